#include "examples.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

/* Rows of a full output are decoded in blocks of about so many values. */
enum { BLOCK_VALUES = 1 << 16 };

static int take_role(km_nnet_io *role, const km_nnet_io *io, const char *name, km_error *error) {
    if (role->name_length != 0) return km_fail(error, io->name, "'%s' comes twice in an example", name);
    *role = *io;
    return KM_OK;
}

int km_example_roles(km_cursor *cursor, const char *output, km_roles *roles, km_error *error) {
    const int64_t start = cursor->at;
    int32_t count;
    if (km_example_open(cursor, &count, error) != KM_OK) return KM_FAILED;
    roles->input.name_length = roles->ivector.name_length = roles->output.name_length = 0;
    for (int32_t i = 0; i < count; i++) {
        km_nnet_io io;
        int status = km_example_io(cursor, &io, error);
        if (status == KM_OK && km_io_is(cursor, &io, "input"))
            status = take_role(&roles->input, &io, "input", error);
        else if (status == KM_OK && km_io_is(cursor, &io, "ivector"))
            status = take_role(&roles->ivector, &io, "ivector", error);
        else if (status == KM_OK && km_io_is(cursor, &io, output))
            status = take_role(&roles->output, &io, output, error);
        if (status != KM_OK) return status;
    }
    if (km_example_close(cursor, error) != KM_OK) return KM_FAILED;
    if (roles->input.name_length == 0) return km_fail(error, start, "the example has no 'input'");
    if (roles->output.name_length == 0) return km_fail(error, start, "the example has no '%s'", output);
    if (roles->input.sparse || (roles->ivector.name_length != 0 && roles->ivector.sparse))
        return km_fail(error, start, "'%s' is a sparse matrix", roles->input.sparse ? "input" : "ivector");
    return KM_OK;
}

void km_targets_begin(km_targets *targets, const km_cursor *cursor, const km_nnet_io *io) {
    const km_scratch none = {0};
    targets->cursor = cursor;
    targets->io = io;
    targets->bytes = io->sparse ? km_cursor_bytes(cursor, io->sparse_rows) : NULL;
    targets->values = targets->scratch = none;
    targets->row = targets->decoded = targets->after = targets->count = 0;
}

void km_targets_free(km_targets *targets) {
    km_scratch_free(&targets->values);
    km_scratch_free(&targets->scratch);
}

void km_targets_skip(km_targets *targets) {
    targets->row++;
    if (!targets->io->sparse) return;
    int32_t count, column;
    float value;
    targets->bytes = km_sparse_row(targets->bytes, &count);
    while (count-- > 0)
        targets->bytes = km_sparse_pair(targets->bytes, &column, &value);
}

static int add_pair(km_targets *targets, int32_t pdf, float weight, km_error *error) {
    if (weight == 0.0F) return KM_OK;
    if (targets->count == KM_MAX_TARGETS)
        return km_fail(error, targets->io->name,
                       "row %" PRId32 " of the output has more than %d values other than 0: posteriors that "
                       "dense are not supported",
                       targets->row, KM_MAX_TARGETS);
    const km_pair pair = {pdf, weight};
    targets->pairs[targets->count++] = pair;
    return KM_OK;
}

/* Has the next row of an output that is not sparse decoded. */
static int decode_block(km_targets *targets, km_error *error) {
    const km_nnet_io *io = targets->io;
    const km_cursor *cursor = targets->cursor;
    const km_view view = {NULL, cursor->data, cursor->begin, cursor->end};
    int32_t rows = BLOCK_VALUES / io->cols > 0 ? BLOCK_VALUES / io->cols : 1;
    if (rows > io->rows - targets->row) rows = io->rows - targets->row;
    const int64_t size = (int64_t)rows * io->cols * (int64_t)sizeof(float);
    if (km_scratch_reserve(&targets->values, size, error) != KM_OK) return KM_FAILED;
    targets->decoded = targets->row;
    targets->after = targets->row + rows;
    return km_matrix_rows(&view, &io->matrix, targets->row, rows, (float *)(void *)targets->values.data,
                          &targets->scratch, error);
}

