/* A block of a matrix of any kind: some rows and some columns of it. */
#ifndef KALDI_MPI_BLOCK_H
#define KALDI_MPI_BLOCK_H

#include "matrix.h"

/* python: begin */
typedef struct {
    int32_t first_row, rows; /* rows > 0 */
    int32_t first_col, cols; /* cols > 0 */
} km_block;

/* Decodes a block to rows * cols floats, row-major. */
int km_matrix_block(const km_file *file, const km_matrix *matrix, const km_block *block, float *out,
                    km_error *error);
/* python: end */

#endif
