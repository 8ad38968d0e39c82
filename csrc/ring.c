#define _POSIX_C_SOURCE 200809L

#include "ring.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    float *feats;
    int64_t *labels;
    int64_t step;  /* to be read at the last position requested of this slot; unused for a run of steps */
    int64_t ready; /* the position that it holds; -1 before the first one */
    int failed;
    km_minibatch minibatch;
    km_error error;
} slot;

struct km_ring {
    const km_corpus *corpus;
    km_plan *plan;
    km_shape shape;
    int32_t rank, depth, num_threads;
    int on_request;
    int64_t first_step; /* at position 0, unless on request */
    slot *slots;
    pthread_t *threads;
    atomic_int stop; /* written under the mutex; also looked at without it, between chunks */

    pthread_mutex_t mutex; /* guards everything below, slot.step and slot.ready */
    pthread_cond_t work;   /* `requested`, `released`, `end` or `stop` changed */
    pthread_cond_t data;   /* a slot became ready, or `end` or `stop` changed */
    int64_t requested;     /* positions before this one have their step */
    int64_t taken;         /* next position that no thread has */
    int64_t end;           /* positions from here on are not wanted */
    int64_t released;      /* positions before this one are done with: their buffers are free */
    int64_t delivered;     /* next position of the consumer; released or released + 1 */
    int finished;          /* no more requests */
    km_counters counters;
};

