#include "chain_scan.h"

#include <inttypes.h>

static int check_dims(km_egs_index *index, const km_chain_example *example, const char *output,
                      km_error *error) {
    const int32_t ivector_dim = example->ivector.name_length != 0 ? example->ivector.cols : 0;
    const km_supervision *supervision = &example->output.supervision;
    const int64_t at = example->input.name;
    if (km_egs_index_dim(index, &index->feat_dim, example->input.cols, at, "input", error) != KM_OK ||
        km_egs_index_dim(index, &index->ivector_dim, ivector_dim, at, "ivector", error) != KM_OK ||
        km_egs_index_dim(index, &index->num_pdfs, supervision->label_dim, example->output.io.name, output,
                         error) != KM_OK)
        return KM_FAILED;
    if (index->num_examples == 0) index->end2end = supervision->end2end;
    if (index->end2end != supervision->end2end)
        return km_fail(error, example->output.io.name, "the supervision is %s, and %s in the examples before",
                       supervision->end2end ? "End2End" : "of one FST",
                       supervision->end2end ? "of one FST" : "End2End");
    return KM_OK;
}

int km_chain_scan(km_cursor *cursor, const char *output, km_egs_index *index, km_scratch *scratch,
                  km_error *error) {
    const int64_t begin = cursor->at;
    km_chain_example example;
    if (km_chain_example_take(cursor, output, &example, scratch, error) != KM_OK ||
        check_dims(index, &example, output, error) != KM_OK)
        return KM_FAILED;
    const km_supervision *supervision = &example.output.supervision;
    if (supervision->arcs > INT32_MAX)
        return km_fail(error, begin, "%" PRId64 " arcs in one example are not supported", supervision->arcs);
    for (int32_t row = 0; row < example.output.io.rows; row++)
        if (km_chain_weight(cursor, &example.output, row) != 1.0F) index->has_weights = 1;
    const km_unit unit = {begin, (int32_t)(cursor->at - begin), 0, example.output.io.rows, 0};
    const km_unit_graphs graphs = {supervision->states, (int32_t)supervision->arcs, supervision->weight};
    return km_egs_index_add(index, &unit, &example.shape, &graphs, error);
}