int km_targets_next(km_targets *targets, km_error *error) {
    const km_nnet_io *io = targets->io;
    targets->count = 0;
    if (io->sparse) {
        int32_t count, column;
        float value;
        targets->bytes = km_sparse_row(targets->bytes, &count);
        while (count-- > 0) {
            targets->bytes = km_sparse_pair(targets->bytes, &column, &value);
            if (add_pair(targets, column, value, error) != KM_OK) return KM_FAILED;
        }
    } else {
        if (targets->row >= targets->after && decode_block(targets, error) != KM_OK) return KM_FAILED;
        const float *values = (const float *)(const void *)targets->values.data +
                              (size_t)(targets->row - targets->decoded) * (size_t)io->cols;
        for (int32_t column = 0; column < io->cols; column++)
            if (add_pair(targets, column, values[column], error) != KM_OK) return KM_FAILED;
        /* A row of targets that are all 0 is one all the same, for a quadratic objective. */
        if (targets->count == 0) targets->pairs[targets->count++] = (km_pair){0, 0.0F};
    }
    targets->row++;
    return KM_OK;
}

/* What a unit is decoded from and to. */
typedef struct {
    const km_examples *examples;
    const km_shape *shape;
    const km_cursor *cursor;
    const km_out *out;
    km_scratch *scratch;
    int32_t n;
} decoding;

/* Rows of one n that are wanted, at consecutive times. */
typedef struct {
    int32_t count;
    int is_part;   /* rows before and after them are passed over; else there must be no other */
    int64_t first; /* t of the first one; set if they are no part */
} span;

static int changed(const km_nnet_io *io, km_error *error) {
    return km_fail(error, io->name, "the example is not the one that was there when the index was made");
}

/* Decodes some rows of one n. */
static int rows_of(const decoding *d, const km_nnet_io *io, span *rows, int32_t cols, float *out,
                   km_error *error) {
    const km_view view = {NULL, d->cursor->data, d->cursor->begin, d->cursor->end};
    const unsigned char *bytes = km_cursor_bytes(d->cursor, io->indexes);
    km_index index = {0, 0, 0};
    if (io->cols != cols) return changed(io, error);
    int32_t found = 0;
    for (int32_t row = 0; row < io->rows;) {
        int32_t run = 0; /* rows of this n that follow each other */
        for (; row + run < io->rows; run++) {
            bytes = km_index_next(bytes, &index);
            if (index.n != d->n) break;
            if (found + run == 0 && !rows->is_part) rows->first = index.t;
            if (found + run < rows->count && index.t == rows->first + found + run) continue;
            if (!rows->is_part) return changed(io, error);
            break;
        }
        if (run > 0 && km_matrix_rows(&view, &io->matrix, row, run, out + (size_t)found * (size_t)cols,
                                      d->scratch, error) != KM_OK)
            return KM_FAILED;
        found += run;
        row += run + (row + run < io->rows); /* and the one that ended the run */
    }
    return found == rows->count ? KM_OK : changed(io, error);
}

static int write_row(const decoding *d, const km_targets *targets, int32_t at, km_error *error) {
    const int32_t most = d->examples->num_targets;
    int64_t *labels = d->out->labels + (size_t)at * (size_t)most;
    float *weights = d->out->weights == NULL ? NULL : d->out->weights + (size_t)at * (size_t)most;
    if (targets->count > most) return changed(targets->io, error);
    for (int32_t i = 0; i < most; i++) {
        const int there = i < targets->count;
        labels[i] = there ? targets->pairs[i].pdf : -1;
        if (weights != NULL)
            weights[i] = there ? targets->pairs[i].weight : 0.0F;
        else if (there && targets->pairs[i].weight != 1.0F)
            return changed(targets->io, error);
    }
    return KM_OK;
}

/* Writes the targets of all rows of the n; the first one's t is to be `first`. */
static int targets_of(const decoding *d, const km_nnet_io *io, int64_t first, km_error *error) {
    const unsigned char *bytes = km_cursor_bytes(d->cursor, io->indexes);
    km_index index = {0, 0, 0};
    km_targets targets;
    if (io->cols != d->examples->num_pdfs) return changed(io, error);
    km_targets_begin(&targets, d->cursor, io);
    int32_t found = 0;
    int status = KM_OK;
    for (int32_t row = 0; status == KM_OK && row < io->rows; row++) {
        bytes = km_index_next(bytes, &index);
        if (index.n != d->n) {
            km_targets_skip(&targets);
            continue;
        }
        if (found >= d->shape->width || index.t != first + found) status = changed(io, error);
        if (status == KM_OK) status = km_targets_next(&targets, error);
        if (status == KM_OK) status = write_row(d, &targets, found++, error);
    }
    km_targets_free(&targets);
    if (status == KM_OK && found != d->shape->width) return changed(io, error);
    return status;
}

