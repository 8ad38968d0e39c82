#include "chain_example.h"

#include <inttypes.h>
#include <math.h>

enum { MAX_ROWS = 1 << 24 };

float km_chain_weight(const km_cursor *cursor, const km_chain_output *output, int32_t row) {
    if (output->weight_bytes == 0) return 1.0F;
    const unsigned char *bytes =
        km_cursor_bytes(cursor, output->weights + (int64_t)row * output->weight_bytes);
    if (output->weight_bytes == 1) return (float)(1.0 / 255.0) * (float)bytes[0];
    float value;
    double wide;
    if (output->weight_bytes == 4) {
        memcpy(&value, bytes, sizeof value);
        return value;
    }
    memcpy(&wide, bytes, sizeof wide);
    return (float)wide;
}

/* Goes over the vector of derivative weights, of which there is one for each row or none at all. */
static int take_vector(km_cursor *cursor, km_chain_output *output, km_error *error) {
    int32_t count;
    const int64_t start = cursor->at;
    if (output->weight_bytes == 1) {
        const unsigned char *bytes = km_cursor_peek(cursor, 5, error);
        if (bytes == NULL) return KM_FAILED;
        if (bytes[0] != 1) return km_fail(error, start, "size byte of the weights is %d, not 1", bytes[0]);
        count = km_int32_at(bytes + 1);
        cursor->at += 5;
    } else {
        if (km_cursor_peek(cursor, 3, error) == NULL) return KM_FAILED;
        output->weight_bytes = km_cursor_is_at(cursor, "DV ") ? 8 : 4;
        if (km_cursor_expect(cursor, output->weight_bytes == 8 ? "DV " : "FV ", error) != KM_OK ||
            km_cursor_int32(cursor, "the number of derivative weights", 0, &count, error) != KM_OK)
            return KM_FAILED;
    }
    if (count != 0 && count != output->io.rows)
        return km_fail(error, cursor->at - 4, "%" PRId32 " derivative weights for %" PRId32 " indexes", count,
                       output->io.rows);
    const int64_t size = (int64_t)count * output->weight_bytes;
    if (km_cursor_peek(cursor, size, error) == NULL) return KM_FAILED;
    output->weights = cursor->at;
    if (count == 0) output->weight_bytes = 0;
    for (int32_t row = 0; row < count; row++)
        if (!isfinite(km_chain_weight(cursor, output, row)))
            return km_fail(error, cursor->at + (int64_t)row * output->weight_bytes,
                           "derivative weight %" PRId32 " is not a finite number", row);
    cursor->at += size;
    return KM_OK;
}

static int take_weights(km_cursor *cursor, km_chain_output *output, km_error *error) {
    output->weight_bytes = 0;
    if (km_cursor_peek(cursor, 5, error) == NULL) return KM_FAILED;
    if (km_cursor_is_at(cursor, "</Nne")) return KM_OK;
    output->weight_bytes = km_cursor_is_at(cursor, "<DW> ") ? 1 : 4;
    if (km_cursor_expect(cursor, output->weight_bytes == 1 ? "<DW> " : "<DW2> ", error) != KM_OK)
        return KM_FAILED;
    return take_vector(cursor, output, error);
}

static int wrong_index(const km_nnet_io *io, int32_t row, const km_index *found, int64_t n, int64_t t,
                       km_error *error) {
    return km_fail(error, io->indexes,
                   "index %" PRId32 " is (n %" PRId32 ", t %" PRId32 ", x %" PRId32 "), and (n %" PRId64
                   ", t %" PRId64 ", x 0) is expected",
                   row, found->n, found->t, found->x, n, t);
}

/* Checks an output's indexes against its supervision: those of all sequences at the first frame come first.
 */
