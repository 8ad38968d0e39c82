#include "text_matrix.h"

#include "decimal.h"
#include "entry.h"

#include <inttypes.h>
#include <stddef.h>

static int ends_row(unsigned char byte) {
    return byte == '\n' || byte == ';';
}

int km_text_matrix_size(const unsigned char *text, int64_t size, int32_t *rows, int32_t *cols,
                        km_error *error) {
    int64_t all_rows = 0, width = 0, in_row = 0;
    for (int64_t at = 0; at <= size; at++) {
        if (at == size || ends_row(text[at])) {
            if (in_row == 0) continue;
            if (all_rows > 0 && in_row != width)
                return km_fail(error, at,
                               "row %" PRId64 " of the matrix has %" PRId64 " values, and row 0 has %" PRId64,
                               all_rows, in_row, width);
            width = in_row;
            in_row = 0;
            all_rows++;
        } else if (!km_is_blank(text[at])) {
            while (at + 1 < size && !km_is_blank(text[at + 1]) && !ends_row(text[at + 1]))
                at++;
            in_row++;
        }
    }
    if (all_rows == 0) return km_fail(error, 0, "empty matrix");
    if (all_rows > INT32_MAX || width > INT32_MAX) return km_fail(error, 0, "a matrix too large");
    *rows = (int32_t)all_rows;
    *cols = (int32_t)width;
    return KM_OK;
}

int km_text_matrix_values(const unsigned char *text, int64_t size, float *floats, double *doubles,
                          km_error *error) {
    int64_t at = 0, count = 0;
    while (at < size) {
        if (km_is_blank(text[at]) || ends_row(text[at])) {
            at++;
            continue;
        }
        double value = 0.0;
        if (km_text_number(text, size, &at, floats != NULL, &value, error) != KM_OK) return KM_FAILED;
        if (at < size && !km_is_blank(text[at]) && !ends_row(text[at]))
            return km_fail(error, at, "a space is expected after a number");
        if (floats != NULL)
            floats[count++] = (float)value;
        else
            doubles[count++] = value;
    }
    return KM_OK;
}
