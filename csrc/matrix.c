#include "matrix.h"

#include "decode.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* The longest header: \0B, "CM2 " and 16 bytes, or "FM " and 10. */
enum { HEADER_BYTES = 2 + 4 + 16 };

/* In a matrix with more rows than this, the bytes of a chunk are fetched column by column; in a shorter one
 * a single read of the whole block is cheaper than one system call for each column. */
enum { ROWS_READ_WHOLE = 8192 };

static int32_t int32_at(const unsigned char *bytes) {
    int32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static float float_at(const unsigned char *bytes) {
    float value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

/* Writes up to five bytes of a token in printable form, for messages. */
static void printable(const unsigned char *bytes, int64_t count, char out[24]) {
    size_t at = 0;
    for (int64_t i = 0; i < count && i < 5 && at < 19; i++) {
        if (bytes[i] > 32 && bytes[i] < 127)
            out[at++] = (char)bytes[i];
        else if (i > 0 && bytes[i] == ' ')
            break;
        else
            at += (size_t)snprintf(out + at, 24 - at, "\\x%02x", bytes[i]);
    }
    out[at] = '\0';
}

static int64_t value_bytes(int32_t kind) {
    switch (kind) {
    case KM_FLOAT:
        return 4;
    case KM_DOUBLE:
        return 8;
    case KM_ROWS16:
        return 2;
    default:
        return 1;
    }
}

/* Bytes of the per-column percentiles that precede the values. */
static int64_t column_header_bytes(const km_matrix *matrix) {
    return matrix->kind == KM_COLUMNS8 ? (int64_t)matrix->cols * 8 : 0;
}

static int check_sizes(const km_view *view, const km_matrix *matrix, int64_t at, km_error *error) {
    if (matrix->rows < 0 || matrix->cols < 0)
        return km_fail(error, at, "matrix header with a negative size: %" PRId32 " rows, %" PRId32 " columns",
                       matrix->rows, matrix->cols);
    if (matrix->rows == 0 || matrix->cols == 0)
        return km_fail(error, at, "empty matrix: %" PRId32 " rows, %" PRId32 " columns", matrix->rows,
                       matrix->cols);
    int64_t left = km_view_size(view) - matrix->data - column_header_bytes(matrix);
    /* Divided rather than multiplied: rows * cols * 8 can exceed 64 bits. */
    int64_t row_bytes = matrix->cols * value_bytes(matrix->kind);
    if (left < row_bytes || left / row_bytes < matrix->rows)
        return km_fail(error, at,
                       "truncated archive or wrong size: the header says %" PRId32 " rows x %" PRId32
                       " columns, and %" PRId64 " bytes follow it",
                       matrix->rows, matrix->cols, km_view_size(view) - matrix->data);
    return KM_OK;
}

static int open_full(const km_view *view, int64_t offset, const unsigned char *head, int64_t got,
                     km_matrix *matrix, km_error *error) {
    enum { SIZES_AT = 5, SIZES_BYTES = 10 };
    if (got < SIZES_AT + SIZES_BYTES)
        return km_fail(error, offset, "truncated archive: the file ends in the matrix header");
    for (int i = 0; i < 2; i++) {
        int at = SIZES_AT + 5 * i;
        if (head[at] != 4)
            return km_fail(error, offset + at, "size byte of the number of %s is %d, not 4",
                           i == 0 ? "rows" : "columns", head[at]);
    }
    matrix->kind = head[2] == 'F' ? KM_FLOAT : KM_DOUBLE;
    matrix->rows = int32_at(head + SIZES_AT + 1);
    matrix->cols = int32_at(head + SIZES_AT + 6);
    matrix->min = matrix->range = 0.0F;
    matrix->data = offset + SIZES_AT + SIZES_BYTES;
    return check_sizes(view, matrix, offset + SIZES_AT, error);
}

static int open_compressed(const km_view *view, int64_t offset, const unsigned char *head, int64_t got,
                           km_matrix *matrix, km_error *error) {
    int at = head[4] == ' ' ? 5 : 6;
    if (got < at + 16) return km_fail(error, offset, "truncated archive: the file ends in the matrix header");
    matrix->kind = head[4] == ' ' ? KM_COLUMNS8 : head[4] == '2' ? KM_ROWS16 : KM_ROWS8;
    matrix->min = float_at(head + at);
    matrix->range = float_at(head + at + 4);
    matrix->rows = int32_at(head + at + 8);
    matrix->cols = int32_at(head + at + 12);
    matrix->data = offset + at + 16;
    if (!isfinite(matrix->min) || !isfinite(matrix->range) || !isfinite(matrix->min + matrix->range))
        return km_fail(error, offset + at, "header of a compressed matrix is not finite: min %g, range %g",
                       (double)matrix->min, (double)matrix->range);
    return check_sizes(view, matrix, offset + at + 8, error);
}

int km_matrix_open(const km_file *file, int64_t offset, km_matrix *matrix, km_error *error) {
    const km_view view = {file, NULL, 0, 0};
    km_scratch scratch = {0};
    const int status = km_matrix_find(&view, offset, matrix, &scratch, error);
    km_scratch_free(&scratch);
    return status;
}

int km_matrix_find(const km_view *view, int64_t offset, km_matrix *matrix, km_scratch *scratch,
                   km_error *error) {
    char shown[24];
    const int64_t left = km_view_size(view) - offset, got = left < HEADER_BYTES ? left : HEADER_BYTES;
    if (offset < 0 || left <= 0)
        return km_fail(error, offset, "offset is beyond the end of the file (%" PRId64 " bytes)",
                       km_view_size(view));
    const unsigned char *bytes = km_view_bytes(view, offset, got, scratch, error);
    if (bytes == NULL) return KM_FAILED;
    unsigned char head[HEADER_BYTES] = {0};
    memcpy(head, bytes, (size_t)got);
    if (got < 2) return km_fail(error, offset, "truncated archive: the file ends in the matrix header");
    if (head[0] != '\0' || head[1] != 'B')
        return km_fail(
            error, offset,
            "no binary Kaldi object here (\\0B expected): a wrong offset, or a text archive, which is "
            "not supported; write it with copy-feats ark:... ark,scp:...");
    if (got >= 5 && (head[2] == 'F' || head[2] == 'D') && head[3] == 'M' && head[4] == ' ')
        return open_full(view, offset, head, got, matrix, error);
    int compressed = head[2] == 'C' && head[3] == 'M';
    if (compressed && (head[4] == ' ' || ((head[4] == '2' || head[4] == '3') && head[5] == ' ')))
        return open_compressed(view, offset, head, got, matrix, error);
    if (got < 6) return km_fail(error, offset, "truncated archive: the file ends in the matrix header");
    printable(head + 2, got - 2, shown);
    return km_fail(error, offset + 2, "unknown token '%s': FM, DM, CM, CM2 or CM3 expected", shown);
}

/* Says what is not finite among the decoded rows first .. first+count-1, and where. */
static int not_finite(const km_matrix *matrix, int64_t first, int64_t count, const float *values,
                      km_error *error) {
    const int64_t cols = matrix->cols;
    int64_t i = 0;
    while (i < count * cols - 1 && isfinite(values[i]))
        i++;
    const int64_t row = first + i / cols, col = i % cols;
    const int64_t number = matrix->kind == KM_COLUMNS8 ? col * matrix->rows + row : row * cols + col;
    return km_fail(error, matrix->data + column_header_bytes(matrix) + number * value_bytes(matrix->kind),
                   "not a finite number: %g in column %" PRId64, (double)values[i], col);
}

static int rows_of_columns(const km_view *view, const km_matrix *matrix, int32_t first, int32_t count,
                           float *out, km_scratch *scratch, km_error *error) {
    const int64_t rows = matrix->rows, cols = matrix->cols, head = column_header_bytes(matrix);
    const int whole =
        matrix->rows <= ROWS_READ_WHOLE || km_view_holds(view, matrix->data, head + rows * cols);
    const int64_t stride = whole ? rows : count, skip = whole ? first : 0;
    const unsigned char *data;
    if (whole) {
        const int64_t needed = head + (cols - 1) * rows + first + count;
        data = km_view_bytes(view, matrix->data, needed, scratch, error);
        if (data == NULL) return KM_FAILED;
    } else {
        if (km_scratch_reserve(scratch, head + stride * cols, error) != KM_OK) return KM_FAILED;
        if (km_view_copy(view, matrix->data, head, scratch->data, scratch, error) != KM_OK) return KM_FAILED;
        for (int64_t col = 0; col < cols; col++)
            if (km_view_copy(view, matrix->data + head + col * rows + first, count,
                             scratch->data + head + col * stride, scratch, error) != KM_OK)
                return KM_FAILED;
        data = scratch->data;
    }
    const int64_t col = km_columns_out_of_order(data, matrix->cols);
    if (col >= 0)
        return km_fail(error, matrix->data + col * 8,
                       "corrupt compressed matrix: the percentiles of column %" PRId64 " are not in order",
                       col);
    const km_columns columns = {.min = matrix->min,
                                .range = matrix->range,
                                .percentiles = data,
                                .codes = data + head + skip,
                                .stride = stride,
                                .rows = count,
                                .cols = matrix->cols};
    if (km_decode_columns(&columns, out)) return KM_OK;
    return not_finite(matrix, first, count, out, error);
}

/* Of rows that lie one after the other. Returns whether all are finite. */
static int decode(const km_matrix *matrix, const unsigned char *data, int64_t count, float *out) {
    switch (matrix->kind) {
    case KM_ROWS16:
        km_decode_linear16(data, count, matrix->min, matrix->range, out);
        return km_linear16_is_finite(matrix->min, matrix->range) || km_all_finite(out, count);
    case KM_ROWS8:
        km_decode_linear8(data, count, matrix->min, matrix->range, out);
        return km_linear8_is_finite(matrix->min, matrix->range) || km_all_finite(out, count);
    case KM_DOUBLE:
        return km_decode_doubles(data, count, out);
    default:
        return km_decode_floats(data, count, out);
    }
}

int km_matrix_rows(const km_view *view, const km_matrix *matrix, int32_t first, int32_t count, float *out,
                   km_scratch *scratch, km_error *error) {
    if (first < 0 || count <= 0 || first > matrix->rows - count)
        return km_fail(error, -1,
                       "rows %" PRId32 " .. +%" PRId32 " asked for of a matrix with %" PRId32 " rows", first,
                       count, matrix->rows);
    if (matrix->kind == KM_COLUMNS8) return rows_of_columns(view, matrix, first, count, out, scratch, error);
    const int64_t width = value_bytes(matrix->kind), values = (int64_t)count * matrix->cols;
    const int64_t at = matrix->data + (int64_t)first * matrix->cols * width;
    int finite;
    if (matrix->kind == KM_FLOAT && !km_view_holds(view, at, values * width)) {
        /* Read to where it belongs, rather than to the scratch. */
        if (km_view_copy(view, at, values * width, out, scratch, error) != KM_OK) return KM_FAILED;
        finite = km_all_finite(out, values);
    } else {
        const unsigned char *data = km_view_bytes(view, at, values * width, scratch, error);
        if (data == NULL) return KM_FAILED;
        finite = decode(matrix, data, values, out);
    }
    return finite ? KM_OK : not_finite(matrix, first, count, out, error);
}

void km_matrix_prefetch(const km_view *view, const km_matrix *matrix, int32_t first, int32_t count) {
#if defined(__GNUC__)
    enum { LINE = 64 };
    const int64_t rows = matrix->rows, head = column_header_bytes(matrix);
    if (matrix->kind != KM_COLUMNS8 || !km_view_holds(view, matrix->data, head + rows * matrix->cols)) return;
    const unsigned char *codes = view->data + (matrix->data - view->begin) + head;
    for (int64_t at = -head; at < 0; at += LINE)
        __builtin_prefetch(codes + at);
    for (int64_t col = 0; col < matrix->cols; col++)
        for (int64_t row = first; row < (int64_t)first + count + LINE - 1; row += LINE)
            __builtin_prefetch(codes + col * rows + (row < rows ? row : rows - 1));
#else
    (void)view, (void)matrix, (void)first, (void)count;
#endif
}

int km_matrix_doubles(const km_file *file, const km_matrix *matrix, double *out, km_error *error) {
    km_scratch scratch = {0};
    const int64_t values = (int64_t)matrix->rows * matrix->cols;
    if (matrix->kind == KM_DOUBLE) return km_read(file, matrix->data, values * 8, out, &scratch, error);
    if (matrix->kind != KM_FLOAT)
        return km_fail(error, matrix->data, "compressed matrix where a full one (DM or FM) is expected");
    int status = km_scratch_reserve(&scratch, values * 4, error);
    if (status == KM_OK) status = km_read(file, matrix->data, values * 4, scratch.data, &scratch, error);
    for (int64_t i = 0; status == KM_OK && i < values; i++)
        out[i] = (double)float_at(scratch.data + 4 * i);
    km_scratch_free(&scratch);
    return status;
}
