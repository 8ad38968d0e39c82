/* What stands between the brackets of a matrix in text. */
#include "fuzz.h"
#include "text_matrix.h"

#include <math.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    km_error error = {0};
    int32_t rows, cols;
    if (km_text_matrix_size(data, (int64_t)size, &rows, &cols, &error) != KM_OK) {
        fuzz_check_error(&error);
        return 0;
    }
    FUZZ_REQUIRE(rows > 0 && cols > 0 && (int64_t)rows * cols <= (int64_t)size);
    const int64_t count = (int64_t)rows * cols;
    float *floats = fuzz_memory(count, sizeof *floats);
    double *doubles = fuzz_memory(count, sizeof *doubles);
    if (km_text_matrix_values(data, (int64_t)size, NULL, doubles, &error) == KM_OK)
        for (int64_t i = 0; i < count; i++)
            FUZZ_REQUIRE(isfinite(doubles[i]));
    else
        fuzz_check_error(&error);
    if (km_text_matrix_values(data, (int64_t)size, floats, NULL, &error) == KM_OK)
        for (int64_t i = 0; i < count; i++)
            FUZZ_REQUIRE(isfinite(floats[i]));
    else
        fuzz_check_error(&error);
    free(floats);
    free(doubles);
    return 0;
}
