/* A directory of chain examples: how one unit of it is decoded.
 *
 * A unit is an example, merged or not: the FST of a merged one is of all its sequences, and these stay
 * together. A unit is read again in full, and checked against what the index says about it.
 */
#ifndef KALDI_MPI_CHAIN_EXAMPLES_H
#define KALDI_MPI_CHAIN_EXAMPLES_H

#include "chain_example.h"

/* python: begin */
/* All arrays are borrowed: their owner keeps them, unchanged, for as long as the examples are used. */
typedef struct {
    int32_t num_units;
    int32_t feat_dim;       /* columns of `input` */
    int32_t ivector_dim;    /* columns of `ivector`; 0: there is none */
    int32_t num_pdfs;       /* labels of the supervision */
    int32_t end2end;        /* 1: there is an FST for each sequence, else for each unit */
    const char *output;     /* name of the output */
    const km_file *files;   /* the archives */
    const int32_t *file_of; /* per unit: index into files */
    const int64_t *begin;   /* per unit: where its \0B stands */
    const int64_t *end;     /* per unit: where it has ended */
    const int32_t *states;  /* per unit: of its FSTs together */
    const int32_t *arcs;    /* per unit: the same */
    const float *weights;   /* per unit: of its supervision */
} km_chain_examples;

/* Where one unit goes. */
typedef struct {
    float *feats;         /* sequences * rows * feat_dim */
    float *ivectors;      /* sequences * ivector_dim; NULL where there are none */
    float *deriv_weights; /* sequences * width; NULL where every one is 1 */
} km_chain_out;

/* Writes one unit, read from its archive; as km_chain_examples_chunk. */
int km_chain_examples_read(const km_chain_examples *examples, const km_shape *shape, int32_t unit,
                           const km_chain_out *out, km_graphs *graphs, km_error *error);
/* python: end */

/* Writes one unit, of the given shape, and appends its FSTs to `graphs`; after a failure these are as before,
 * and error->utterance is the unit. `view` is of the unit's archive. Any number of threads may read the
 * examples. */
int km_chain_examples_chunk(const km_chain_examples *examples, const km_shape *shape, int32_t unit,
                            const km_view *view, const km_chain_out *out, km_graphs *graphs,
                            km_scratch *scratch, km_error *error);

#endif
