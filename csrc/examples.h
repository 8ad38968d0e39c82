/* A directory of nnet3 examples: how one unit of it is decoded.
 *
 * A unit is one chunk: an example, or, in a merged one, the rows whose Index has one n. The rows of `input`
 * and of the output must come in order of t without gaps, and the first output row's t lies `left` rows after
 * the first input row's. A unit is read again in full, and checked against what the index says about it.
 */
#ifndef KALDI_MPI_EXAMPLES_H
#define KALDI_MPI_EXAMPLES_H

#include "corpus.h"
#include "example.h"

/* python: begin */
/* So many (pdf, weight) pairs may an output row have that differ from 0. */
enum { KM_MAX_TARGETS = 256 };

/* All arrays are borrowed: their owner keeps them, unchanged, for as long as the examples are used. */
typedef struct {
    int32_t num_units;
    int32_t feat_dim;       /* columns of `input` */
    int32_t ivector_dim;    /* columns of `ivector`; 0: there is none */
    int32_t num_pdfs;       /* columns of the output */
    int32_t num_targets;    /* the most pairs of any output row */
    const char *output;     /* its name */
    const km_file *files;   /* the archives */
    const int32_t *file_of; /* per unit: index into files */
    const int64_t *begin;   /* per unit: where its example's \0B stands */
    const int64_t *end;     /* per unit: where its example has ended */
    const int32_t *n;       /* per unit: the n of its Index */
} km_examples;

/* Writes one unit, read from its archive; as km_examples_chunk. */
int km_examples_read(const km_examples *examples, const km_shape *shape, int32_t unit, const km_out *out,
                     km_error *error);
/* python: end */

/* In place of a frame's number: all of them. */
enum { KM_WHOLE = -1 };

/* Writes one unit, of the given shape, with frame KM_WHOLE; else of its labelled frames the one of this
 * number, from 0 (frames without a label have none), with shape->left rows before it and shape->right after
 * it: the width is 1. `view` is of the unit's archive. On failure error->utterance is the unit. Any number of
 * threads may read one km_examples. */
int km_examples_chunk(const km_examples *examples, const km_shape *shape, int32_t unit, int32_t frame,
                      const km_view *view, const km_out *out, km_scratch *scratch, km_error *error);

/* The inputs and outputs of an example that matter here; name_length 0: there is no such one. */
typedef struct {
    km_nnet_io input, ivector, output;
} km_roles;

/* Goes over an example at the cursor, and finds the roles; input and output are there after that, once. */
int km_example_roles(km_cursor *cursor, const char *output, km_roles *roles, km_error *error);

typedef struct {
    int32_t pdf;
    float weight;
} km_pair;

/* Goes through the rows of an output, sparse or not; only pairs with a weight that differs from 0 count. */
typedef struct {
    const km_cursor *cursor;
    const km_nnet_io *io;
    const unsigned char *bytes; /* sparse: the next row */
    km_scratch values, scratch; /* not sparse: decoded rows */
    int32_t row;                /* the next one */
    int32_t decoded, after;     /* rows decoded .. after-1 are in values */
    int32_t count;              /* pairs of the row that was read */
    km_pair pairs[KM_MAX_TARGETS];
} km_targets;

void km_targets_begin(km_targets *targets, const km_cursor *cursor, const km_nnet_io *io);
int km_targets_next(km_targets *targets, km_error *error);
void km_targets_skip(km_targets *targets);
void km_targets_free(km_targets *targets);

#endif
