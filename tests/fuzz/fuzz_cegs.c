/* An archive of chain examples: its index, and every unit that is in it. */
#include "chain_examples.h"
#include "egs_scan.h"
#include "fuzz.h"

#include <math.h>

/* A unit is small where the input is; what an index promises must be so. */
enum { MAX_UNITS = 64 };

/* Memory for just the FSTs that are promised. */
static km_graphs new_graphs(int32_t fsts, int32_t states, int32_t arcs, int end2end) {
    return (km_graphs){
        .first_state = fuzz_memory((int64_t)fsts + 1, sizeof(int32_t)),
        .first_sequence = fuzz_memory((int64_t)fsts + 1, sizeof(int32_t)),
        .first_arc = fuzz_memory((int64_t)states + 1, sizeof(int64_t)),
        .finals = fuzz_memory(states, sizeof(float)),
        .times = end2end ? NULL : fuzz_memory(states, sizeof(int32_t)),
        .pdfs = fuzz_memory(arcs, sizeof(int32_t)),
        .costs = fuzz_memory(arcs, sizeof(float)),
        .nexts = fuzz_memory(arcs, sizeof(int32_t)),
    };
}

static void free_graphs(km_graphs *graphs) {
    free(graphs->first_state);
    free(graphs->first_sequence);
    free(graphs->first_arc);
    free(graphs->finals);
    free(graphs->times);
    free(graphs->pdfs);
    free(graphs->costs);
    free(graphs->nexts);
}

/* That all paths have so many arcs, by the states' times. */
static void check_times(const km_graphs *graphs, int32_t first, int32_t end, int32_t frames) {
    FUZZ_REQUIRE(graphs->times[first] == 0);
    for (int32_t state = first; state < end; state++) {
        FUZZ_REQUIRE(state == first || graphs->times[state] >= graphs->times[state - 1]);
        FUZZ_REQUIRE((graphs->finals[state] != INFINITY) == (graphs->times[state] == frames));
        for (int64_t arc = graphs->first_arc[state]; arc < graphs->first_arc[state + 1]; arc++)
            FUZZ_REQUIRE(graphs->times[graphs->nexts[arc]] == graphs->times[state] + 1);
    }
}

static void check_fst(const km_graphs *graphs, int32_t fst, int32_t num_pdfs) {
    const int32_t first = graphs->first_state[fst], end = graphs->first_state[fst + 1];
    int32_t finals = 0;
    FUZZ_REQUIRE(0 <= first && first < end && end <= graphs->num_states);
    for (int32_t state = first; state < end; state++) {
        FUZZ_REQUIRE(!isnan(graphs->finals[state]) && graphs->finals[state] != -INFINITY);
        finals += graphs->finals[state] != INFINITY;
        FUZZ_REQUIRE(0 <= graphs->first_arc[state] &&
                     graphs->first_arc[state] <= graphs->first_arc[state + 1]);
        for (int64_t arc = graphs->first_arc[state]; arc < graphs->first_arc[state + 1]; arc++) {
            FUZZ_REQUIRE(0 <= graphs->pdfs[arc] && graphs->pdfs[arc] < num_pdfs);
            FUZZ_REQUIRE(isfinite(graphs->costs[arc]));
            FUZZ_REQUIRE(first <= graphs->nexts[arc] && graphs->nexts[arc] < end);
        }
    }
    FUZZ_REQUIRE(finals > 0);
}