static double seconds_now(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Fills the slot with one step's share of this rank; no lock is held. */
static int fill(km_ring *ring, int64_t step, int64_t position, slot *into, km_scratch *scratch) {
    const km_shape *shape = &ring->shape;
    const uint32_t *order = km_plan_acquire(ring->plan, step, &into->error);
    if (order == NULL) return KM_FAILED;
    const km_span share = km_plan_share(ring->plan, step, ring->rank);
    const size_t feats_size =
        ((size_t)shape->left + (size_t)shape->width + (size_t)shape->right) * (size_t)ring->corpus->dim;
    int status = KM_OK;
    for (int64_t i = 0; i < share.count && status == KM_OK; i++) {
        if (atomic_load_explicit(&ring->stop, memory_order_relaxed)) break;
        const km_chunk chunk = km_plan_chunk(ring->plan, order[share.first + i]);
        const km_view view = {ring->corpus->files + ring->corpus->file_of[chunk.utterance], NULL, 0, 0};
        const km_out out = {into->feats + (size_t)i * feats_size, into->labels + i * shape->width, NULL,
                            NULL};
        status = km_corpus_chunk(ring->corpus, shape, &chunk, &view, &out, scratch, &into->error);
    }
    into->minibatch.step = step;
    into->minibatch.buffer = (int32_t)(position % ring->depth);
    into->minibatch.num_chunks = (int32_t)share.count;
    into->minibatch.frames = km_plan_frames(ring->plan, order, share);
    into->minibatch.global_frames = km_plan_frames(ring->plan, order, km_plan_step(ring->plan, step));
    km_plan_release(ring->plan, step);
    return status;
}

/* With the mutex held: whether the next position has a step and a free buffer. */
static int has_work(const km_ring *ring) {
    return ring->taken < ring->requested && ring->taken - ring->released < ring->depth;
}

/* With the mutex held: waits until there is work; 0 where the ring is stopped or has come to its end instead.
 */
static int wait_for_work(km_ring *ring) {
    if (!ring->stop && ring->taken < ring->end && !has_work(ring)) {
        const double since = seconds_now();
        while (!ring->stop && ring->taken < ring->end && !has_work(ring))
            (void)pthread_cond_wait(&ring->work, &ring->mutex);
        ring->counters.readers_waited += seconds_now() - since;
    }
    return !ring->stop && ring->taken < ring->end;
}

/* With the mutex held: nothing from this position on is wanted. */
static void end_at(km_ring *ring, int64_t position) {
    if (position >= ring->end) return;
    ring->end = position;
    (void)pthread_cond_broadcast(&ring->work);
    (void)pthread_cond_signal(&ring->data);
}

static void *read_steps(void *argument) {
    km_ring *ring = argument;
    km_scratch scratch = {0};
    (void)pthread_mutex_lock(&ring->mutex);
    while (wait_for_work(ring)) {
        const int64_t position = ring->taken++;
        slot *mine = ring->slots + position % ring->depth;
        const int64_t step = ring->on_request ? mine->step : ring->first_step + position;
        (void)pthread_mutex_unlock(&ring->mutex);

        const int64_t before = scratch.bytes_read;
        const int status = fill(ring, step, position, mine, &scratch);

        (void)pthread_mutex_lock(&ring->mutex);
        ring->counters.bytes_read += scratch.bytes_read - before;
        mine->failed = status != KM_OK;
        mine->ready = position;
        if (mine->failed) end_at(ring, position + 1); /* nothing after it will be asked for */
        (void)pthread_cond_signal(&ring->data);
    }
    (void)pthread_mutex_unlock(&ring->mutex);
    km_scratch_free(&scratch);
    return NULL;
}

/* Signals are the consumer's affair: a reader thread must not be the one that Ctrl-C interrupts. */
static int start_threads(km_ring *ring, int32_t threads) {
    sigset_t all, before;
    int status = 0;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    while (status == 0 && ring->num_threads < threads) {
        status = pthread_create(ring->threads + ring->num_threads, NULL, read_steps, ring);
        if (status == 0) ring->num_threads++;
    }
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return status;
}

km_ring *km_ring_new(const km_corpus *corpus, km_plan *plan, const km_shape *shape, int32_t rank,
                     int32_t threads, int32_t depth, float *const *feats, int64_t *const *labels,
                     int64_t first_step, int64_t end_step, km_error *error) {
    const int on_request = first_step == KM_ON_REQUEST;
    if (threads <= 0 || depth <= 0 || (first_step < 0 && !on_request) || rank < 0) {
        (void)km_fail(error, -1, "a ring needs threads, buffers and a step to start from");
        return NULL;
    }
    km_ring *ring = calloc(1, sizeof *ring);
    slot *slots = calloc((size_t)depth, sizeof *slots);
    pthread_t *handles = calloc((size_t)threads, sizeof *handles);
    if (ring == NULL || slots == NULL || handles == NULL) {
        free(ring);
        free(slots);
        free(handles);
        (void)km_fail(error, -1, "out of memory: a ring of %d buffers", (int)depth);
        return NULL;
    }
    ring->corpus = corpus;
    ring->plan = plan;
    ring->shape = *shape;
    ring->rank = rank;
    ring->depth = depth;
    ring->slots = slots;
    ring->threads = handles;
    ring->on_request = on_request;
    ring->first_step = first_step;
    ring->requested = on_request ? 0 : INT64_MAX;
    ring->end = on_request ? INT64_MAX : end_step - first_step;
    for (int32_t i = 0; i < depth; i++) {
        slots[i].feats = feats[i];
        slots[i].labels = labels[i];
        slots[i].ready = -1;
    }
    (void)pthread_mutex_init(&ring->mutex, NULL);
    (void)pthread_cond_init(&ring->work, NULL);
    (void)pthread_cond_init(&ring->data, NULL);
    const int status = start_threads(ring, threads);
    if (status == 0) return ring;
    (void)km_fail(error, -1, "cannot start %d reader threads: %s", (int)threads, strerror(status));
    km_ring_free(ring);
    return NULL;
}

void km_ring_stop(km_ring *ring) {
    (void)pthread_mutex_lock(&ring->mutex);
    ring->stop = 1;
    (void)pthread_cond_broadcast(&ring->work);
    (void)pthread_cond_signal(&ring->data);
    (void)pthread_mutex_unlock(&ring->mutex);
}

void km_ring_free(km_ring *ring) {
    if (ring == NULL) return;
    km_ring_stop(ring);
    for (int32_t i = 0; i < ring->num_threads; i++)
        (void)pthread_join(ring->threads[i], NULL);
    (void)pthread_cond_destroy(&ring->data);
    (void)pthread_cond_destroy(&ring->work);
    (void)pthread_mutex_destroy(&ring->mutex);
    free(ring->threads);
    free(ring->slots);
    free(ring);
}

int km_ring_request(km_ring *ring, int64_t step) {
    int result = KM_OK;
    (void)pthread_mutex_lock(&ring->mutex);
    if (!ring->on_request || ring->finished) {
        result = KM_END;
    } else if (ring->requested - ring->delivered >= ring->depth) {
        result = KM_FULL;
    } else {
        ring->slots[ring->requested % ring->depth].step = step;
        ring->requested++;
        (void)pthread_cond_signal(&ring->work);
    }
    (void)pthread_mutex_unlock(&ring->mutex);
    return result;
}

void km_ring_finish(km_ring *ring) {
    (void)pthread_mutex_lock(&ring->mutex);
    if (ring->on_request) {
        ring->finished = 1;
        end_at(ring, ring->requested);
    }
    (void)pthread_mutex_unlock(&ring->mutex);
}

/* With the mutex held: waits until the position is ready, or will never be, or the time is over. */
static void wait_for_data(km_ring *ring, int64_t position, int32_t milliseconds) {
    const slot *wanted = ring->slots + position % ring->depth;
    if (wanted->ready == position) return;
    const double since = seconds_now();
    struct timespec until; /* the clock that condition variables use unless told otherwise */
    (void)clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += milliseconds / 1000;
    until.tv_nsec += (long)(milliseconds % 1000) * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    int status = 0;
    while (wanted->ready != position && position < ring->end && !ring->stop && status != ETIMEDOUT)
        status = pthread_cond_timedwait(&ring->data, &ring->mutex, &until);
    ring->counters.consumer_waited += seconds_now() - since;
}

int km_ring_next(km_ring *ring, int32_t milliseconds, km_minibatch *minibatch, km_error *error) {
    int result = KM_NOT_YET;
    (void)pthread_mutex_lock(&ring->mutex);
    if (ring->released < ring->delivered) {
        ring->released = ring->delivered;
        (void)pthread_cond_broadcast(&ring->work);
    }
    const int64_t position = ring->delivered;
    const slot *next = ring->slots + position % ring->depth;
    if (position < ring->end) wait_for_data(ring, position, milliseconds);
    if (position >= ring->end) {
        result = KM_END;
    } else if (next->ready == position && next->failed) {
        *error = next->error;
        result = KM_FAILED;
    } else if (next->ready == position) {
        *minibatch = next->minibatch;
        ring->delivered++;
        ring->counters.frames += next->minibatch.frames;
        result = KM_READY;
    }
    (void)pthread_mutex_unlock(&ring->mutex);
    return result;
}

void km_ring_counters(km_ring *ring, km_counters *counters) {
    (void)pthread_mutex_lock(&ring->mutex);
    *counters = ring->counters;
    (void)pthread_mutex_unlock(&ring->mutex);
}
