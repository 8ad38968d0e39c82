/* An archive of nnet3 examples: its index, and every unit that is in it. */
#include "egs_scan.h"
#include "fuzz.h"

#include <math.h>

/* A unit is small where the input is; what an index promises must be so. */
enum { MAX_UNITS = 64 };

static void read_unit(const km_examples *examples, const km_egs_index *index, int32_t unit) {
    const km_shape *shape = index->shapes + index->units[unit].shape;
    const int64_t rows = (int64_t)shape->left + shape->width + shape->right;
    const int64_t targets = (int64_t)shape->width * examples->num_targets;
    FUZZ_REQUIRE(rows > 0 && shape->width > 0 && examples->num_targets > 0);
    km_out out = {
        .feats = fuzz_memory(rows * examples->feat_dim, sizeof(float)),
        .labels = fuzz_memory(targets, sizeof(int64_t)),
        .weights = index->has_weights ? fuzz_memory(targets, sizeof(float)) : NULL,
        .ivector = examples->ivector_dim ? fuzz_memory(examples->ivector_dim, sizeof(float)) : NULL,
    };
    km_error error = {0};
    if (km_examples_read(examples, shape, unit, &out, &error) != KM_OK) {
        fuzz_check_error(&error);
        FUZZ_REQUIRE(error.utterance == unit);
    } else {
        for (int64_t i = 0; i < rows * examples->feat_dim; i++)
            FUZZ_REQUIRE(isfinite(out.feats[i]));
        for (int64_t i = 0; i < targets; i++)
            FUZZ_REQUIRE(out.labels[i] >= -1 && out.labels[i] < examples->num_pdfs);
    }
    free(out.feats);
    free(out.labels);
    free(out.weights);
    free(out.ivector);
}

static void read_units(const km_file *file, const km_egs_index *index) {
    const int32_t count = (int32_t)(index->num_units < MAX_UNITS ? index->num_units : MAX_UNITS);
    int32_t file_of[MAX_UNITS] = {0}, n[MAX_UNITS];
    int64_t begin[MAX_UNITS], end[MAX_UNITS];
    for (int32_t i = 0; i < count; i++) {
        begin[i] = index->units[i].begin;
        end[i] = begin[i] + index->units[i].size;
        n[i] = index->units[i].n;
        FUZZ_REQUIRE(begin[i] >= 0 && index->units[i].size > 0 && end[i] <= file->size);
        FUZZ_REQUIRE(index->units[i].shape >= 0 && index->units[i].shape < index->num_shapes);
    }
    const km_examples examples = {.num_units = count,
                                  .feat_dim = index->feat_dim,
                                  .ivector_dim = index->ivector_dim,
                                  .num_pdfs = index->num_pdfs,
                                  .num_targets = index->num_targets > 0 ? index->num_targets : 1,
                                  .output = "output",
                                  .files = file,
                                  .file_of = file_of,
                                  .begin = begin,
                                  .end = end,
                                  .n = n};
    for (int32_t i = 0; i < count; i++)
        read_unit(&examples, index, i);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const km_file file = fuzz_file(data, size);
    km_egs_index index = {0};
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
