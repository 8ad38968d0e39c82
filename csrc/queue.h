/* The prefetch queue: reader threads fill a queue of the caller's minibatch buffers ahead of the consumer.
 *
 * Minibatches are numbered 0, 1, 2, ... as they are delivered: they are consecutive steps, or, in a queue
 * made with KM_ON_REQUEST, the steps that km_queue_request names, in that order. Minibatch n always lands in
 * buffer n mod depth and the numbers are handed out in order, so what the consumer sees does not depend on
 * how many threads there are. A thread that finds the next minibatch's buffer free takes it and fills it
 * alone. A failure belongs to its minibatch: the consumer gets every one before it.
 *
 * One consumer thread; steps may be requested by any. What the configuration points to must outlive the
 * queue: km_queue_free joins the threads, and nothing is touched after it returns.
 */
#ifndef KALDI_MPI_QUEUE_H
#define KALDI_MPI_QUEUE_H

#include "cache.h"
#include "chain_examples.h"
#include "examples.h"

/* python: begin */
enum { KM_READY = 1, KM_END = 2, KM_NOT_YET = 3, KM_FULL = 4 };
enum { KM_ON_REQUEST = -1 };

typedef struct km_queue km_queue;

typedef struct {
    int64_t step;   /* over all epochs */
    int32_t buffer; /* which of the buffers holds it */
    int32_t shape;  /* an index into the shapes */
    int32_t
        num_chunks; /* of this rank; may be 0 in an epoch's last steps. Of chain training: its sequences */
    int64_t epoch;
    int64_t frames;        /* labelled frames of this rank, without those of bad units */
    int64_t global_frames; /* and of all ranks, with those */
    km_graphs graphs;      /* of chain training: what the buffer's have in them */
    float weight;          /* of chain training: of each sequence's supervision */
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
    float *feats;     /* B * rows * dim */
    int64_t *labels;  /* B * width * targets */
    float *weights;   /* the same, or of chain training B * width; NULL where every weight is 1 */
    float *ivectors;  /* B * ivector_dim; NULL where there are none */
    km_graphs graphs; /* of chain training: with nothing in them, and room for the largest minibatch */
} km_buffer;

typedef struct {
    const km_corpus *corpus;        /* one of these three, */
    const km_examples *examples;    /* the others */
    const km_chain_examples *chain; /* are NULL */
    int32_t single_frames;          /* a chunk is one labelled frame of an example, not all of it */
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
} km_queue_config;

/* Everything that the configuration points to is borrowed. Delivers one rank's share of the steps first_step
 * .. end_step-1; first_step KM_ON_REQUEST: of the steps requested (end_step is not looked at). NULL on
 * failure. */
km_queue *km_queue_new(const km_queue_config *config, km_error *error);

/* Has the threads stop, in mid-minibatch if need be, and a waiting km_queue_next return; waits for nobody. */
void km_queue_stop(km_queue *queue);

/* The same, and joins the threads; nobody else may be using the queue. */
void km_queue_free(km_queue *queue);

/* Asks for a step (>= 0) to be delivered after those requested before. KM_OK; KM_FULL: `depth` steps are
 * requested and not yet delivered; KM_END: after km_queue_finish, or the queue is not KM_ON_REQUEST. */
int km_queue_request(km_queue *queue, int64_t step);

/* There will be no more requests: KM_END follows the last one. */
void km_queue_finish(km_queue *queue);

/* Frees the buffer of the minibatch delivered before, and waits up to milliseconds for the next one.
 * KM_READY: *minibatch is it; KM_END: there are no more; KM_NOT_YET: call again (the caller may look at its
 * signals), or the queue is stopped; KM_FAILED: *error says why, and so it will at every later call. */
int km_queue_next(km_queue *queue, int32_t milliseconds, km_minibatch *minibatch, km_error *error);

void km_queue_counters(km_queue *queue, km_counters *counters);

/* Why the bad unit `number` (from 0, in the order in which they were met) could not be read; KM_END: there
 * are not so many. A chunk of a bad unit is delivered with features 0 and without labels; of chain training
 * its minibatch is without it. */
int km_queue_bad(km_queue *queue, int32_t number, km_error *error);
/* python: end */

#endif
