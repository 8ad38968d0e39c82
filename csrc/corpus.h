/* A corpus in memory: where each utterance's features lie, its labels, its normalisation; and how one chunk
 * of it is cut. All arrays are borrowed: their owner keeps them, unchanged, for as long as the corpus is
 * used. Any number of threads may read one corpus.
 */
#ifndef KALDI_MPI_CORPUS_H
#define KALDI_MPI_CORPUS_H

#include "file.h"
#include "matrix.h"

/* python: begin */
typedef struct {
    int32_t num_utterances;
    int32_t dim;                /* columns of every matrix */
    const km_file *files;       /* the archives */
    const int32_t *file_of;     /* per utterance: index into files */
    const km_matrix *matrices;  /* per utterance */
    const int32_t *first_row;   /* per utterance: where a row range of the scp starts, else 0 */
    const int32_t *num_frames;  /* per utterance, > 0 */
    const int64_t *first_label; /* per utterance: index into labels; num_frames labels follow */
    const int32_t *labels;      /* >= 0 */
    const int32_t *norm_of;     /* per utterance: index into norms */
    const float *norms;         /* per speaker dim offsets, then dim scales; NULL: no normalisation */
    int32_t scales;             /* 1: x * scale + offset, 0: x + offset */
} km_corpus;

/* Where one chunk goes. */
typedef struct {
    float *feats;    /* rows * dim */
    int64_t *labels; /* width * targets pdf-ids, -1 where there is none */
    float *weights;  /* width * targets; NULL where every weight is 1 */
    float *ivector;  /* ivector_dim; NULL where there are none */
} km_out;

typedef struct {
    int32_t width;       /* labelled frames, > 0 */
    int32_t left, right; /* context rows before and after, >= 0 */
    int32_t label_delay; /* rows by which the input is later than the labels, >= 0 */
} km_shape;

/* All rows of an utterance, normalised: num_frames * dim floats. */
int km_corpus_features(const km_corpus *corpus, int32_t utterance, float *out, km_error *error);

/* Offsets and scales for CMVN from 2 x (dim+1) statistics (sums and count; sums of squares), in the
 * arithmetic of Kaldi's apply-cmvn: the variance is floored at 1e-20. Without norm_vars the scales are 1. */
int km_cmvn_norms(const double *stats, int32_t dim, int32_t norm_vars, float *norms, km_error *error);
/* python: end */

/* The part of an utterance that one chunk is about. */
typedef struct {
    int32_t utterance;
    int32_t number;      /* of the chunk in its utterance */
    int32_t start;       /* time of the chunk's first label */
    int32_t first_label; /* the labelled frames are first_label .. end_label-1; the others are -1, because */
    int32_t end_label;   /* they are beyond the end or belong to the chunk before */
    uint64_t draw;       /* random bits, for what is drawn for each chunk */
} km_chunk;

/* `view` is of the utterance's archive. Writes the rows start-left+label_delay ..
 * start+width-1+right+label_delay (the edge frames repeated outside the utterance) and the width labels of
 * one chunk. On failure error->utterance is set. */
int km_corpus_chunk(const km_corpus *corpus, const km_shape *shape, const km_chunk *chunk,
                    const km_view *view, const km_out *out, km_scratch *scratch, km_error *error);

#endif