static int check_output_indexes(const km_cursor *cursor, km_chain_output *output, km_error *error) {
    const km_nnet_io *io = &output->io;
    const km_supervision *supervision = &output->supervision;
    const int32_t sequences = supervision->sequences;
    if ((int64_t)sequences * supervision->frames != io->rows)
        return km_fail(error, io->indexes,
                       "%" PRId32 " indexes for %" PRId32 " sequences of %" PRId32 " frames", io->rows,
                       sequences, supervision->frames);
    const unsigned char *bytes = km_cursor_bytes(cursor, io->indexes);
    km_index at = {0, 0, 0};
    output->subsampling = 1;
    for (int32_t row = 0; row < io->rows; row++) {
        bytes = km_index_next(bytes, &at);
        const int32_t n = row % sequences, frame = row / sequences;
        if (row == 0) output->first_t = at.t;
        if (row == sequences) {
            const int64_t step = (int64_t)at.t - output->first_t;
            if (step < 1 || step >= MAX_ROWS)
                return km_fail(error, io->indexes, "output frames are %" PRId64 " input frames apart", step);
            output->subsampling = (int32_t)step;
        }
        const int64_t t = output->first_t + (int64_t)frame * output->subsampling;
        if (at.n != n || at.t != t || at.x != 0) return wrong_index(io, row, &at, n, t, error);
    }
    return KM_OK;
}

static int take_output(km_cursor *cursor, km_chain_output *output, km_scratch *scratch, km_error *error) {
    memset(output, 0, sizeof *output);
    if (km_cursor_expect(cursor, "<NnetChainSup> ", error) != KM_OK ||
        km_cursor_name(cursor, &output->io.name, &output->io.name_length, error) != KM_OK ||
        km_example_indexes(cursor, &output->io, error) != KM_OK ||
        km_supervision_take(cursor, &output->supervision, scratch, error) != KM_OK ||
        check_output_indexes(cursor, output, error) != KM_OK || take_weights(cursor, output, error) != KM_OK)
        return KM_FAILED;
    return km_cursor_expect(cursor, "</NnetChainSup> ", error);
}

static int take_count(km_cursor *cursor, const char *token, const char *what, int32_t *count,
                      km_error *error) {
    if (km_cursor_expect(cursor, token, error) != KM_OK ||
        km_cursor_int32(cursor, what, 1, count, error) != KM_OK)
        return KM_FAILED;
    if (*count > KM_MAX_IOS)
        return km_fail(error, cursor->at - 4, "%s is %" PRId32 ", which is not possible", what, *count);
    return KM_OK;
}

static int take_head(km_cursor *cursor, int32_t *inputs, km_error *error) {
    const unsigned char *bytes = km_cursor_peek(cursor, 2, error);
    if (bytes == NULL) return KM_FAILED;
    if (bytes[0] != '\0' || bytes[1] != 'B')
        return km_fail(error, cursor->at, "no binary example here (\\0B is expected)");
    cursor->at += 2;
    if (km_cursor_is_at(cursor, "<Nnet3Eg>"))
        return km_fail(error, cursor->at, "an example with labels, where a chain example is expected");
    if (km_cursor_expect(cursor, "<Nnet3ChainEg> ", error) != KM_OK) return KM_FAILED;
    return take_count(cursor, "<NumInputs> ", "the number of inputs", inputs, error);
}

static int twice(const km_nnet_io *io, const char *name, km_error *error) {
    return km_fail(error, io->name, "'%s' comes twice in an example", name);
}

static int take_inputs(km_cursor *cursor, int32_t count, km_chain_example *found, km_error *error) {
    for (int32_t i = 0; i < count; i++) {
        km_nnet_io io;
        if (km_example_io(cursor, &io, error) != KM_OK) return KM_FAILED;
        const int is_ivector = km_io_is(cursor, &io, "ivector");
        if (!is_ivector && !km_io_is(cursor, &io, "input")) continue;
        km_nnet_io *role = is_ivector ? &found->ivector : &found->input;
        const char *name = is_ivector ? "ivector" : "input";
        if (role->name_length != 0) return twice(&io, name, error);
        if (io.sparse) return km_fail(error, io.name, "'%s' is a sparse matrix", name);
        *role = io;
    }
    return KM_OK;
}

/* Checks that the rows of `input` are those of one sequence after the other, at the same consecutive times.
 */
