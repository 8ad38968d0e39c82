/* The index of one archive of nnet3 examples, made by one sequential pass over it in large blocks. */
#ifndef KALDI_MPI_EGS_SCAN_H
#define KALDI_MPI_EGS_SCAN_H

#include "examples.h"

/* python: begin */
/* A unit, as in examples.h. */
typedef struct {
    int64_t begin; /* of its example: where the \0B stands */
    int32_t size;  /* bytes of the example from there */
    int32_t n;
    int32_t frames; /* output rows with a label */
    int32_t shape;  /* index into shapes */
} km_unit;

/* The index of an archive, or of its beginning; zero-initialised is valid, and of nothing. */
typedef struct {
    int64_t num_units, units_room;
    km_unit *units;
    int32_t num_shapes;
    int64_t shapes_room;
    km_shape *shapes;
    int64_t num_examples;
    int32_t feat_dim, ivector_dim, num_pdfs; /* not yet known as long as there is no example */
    int32_t num_targets;                     /* the most pairs of any output row */
    int32_t has_weights;                     /* 1 if any weight differs from 1 */
    int64_t entry; /* where the next example's key stands; at the end, the size of the file */
} km_egs_index;

/* Goes on with the index of an archive to its end; `output` is the output's name. Memory: a block of 4 MiB,
 * or one example if that is larger (at most 1 GiB), and the units. After a failure the index is that of the
 * examples before the one at fault, which index->entry says. */
int km_egs_scan(const km_file *file, const char *output, km_egs_index *index, km_error *error);

/* Leaves the example at index->entry out: moves on to the next place where an example begins, to all
 * appearances, or to the end of the file. */
int km_egs_skip(const km_file *file, km_egs_index *index, km_error *error);

/* Frees what is in it. */
void km_egs_index_free(km_egs_index *index);
/* python: end */

#endif
