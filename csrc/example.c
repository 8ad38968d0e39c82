#include "example.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

enum { ONE_BYTE_LIMIT = 125 };

int km_example_open(km_cursor *cursor, int32_t *num_ios, km_error *error) {
    const unsigned char *bytes = km_cursor_peek(cursor, 2, error);
    if (bytes == NULL) return KM_FAILED;
    if (bytes[0] != '\0' || bytes[1] != 'B')
        return km_fail(error, cursor->at, "no binary example here (\\0B is expected)");
    cursor->at += 2;
    if (km_cursor_is_at(cursor, "<Nnet3ChainEg>"))
        return km_fail(error, cursor->at, "a chain example, where one with labels is expected");
    if (km_cursor_expect(cursor, "<Nnet3Eg> ", error) != KM_OK ||
        km_cursor_expect(cursor, "<NumIo> ", error) != KM_OK ||
        km_cursor_int32(cursor, "the number of inputs and outputs", 1, num_ios, error) != KM_OK)
        return KM_FAILED;
    if (*num_ios > KM_MAX_IOS)
        return km_fail(error, cursor->at - 4, "%" PRId32 " inputs and outputs are not possible", *num_ios);
    return KM_OK;
}

int km_example_close(km_cursor *cursor, km_error *error) {
    return km_cursor_expect(cursor, "</Nnet3Eg> ", error);
}

/* Goes over an Index that is not one byte. */
static int take_full_index(km_cursor *cursor, int32_t i, int64_t *t, km_error *error) {
    const int first = (signed char)km_cursor_bytes(cursor, cursor->at)[0];
    int32_t n, full_t, x;
    if (first != KM_FULL_INDEX)
        return km_fail(error, cursor->at, "byte %d cannot begin index %" PRId32, first, i);
    cursor->at += 1;
    if (km_cursor_int32(cursor, "an index's n", INT32_MIN, &n, error) != KM_OK ||
        km_cursor_int32(cursor, "an index's t", INT32_MIN, &full_t, error) != KM_OK ||
        km_cursor_int32(cursor, "an index's x", INT32_MIN, &x, error) != KM_OK)
        return KM_FAILED;
    *t = full_t;
    return KM_OK;
}

int km_example_indexes(km_cursor *cursor, km_nnet_io *io, km_error *error) {
    if (km_cursor_expect(cursor, "<I1V> ", error) != KM_OK ||
        km_cursor_int32(cursor, "the number of indexes", 1, &io->rows, error) != KM_OK ||
        km_cursor_peek(cursor, io->rows, error) == NULL) /* each takes at least a byte */
        return KM_FAILED;
    io->indexes = cursor->at;
    int64_t t = 0;
    for (int32_t i = 0; i < io->rows;) {
        /* As many in one byte each as follow each other. */
        const unsigned char *bytes = km_cursor_bytes(cursor, cursor->at);
        const int64_t left = cursor->end - cursor->at;
        const int32_t most = left < io->rows - i ? (int32_t)left : io->rows - i;
        int32_t run = 0;
        for (; run < most; run++) {
            const int c = (signed char)bytes[run];
            if (c <= -ONE_BYTE_LIMIT || c >= ONE_BYTE_LIMIT) break;
            t += c;
            if (t < INT32_MIN || t > INT32_MAX)
                return km_fail(error, cursor->at + run, "the t of index %" PRId32 " is beyond 32 bits",
                               i + run);
        }
        cursor->at += run;
        i += run;
        if (i == io->rows) break;
        if (km_cursor_peek(cursor, 1, error) == NULL || take_full_index(cursor, i, &t, error) != KM_OK)
            return KM_FAILED;
        i++;
    }
    return KM_OK;
}

/* Goes over a sparse row that is as Kaldi writes it, and returns 1; 0: it has to be looked at more closely.
 */
static int take_usual_row(km_cursor *cursor, km_nnet_io *io) {
    const int64_t left = cursor->end - cursor->at;
    if (left < 13) return 0;
    const unsigned char *bytes = km_cursor_bytes(cursor, cursor->at);
    const int32_t dim = km_int32_at(bytes + 4), count = km_int32_at(bytes + 9);
    if (memcmp(bytes, "SV \4", 4) != 0 || bytes[8] != 4 || dim != io->cols || count < 0 || count > dim ||
        count > (left - 13) / 10)
        return 0;
    bytes += 13;
    for (int32_t i = 0; i < count; i++, bytes += 10) {
        const int32_t column = km_int32_at(bytes + 1);
        float value;
        memcpy(&value, bytes + 6, sizeof value);
        if (bytes[0] != 4 || bytes[5] != 4 || column < 0 || column >= dim || !isfinite(value)) return 0;
    }
    io->pairs += count;
    cursor->at += 13 + 10 * (int64_t)count;
    return 1;
}

