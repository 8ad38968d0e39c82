#include "corpus.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
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
    const size_t dim = (size_t)corpus->input_dim;
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

static int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

/* Rows as they are stored, normalised. */
static int input_rows(const km_corpus *corpus, int32_t utterance, const km_view *view, int32_t first,
                      int32_t count, float *out, km_scratch *scratch, km_error *error) {
    const int32_t row = corpus->first_row[utterance] + first;
    if (km_matrix_rows(view, corpus->matrices + utterance, row, count, out, scratch, error) != KM_OK)
        return KM_FAILED;
    if (corpus->norms != NULL) normalise(corpus, utterance, count, out);
    return KM_OK;
}

/* Rows first .. first+count-1, all of them in the utterance, as a chunk has them. */
static int output_rows(const km_corpus *corpus, int32_t utterance, const km_view *view, int32_t first,
                       int32_t count, float *out, km_scratch *scratch, km_error *error) {
    const km_transform *transform = corpus->transform;
    if (transform == NULL) return input_rows(corpus, utterance, view, first, count, out, scratch, error);
    const int32_t length = corpus->num_frames[utterance];
    const int32_t low = (int32_t)clamp((int64_t)first - transform->left, 0, length - 1);
    const int32_t high = (int32_t)clamp((int64_t)first + count - 1 + transform->right, 0, length - 1);
    const int32_t needed = high - low + 1;
    /* The matrix has these rows, and so the file at least a byte for each of these floats. */
    float *rows = malloc((size_t)needed * (size_t)corpus->input_dim * sizeof *rows);
    if (rows == NULL) return km_fail(error, -1, "out of memory: %" PRId32 " rows of features", needed);
    const int status = input_rows(corpus, utterance, view, low, needed, rows, scratch, error);
    if (status == KM_OK) {
        const km_rows in = {rows, corpus->input_dim, low, high, length};
        km_transform_rows(transform, &in, first, count, out);
    }
    free(rows);
    return status;
}

int km_corpus_features(const km_corpus *corpus, int32_t utterance, float *out, km_error *error) {
    km_scratch scratch = {0};
    const km_view view = {corpus->files + corpus->file_of[utterance], NULL, 0, 0};
    const int status =
        output_rows(corpus, utterance, &view, 0, corpus->num_frames[utterance], out, &scratch, error);
    if (status != KM_OK) error->utterance = utterance;
    km_scratch_free(&scratch);
    return status;
}

static int chunk_features(const km_corpus *corpus, const km_shape *shape, const km_chunk *chunk,
                          const km_view *view, float *feats, km_scratch *scratch, km_error *error) {
    const int64_t length = corpus->num_frames[chunk->utterance];
    const size_t dim = (size_t)corpus->dim, row_bytes = dim * sizeof(float);
    const int64_t begin = (int64_t)chunk->start - shape->left + shape->label_delay;
    const int64_t rows = (int64_t)shape->left + shape->width + shape->right;
    /* The rows that exist are decoded once, at their place; the edges are copied from them afterwards. */
    const int64_t low = clamp(begin, 0, length - 1), high = clamp(begin + rows - 1, 0, length - 1);
    const int64_t before = clamp(-begin, 0, rows - 1), count = high - low + 1;
    float *decoded = feats + (size_t)before * dim;
    if (output_rows(corpus, chunk->utterance, view, (int32_t)low, (int32_t)count, decoded, scratch, error) !=
        KM_OK)
        return KM_FAILED;
    for (int64_t row = 0; row < before; row++)
        memcpy(feats + (size_t)row * dim, decoded, row_bytes);
    const float *last = decoded + (size_t)(count - 1) * dim;
    for (int64_t row = before + count; row < rows; row++)
        memcpy(feats + (size_t)row * dim, last, row_bytes);
    return KM_OK;
}

