/* The prefetch ring: reader threads fill a ring of the caller's minibatch buffers ahead of the consumer.
 *
 * The ring delivers one step at each *position* 0, 1, 2, ...: a run of consecutive steps, or, made with
 * KM_ON_REQUEST, the steps that km_ring_request names, in that order. Position p always lands in buffer
 * p mod depth and the positions are handed out in order, so what the consumer sees does not depend on the
 * number of threads. A thread that finds the next position's buffer free takes it and fills it alone. A
 * failure belongs to its position: the consumer gets every one before it.
 *
 * One consumer thread; steps may be requested by any. What the configuration points to must outlive the ring:
 * km_ring_free joins the threads, and nothing is touched after it returns.
 */
#ifndef KALDI_MPI_RING_H
#define KALDI_MPI_RING_H

#include "examples.h"
#include "store.h"

/* python: begin */
enum { KM_READY = 1, KM_END = 2, KM_NOT_YET = 3, KM_FULL = 4 };
enum { KM_ON_REQUEST = -1 };

typedef struct km_ring km_ring;

typedef struct {
    int64_t step;       /* over all epochs */
    int32_t buffer;     /* which of the buffers holds it */
    int32_t shape;      /* an index into the shapes */
    int32_t num_chunks; /* of this rank; may be 0 in an epoch's last steps */
    int64_t epoch;
    int64_t frames;        /* labelled frames of this rank, without those of bad units */
    int64_t global_frames; /* and of all ranks, with those */
} km_minibatch;

typedef struct {
    double consumer_waited; /* seconds that the consumer waited for data (or for a request), and */
    double
        readers_waited; /* that reader threads waited for a free buffer (or a request), summed over them, */
    double disk_waited; /* and for the bytes of a pool, summed over them */
    int64_t bytes_read;
    int64_t frames; /* labelled frames handed to the consumer */
    int64_t memory; /* bytes in use: pools and their orders; not the buffers, which are the caller's */
    int32_t bad;    /* units that could not be read, and were left out */
} km_counters;

/* Memory for one minibatch: of each shape, B chunks must fit. */
typedef struct {
    float *feats;    /* B * rows * dim */
    int64_t *labels; /* B * width * targets */
    float *weights;  /* the same; NULL where every weight is 1 */
    float *ivectors; /* B * ivector_dim; NULL where there are none */
} km_buffer;

typedef struct {
    const km_corpus *corpus;     /* one of these two, */
    const km_examples *examples; /* the other is NULL */
    km_units units;
    km_plan *plan;
    int32_t num_shapes;
    const km_shape *shapes;
    int32_t dim, ivector_dim, targets;
    int32_t rank;
    int32_t threads; /* that decode; one more reads ahead */
    int32_t depth;
    const km_buffer *buffers;
    int64_t first_step, end_step;
    int64_t bytes_per_second; /* read no faster than that; 0: as fast as possible */
    int32_t skip_bad;         /* units that may turn out to be unreadable */
} km_ring_config;

/* Everything that the configuration points to is borrowed. Delivers one rank's share of the steps first_step
 * .. end_step-1; first_step KM_ON_REQUEST: of the steps requested (end_step is not looked at). NULL on
 * failure. */
km_ring *km_ring_new(const km_ring_config *config, km_error *error);

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

/* Why the bad unit `number` (from 0, in the order in which they were met) could not be read; KM_END: there
 * are not so many. A chunk of a bad unit is delivered with features 0 and without labels. */
int km_ring_bad(km_ring *ring, int32_t number, km_error *error);
/* python: end */

#endif
