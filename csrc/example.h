/* One nnet3 example, parsed from memory:
 *
 *   \0 B <Nnet3Eg> <NumIo> int32, then for each input or output
 *     <NnetIo> name <I1V> int32 n, n encoded Index, matrix </NnetIo>
 *   </Nnet3Eg>
 *
 * Tokens end in one space; every int32 stands behind a size byte 4 (in a compressed matrix's header without).
 *   Index    one signed byte c, |c| < 125: t is c later than that of the Index before (n and x the same), or,
 *            in the first one, n = 0, t = c, x = 0; or the byte 127, then int32 n, t and x
 *   matrix   FM, DM, CM, CM2 or CM3 as in matrix.h (without \0B), or sparse:
 *            SM, int32 rows, per row SV, int32 dim, int32 count, count times int32 and float (or double)
 * An example is gone through by a cursor: open, then io for each input or output, then close. What these have
 * passed over is checked in full, so that the readers further down need no checks.
 */
#ifndef KALDI_MPI_EXAMPLE_H
#define KALDI_MPI_EXAMPLE_H

#include "cursor.h"
#include "matrix.h"

/* An Index that is not one byte begins with this one. */
enum { KM_FULL_INDEX = 127 };

/* python: begin */
typedef struct {
    int64_t name;        /* offset in the file */
    int32_t name_length; /* > 0 */
    int32_t rows;        /* of the matrix, and so many Index; > 0 */
    int32_t cols;        /* of the matrix; in a sparse one the dimension of its rows */
    int32_t sparse;      /* 1 or 0 */
    int64_t indexes;     /* offset of the first Index */
    int64_t sparse_rows; /* sparse: offset of the first row */
    int64_t pairs;       /* sparse: how many, in all rows together */
    km_matrix matrix;    /* not sparse */
} km_nnet_io;

typedef struct {
    int32_t n, t, x;
} km_index;

/* Goes over the example's head; 0 < *num_ios <= 1000000. */
int km_example_open(km_cursor *cursor, int32_t *num_ios, km_error *error);

/* Goes over one input or output, and checks all of it but the values of a full or compressed matrix. */
int km_example_io(km_cursor *cursor, km_nnet_io *io, km_error *error);

/* Goes over the example's end. */
int km_example_close(km_cursor *cursor, km_error *error);

/* The io->rows Index of an input or output that the cursor has gone over. */
void km_io_indexes(const km_cursor *cursor, const km_nnet_io *io, km_index *out);

/* The rows of its matrix, which is not sparse: rows * cols floats. */
int km_io_matrix(const km_cursor *cursor, const km_nnet_io *io, float *out, km_error *error);

/* The rows of its sparse matrix: the pairs of row i are first[i] .. first[i+1]-1 (rows + 1 values in first).
 */
void km_io_pairs(const km_cursor *cursor, const km_nnet_io *io, int64_t *first, int32_t *columns,
                 float *values);
/* python: end */

/* So many inputs or outputs may an example have. */
enum { KM_MAX_IOS = 1000000 };

/* Goes over a list of Index: sets io->rows and io->indexes. */
int km_example_indexes(km_cursor *cursor, km_nnet_io *io, km_error *error);

/* Whether the name of an input or output is this one. */
int km_io_is(const km_cursor *cursor, const km_nnet_io *io, const char *name);

/* The readers below take bytes that have been checked. They return where the next thing stands. */

/* Reads an Index, given the one before it (zeros at first). */
static inline const unsigned char *km_index_next(const unsigned char *bytes, km_index *index) {
    const int c = (signed char)bytes[0];
    if (c != KM_FULL_INDEX) {
        index->t += c;
        return bytes + 1;
    }
    index->n = km_int32_at(bytes + 2);
    index->t = km_int32_at(bytes + 7);
    index->x = km_int32_at(bytes + 12);
    return bytes + 16;
}

/* Reads the head of a sparse row. */
static inline const unsigned char *km_sparse_row(const unsigned char *bytes, int32_t *count) {
    *count = km_int32_at(bytes + 9);
    return bytes + 13;
}

/* Reads a pair of a sparse row. */
static inline const unsigned char *km_sparse_pair(const unsigned char *bytes, int32_t *column, float *value) {
    *column = km_int32_at(bytes + 1);
    if (bytes[5] == 4) {
        memcpy(value, bytes + 6, 4);
        return bytes + 10;
    }
    double wide;
    memcpy(&wide, bytes + 6, 8);
    *value = (float)wide;
    return bytes + 14;
}

#endif
