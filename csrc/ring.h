/* The prefetch ring: reader threads fill a ring of the caller's minibatch buffers ahead of the consumer.
 *
 * The ring delivers one step at each *position* 0, 1, 2, ...: a run of consecutive steps, or, made with
 * KM_ON_REQUEST, the steps that km_ring_request names, in that order. Position p always lands in buffer
 * p mod depth and the positions are handed out in order, so what the consumer sees does not depend on the
 * number of threads. A thread that finds the next position's buffer free takes it and fills it alone. A
 * failure belongs to its position: the consumer gets every one before it.
 *
 * One consumer thread; steps may be requested by any. Corpus, plan and buffers are borrowed, and must outlive
 * the ring: km_ring_free joins the threads, and nothing is touched after it returns.
 */
#ifndef KALDI_MPI_RING_H
#define KALDI_MPI_RING_H

#include "corpus.h"
#include "plan.h"

/* python: begin */
enum { KM_READY = 1, KM_END = 2, KM_NOT_YET = 3, KM_FULL = 4 };
enum { KM_ON_REQUEST = -1 };

typedef struct km_ring km_ring;

typedef struct {
    int64_t step;          /* over all epochs */
    int32_t buffer;        /* which of the buffers holds it */
    int32_t num_chunks;    /* of this rank; may be 0 in an epoch's last step */
    int64_t frames;        /* labelled frames of this rank */
    int64_t global_frames; /* and of all ranks */
} km_minibatch;

typedef struct {
    double consumer_waited; /* seconds that the consumer waited for data (or for a request) */
    double
        readers_waited; /* seconds that threads waited for a free buffer (or a request), summed over them */
    int64_t bytes_read;
    int64_t frames; /* labelled frames handed to the consumer */
} km_counters;

/* feats[i]: B * (left + width + right) * dim floats; labels[i]: B * width; `depth` buffers of B chunks each,
 * B being the plan's chunks per minibatch. Delivers one rank's share of the steps first_step .. end_step-1;
 * first_step KM_ON_REQUEST: of the steps requested (end_step is not looked at). NULL on failure. */
km_ring *km_ring_new(const km_corpus *corpus, km_plan *plan, const km_shape *shape, int32_t rank,
                     int32_t threads, int32_t depth, float *const *feats, int64_t *const *labels,
                     int64_t first_step, int64_t end_step, km_error *error);

/* Has the threads stop, in mid-minibatch if need be, and a waiting km_ring_next return; waits for nobody. */
void km_ring_stop(km_ring *ring);

/* The same, and joins the threads; nobody else may be using the ring. */
void km_ring_free(km_ring *ring);

/* Asks for a step (>= 0) to be delivered after those requested before. KM_OK; KM_FULL: `depth` steps are
 * requested and not yet delivered; KM_END: after km_ring_finish, or the ring is not KM_ON_REQUEST. */
int km_ring_request(km_ring *ring, int64_t step);

/* There will be no more requests: KM_END follows the last one. */
void km_ring_finish(km_ring *ring);

/* Frees the buffer of the minibatch delivered before, and waits up to milliseconds for the next one.
 * KM_READY: *minibatch is it; KM_END: there are no more; KM_NOT_YET: call again (the caller may look at its
 * signals), or the ring is stopped; KM_FAILED: *error says why, and so it will at every later call. */
int km_ring_next(km_ring *ring, int32_t milliseconds, km_minibatch *minibatch, km_error *error);

void km_ring_counters(km_ring *ring, km_counters *counters);
/* python: end */

#endif
