#include "block.h"

#include <inttypes.h>
#include <string.h>

/* Whole rows are decoded a few at a time, so that the memory for them stays small. */
enum { VALUES_AT_ONCE = 1 << 16 };

int km_matrix_block(const km_file *file, const km_matrix *matrix, const km_block *block, float *out,
                    km_error *error) {
    const km_view view = {file, NULL, 0, 0};
    km_scratch scratch = {0}, decoded = {0};
    if (block->first_col < 0 || block->cols <= 0 || block->first_col > matrix->cols - block->cols)
        return km_fail(error, -1,
                       "columns %" PRId32 " .. +%" PRId32 " asked for of a matrix with %" PRId32 " columns",
                       block->first_col, block->cols, matrix->cols);
    const int32_t most = matrix->cols < VALUES_AT_ONCE ? VALUES_AT_ONCE / matrix->cols : 1;
    const int32_t step = most < block->rows ? most : block->rows;
    int status = km_scratch_reserve(&decoded, (int64_t)step * matrix->cols * 4, error);
    for (int64_t done = 0; status == KM_OK && done < block->rows; done += step) {
        const int32_t count = step < block->rows - done ? step : (int32_t)(block->rows - done);
        float *rows = (float *)(void *)decoded.data; /* malloc'ed, so aligned */
        status =
            km_matrix_rows(&view, matrix, block->first_row + (int32_t)done, count, rows, &scratch, error);
        for (int32_t row = 0; status == KM_OK && row < count; row++)
            memcpy(out + (size_t)(done + row) * (size_t)block->cols,
                   rows + (size_t)row * (size_t)matrix->cols + block->first_col,
                   (size_t)block->cols * sizeof *out);
    }
    km_scratch_free(&scratch);
    km_scratch_free(&decoded);
    return status;
}
