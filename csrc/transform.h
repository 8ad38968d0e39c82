/* Transforms of features in time: deltas and splicing.
 *
 * An output row consists of blocks side by side. Each block is a weighted sum of input rows, at fixed
 * distances from the output row: for splicing one row of weight 1, for deltas a regression window. An input
 * row outside the utterance is its first or last one. Everything here is borrowed and may be shared.
 */
#ifndef KALDI_MPI_TRANSFORM_H
#define KALDI_MPI_TRANSFORM_H

#include <stdint.h>

/* python: begin */
typedef struct {
    int32_t columns;        /* that are used: the first ones of each input row, > 0 */
    int32_t blocks;         /* > 0; an output row has blocks * columns values */
    int32_t left, right;    /* input rows that an output row needs before and after it, >= 0 */
    const int32_t *first;   /* blocks + 1 indices of taps: block b has first[b] .. first[b+1] - 1 */
    const int32_t *offsets; /* per tap: its row less the output row, -left .. right */
    const float *weights;   /* per tap */
} km_transform;
/* python: end */

/* Rows of an utterance of which some are in memory. */
typedef struct {
    const float *rows; /* at row `low` */
    int32_t dim;       /* values of a row, at least the columns that the transform uses */
    int32_t low, high; /* rows in memory, the last one included */
    int32_t length;    /* rows that the utterance has */
} km_rows;

/* Computes output rows first .. first+count-1 (all in the utterance); of the rows that they need, those in
 * the utterance must be in memory. */
void km_transform_rows(const km_transform *transform, const km_rows *in, int32_t first, int32_t count,
                       float *out);

#endif
