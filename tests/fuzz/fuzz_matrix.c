/* A matrix of any kind: by a view of memory and by a file, the whole and rows of it. */
#include "block.h"
#include "fuzz.h"
#include "matrix.h"

#include <math.h>

/* One row by itself, in bytes other than the first; the last row is the one next to the data's end. */
static void check_row(const km_view *view, const km_matrix *matrix, int32_t row, const float *whole,
                      km_scratch *scratch) {
    km_error error;
    float *values = fuzz_memory(matrix->cols, sizeof *values);
    FUZZ_REQUIRE(km_matrix_rows(view, matrix, row, 1, values, scratch, &error) == KM_OK);
    FUZZ_REQUIRE(memcmp(values, whole + (int64_t)row * matrix->cols, 4 * (size_t)matrix->cols) == 0);
    free(values);
}

static void check_block(const km_file *file, const km_matrix *matrix, const float *whole) {
    km_error error;
    const km_block block = {matrix->rows / 2, matrix->rows - matrix->rows / 2, matrix->cols / 2,
                            matrix->cols - matrix->cols / 2};
    float *values = fuzz_memory((int64_t)block.rows * block.cols, sizeof *values);
    FUZZ_REQUIRE(km_matrix_block(file, matrix, &block, values, &error) == KM_OK);
    for (int64_t row = 0; row < block.rows; row++)
        FUZZ_REQUIRE(memcmp(values + row * block.cols,
                            whole + (block.first_row + row) * matrix->cols + block.first_col,
                            4 * (size_t)block.cols) == 0);
    free(values);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const km_view memory = {NULL, data, 0, (int64_t)size};
    km_scratch scratch = {0};
    km_matrix matrix, same;
    km_error error = {0};
    if (km_matrix_find(&memory, 0, &matrix, &scratch, &error) != KM_OK) {
        fuzz_check_error(&error);
        km_scratch_free(&scratch);
        return 0;
    }
    const km_file file = fuzz_file(data, size);
    const km_view from_file = {&file, NULL, 0, 0};
    FUZZ_REQUIRE(km_matrix_open(&file, 0, &same, &error) == KM_OK);
    FUZZ_REQUIRE(same.data == matrix.data && same.rows == matrix.rows && same.cols == matrix.cols);
    const int64_t count = (int64_t)matrix.rows * matrix.cols;
    float *one = fuzz_memory(count, sizeof *one), *other = fuzz_memory(count, sizeof *other);
    const int status = km_matrix_rows(&memory, &matrix, 0, matrix.rows, one, &scratch, &error);
    FUZZ_REQUIRE(km_matrix_rows(&from_file, &matrix, 0, matrix.rows, other, &scratch, &error) == status);
    if (status == KM_OK) {
        FUZZ_REQUIRE(memcmp(one, other, 4 * (size_t)count) == 0);
        for (int64_t i = 0; i < count; i++)
            FUZZ_REQUIRE(isfinite(one[i]));
        check_row(&memory, &matrix, matrix.rows - 1, one, &scratch);
        check_row(&from_file, &matrix, matrix.rows / 2, one, &scratch);
        check_block(&file, &matrix, one);
    } else {
        fuzz_check_error(&error);
        FUZZ_REQUIRE(error.offset < (int64_t)size);
    }
    double *doubles = fuzz_memory(count, sizeof *doubles);
    if (km_matrix_doubles(&file, &matrix, doubles, &error) != KM_OK) fuzz_check_error(&error);
    free(doubles);
    free(one);
    free(other);
    km_scratch_free(&scratch);
    return 0;
}
