#include "chain_examples.h"

static int changed(const km_chain_example *example, km_error *error) {
    return km_fail(error, example->input.name,
                   "the example is not the one that was there when the index was made");
}

static int is_as_indexed(const km_chain_examples *examples, const km_shape *shape, int32_t unit,
                         const km_chain_example *found) {
    const km_supervision *supervision = &found->output.supervision;
    return found->shape.width == shape->width && found->shape.left == shape->left &&
           found->shape.right == shape->right &&
           (shape->width == 1 || found->shape.subsampling == shape->subsampling) &&
           found->shape.sequences == shape->sequences && found->input.cols == examples->feat_dim &&
           (found->ivector.name_length != 0 ? found->ivector.cols : 0) == examples->ivector_dim &&
           supervision->label_dim == examples->num_pdfs && supervision->end2end == examples->end2end &&
           supervision->states == examples->states[unit] && supervision->arcs == examples->arcs[unit] &&
           supervision->weight == examples->weights[unit];
}

/* Writes the derivative weights of one sequence after the other; they stand frame by frame in the file. */
static int decode_weights(const km_cursor *cursor, const km_chain_example *example, float *out,
                          km_error *error) {
    const int32_t sequences = example->shape.sequences, frames = example->shape.width;
    for (int32_t row = 0; row < example->output.io.rows; row++) {
        const float weight = km_chain_weight(cursor, &example->output, row);
        if (out != NULL)
            out[(size_t)(row % sequences) * (size_t)frames + (size_t)(row / sequences)] = weight;
        else if (weight != 1.0F)
            return changed(example, error);
    }
    return KM_OK;
}

static int decode(const km_chain_examples *examples, const km_cursor *cursor, const km_chain_example *example,
                  const km_chain_out *out, km_scratch *scratch, km_error *error) {
    const km_view view = {NULL, cursor->data, cursor->begin, cursor->end};
    if (km_matrix_rows(&view, &example->input.matrix, 0, example->input.rows, out->feats, scratch, error) !=
        KM_OK)
        return KM_FAILED;
    if (examples->ivector_dim > 0 && out->ivectors != NULL &&
        km_matrix_rows(&view, &example->ivector.matrix, 0, example->ivector.rows, out->ivectors, scratch,
                       error) != KM_OK)
        return KM_FAILED;
    return decode_weights(cursor, example, out->deriv_weights, error);
}

int km_chain_examples_chunk(const km_chain_examples *examples, const km_shape *shape, int32_t unit,
                            const km_view *view, const km_chain_out *out, km_graphs *graphs,
                            km_scratch *scratch, km_error *error) {
    const int64_t begin = examples->begin[unit], end = examples->end[unit];
    /* Its own, because the bytes must stay while the scratch is used to decode them; empty where the bytes
     * are in memory. */
    km_scratch own = {0};
    km_chain_example found;
    int status = KM_FAILED;
    const unsigned char *bytes = km_view_bytes(view, begin, end - begin, &own, error);
    if (bytes != NULL) {
        km_cursor cursor = {bytes, begin, end, end, begin, 0};
        status = km_chain_example_take(&cursor, examples->output, &found, scratch, error);
        if (status == KM_OK && (cursor.at != end || !is_as_indexed(examples, shape, unit, &found)))
            status = changed(&found, error);
        if (status == KM_OK) status = decode(examples, &cursor, &found, out, scratch, error);
        if (status == KM_OK) km_supervision_append(&cursor, &found.output.supervision, graphs);
    }
    scratch->bytes_read += own.bytes_read;
    km_scratch_free(&own);
    if (status != KM_OK) error->utterance = unit;
    return status;
}

int km_chain_examples_read(const km_chain_examples *examples, const km_shape *shape, int32_t unit,
                           const km_chain_out *out, km_graphs *graphs, km_error *error) {
    const km_view view = {examples->files + examples->file_of[unit], NULL, 0, 0};
    km_scratch scratch = {0};
    const int status = km_chain_examples_chunk(examples, shape, unit, &view, out, graphs, &scratch, error);
    km_scratch_free(&scratch);
    return status;
}
