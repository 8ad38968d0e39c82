/* The plan: which chunks there are, and which of them each rank takes at each step of each epoch.
 *
 * An utterance of L frames gives ceil(L / width) chunks, at 0, width, 2 * width, ...; the last one is moved
 * back to end with the utterance, where that is possible. Epoch e is a permutation of all chunks, seeded by
 * (seed, e) and so the same on every rank. Step k of an epoch takes its positions k*N*B .. (k+1)*N*B - 1 for
 * N ranks with B chunks each; of the M positions of a step rank r has M*r/N .. M*(r+1)/N - 1.
 *
 * Steps are numbered over all epochs. A plan may be used by several threads.
 */
#ifndef KALDI_MPI_PLAN_H
#define KALDI_MPI_PLAN_H

#include "corpus.h"

/* python: begin */
typedef struct km_plan km_plan;

/* num_frames (num_utterances values, each > 0) is borrowed for the plan's life. NULL on failure. */
km_plan *km_plan_new(const int32_t *num_frames, int32_t num_utterances, int32_t width,
                     int32_t chunks_per_minibatch, int32_t num_ranks, uint64_t seed, int32_t shuffle,
                     km_error *error);
void km_plan_free(km_plan *plan);

int64_t km_plan_num_chunks(const km_plan *plan);
int64_t km_plan_steps_per_epoch(const km_plan *plan);

/* Labelled frames of a step over all ranks, or -1 on failure. */
int64_t km_plan_frames_of_step(km_plan *plan, int64_t step, km_error *error);
/* python: end */

/* The positions first .. first+count-1 of an epoch. */
typedef struct {
    int64_t first, count;
} km_span;

km_span km_plan_step(const km_plan *plan, int64_t step);
km_span km_plan_share(const km_plan *plan, int64_t step, int32_t rank);

/* The order of the epoch that a step is in: position -> chunk. NULL on failure. The order stays valid until
 * the same step is released. */
const uint32_t *km_plan_acquire(km_plan *plan, int64_t step, km_error *error);
void km_plan_release(km_plan *plan, int64_t step);

km_chunk km_plan_chunk(const km_plan *plan, uint32_t chunk);

/* Labelled frames of the chunks at the given positions of an order. */
int64_t km_plan_frames(const km_plan *plan, const uint32_t *order, km_span span);

#endif
