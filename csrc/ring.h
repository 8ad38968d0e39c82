/* The prefetch ring: reader threads fill a ring of the caller's minibatch buffers ahead of the consumer.
 *
 * Step s always lands in buffer s mod depth and the steps are handed out in order, so what the consumer sees
 * does not depend on the number of threads. A thread takes the next step that nobody has, waits until its
 * buffer is free, and fills it alone. A failure belongs to its step: the consumer gets every step before it.
 *
 * One consumer thread. Corpus, plan and buffers are borrowed, and must outlive the ring: km_ring_free joins
 * the threads, and nothing is touched after it returns.
 */
#ifndef KALDI_MPI_RING_H
#define KALDI_MPI_RING_H

#include "corpus.h"
#include "plan.h"

/* python: begin */
enum { KM_READY = 1, KM_END = 2, KM_NOT_YET = 3 };

typedef struct km_ring km_ring;

typedef struct {
    int64_t step;          /* over all epochs */
    int32_t buffer;        /* which of the buffers holds it */
    int32_t num_chunks;    /* of this rank; may be 0 in an epoch's last step */
    int64_t frames;        /* labelled frames of this rank */
    int64_t global_frames; /* and of all ranks */
} km_minibatch;

typedef struct {
    double consumer_waited; /* seconds that the consumer waited for data */
    double readers_waited;  /* seconds that threads waited for a free buffer, summed over them */
    int64_t bytes_read;
    int64_t frames; /* labelled frames handed to the consumer */
} km_counters;

/* feats[i]: B * (left + width + right) * dim floats; labels[i]: B * width; `depth` buffers of B chunks each,
 * B being the plan's chunks per minibatch. Delivers the steps first_step .. end_step-1 of one rank.
 * NULL on failure. */
km_ring *km_ring_new(const km_corpus *corpus, km_plan *plan, const km_shape *shape, int32_t rank,
                     int32_t threads, int32_t depth, float *const *feats, int64_t *const *labels,
                     int64_t first_step, int64_t end_step, km_error *error);

/* Stops and joins the threads, in mid-minibatch if need be. */
void km_ring_free(km_ring *ring);

/* Frees the buffer of the minibatch delivered before, and waits up to milliseconds for the next one.
 * KM_READY: *minibatch is it; KM_END: there are no more; KM_NOT_YET: call again (the caller may look at its
 * signals); KM_FAILED: *error says why, and so it will at every later call. */
int km_ring_next(km_ring *ring, int32_t milliseconds, km_minibatch *minibatch, km_error *error);

void km_ring_counters(km_ring *ring, km_counters *counters);
/* python: end */

#endif
