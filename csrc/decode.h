/* The values of Kaldi's matrices as floats: loops over memory, and nothing of files.
 *
 * Each function writes `count` (or rows x cols) floats, the ones that Kaldi's own reader computes, bit for
 * bit on every machine; none may be contracted to fused operations (the build says so). The bytes need no
 * alignment, and must not overlap what is written.
 */
#ifndef KALDI_MPI_DECODE_H
#define KALDI_MPI_DECODE_H

#include <stdint.h>

/* Floats as they are. Returns whether all of them are finite. */
int km_decode_floats(const unsigned char *bytes, int64_t count, float *out);

/* Doubles, rounded. Returns whether all of the floats are finite. */
int km_decode_doubles(const unsigned char *bytes, int64_t count, float *out);

/* min + code * (range / 65535) and min + code * (range / 255). */
void km_decode_linear16(const unsigned char *bytes, int64_t count, float min, float range, float *out);
void km_decode_linear8(const unsigned char *bytes, int64_t count, float min, float range, float *out);

/* Whether the largest code of these two is a finite number; the others are between it and min. */
int km_linear16_is_finite(float min, float range);
int km_linear8_is_finite(float min, float range);

/* python: begin */
/* A matrix of 8-bit codes that lie column by column: of each column 4 percentiles (uint16, in Kaldi's scale
 * between min and min + range), which are the values of the codes 0, 64, 192 and 255. Between them the
 * curve is straight. */
typedef struct {
    float min, range;
    const unsigned char *percentiles; /* 8 bytes for each column */
    const unsigned char *codes;       /* of the first row wanted */
    int64_t stride;                   /* bytes from a code to the next column's, >= rows */
    int32_t rows, cols;               /* wanted, > 0 */
} km_columns;

/* Writes rows x cols floats, row by row. Returns whether all of them are finite. */
int km_decode_columns(const km_columns *columns, float *out);

/* The same, one value at a time: for other processors, and what the other is tested against. */
int km_decode_columns_plainly(const km_columns *columns, float *out);
/* python: end */

/* The first column whose percentiles are not in order, or -1. */
int64_t km_columns_out_of_order(const unsigned char *percentiles, int32_t cols);

/* Whether all of these floats are finite. */
int km_all_finite(const float *values, int64_t count);

#endif