/* Goes over a sparse row; its dimension must be io->cols, which the first row sets. */
static int take_sparse_row(km_cursor *cursor, int32_t row, km_nnet_io *io, km_error *error) {
    int32_t dim, count, column = 0;
    if (km_cursor_expect(cursor, "SV ", error) != KM_OK ||
        km_cursor_int32(cursor, "a sparse row's dimension", 1, &dim, error) != KM_OK ||
        km_cursor_int32(cursor, "the number of pairs of a sparse row", 0, &count, error) != KM_OK)
        return KM_FAILED;
    if (row == 0) io->cols = dim;
    if (dim != io->cols)
        return km_fail(error, cursor->at - 9, "the sparse rows have dimensions %" PRId32 " and %" PRId32,
                       io->cols, dim);
    if (count > dim)
        return km_fail(error, cursor->at - 4,
                       "a sparse row of dimension %" PRId32 " cannot have %" PRId32 " pairs", dim, count);
    if (km_cursor_peek(cursor, (int64_t)count * 10, error) == NULL)
        return KM_FAILED; /* each takes at least this */
    for (int32_t i = 0; i < count; i++) {
        if (km_cursor_int32(cursor, "a sparse row's column", 0, &column, error) != KM_OK) return KM_FAILED;
        if (column >= dim)
            return km_fail(error, cursor->at - 4, "column %" PRId32 " of a sparse row of dimension %" PRId32,
                           column, dim);
        const unsigned char *bytes = km_cursor_peek(cursor, 5, error);
        if (bytes == NULL) return KM_FAILED;
        if (bytes[0] != 4 && bytes[0] != 8)
            return km_fail(error, cursor->at, "size byte of a sparse row's value is %d, not 4", bytes[0]);
        if (km_cursor_peek(cursor, 1 + bytes[0], error) == NULL) return KM_FAILED;
        float value;
        const unsigned char *next = km_sparse_pair(bytes - 5, &column, &value);
        if (!isfinite(value))
            return km_fail(error, cursor->at + 1, "not a finite number: %g in column %" PRId32, (double)value,
                           column);
        cursor->at += next - bytes;
    }
    io->pairs += count;
    return KM_OK;
}

static int take_sparse(km_cursor *cursor, km_nnet_io *io, km_error *error) {
    int32_t rows;
    if (km_cursor_expect(cursor, "SM ", error) != KM_OK ||
        km_cursor_int32(cursor, "the number of sparse rows", 0, &rows, error) != KM_OK)
        return KM_FAILED;
    if (rows != io->rows)
        return km_fail(error, cursor->at - 4, "%" PRId32 " rows for %" PRId32 " indexes", rows, io->rows);
    if (km_cursor_peek(cursor, (int64_t)rows * 13, error) == NULL)
        return KM_FAILED; /* each takes at least this */
    io->sparse = 1;
    io->sparse_rows = cursor->at;
    io->pairs = 0;
    for (int32_t row = 0; row < rows; row++)
        if ((row == 0 || !take_usual_row(cursor, io)) && take_sparse_row(cursor, row, io, error) != KM_OK)
            return KM_FAILED;
    return KM_OK;
}

/* Goes over the header of a matrix that is not sparse. */
static int take_header(km_cursor *cursor, km_matrix *matrix, km_error *error) {
    static const struct {
        const char *token;
        int32_t kind;
    } kinds[] = {
        {"FM ", KM_FLOAT}, {"DM ", KM_DOUBLE}, {"CM ", KM_COLUMNS8}, {"CM2 ", KM_ROWS16}, {"CM3 ", KM_ROWS8}};
    const unsigned char *bytes = km_cursor_peek(cursor, 4, error);
    if (bytes == NULL) return KM_FAILED;
    matrix->kind = 0;
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0] && matrix->kind == 0; i++) {
        if (memcmp(bytes, kinds[i].token, strlen(kinds[i].token)) == 0) {
            matrix->kind = kinds[i].kind;
            cursor->at += (int64_t)strlen(kinds[i].token);
        }
    }
    if (matrix->kind == 0) {
        char shown[24];
        km_cursor_printable(cursor, shown);
        return km_fail(error, cursor->at, "unknown token '%s': FM, DM, CM, CM2, CM3 or SM expected", shown);
    }
    matrix->min = matrix->range = 0.0F;
    if (matrix->kind == KM_FLOAT || matrix->kind == KM_DOUBLE) {
        if (km_cursor_int32(cursor, "the number of rows", 0, &matrix->rows, error) != KM_OK) return KM_FAILED;
        return km_cursor_int32(cursor, "the number of columns", 1, &matrix->cols, error);
    }
    bytes = km_cursor_peek(cursor, 16, error);
    if (bytes == NULL) return KM_FAILED;
    memcpy(&matrix->min, bytes, 4);
    memcpy(&matrix->range, bytes + 4, 4);
    matrix->rows = km_int32_at(bytes + 8);
    matrix->cols = km_int32_at(bytes + 12);
    if (!isfinite(matrix->min) || !isfinite(matrix->range) || !isfinite(matrix->min + matrix->range))
        return km_fail(error, cursor->at, "header of a compressed matrix is not finite: min %g, range %g",
                       (double)matrix->min, (double)matrix->range);
    if (matrix->cols < 1)
        return km_fail(error, cursor->at + 12, "%" PRId32 " columns in a matrix", matrix->cols);
    cursor->at += 16;
    return KM_OK;
}

