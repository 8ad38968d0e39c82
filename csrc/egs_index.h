/* The index of one archive of examples, as it grows: of nnet3 examples or of those of chain training. */
#ifndef KALDI_MPI_EGS_INDEX_H
#define KALDI_MPI_EGS_INDEX_H

#include "corpus.h"

/* python: begin */
/* A unit, as in examples.h or chain_examples.h. */
typedef struct {
    int64_t begin; /* of its example: where the \0B stands */
    int32_t size;  /* bytes of the example from there */
    int32_t n;
    int32_t frames; /* output rows with a label */
    int32_t shape;  /* index into shapes */
} km_unit;

/* What else is known of a unit of chain training: of its supervision. */
typedef struct {
    int32_t states, arcs; /* of its FSTs together */
    float weight;
} km_unit_graphs;

/* The index of an archive, or of its beginning; zero-initialised is valid, and of nothing. */
typedef struct {
    int32_t chain; /* 1: of chain examples; set before anything is in it */
    int64_t num_units, units_room, graphs_room;
    km_unit *units;
    km_unit_graphs *graphs; /* per unit, of chain examples */
    int32_t num_shapes;
    int64_t shapes_room;
    km_shape *shapes;
    int64_t num_examples;
    int32_t feat_dim, ivector_dim, num_pdfs; /* not yet known as long as there is no example */
    int32_t num_targets;                     /* the most pairs of any output row */
    int32_t has_weights;                     /* 1 if any weight, or derivative weight, differs from 1 */
    int32_t end2end;                         /* of chain examples: 1 if the FSTs are of a sequence each */
    int64_t entry; /* where the next example's key stands; at the end, the size of the file */
} km_egs_index;

/* Frees what is in it. */
void km_egs_index_free(km_egs_index *index);
/* python: end */

/* Checks that a dimension is that of the examples before, or takes note of the first one's; `offset` and
 * `name` are for messages. */
int km_egs_index_dim(const km_egs_index *index, int32_t *known, int32_t found, int64_t offset,
                     const char *name, km_error *error);

/* Appends a unit of this shape, with `graphs` where it is one of chain training, else NULL. */
int km_egs_index_add(km_egs_index *index, const km_unit *unit, const km_shape *shape,
                     const km_unit_graphs *graphs, km_error *error);

#endif