/* Writes the targets of the labelled row `frame` of the n; its time goes into *t. */
static int target_of(const decoding *d, const km_nnet_io *io, int32_t frame, int32_t *t, km_error *error) {
    const unsigned char *bytes = km_cursor_bytes(d->cursor, io->indexes);
    km_index index = {0, 0, 0};
    km_targets targets;
    if (io->cols != d->examples->num_pdfs) return changed(io, error);
    km_targets_begin(&targets, d->cursor, io);
    int32_t labelled = 0;
    int status = KM_OK;
    for (int32_t row = 0; status == KM_OK && labelled <= frame && row < io->rows; row++) {
        bytes = km_index_next(bytes, &index);
        if (index.n != d->n) {
            km_targets_skip(&targets);
            continue;
        }
        status = km_targets_next(&targets, error);
        if (status == KM_OK && targets.count > 0 && labelled++ == frame) {
            *t = index.t;
            status = write_row(d, &targets, 0, error);
        }
    }
    km_targets_free(&targets);
    if (status == KM_OK && labelled <= frame) return changed(io, error);
    return status;
}

static int decode_ivector(const decoding *d, const km_nnet_io *ivector, km_error *error) {
    span one = {1, 0, 0};
    if (d->examples->ivector_dim == 0 || d->out->ivector == NULL) return KM_OK;
    return rows_of(d, ivector, &one, d->examples->ivector_dim, d->out->ivector, error);
}

static int decode(const decoding *d, const km_roles *roles, int32_t frame, km_error *error) {
    const km_examples *examples = d->examples;
    span rows = {(int32_t)km_shape_rows(d->shape), frame != KM_WHOLE, 0};
    if ((roles->ivector.name_length != 0) != (examples->ivector_dim > 0))
        return changed(&roles->input, error);
    if (frame != KM_WHOLE) {
        int32_t t = 0;
        if (target_of(d, &roles->output, frame, &t, error) != KM_OK) return KM_FAILED;
        rows.first = (int64_t)t - d->shape->left;
    }
    if (rows_of(d, &roles->input, &rows, examples->feat_dim, d->out->feats, error) != KM_OK ||
        decode_ivector(d, &roles->ivector, error) != KM_OK)
        return KM_FAILED;
    return frame != KM_WHOLE ? KM_OK : targets_of(d, &roles->output, rows.first + d->shape->left, error);
}

int km_examples_chunk(const km_examples *examples, const km_shape *shape, int32_t unit, int32_t frame,
                      const km_view *view, const km_out *out, km_scratch *scratch, km_error *error) {
    const int64_t begin = examples->begin[unit], end = examples->end[unit];
    /* Its own, because the bytes must stay while the scratch is used to decode them; empty where the bytes
     * are in memory. */
    km_scratch own = {0};
    km_roles roles;
    int status = KM_FAILED;
    const unsigned char *bytes = km_view_bytes(view, begin, end - begin, &own, error);
    if (bytes != NULL) {
        km_cursor cursor = {bytes, begin, end, end, begin, 0};
        const decoding d = {examples, shape, &cursor, out, scratch, examples->n[unit]};
        status = km_example_roles(&cursor, examples->output, &roles, error);
        if (status == KM_OK && cursor.at != end) status = changed(&roles.input, error);
        if (status == KM_OK) status = decode(&d, &roles, frame, error);
    }
    scratch->bytes_read += own.bytes_read;
    km_scratch_free(&own);
    if (status != KM_OK) error->utterance = unit;
    return status;
}

int km_examples_read(const km_examples *examples, const km_shape *shape, int32_t unit, const km_out *out,
                     km_error *error) {
    const km_view view = {examples->files + examples->file_of[unit], NULL, 0, 0};
    km_scratch scratch = {0};
    const int status = km_examples_chunk(examples, shape, unit, KM_WHOLE, &view, out, &scratch, error);
    km_scratch_free(&scratch);
    return status;
}