static void read_unit(const km_chain_examples *examples, const km_egs_index *index, int32_t unit) {
    const km_shape *shape = index->shapes + index->units[unit].shape;
    const int64_t rows = (int64_t)km_shape_rows(shape), sequences = shape->sequences;
    const int32_t fsts = examples->end2end ? shape->sequences : 1;
    FUZZ_REQUIRE(rows > 0 && sequences > 0 && shape->width > 0 && shape->left >= 0 && shape->right >= 0);
    FUZZ_REQUIRE(index->units[unit].frames == sequences * shape->width);
    const km_chain_out out = {
        .feats = fuzz_memory(sequences * rows * examples->feat_dim, sizeof(float)),
        .ivectors =
            examples->ivector_dim ? fuzz_memory(sequences * examples->ivector_dim, sizeof(float)) : NULL,
        .deriv_weights = index->has_weights ? fuzz_memory(sequences * shape->width, sizeof(float)) : NULL,
    };
    km_graphs graphs = new_graphs(fsts, examples->states[unit], examples->arcs[unit], examples->end2end);
    km_error error = {0};
    if (km_chain_examples_read(examples, shape, unit, &out, &graphs, &error) != KM_OK) {
        fuzz_check_error(&error);
        FUZZ_REQUIRE(error.utterance == unit && graphs.num_fsts == 0 && graphs.num_arcs == 0);
    } else {
        for (int64_t i = 0; i < sequences * rows * examples->feat_dim; i++)
            FUZZ_REQUIRE(isfinite(out.feats[i]));
        for (int64_t i = 0; out.deriv_weights != NULL && i < sequences * shape->width; i++)
            FUZZ_REQUIRE(isfinite(out.deriv_weights[i]));
        FUZZ_REQUIRE(graphs.num_fsts == fsts && graphs.num_sequences == shape->sequences);
        FUZZ_REQUIRE(graphs.num_states == examples->states[unit] && graphs.num_arcs == examples->arcs[unit]);
        for (int32_t fst = 0; fst < fsts; fst++)
            check_fst(&graphs, fst, examples->num_pdfs);
        if (!examples->end2end) check_times(&graphs, 0, graphs.num_states, index->units[unit].frames);
    }
    free(out.feats);
    free(out.ivectors);
    free(out.deriv_weights);
    free_graphs(&graphs);
}

static void read_units(const km_file *file, const km_egs_index *index) {
    const int32_t count = (int32_t)(index->num_units < MAX_UNITS ? index->num_units : MAX_UNITS);
    int32_t file_of[MAX_UNITS] = {0}, states[MAX_UNITS], arcs[MAX_UNITS];
    int64_t begin[MAX_UNITS], end[MAX_UNITS];
    float weights[MAX_UNITS];
    for (int32_t i = 0; i < count; i++) {
        begin[i] = index->units[i].begin;
        end[i] = begin[i] + index->units[i].size;
        states[i] = index->graphs[i].states;
        arcs[i] = index->graphs[i].arcs;
        weights[i] = index->graphs[i].weight;
        FUZZ_REQUIRE(begin[i] >= 0 && index->units[i].size > 0 && end[i] <= file->size);
        FUZZ_REQUIRE(index->units[i].shape >= 0 && index->units[i].shape < index->num_shapes);
        FUZZ_REQUIRE(states[i] > 0 && arcs[i] >= 0 && isfinite(weights[i]));
    }
    const km_chain_examples examples = {.num_units = count,
                                        .feat_dim = index->feat_dim,
                                        .ivector_dim = index->ivector_dim,
                                        .num_pdfs = index->num_pdfs,
                                        .end2end = index->end2end,
                                        .output = "output",
                                        .files = file,
                                        .file_of = file_of,
                                        .begin = begin,
                                        .end = end,
                                        .states = states,
                                        .arcs = arcs,
                                        .weights = weights};
    for (int32_t i = 0; i < count; i++)
        read_unit(&examples, index, i);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const km_file file = fuzz_file(data, size);
    km_egs_index index = {.chain = 1};
    km_error error = {0};
    /* What is bad is left out, as --skip-bad-utterances does; each time that leads further into the file. */
    while (km_egs_scan(&file, "output", &index, &error) != KM_OK) {
        const int64_t bad = index.entry;
        fuzz_check_error(&error);
        FUZZ_REQUIRE(bad >= 0 && bad < file.size);
        FUZZ_REQUIRE(km_egs_skip(&file, &index, &error) == KM_OK);
        FUZZ_REQUIRE(index.entry > bad && index.entry <= file.size);
    }
    FUZZ_REQUIRE(index.entry == file.size);
    read_units(&file, &index);
    km_egs_index_free(&index);
    return 0;
}
