/* The fast decoding of compressed columns against the plain one: bytes 0-1 are the size, then min and range,
 * the percentiles and the codes. */
#include "decode.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 10) return 0;
    const int32_t rows = 1 + data[0], cols = 1 + data[1] % 50;
    float head[2];
    memcpy(head, data + 2, sizeof head);
    data += 10, size -= 10;
    /* What is missing is 0; the codes end where their memory ends. */
    const size_t codes_size = (size_t)rows * (size_t)cols, percentiles_size = 8 * (size_t)cols;
    unsigned char *percentiles = fuzz_memory((int64_t)percentiles_size, 1);
    unsigned char *codes = fuzz_memory((int64_t)codes_size, 1);
    memset(percentiles, 0, percentiles_size);
    memset(codes, 0, codes_size);
    const size_t first = size < percentiles_size ? size : percentiles_size;
    memcpy(percentiles, data, first);
    const size_t rest = size - first < codes_size ? size - first : codes_size;
    memcpy(codes, data + first, rest);
    const km_columns columns = {head[0], head[1], percentiles, codes, rows, rows, cols};
    float *fast = fuzz_memory((int64_t)codes_size, sizeof *fast);
    float *plain = fuzz_memory((int64_t)codes_size, sizeof *plain);
    const int finite = km_decode_columns(&columns, fast);
    FUZZ_REQUIRE(finite == km_decode_columns_plainly(&columns, plain));
    /* One NaN may differ from another; then the matrix is refused. */
    if (finite) FUZZ_REQUIRE(memcmp(fast, plain, codes_size * sizeof *fast) == 0);
    free(fast);
    free(plain);
    free(codes);
    free(percentiles);
    return 0;
}
