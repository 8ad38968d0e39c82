#include "corpus.h"

#include <math.h>
#include <string.h>

int km_cmvn_norms(const double *stats, int32_t dim, int32_t norm_vars, float *norms, km_error *error) {
    const double *sums = stats, *squares = stats + dim + 1;
    const double count = stats[dim];
    float *offsets = norms, *scales = norms + dim;
    if (!(count >= 1.0))
        return km_fail(error, -1, "too little data for mean and variance normalisation: count %g", count);
    /* Without variances Kaldi scales the sums by a float, with them it computes in double throughout. */
    const float weight = (float)(-1.0 / count);
    for (int32_t d = 0; d < dim; d++) {
        if (!norm_vars) {
            scales[d] = 1.0F;
            offsets[d] = (float)((double)weight * sums[d]);
        } else {
            const double mean = sums[d] / count;
            double variance = squares[d] / count - mean * mean;
            if (variance < 1.0e-20) variance = 1.0e-20;
            const double scale = 1.0 / sqrt(variance);
            scales[d] = (float)scale;
            offsets[d] = (float)-(mean * scale);
        }
        if (!isfinite(offsets[d]) || !isfinite(scales[d]))
            return km_fail(error, -1, "statistics of dimension %d are not finite", (int)d);
    }
    return KM_OK;
}

static void normalise(const km_corpus *corpus, int32_t utterance, int32_t rows, float *out) {
    const size_t dim = (size_t)corpus->dim;
    const float *offsets = corpus->norms + 2 * dim * (size_t)corpus->norm_of[utterance];
    const float *scales = offsets + dim;
    for (int32_t row = 0; row < rows; row++, out += dim) {
        /* Two roundings, as in Kaldi: first the product, then the sum. */
        if (corpus->scales)
            for (size_t d = 0; d < dim; d++)
                out[d] *= scales[d];
        for (size_t d = 0; d < dim; d++)
            out[d] += offsets[d];
    }
}

static int rows_of(const km_corpus *corpus, int32_t utterance, const km_view *view, int32_t first,
                   int32_t count, float *out, km_scratch *scratch, km_error *error) {
    const int32_t row = corpus->first_row[utterance] + first;
    if (km_matrix_rows(view, corpus->matrices + utterance, row, count, out, scratch, error) != KM_OK) {
        error->utterance = utterance;
        return KM_FAILED;
    }
    if (corpus->norms != NULL) normalise(corpus, utterance, count, out);
    return KM_OK;
}

int km_corpus_features(const km_corpus *corpus, int32_t utterance, float *out, km_error *error) {
    km_scratch scratch = {0};
    const km_view view = {corpus->files + corpus->file_of[utterance], NULL, 0, 0};
    int status = rows_of(corpus, utterance, &view, 0, corpus->num_frames[utterance], out, &scratch, error);
    km_scratch_free(&scratch);
    return status;
}

static int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

int km_corpus_chunk(const km_corpus *corpus, const km_shape *shape, const km_chunk *chunk,
                    const km_view *view, const km_out *out, km_scratch *scratch, km_error *error) {
    float *feats = out->feats;
    const int64_t length = corpus->num_frames[chunk->utterance];
    const size_t dim = (size_t)corpus->dim, row_bytes = dim * sizeof(float);
    const int64_t begin = (int64_t)chunk->start - shape->left + shape->label_delay;
    const int64_t rows = (int64_t)shape->left + shape->width + shape->right;
    /* The rows that exist are decoded once, at their place; the edges are copied from them afterwards. */
    const int64_t low = clamp(begin, 0, length - 1), high = clamp(begin + rows - 1, 0, length - 1);
    const int64_t before = begin < 0 ? -begin : 0, count = high - low + 1;
    float *decoded = feats + (size_t)before * dim;
    if (rows_of(corpus, chunk->utterance, view, (int32_t)low, (int32_t)count, decoded, scratch, error) !=
        KM_OK)
        return KM_FAILED;
    for (int64_t row = 0; row < before; row++)
        memcpy(feats + (size_t)row * dim, decoded, row_bytes);
    const float *last = decoded + (size_t)(count - 1) * dim;
    for (int64_t row = before + count; row < rows; row++)
        memcpy(feats + (size_t)row * dim, last, row_bytes);

    const int32_t *all = corpus->labels + corpus->first_label[chunk->utterance];
    for (int32_t i = 0; i < shape->width; i++) {
        const int64_t t = (int64_t)chunk->start + i;
        out->labels[i] = t >= chunk->first_label && t < chunk->end_label ? all[t] : -1;
    }
    return KM_OK;
}
