/* A matrix in text, as copy-feats writes it to ark,t: rows of numbers between '[' and ']'. The numbers of a
 * row stand between blanks, and a row ends at the end of the line or at ';'. */
#ifndef KALDI_MPI_TEXT_MATRIX_H
#define KALDI_MPI_TEXT_MATRIX_H

#include "error.h"

/* python: begin */
/* Counts and checks what stands between the brackets: rows of equal length, numbers only. A matrix without
 * any number is an error. */
int km_text_matrix_size(const unsigned char *text, int64_t size, int32_t *rows, int32_t *cols,
                        km_error *error);

/* Reads a text of which the size was found above: rows * cols values, row-major, to the one of `floats` and
 * `doubles` that is not NULL. A number that its type cannot hold is an error. */
int km_text_matrix_values(const unsigned char *text, int64_t size, float *floats, double *doubles,
                          km_error *error);
/* python: end */

#endif