static int take_matrix(km_cursor *cursor, km_nnet_io *io, km_error *error) {
    const int64_t start = cursor->at;
    km_matrix *matrix = &io->matrix;
    if (take_header(cursor, matrix, error) != KM_OK) return KM_FAILED;
    if (matrix->rows != io->rows)
        return km_fail(error, start, "a matrix of %" PRId32 " rows for %" PRId32 " indexes", matrix->rows,
                       io->rows);
    const int64_t width = matrix->kind == KM_FLOAT    ? 4
                          : matrix->kind == KM_DOUBLE ? 8
                          : matrix->kind == KM_ROWS16 ? 2
                                                      : 1;
    const int64_t columns = matrix->kind == KM_COLUMNS8 ? (int64_t)matrix->cols * 8 : 0;
    const int64_t row_bytes = matrix->cols * width;
    /* Multiplied, not divided: 2^31 * 2^31 values are within 62 bits; only 8 bytes each are not. */
    if (row_bytes > (INT64_MAX - columns) / 2 / matrix->rows)
        return km_fail(error, start, "a matrix of %" PRId32 " rows x %" PRId32 " columns is not possible",
                       matrix->rows, matrix->cols);
    const int64_t size = columns + row_bytes * matrix->rows;
    if (size > INT64_MAX - cursor->at || km_cursor_peek(cursor, size, error) == NULL) {
        const int64_t needed = cursor->wanted;
        (void)km_fail(error, start,
                      "truncated archive or wrong size: the header says %" PRId32 " rows x %" PRId32
                      " columns, and %" PRId64 " bytes follow it",
                      matrix->rows, matrix->cols, cursor->size - cursor->at);
        cursor->wanted = needed;
        return KM_FAILED;
    }
    matrix->data = cursor->at;
    io->sparse = 0;
    io->cols = matrix->cols;
    io->sparse_rows = io->pairs = 0;
    cursor->at += size;
    return KM_OK;
}

int km_example_io(km_cursor *cursor, km_nnet_io *io, km_error *error) {
    if (km_cursor_expect(cursor, "<NnetIo> ", error) != KM_OK ||
        km_cursor_name(cursor, &io->name, &io->name_length, error) != KM_OK ||
        km_example_indexes(cursor, io, error) != KM_OK)
        return KM_FAILED;
    const unsigned char *bytes = km_cursor_peek(cursor, 1, error);
    if (bytes == NULL) return KM_FAILED;
    const int status = bytes[0] == 'S' ? take_sparse(cursor, io, error) : take_matrix(cursor, io, error);
    return status != KM_OK ? status : km_cursor_expect(cursor, "</NnetIo> ", error);
}

int km_io_is(const km_cursor *cursor, const km_nnet_io *io, const char *name) {
    const size_t length = strlen(name);
    return (size_t)io->name_length == length && memcmp(km_cursor_bytes(cursor, io->name), name, length) == 0;
}

void km_io_indexes(const km_cursor *cursor, const km_nnet_io *io, km_index *out) {
    const unsigned char *bytes = km_cursor_bytes(cursor, io->indexes);
    km_index index = {0, 0, 0};
    for (int32_t i = 0; i < io->rows; i++) {
        bytes = km_index_next(bytes, &index);
        out[i] = index;
    }
}

int km_io_matrix(const km_cursor *cursor, const km_nnet_io *io, float *out, km_error *error) {
    const km_view view = {NULL, cursor->data, cursor->begin, cursor->end};
    km_scratch scratch = {0};
    const int status = km_matrix_rows(&view, &io->matrix, 0, io->rows, out, &scratch, error);
    km_scratch_free(&scratch);
    return status;
}

void km_io_pairs(const km_cursor *cursor, const km_nnet_io *io, int64_t *first, int32_t *columns,
                 float *values) {
    const unsigned char *bytes = km_cursor_bytes(cursor, io->sparse_rows);
    int64_t pair = 0;
    for (int32_t row = 0; row < io->rows; row++) {
        int32_t count;
        first[row] = pair;
        bytes = km_sparse_row(bytes, &count);
        for (int32_t i = 0; i < count; i++, pair++)
            bytes = km_sparse_pair(bytes, columns + pair, values + pair);
    }
    first[io->rows] = pair;
}