static int check_input_indexes(const km_cursor *cursor, const km_nnet_io *io, int32_t sequences,
                               int32_t *first_t, km_error *error) {
    const unsigned char *bytes = km_cursor_bytes(cursor, io->indexes);
    const int32_t rows = io->rows / sequences;
    km_index at = {0, 0, 0};
    if (io->rows % sequences != 0)
        return km_fail(error, io->indexes, "'input' has %" PRId32 " rows for %" PRId32 " sequences", io->rows,
                       sequences);
    for (int32_t row = 0; row < io->rows; row++) {
        bytes = km_index_next(bytes, &at);
        if (row == 0) *first_t = at.t;
        const int64_t n = row / rows, t = (int64_t)*first_t + row % rows;
        if (at.n != n || at.t != t || at.x != 0) return wrong_index(io, row, &at, n, t, error);
    }
    return KM_OK;
}

static int check_ivector_indexes(const km_cursor *cursor, const km_nnet_io *io, int32_t sequences,
                                 km_error *error) {
    const unsigned char *bytes = km_cursor_bytes(cursor, io->indexes);
    km_index at = {0, 0, 0};
    if (io->rows != sequences)
        return km_fail(error, io->indexes, "'ivector' has %" PRId32 " rows for %" PRId32 " sequences",
                       io->rows, sequences);
    for (int32_t row = 0; row < io->rows; row++) {
        bytes = km_index_next(bytes, &at);
        if (at.n != row || at.x != 0) return wrong_index(io, row, &at, row, at.t, error);
    }
    return KM_OK;
}

/* Finds the shape; the input must cover the output's frames. */
static int find_shape(const km_cursor *cursor, km_chain_example *found, km_error *error) {
    const km_supervision *supervision = &found->output.supervision;
    const km_nnet_io *input = &found->input;
    int32_t first_t = 0;
    if (check_input_indexes(cursor, input, supervision->sequences, &first_t, error) != KM_OK ||
        (found->ivector.name_length != 0 &&
         check_ivector_indexes(cursor, &found->ivector, supervision->sequences, error) != KM_OK))
        return KM_FAILED;
    const int64_t last_t = (int64_t)first_t + input->rows / supervision->sequences - 1;
    const int64_t output_last =
        found->output.first_t + (int64_t)(supervision->frames - 1) * found->output.subsampling;
    const int64_t left = (int64_t)found->output.first_t - first_t, right = last_t - output_last;
    if (left < 0 || right < 0)
        return km_fail(error, input->indexes,
                       "'input' has t %" PRId32 " to %" PRId64 ", which does not cover the output's %" PRId32
                       " to %" PRId64,
                       first_t, last_t, found->output.first_t, output_last);
    if (input->rows >= MAX_ROWS)
        return km_fail(error, input->indexes, "a chunk of %" PRId32 " frames is not supported", input->rows);
    found->shape = (km_shape){
        .width = supervision->frames,
        .left = (int32_t)left,
        .right = (int32_t)right,
        .subsampling = found->output.subsampling,
        .sequences = supervision->sequences,
    };
    return KM_OK;
}

int km_chain_example_take(km_cursor *cursor, const char *output, km_chain_example *found, km_scratch *scratch,
                          km_error *error) {
    const int64_t start = cursor->at;
    int32_t inputs, outputs;
    memset(found, 0, sizeof *found);
    if (take_head(cursor, &inputs, error) != KM_OK || take_inputs(cursor, inputs, found, error) != KM_OK ||
        take_count(cursor, "<NumOutputs> ", "the number of outputs", &outputs, error) != KM_OK)
        return KM_FAILED;
    for (int32_t i = 0; i < outputs; i++) {
        km_chain_output other;
        if (take_output(cursor, &other, scratch, error) != KM_OK) return KM_FAILED;
        if (!km_io_is(cursor, &other.io, output)) continue;
        if (found->output.io.name_length != 0) return twice(&other.io, output, error);
        found->output = other;
    }
    if (km_cursor_expect(cursor, "</Nnet3ChainEg> ", error) != KM_OK) return KM_FAILED;
    if (found->input.name_length == 0) return km_fail(error, start, "the example has no 'input'");
    if (found->output.io.name_length == 0) return km_fail(error, start, "the example has no '%s'", output);
    return find_shape(cursor, found, error);
}
