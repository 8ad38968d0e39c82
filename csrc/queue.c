#define _POSIX_C_SOURCE 200809L

#include "queue.h"

#include "thread.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    km_buffer buffer;
    int64_t step;  /* the last one requested of this slot; unused for a run of steps */
    int64_t ready; /* number of the minibatch that it holds; -1 before the first one */
    int failed;
    km_minibatch minibatch;
    km_error error;
} slot;

struct km_queue {
    km_queue_config config;
    km_cache *cache;
    km_cache *ivectors; /* the same pools of the utterances' i-vectors; NULL: there are none */
    km_shape *shapes;
    int32_t num_threads;
    int on_request;
    int64_t first_step; /* of minibatch 0, unless on request */
    slot *slots;
    pthread_t *threads;
    int32_t *bad;         /* the units that could not be read, */
    km_error *bad_errors; /* and why */
    atomic_int stop;      /* written under the mutex; also looked at without it, between chunks */

    pthread_mutex_t mutex; /* guards everything below, slot.step and slot.ready */
    pthread_cond_t work;   /* `requested`, `released`, `end` or `stop` changed */
    pthread_cond_t data;   /* a slot became ready, or `end` or `stop` changed */
    int64_t requested;     /* minibatches before this one have their step */
    int64_t taken;         /* next minibatch that no thread has */
    int64_t end;           /* minibatches from here on are not wanted */
    int64_t released;      /* minibatches before this one are done with: their buffers are free */
    int64_t delivered;     /* next minibatch of the consumer; released or released + 1 */
    int finished;          /* no more requests */
    km_counters counters;
};

/* With the mutex held: whether the unit is among the bad ones. */
static int is_bad(const km_queue *queue, int32_t unit) {
    for (int32_t i = 0; i < queue->counters.bad; i++)
        if (queue->bad[i] == unit) return 1;
    return 0;
}

/* Takes note of a unit that could not be read; whether one more is tolerated. */
static int tolerate(km_queue *queue, int32_t unit, const km_error *error) {
    (void)pthread_mutex_lock(&queue->mutex);
    int good = is_bad(queue, unit);
    if (!good && queue->counters.bad < queue->config.skip_bad) {
        queue->bad[queue->counters.bad] = unit;
        queue->bad_errors[queue->counters.bad++] = *error;
        good = 1;
    }
    (void)pthread_mutex_unlock(&queue->mutex);
    return good;
}

/* What is in a minibatch. */
typedef struct {
    int64_t chunks;
    int64_t frames; /* labelled ones, without those of bad units */
    km_graphs graphs;
    float weight;
} contents;

/* Where the next chunk of a minibatch goes. */
static km_out place_of(const km_queue *queue, const km_buffer *buffer, const km_shape *shape,
                       int64_t chunks) {
    const km_queue_config *config = &queue->config;
    const size_t at = (size_t)chunks, feats = km_shape_rows(shape) * (size_t)config->dim;
    const size_t labels = (size_t)shape->width * (size_t)config->targets;
    return (km_out){
        buffer->feats + at * feats,
        buffer->labels + at * labels,
        buffer->weights != NULL ? buffer->weights + at * labels : NULL,
        buffer->ivectors != NULL ? buffer->ivectors + at * (size_t)config->ivector_dim : NULL,
    };
}

