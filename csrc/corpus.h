/* A corpus in memory: where each utterance's features and i-vectors lie, its labels, its normalisation and
 * transform; and how one chunk of it is cut. All arrays are borrowed: their owner keeps them, unchanged, for
 * as long as the corpus is used. Any number of threads may read one corpus.
 */
#ifndef KALDI_MPI_CORPUS_H
#define KALDI_MPI_CORPUS_H

#include "file.h"
#include "matrix.h"
#include "transform.h"

/* python: begin */
/* Labels of all frames, one utterance behind the other. */
typedef struct {
    int32_t targets;        /* the most labels of a frame, > 0 */
    const int64_t *frames;  /* per utterance: index of its first frame */
    const int64_t *entries; /* per utterance: index of its first label; NULL: each frame has one label, and
                             * its index is the frame's */
    const int32_t *ends;    /* per frame, with entries: labels of its utterance up to its end */
    const uint16_t *narrow; /* per label: an id, where all ids fit; */
    const int32_t *wide;    /* else here; one of the two is NULL */
    const float *weights;   /* per label; NULL: all are 1 */
} km_labels;

/* One i-vector for every `period` frames. */
typedef struct {
    int32_t dim;               /* 0: there are none, and the rest is not looked at */
    int32_t period;            /* > 0 */
    const km_file *files;      /* the archives */
    const int32_t *file_of;    /* per utterance: index into files */
    const km_matrix *matrices; /* per utterance: dim columns */
    const int64_t *begin;      /* per utterance: its values are bytes begin .. end-1 of the file */
    const int64_t *end;
    const int32_t *first_row; /* per utterance: where a row range of the scp starts, else 0 */
    const int32_t *num_rows;  /* per utterance, > 0 */
} km_ivectors;

typedef struct {
    int32_t num_utterances;
    int32_t dim;               /* columns of a chunk's rows */
    int32_t input_dim;         /* columns of every matrix */
    const km_file *files;      /* the archives */
    const int32_t *file_of;    /* per utterance: index into files */
    const km_matrix *matrices; /* per utterance */
    const int32_t *first_row;  /* per utterance: where a row range of the scp starts, else 0 */
    const int32_t *num_frames; /* per utterance, > 0 */
    km_labels labels;
    const int32_t *norm_of;        /* per utterance: index into norms */
    const float *norms;            /* per speaker input_dim offsets, then scales; NULL: no normalisation */
    int32_t scales;                /* 1: x * scale + offset, 0: x + offset */
    const km_transform *transform; /* after normalisation; NULL: none, and dim == input_dim */
    km_ivectors ivectors;
} km_corpus;

/* Where one chunk goes. */
typedef struct {
    float *feats;    /* rows * dim */
    int64_t *labels; /* width * targets pdf-ids, -1 where there is none */
    float *weights;  /* width * targets, 0 where there is no label; NULL where every weight is 1 */
    float *ivector;  /* ivector_dim; NULL where there are none */
} km_out;

typedef struct {
    int32_t width;       /* labelled frames, > 0 */
    int32_t left, right; /* context rows before and after, >= 0 */
    int32_t label_delay; /* rows by which the input is later than the labels, >= 0 */
    int32_t subsampling; /* frames from one label to the next, > 0 */
    int32_t sequences;   /* chunks of this shape that one unit has and that stay together, > 0 */
} km_shape;

/* All rows of an utterance, normalised and transformed: num_frames * dim floats. */
int km_corpus_features(const km_corpus *corpus, int32_t utterance, float *out, km_error *error);

/* Offsets and scales for CMVN from 2 x (dim+1) statistics (sums and count; sums of squares), in the
 * arithmetic of Kaldi's apply-cmvn: the variance is floored at 1e-20. Without norm_vars the scales are 1. */
int km_cmvn_norms(const double *stats, int32_t dim, int32_t norm_vars, float *norms, km_error *error);
/* python: end */

/* Input rows of a chunk. */
static inline size_t km_shape_rows(const km_shape *shape) {
    return (size_t)shape->left + ((size_t)shape->width - 1) * (size_t)shape->subsampling + 1 +
           (size_t)shape->right;
}

/* The part of an utterance that one chunk is about. */
typedef struct {
    int32_t utterance;
    int32_t number;      /* of the chunk in its utterance */
    int32_t start;       /* time of the chunk's first label */
    int32_t first_label; /* the labelled frames are first_label .. end_label-1; the others are -1, because */
    int32_t end_label;   /* they are beyond the end or belong to the chunk before */
    uint64_t draw;       /* random bits: which labelled frame the i-vector is of */
} km_chunk;

/* `view` is of the utterance's archive, and `ivectors` of that of its i-vectors (not looked at where there
 * are none). Writes the rows start-left+label_delay .. start+width-1+right+label_delay of the transformed
 * features (the edge rows repeated outside the utterance), the labels of the chunk's width frames, and the
 * i-vector of the labelled frame that the chunk's random bits choose. On failure error->utterance is set: the
 * utterance's index, to which num_utterances is added where it is the i-vector that cannot be read. */
int km_corpus_chunk(const km_corpus *corpus, const km_shape *shape, const km_chunk *chunk,
                    const km_view *view, const km_view *ivectors, const km_out *out, km_scratch *scratch,
                    km_error *error);

/* Has the processor fetch what km_corpus_chunk is about to be asked for. */
void km_corpus_prefetch(const km_corpus *corpus, const km_shape *shape, const km_chunk *chunk,
                        const km_view *view);

#endif
