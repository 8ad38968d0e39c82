#define _POSIX_C_SOURCE 200809L

#include "ring.h"

#include "thread.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    km_buffer buffer;
    int64_t step;  /* to be read at the last position requested of this slot; unused for a run of steps */
    int64_t ready; /* the position that it holds; -1 before the first one */
    int failed;
    km_minibatch minibatch;
    km_error error;
} slot;

struct km_ring {
    km_ring_config config;
    km_store *store;
    km_store *ivectors; /* the same pools of the utterances' i-vectors; NULL: there are none */
    km_shape *shapes;
    int32_t num_threads;
    int on_request;
    int64_t first_step; /* at position 0, unless on request */
    slot *slots;
    pthread_t *threads;
    int32_t *bad;         /* the units that could not be read, */
    km_error *bad_errors; /* and why */
    atomic_int stop;      /* written under the mutex; also looked at without it, between chunks */

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

/* With the mutex held: whether the unit is among the bad ones. */
static int is_bad(const km_ring *ring, int32_t unit) {
    for (int32_t i = 0; i < ring->counters.bad; i++)
        if (ring->bad[i] == unit) return 1;
    return 0;
}

/* Takes note of a unit that could not be read; whether one more is tolerated. */
static int tolerate(km_ring *ring, int32_t unit, const km_error *error) {
    (void)pthread_mutex_lock(&ring->mutex);
    int good = is_bad(ring, unit);
    if (!good && ring->counters.bad < ring->config.skip_bad) {
        ring->bad[ring->counters.bad] = unit;
        ring->bad_errors[ring->counters.bad++] = *error;
        good = 1;
    }
    (void)pthread_mutex_unlock(&ring->mutex);
    return good;
}

/* Where chunk `i` of a minibatch goes. */
static km_out place_of(const km_ring *ring, const km_buffer *buffer, const km_shape *shape, int64_t i) {
    const km_ring_config *config = &ring->config;
    const size_t rows = (size_t)shape->left + (size_t)shape->width + (size_t)shape->right, at = (size_t)i;
    const size_t feats = rows * (size_t)config->dim, labels = (size_t)shape->width * (size_t)config->targets;
    return (km_out){
        buffer->feats + at * feats,
        buffer->labels + at * labels,
        buffer->weights != NULL ? buffer->weights + at * labels : NULL,
        buffer->ivectors != NULL ? buffer->ivectors + at * (size_t)config->ivector_dim : NULL,
    };
}

static void clear(const km_ring *ring, const km_shape *shape, const km_out *out) {
    const size_t rows = (size_t)shape->left + (size_t)shape->width + (size_t)shape->right;
    const size_t labels = (size_t)shape->width * (size_t)ring->config.targets;
    memset(out->feats, 0, rows * (size_t)ring->config.dim * sizeof(float));
    for (size_t i = 0; i < labels; i++)
        out->labels[i] = -1;
    if (out->weights != NULL) memset(out->weights, 0, labels * sizeof(float));
    if (out->ivector != NULL) memset(out->ivector, 0, (size_t)ring->config.ivector_dim * sizeof(float));
}

/* The bytes of one pool, as far as they are in memory. */
typedef struct {
    const km_resident *units, *ivectors;
} pool_bytes;

/* A chunk and where its bytes are. */
typedef struct {
    km_chunk chunk;
    km_view view;
    km_view ivectors; /* of the utterance, where there are some */
} task;

static task find_chunk(const km_ring *ring, const km_step *step, int64_t i, const pool_bytes *resident) {
    task found = {.chunk = km_plan_chunk(ring->config.plan, step->epoch, step->chunks[i])};
    const int32_t unit = found.chunk.utterance;
    found.view = km_store_view(ring->store, resident->units, unit);
    if (ring->ivectors != NULL) found.ivectors = km_store_view(ring->ivectors, resident->ivectors, unit);
    if (ring->config.corpus != NULL)
        km_corpus_prefetch(ring->config.corpus, ring->shapes + step->shape, &found.chunk, &found.view);
    return found;
}

/* Decodes one chunk into its place. */
static int fill_chunk(const km_ring *ring, const km_shape *shape, const task *what, const km_out *out,
                      km_scratch *scratch, km_error *error) {
    const km_ring_config *config = &ring->config;
    if (config->examples != NULL)
        return km_examples_chunk(config->examples, shape, what->chunk.utterance, &what->view, out, scratch,
                                 error);
    return km_corpus_chunk(config->corpus, shape, &what->chunk, &what->view, &what->ivectors, out, scratch,
                           error);
}

/* Decodes this rank's chunks of a step into the slot; sets how many labelled frames these have, but for bad
 * units. */
static int fill_chunks(km_ring *ring, const km_step *step, km_span share, const pool_bytes *resident,
                       slot *into, km_scratch *scratch, int64_t *frames) {
    const km_shape *shape = ring->shapes + step->shape;
    task next;
    if (share.count > 0) next = find_chunk(ring, step, share.first, resident);
    for (int64_t i = 0; i < share.count; i++) {
        if (atomic_load_explicit(&ring->stop, memory_order_relaxed)) break;
        const task now = next;
        /* One ahead, so that its bytes come while this one is decoded. */
        if (i + 1 < share.count) next = find_chunk(ring, step, share.first + i + 1, resident);
        const km_out out = place_of(ring, &into->buffer, shape, i);
        if (fill_chunk(ring, shape, &now, &out, scratch, &into->error) == KM_OK) {
            *frames += now.chunk.end_label - now.chunk.first_label;
            continue;
        }
        if (!tolerate(ring, now.chunk.utterance, &into->error)) return KM_FAILED;
        clear(ring, shape, &out);
    }
    return KM_OK;
}

/* Fills the slot with one step's share of this rank; no lock is held. */
static int fill(km_ring *ring, int64_t step, int64_t position, slot *into, km_scratch *scratch,
                double *disk_waited) {
    km_plan *plan = ring->config.plan;
    km_step found;
    if (km_plan_acquire(plan, step, &found, &into->error) != KM_OK) return KM_FAILED;
    pool_bytes resident = {km_store_acquire(ring->store, found.pool, disk_waited), NULL};
    if (ring->ivectors != NULL) resident.ivectors = km_store_acquire(ring->ivectors, found.pool, disk_waited);
    const km_span share = km_plan_share(plan, &found, ring->config.rank);
    int64_t frames = 0;
    const int status = fill_chunks(ring, &found, share, &resident, into, scratch, &frames);
    into->minibatch = (km_minibatch){
        .step = step,
        .buffer = (int32_t)(position % ring->config.depth),
        .shape = found.shape,
        .num_chunks = (int32_t)share.count,
        .epoch = found.epoch,
        .frames = frames,
        .global_frames = found.frames,
    };
    km_store_release(ring->store, resident.units);
    if (ring->ivectors != NULL) km_store_release(ring->ivectors, resident.ivectors);
    km_plan_release(plan, found.pool);
    return status;
}

/* With the mutex held: whether the next position has a step and a free buffer. */
static int has_work(const km_ring *ring) {
    return ring->taken < ring->requested && ring->taken - ring->released < ring->config.depth;
}

/* With the mutex held: waits until there is work; 0 where the ring is stopped or has come to its end instead.
 */
static int wait_for_work(km_ring *ring) {
    if (!ring->stop && ring->taken < ring->end && !has_work(ring)) {
        const double since = km_seconds();
        while (!ring->stop && ring->taken < ring->end && !has_work(ring))
            (void)pthread_cond_wait(&ring->work, &ring->mutex);
        ring->counters.readers_waited += km_seconds() - since;
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
        slot *mine = ring->slots + position % ring->config.depth;
        const int64_t step = ring->on_request ? mine->step : ring->first_step + position;
        (void)pthread_mutex_unlock(&ring->mutex);

        const int64_t before = scratch.bytes_read;
        double disk_waited = 0.0;
        const int status = fill(ring, step, position, mine, &scratch, &disk_waited);

        (void)pthread_mutex_lock(&ring->mutex);
        ring->counters.bytes_read += scratch.bytes_read - before;
        ring->counters.disk_waited += disk_waited;
        mine->failed = status != KM_OK;
        mine->ready = position;
        if (mine->failed) end_at(ring, position + 1); /* nothing after it will be asked for */
        (void)pthread_cond_signal(&ring->data);
    }
    (void)pthread_mutex_unlock(&ring->mutex);
    km_scratch_free(&scratch);
    return NULL;
}

static int start_threads(km_ring *ring) {
    int status = 0;
    while (status == 0 && ring->num_threads < ring->config.threads) {
        status = km_thread_start(ring->threads + ring->num_threads, read_steps, ring);
        if (status == 0) ring->num_threads++;
    }
    return status;
}

static int allocate(km_ring *ring) {
    const km_ring_config *config = &ring->config;
    const size_t bad = config->skip_bad > 0 ? (size_t)config->skip_bad : 1;
    ring->slots = calloc((size_t)config->depth, sizeof *ring->slots);
    ring->threads = calloc((size_t)config->threads, sizeof *ring->threads);
    ring->shapes = calloc((size_t)config->num_shapes, sizeof *ring->shapes);
    ring->bad = calloc(bad, sizeof *ring->bad);
    ring->bad_errors = calloc(bad, sizeof *ring->bad_errors);
    return ring->slots != NULL && ring->threads != NULL && ring->shapes != NULL && ring->bad != NULL &&
           ring->bad_errors != NULL;
}

static void release(km_ring *ring) {
    free(ring->slots);
    free(ring->threads);
    free(ring->shapes);
    free(ring->bad);
    free(ring->bad_errors);
    free(ring);
}

static int make_stores(km_ring *ring, km_error *error) {
    const km_ring_config *config = &ring->config;
    const int64_t speed = config->bytes_per_second;
    ring->store = km_store_new(&config->units, config->plan, speed, error);
    if (ring->store == NULL) return KM_FAILED;
    const km_ivectors *ivectors = config->corpus != NULL ? &config->corpus->ivectors : NULL;
    if (ivectors == NULL || ivectors->dim == 0) return KM_OK;
    const km_units units = {config->units.num_units, ivectors->files, ivectors->file_of, ivectors->begin,
                            ivectors->end};
    ring->ivectors = km_store_new(&units, config->plan, speed, error);
    return ring->ivectors != NULL ? KM_OK : KM_FAILED;
}

km_ring *km_ring_new(const km_ring_config *config, km_error *error) {
    const int on_request = config->first_step == KM_ON_REQUEST;
    if (config->threads <= 0 || config->depth <= 0 || (config->first_step < 0 && !on_request) ||
        config->rank < 0 || config->num_shapes <= 0) {
        (void)km_fail(error, -1, "a ring needs threads, buffers, shapes and a step to start from");
        return NULL;
    }
    km_ring *ring = calloc(1, sizeof *ring);
    if (ring != NULL) ring->config = *config;
    if (ring == NULL || !allocate(ring)) {
        if (ring != NULL) release(ring);
        (void)km_fail(error, -1, "out of memory: a ring of %d buffers", (int)config->depth);
        return NULL;
    }
    memcpy(ring->shapes, config->shapes, (size_t)config->num_shapes * sizeof *ring->shapes);
    if (make_stores(ring, error) != KM_OK) {
        if (ring->store != NULL) km_store_free(ring->store);
        release(ring);
        return NULL;
    }
    ring->on_request = on_request;
    ring->first_step = config->first_step;
    ring->requested = on_request ? 0 : INT64_MAX;
    ring->end = on_request ? INT64_MAX : config->end_step - config->first_step;
    for (int32_t i = 0; i < config->depth; i++) {
        ring->slots[i].buffer = config->buffers[i];
        ring->slots[i].ready = -1;
    }
    (void)pthread_mutex_init(&ring->mutex, NULL);
    (void)pthread_cond_init(&ring->work, NULL);
    (void)pthread_cond_init(&ring->data, NULL);
    const int status = start_threads(ring);
    if (status == 0) return ring;
    (void)km_fail(error, -1, "cannot start %d reader threads: %s", (int)config->threads, strerror(status));
    km_ring_free(ring);
    return NULL;
}

void km_ring_stop(km_ring *ring) {
    (void)pthread_mutex_lock(&ring->mutex);
    ring->stop = 1;
    (void)pthread_cond_broadcast(&ring->work);
    (void)pthread_cond_signal(&ring->data);
    (void)pthread_mutex_unlock(&ring->mutex);
    km_store_stop(ring->store);
    if (ring->ivectors != NULL) km_store_stop(ring->ivectors);
}

void km_ring_free(km_ring *ring) {
    if (ring == NULL) return;
    km_ring_stop(ring);
    for (int32_t i = 0; i < ring->num_threads; i++)
        (void)pthread_join(ring->threads[i], NULL);
    km_store_free(ring->store);
    if (ring->ivectors != NULL) km_store_free(ring->ivectors);
    (void)pthread_cond_destroy(&ring->data);
    (void)pthread_cond_destroy(&ring->work);
    (void)pthread_mutex_destroy(&ring->mutex);
    release(ring);
}

int km_ring_request(km_ring *ring, int64_t step) {
    int result = KM_OK;
    (void)pthread_mutex_lock(&ring->mutex);
    if (!ring->on_request || ring->finished) {
        result = KM_END;
    } else if (ring->requested - ring->delivered >= ring->config.depth) {
        result = KM_FULL;
    } else {
        ring->slots[ring->requested % ring->config.depth].step = step;
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
    const slot *wanted = ring->slots + position % ring->config.depth;
    if (wanted->ready == position) return;
    const double since = km_seconds();
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
    ring->counters.consumer_waited += km_seconds() - since;
}

int km_ring_next(km_ring *ring, int32_t milliseconds, km_minibatch *minibatch, km_error *error) {
    int result = KM_NOT_YET;
    (void)pthread_mutex_lock(&ring->mutex);
    if (ring->released < ring->delivered) {
        ring->released = ring->delivered;
        (void)pthread_cond_broadcast(&ring->work);
    }
    const int64_t position = ring->delivered;
    const slot *next = ring->slots + position % ring->config.depth;
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
    counters->bytes_read += km_store_bytes_read(ring->store);
    counters->memory = km_store_memory(ring->store) + km_plan_memory(ring->config.plan);
    if (ring->ivectors == NULL) return;
    counters->bytes_read += km_store_bytes_read(ring->ivectors);
    counters->memory += km_store_memory(ring->ivectors);
}

int km_ring_bad(km_ring *ring, int32_t number, km_error *error) {
    int result = KM_END;
    (void)pthread_mutex_lock(&ring->mutex);
    if (number >= 0 && number < ring->counters.bad) {
        *error = ring->bad_errors[number];
        result = KM_OK;
    }
    (void)pthread_mutex_unlock(&ring->mutex);
    return result;
}