static void clear(const km_queue *queue, const km_shape *shape, const km_out *out) {
    const size_t labels = (size_t)shape->width * (size_t)queue->config.targets;
    memset(out->feats, 0, km_shape_rows(shape) * (size_t)queue->config.dim * sizeof(float));
    for (size_t i = 0; i < labels; i++)
        out->labels[i] = -1;
    if (out->weights != NULL) memset(out->weights, 0, labels * sizeof(float));
    if (out->ivector != NULL) memset(out->ivector, 0, (size_t)queue->config.ivector_dim * sizeof(float));
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

static task find_chunk(const km_queue *queue, const km_step *step, int64_t i, const pool_bytes *resident) {
    task found = {.chunk = km_plan_chunk(queue->config.plan, step->epoch, step->chunks[i])};
    const int32_t unit = found.chunk.utterance;
    found.view = km_cache_view(queue->cache, resident->units, unit);
    if (queue->ivectors != NULL) found.ivectors = km_cache_view(queue->ivectors, resident->ivectors, unit);
    if (queue->config.corpus != NULL)
        km_corpus_prefetch(queue->config.corpus, queue->shapes + step->shape, &found.chunk, &found.view);
    return found;
}

/* Decodes one chunk, with labels, into its place. */
static int fill_chunk(const km_queue *queue, const km_shape *shape, const task *what, const km_out *out,
                      km_scratch *scratch, km_error *error) {
    const km_queue_config *config = &queue->config;
    const int32_t frame = config->single_frames ? what->chunk.number : KM_WHOLE;
    if (config->examples != NULL)
        return km_examples_chunk(config->examples, shape, what->chunk.utterance, frame, &what->view, out,
                                 scratch, error);
    return km_corpus_chunk(config->corpus, shape, &what->chunk, &what->view, &what->ivectors, out, scratch,
                           error);
}

/* Adds a chunk to a minibatch, or where it cannot be read a chunk without labels. */
static int add_labelled(km_queue *queue, const km_shape *shape, const task *what, slot *into, contents *in,
                        km_scratch *scratch) {
    const km_out out = place_of(queue, &into->buffer, shape, in->chunks);
    if (fill_chunk(queue, shape, what, &out, scratch, &into->error) == KM_OK)
        in->frames += what->chunk.end_label - what->chunk.first_label;
    else if (tolerate(queue, what->chunk.utterance, &into->error))
        clear(queue, shape, &out);
    else
        return KM_FAILED;
    in->chunks++;
    return KM_OK;
}

/* Adds the sequences of a unit of chain training, unless it cannot be read. */
static int add_chain(km_queue *queue, const km_shape *shape, const task *what, slot *into, contents *in,
                     km_scratch *scratch) {
    const km_queue_config *config = &queue->config;
    const size_t at = (size_t)in->chunks, rows = km_shape_rows(shape), width = (size_t)shape->width;
    const km_buffer *buffer = &into->buffer;
    const int32_t unit = what->chunk.utterance;
    const km_chain_out out = {
        buffer->feats + at * rows * (size_t)config->dim,
        buffer->ivectors != NULL ? buffer->ivectors + at * (size_t)config->ivector_dim : NULL,
        buffer->weights != NULL ? buffer->weights + at * width : NULL,
    };
    if (km_chain_examples_chunk(config->chain, shape, unit, &what->view, &out, &in->graphs, scratch,
                                &into->error) != KM_OK)
        return tolerate(queue, unit, &into->error) ? KM_OK : KM_FAILED;
    in->chunks += shape->sequences;
    in->frames += what->chunk.end_label - what->chunk.first_label;
    in->weight = config->chain->weights[unit];
    return KM_OK;
}

/* Decodes this rank's chunks of a step into the slot. */
static int fill_chunks(km_queue *queue, const km_step *step, km_span share, const pool_bytes *resident,
                       slot *into, contents *in, km_scratch *scratch) {
    const km_shape *shape = queue->shapes + step->shape;
    task next;
    if (share.count > 0) next = find_chunk(queue, step, share.first, resident);
    for (int64_t i = 0; i < share.count; i++) {
        if (atomic_load_explicit(&queue->stop, memory_order_relaxed)) break;
        const task now = next;
        /* One ahead, so that its bytes come while this one is decoded. */
        if (i + 1 < share.count) next = find_chunk(queue, step, share.first + i + 1, resident);
        const int status = queue->config.chain != NULL ? add_chain(queue, shape, &now, into, in, scratch)
                                                       : add_labelled(queue, shape, &now, into, in, scratch);
        if (status != KM_OK) return KM_FAILED;
    }
    return KM_OK;
}

/* Fills the slot with one step's share of this rank; no lock is held. */
static int fill(km_queue *queue, int64_t step, int64_t number, slot *into, km_scratch *scratch,
                double *disk_waited) {
    km_plan *plan = queue->config.plan;
    km_step found;
    if (km_plan_acquire(plan, step, &found, &into->error) != KM_OK) return KM_FAILED;
    pool_bytes resident = {km_cache_acquire(queue->cache, found.pool, disk_waited), NULL};
    if (queue->ivectors != NULL)
        resident.ivectors = km_cache_acquire(queue->ivectors, found.pool, disk_waited);
    const km_span share = km_plan_share(plan, &found, queue->config.rank);
    contents in = {.graphs = into->buffer.graphs};
    if (queue->config.chain != NULL) km_graphs_begin(&in.graphs);
    const int status = fill_chunks(queue, &found, share, &resident, into, &in, scratch);
    into->minibatch = (km_minibatch){
        .step = step,
        .buffer = (int32_t)(number % queue->config.depth),
        .shape = found.shape,
        .num_chunks = (int32_t)in.chunks,
        .epoch = found.epoch,
        .frames = in.frames,
        .global_frames = found.frames,
        .graphs = in.graphs,
        .weight = in.weight,
    };
    km_cache_release(queue->cache, resident.units);
    if (queue->ivectors != NULL) km_cache_release(queue->ivectors, resident.ivectors);
    km_plan_release(plan, found.pool);
    return status;
}

/* With the mutex held: whether the next minibatch has a step and a free buffer. */
static int has_work(const km_queue *queue) {
    return queue->taken < queue->requested && queue->taken - queue->released < queue->config.depth;
}

/* With the mutex held: waits until there is work; 0 where the queue is stopped or has come to its end
 * instead.
 */
static int wait_for_work(km_queue *queue) {
    if (!queue->stop && queue->taken < queue->end && !has_work(queue)) {
        const double since = km_seconds();
        while (!queue->stop && queue->taken < queue->end && !has_work(queue))
            (void)pthread_cond_wait(&queue->work, &queue->mutex);
        queue->counters.readers_waited += km_seconds() - since;
    }
    return !queue->stop && queue->taken < queue->end;
}

/* With the mutex held: nothing from this minibatch on is wanted. */
static void end_at(km_queue *queue, int64_t number) {
    if (number >= queue->end) return;
    queue->end = number;
    (void)pthread_cond_broadcast(&queue->work);
    (void)pthread_cond_signal(&queue->data);
}

static void *read_steps(void *argument) {
    km_queue *queue = argument;
    km_scratch scratch = {0};
    (void)pthread_mutex_lock(&queue->mutex);
    while (wait_for_work(queue)) {
        const int64_t number = queue->taken++;
        slot *mine = queue->slots + number % queue->config.depth;
        const int64_t step = queue->on_request ? mine->step : queue->first_step + number;
        (void)pthread_mutex_unlock(&queue->mutex);

        const int64_t before = scratch.bytes_read;
        double disk_waited = 0.0;
        const int status = fill(queue, step, number, mine, &scratch, &disk_waited);

        (void)pthread_mutex_lock(&queue->mutex);
        queue->counters.bytes_read += scratch.bytes_read - before;
        queue->counters.disk_waited += disk_waited;
        mine->failed = status != KM_OK;
        mine->ready = number;
        if (mine->failed) end_at(queue, number + 1); /* nothing after it will be asked for */
        (void)pthread_cond_signal(&queue->data);
    }
    (void)pthread_mutex_unlock(&queue->mutex);
    km_scratch_free(&scratch);
    return NULL;
}

static int start_threads(km_queue *queue) {
    int status = 0;
    while (status == 0 && queue->num_threads < queue->config.threads) {
        status = km_thread_start(queue->threads + queue->num_threads, read_steps, queue);
        if (status == 0) queue->num_threads++;
    }
    return status;
}

static int allocate(km_queue *queue) {
    const km_queue_config *config = &queue->config;
    const size_t bad = config->skip_bad > 0 ? (size_t)config->skip_bad : 1;
    queue->slots = calloc((size_t)config->depth, sizeof *queue->slots);
    queue->threads = calloc((size_t)config->threads, sizeof *queue->threads);
    queue->shapes = calloc((size_t)config->num_shapes, sizeof *queue->shapes);
    queue->bad = calloc(bad, sizeof *queue->bad);
    queue->bad_errors = calloc(bad, sizeof *queue->bad_errors);
    return queue->slots != NULL && queue->threads != NULL && queue->shapes != NULL && queue->bad != NULL &&
           queue->bad_errors != NULL;
}

static void release(km_queue *queue) {
    free(queue->slots);
    free(queue->threads);
    free(queue->shapes);
    free(queue->bad);
    free(queue->bad_errors);
    free(queue);
}

static int make_caches(km_queue *queue, km_error *error) {
    const km_queue_config *config = &queue->config;
    const int64_t speed = config->bytes_per_second;
    queue->cache = km_cache_new(&config->units, config->plan, speed, error);
    if (queue->cache == NULL) return KM_FAILED;
    const km_ivectors *ivectors = config->corpus != NULL ? &config->corpus->ivectors : NULL;
    if (ivectors == NULL || ivectors->dim == 0) return KM_OK;
    const km_units units = {config->units.num_units, ivectors->files, ivectors->file_of, ivectors->begin,
                            ivectors->end};
    queue->ivectors = km_cache_new(&units, config->plan, speed, error);
    return queue->ivectors != NULL ? KM_OK : KM_FAILED;
}

km_queue *km_queue_new(const km_queue_config *config, km_error *error) {
    const int on_request = config->first_step == KM_ON_REQUEST;
    if (config->threads <= 0 || config->depth <= 0 || (config->first_step < 0 && !on_request) ||
        config->rank < 0 || config->num_shapes <= 0) {
        (void)km_fail(error, -1, "a queue needs threads, buffers, shapes and a step to start from");
        return NULL;
    }
    km_queue *queue = calloc(1, sizeof *queue);
    if (queue != NULL) queue->config = *config;
    if (queue == NULL || !allocate(queue)) {
        if (queue != NULL) release(queue);
        (void)km_fail(error, -1, "out of memory: a queue of %d minibatches", (int)config->depth);
        return NULL;
    }
    memcpy(queue->shapes, config->shapes, (size_t)config->num_shapes * sizeof *queue->shapes);
    if (make_caches(queue, error) != KM_OK) {
        if (queue->cache != NULL) km_cache_free(queue->cache);
        release(queue);
        return NULL;
    }
    queue->on_request = on_request;
    queue->first_step = config->first_step;
    queue->requested = on_request ? 0 : INT64_MAX;
    queue->end = on_request ? INT64_MAX : config->end_step - config->first_step;
    for (int32_t i = 0; i < config->depth; i++) {
        queue->slots[i].buffer = config->buffers[i];
        queue->slots[i].ready = -1;
    }
    (void)pthread_mutex_init(&queue->mutex, NULL);
    (void)pthread_cond_init(&queue->work, NULL);
    (void)pthread_cond_init(&queue->data, NULL);
    const int status = start_threads(queue);
    if (status == 0) return queue;
    (void)km_fail(error, -1, "cannot start %d reader threads: %s", (int)config->threads, strerror(status));
    km_queue_free(queue);
    return NULL;
}

void km_queue_stop(km_queue *queue) {
    (void)pthread_mutex_lock(&queue->mutex);
    queue->stop = 1;
    (void)pthread_cond_broadcast(&queue->work);
    (void)pthread_cond_signal(&queue->data);
    (void)pthread_mutex_unlock(&queue->mutex);
    km_cache_stop(queue->cache);
    if (queue->ivectors != NULL) km_cache_stop(queue->ivectors);
}

void km_queue_free(km_queue *queue) {
    if (queue == NULL) return;
    km_queue_stop(queue);
    for (int32_t i = 0; i < queue->num_threads; i++)
        (void)pthread_join(queue->threads[i], NULL);
    km_cache_free(queue->cache);
    if (queue->ivectors != NULL) km_cache_free(queue->ivectors);
    (void)pthread_cond_destroy(&queue->data);
    (void)pthread_cond_destroy(&queue->work);
    (void)pthread_mutex_destroy(&queue->mutex);
    release(queue);
}

int km_queue_request(km_queue *queue, int64_t step) {
    int result = KM_OK;
    (void)pthread_mutex_lock(&queue->mutex);
    if (!queue->on_request || queue->finished) {
        result = KM_END;
    } else if (queue->requested - queue->delivered >= queue->config.depth) {
        result = KM_FULL;
    } else {
        queue->slots[queue->requested % queue->config.depth].step = step;
        queue->requested++;
        (void)pthread_cond_signal(&queue->work);
    }
    (void)pthread_mutex_unlock(&queue->mutex);
    return result;
}

void km_queue_finish(km_queue *queue) {
    (void)pthread_mutex_lock(&queue->mutex);
    if (queue->on_request) {
        queue->finished = 1;
        end_at(queue, queue->requested);
    }
    (void)pthread_mutex_unlock(&queue->mutex);
}

/* With the mutex held: waits until the minibatch is ready, or will never be, or the time is over. */
static void wait_for_data(km_queue *queue, int64_t number, int32_t milliseconds) {
    const slot *wanted = queue->slots + number % queue->config.depth;
    if (wanted->ready == number) return;
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
    while (wanted->ready != number && number < queue->end && !queue->stop && status != ETIMEDOUT)
        status = pthread_cond_timedwait(&queue->data, &queue->mutex, &until);
    queue->counters.consumer_waited += km_seconds() - since;
}

int km_queue_next(km_queue *queue, int32_t milliseconds, km_minibatch *minibatch, km_error *error) {
    int result = KM_NOT_YET;
    (void)pthread_mutex_lock(&queue->mutex);
    if (queue->released < queue->delivered) {
        queue->released = queue->delivered;
        (void)pthread_cond_broadcast(&queue->work);
    }
    const int64_t number = queue->delivered;
    const slot *next = queue->slots + number % queue->config.depth;
    if (number < queue->end) wait_for_data(queue, number, milliseconds);
    if (number >= queue->end) {
        result = KM_END;
    } else if (next->ready == number && next->failed) {
        *error = next->error;
        result = KM_FAILED;
    } else if (next->ready == number) {
        *minibatch = next->minibatch;
        queue->delivered++;
        queue->counters.frames += next->minibatch.frames;
        result = KM_READY;
    }
    (void)pthread_mutex_unlock(&queue->mutex);
    return result;
}

void km_queue_counters(km_queue *queue, km_counters *counters) {
    (void)pthread_mutex_lock(&queue->mutex);
    *counters = queue->counters;
    (void)pthread_mutex_unlock(&queue->mutex);
    counters->bytes_read += km_cache_bytes_read(queue->cache);
    counters->memory = km_cache_memory(queue->cache) + km_plan_memory(queue->config.plan);
    if (queue->ivectors == NULL) return;
    counters->bytes_read += km_cache_bytes_read(queue->ivectors);
    counters->memory += km_cache_memory(queue->ivectors);
}

int km_queue_bad(km_queue *queue, int32_t number, km_error *error) {
    int result = KM_END;
    (void)pthread_mutex_lock(&queue->mutex);
    if (number >= 0 && number < queue->counters.bad) {
        *error = queue->bad_errors[number];
        result = KM_OK;
    }
    (void)pthread_mutex_unlock(&queue->mutex);
    return result;
}
