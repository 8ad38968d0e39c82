/* Passes over matrices of activations, (rows, columns) row by row, that do in one reading what PyTorch does
 * in several: an elementwise function and the sums over its columns.
 *
 * Sums are of 32 rows in float, and of these in double. Outputs may not overlap inputs. */
#ifndef KALDI_MPI_PASSES_H
#define KALDI_MPI_PASSES_H

#include <stdint.h>

/* python: begin */
/* out = (x - mean) * scale with each column's mean over the rows and scale = target_rms / sqrt(variance +
 * epsilon). means, squares (of x^2), scales: of each column. At least one row. */
void km_batch_norm(const float *x, int64_t rows, int64_t columns, double epsilon, double target_rms,
                   float *out, float *means, float *squares, float *scales);

/* out = (d - mean d - z * mean(d z) / target_rms^2) * scale, where z is what km_batch_norm gave. */
void km_batch_norm_backward(const float *d, const float *z, int64_t rows, int64_t columns, double target_rms,
                            const float *scales, float *out);

/* out = max(x, 0), NaN stays; sums over rows of it and of its slope (1 where it is above 0), unless both are
 * NULL. */
void km_relu(const float *x, int64_t rows, int64_t columns, float *out, double *sums, double *slopes);

/* out = d + add (per column) where y is not 0, `add` elsewhere; NULL: 0. Sums over rows of d^2, unless they
 * are NULL. */
void km_relu_backward(const float *d, const float *y, int64_t rows, int64_t columns, const float *add,
                      float *out, double *squares);

/* From now on memory that is freed stays with the process. A step's matrices otherwise go back to the system,
 * which clears each page anew in the next step. glibc alone; elsewhere nothing. */
void km_keep_memory(void);
/* python: end */

#endif
