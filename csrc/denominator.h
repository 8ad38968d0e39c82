/* The denominator of chain (LF-MMI) training: forward and backward over the denominator graph, in probability
 * space, with the leaky HMM (Povey et al. 2016, section 2; Kaldi's chain-denominator).
 *
 * Sequences are worked on KM_LANES at a time, one a lane, through all frames: a block's states and outputs
 * then stay in the cache, arcs are read once for all of its lanes, and no lane depends on another: results
 * are the same for any number of threads and any place in the minibatch. Storage is float32. */
#ifndef KALDI_MPI_DENOMINATOR_H
#define KALDI_MPI_DENOMINATOR_H

#include <stdint.h>

/* python: begin */
enum { KM_LANES = 16 };

/* Arcs into a state stand in groups of the same pdf: the output's probability is a factor of the group's sum.
 * The arrays belong to the caller. */
typedef struct {
    int32_t num_states, num_pdfs, num_groups;
    const float *initial;       /* per state */
    const int32_t *first_group; /* per state, and num_groups: the groups of arcs into it */
    const int32_t *group_pdfs;  /* per group */
    const int64_t *first_in;    /* per group, and the number of arcs */
    const int32_t *sources;     /* per arc, by groups */
    const float *in_probs;      /* per arc, by groups */
    const int64_t *first_out;   /* per state, and the number of arcs */
    const int32_t *out_groups;  /* per arc, by the states they leave: the group it is in */
    const float *out_probs;     /* the same */
} km_denominator_graph;

/* Outputs of a minibatch; strides are in floats, the pdfs of a row stand together. */
typedef struct {
    const float *values; /* of any size, NaN too: see km_denominator */
    int64_t sequence_stride, frame_stride;
    int32_t sequences, frames; /* frames >= 1 */
} km_outputs;

/* What is found. */
typedef struct {
    double *log_probs;  /* per sequence */
    float *derivative;  /* like the outputs, with their strides; NULL: only log_probs are wanted */
    float scale;        /* of what is written to `derivative` */
    int32_t checked;    /* for how many of the first frames the sums below are taken */
    double *state_sums; /* (checked, sequences): sum over states of alpha times beta, 1 but for rounding */
    double *pdf_sums;   /* (checked, sequences): sum over pdfs of the occupation, 1 but for rounding */
} km_denominator_sums;

/* How many floats of memory a call takes, for any number of sequences. */
int64_t km_denominator_floats(const km_denominator_graph *graph, int32_t frames);

/* Log-probability of the sequences begin .. end - 1, and the occupation of each pdf at each frame times
 * `scale`, written to `derivative`. Outputs are limited to -30 .. 30, and NaN is -30. `leaky` is the
 * coefficient of the leaky HMM. `memory` is as km_denominator_floats says; calls with memory of their own may
 * run at the same time. */
void km_denominator(const km_denominator_graph *graph, const km_outputs *outputs, float leaky, int32_t begin,
                    int32_t end, const km_denominator_sums *sums, float *memory);
/* python: end */

#endif
