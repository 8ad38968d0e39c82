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

/* An archive's index; zero-initialised is valid and empty. */
typedef struct {
    int64_t num_units;
    km_unit *units;
    int32_t num_shapes;
    km_shape *shapes;
    int32_t feat_dim, ivector_dim, num_pdfs; /* -1 as long as there is no unit */
    int32_t num_targets;                     /* the most pairs of any output row */
    int32_t has_weights;                     /* 1 if any weight differs from 1 */
    int64_t num_examples;
    int64_t entry; /* where the key of the example stands that was read last */
} km_egs_index;

/* Makes the index of an archive; `output` is the output's name. Memory: a block of 4 MiB, or one example if
 * that is larger (at most 1 GiB), and the units. After a failure index->entry is the example at fault. */
int km_egs_scan(const km_file *file, const char *output, km_egs_index *index, km_error *error);

/* Frees what is in it. */
void km_egs_index_free(km_egs_index *index);
/* python: end */

#endif
