#include "transform.h"

#include <stddef.h>
#include <string.h>

static const float *row_at(const km_rows *in, int32_t row) {
    const int32_t inside = row < 0 ? 0 : row >= in->length ? in->length - 1 : row;
    return in->rows + (size_t)(inside - in->low) * (size_t)in->dim;
}

/* Kaldi's order and precision: floats, summed from the earliest row to the latest. */
static void add_taps(const km_transform *transform, const km_rows *in, int32_t row, int32_t block,
                     float *restrict out) {
    const size_t columns = (size_t)transform->columns;
    for (int32_t tap = transform->first[block]; tap < transform->first[block + 1]; tap++) {
        const float weight = transform->weights[tap];
        const float *from = row_at(in, row + transform->offsets[tap]);
        for (size_t column = 0; column < columns; column++)
            out[column] += weight * from[column];
    }
}

void km_transform_rows(const km_transform *transform, const km_rows *in, int32_t first, int32_t count,
                       float *out) {
    const size_t columns = (size_t)transform->columns;
    for (int32_t row = first; row < first + count; row++) {
        for (int32_t block = 0; block < transform->blocks; block++, out += columns) {
            const int32_t tap = transform->first[block];
            if (transform->first[block + 1] == tap + 1 && transform->weights[tap] == 1.0F) {
                memcpy(out, row_at(in, row + transform->offsets[tap]), columns * sizeof *out);
            } else {
                memset(out, 0, columns * sizeof *out);
                add_taps(transform, in, row, block, out);
            }
        }
    }
}