void km_corpus_prefetch(const km_corpus *corpus, const km_shape *shape, const km_chunk *chunk,
                        const km_view *view) {
    const int64_t length = corpus->num_frames[chunk->utterance];
    const int64_t begin = (int64_t)chunk->start - shape->left + shape->label_delay;
    const int64_t rows = (int64_t)shape->left + shape->width + shape->right;
    const int64_t low = clamp(begin, 0, length - 1), high = clamp(begin + rows - 1, 0, length - 1);
    km_matrix_prefetch(view, corpus->matrices + chunk->utterance,
                       (int32_t)(corpus->first_row[chunk->utterance] + low), (int32_t)(high - low + 1));
}

static int64_t label_at(const km_labels *labels, int64_t index) {
    return labels->narrow != NULL ? labels->narrow[index] : labels->wide[index];
}

/* One label for each frame. */
static void single_labels(const km_labels *labels, const km_shape *shape, const km_chunk *chunk,
                          const km_out *out) {
    const int64_t utterance = labels->frames[chunk->utterance];
    for (int32_t i = 0; i < shape->width; i++) {
        const int64_t t = (int64_t)chunk->start + i;
        const int mine = t >= chunk->first_label && t < chunk->end_label;
        out->labels[i] = mine ? label_at(labels, utterance + t) : -1;
        if (out->weights != NULL) out->weights[i] = mine ? 1.0F : 0.0F;
    }
}

static void several_labels(const km_labels *labels, const km_shape *shape, const km_chunk *chunk,
                           const km_out *out) {
    const int32_t targets = labels->targets;
    const int64_t base = labels->entries[chunk->utterance];
    const int32_t *ends = labels->ends + labels->frames[chunk->utterance];
    for (int64_t i = 0; i < (int64_t)shape->width * targets; i++)
        out->labels[i] = -1;
    if (out->weights != NULL)
        memset(out->weights, 0, (size_t)shape->width * (size_t)targets * sizeof *out->weights);
    for (int32_t t = chunk->first_label; t < chunk->end_label; t++) {
        const size_t at = (size_t)(t - chunk->start) * (size_t)targets;
        const int32_t begin = t > 0 ? ends[t - 1] : 0;
        for (int32_t j = begin; j < ends[t]; j++) {
            out->labels[at + (size_t)(j - begin)] = label_at(labels, base + j);
            if (out->weights != NULL)
                out->weights[at + (size_t)(j - begin)] =
                    labels->weights != NULL ? labels->weights[base + j] : 1.0F;
        }
    }
}

static int chunk_ivector(const km_ivectors *ivectors, const km_chunk *chunk, const km_view *view, float *out,
                         km_scratch *scratch, km_error *error) {
    const uint64_t labelled = (uint64_t)chunk->end_label - (uint64_t)chunk->first_label;
    const int64_t frame = chunk->first_label + (int64_t)(chunk->draw % labelled);
    const int32_t utterance = chunk->utterance, rows = ivectors->num_rows[utterance];
    const int64_t row = clamp(frame / ivectors->period, 0, rows - 1) + ivectors->first_row[utterance];
    return km_matrix_rows(view, ivectors->matrices + utterance, (int32_t)row, 1, out, scratch, error);
}

int km_corpus_chunk(const km_corpus *corpus, const km_shape *shape, const km_chunk *chunk,
                    const km_view *view, const km_view *ivectors, const km_out *out, km_scratch *scratch,
                    km_error *error) {
    if (chunk_features(corpus, shape, chunk, view, out->feats, scratch, error) != KM_OK) {
        error->utterance = chunk->utterance;
        return KM_FAILED;
    }
    if (corpus->ivectors.dim > 0 &&
        chunk_ivector(&corpus->ivectors, chunk, ivectors, out->ivector, scratch, error) != KM_OK) {
        error->utterance = corpus->num_utterances + chunk->utterance;
        return KM_FAILED;
    }
    if (corpus->labels.entries == NULL)
        single_labels(&corpus->labels, shape, chunk, out);
    else
        several_labels(&corpus->labels, shape, chunk, out);
    return KM_OK;
}
