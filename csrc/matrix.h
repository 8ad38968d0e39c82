/* Kaldi's matrices on disk: FM, DM (full) and CM, CM2, CM3 (compressed), read by rows.
 *
 * Layouts (little endian; the object starts with the two bytes \0 B):
 *   FM, DM   token, int32 rows and cols each behind a size byte 4, row-major float or double
 *   CM       token, header, per column 4 uint16 percentiles, then bytes column by column
 *   CM2      token, header, row-major uint16
 *   CM3      token, header, row-major uint8
 *   header   float min, float range, int32 rows, int32 cols, without size bytes
 * A decoded value is the float that Kaldi's own reader computes, bit for bit.
 */
#ifndef KALDI_MPI_MATRIX_H
#define KALDI_MPI_MATRIX_H

#include "file.h"

/* python: begin */
enum { KM_FLOAT = 1, KM_DOUBLE, KM_COLUMNS8, KM_ROWS16, KM_ROWS8 };

typedef struct {
    int64_t data;     /* byte offset of what follows the header */
    int32_t kind;     /* KM_FLOAT ... KM_ROWS8 */
    int32_t rows;     /* > 0 */
    int32_t cols;     /* > 0 */
    float min, range; /* of compressed kinds; finite */
} km_matrix;

/* Reads the header of the matrix whose \0B stands at `offset`, and checks that the file is long enough for
 * all of its values: nothing is allocated by a size that the file does not hold. */
int km_matrix_open(const km_file *file, int64_t offset, km_matrix *matrix, km_error *error);

/* The whole matrix as rows * cols doubles (full matrices only: statistics are never compressed). */
int km_matrix_doubles(const km_file *file, const km_matrix *matrix, double *out, km_error *error);
/* python: end */

/* The same for a view, whose scratch it may use. */
int km_matrix_find(const km_view *view, int64_t offset, km_matrix *matrix, km_scratch *scratch,
                   km_error *error);

/* Decodes rows first .. first+count-1 into out (count * cols floats, row-major). Needs 0 <= first,
 * 0 < count and first + count <= rows. A value that is not finite is an error: it would spoil the training
 * silently. */
int km_matrix_rows(const km_view *view, const km_matrix *matrix, int32_t first, int32_t count, float *out,
                   km_scratch *scratch, km_error *error);

/* Has the processor fetch the bytes of some rows, if they are in memory, which km_matrix_rows is about to be
 * asked for: where they are stored by columns they lie in many places, and waiting for each costs more than
 * decoding it. */
void km_matrix_prefetch(const km_view *view, const km_matrix *matrix, int32_t first, int32_t count);

#endif
