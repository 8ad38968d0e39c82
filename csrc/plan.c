#define _POSIX_C_SOURCE 200809L

#include "plan.h"

#include "random.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>

/* Orders that nobody uses are kept up to this many, because the next step will ask for the same one. */
enum { IDLE_ORDERS = 2 };

typedef struct order {
    int64_t epoch;
    int32_t users;
    uint32_t *chunks;
    struct order *next; /* the list runs from the last used one to the one used longest ago */
} order;

struct km_plan {
    const int32_t *num_frames;
    int32_t num_utterances, width, num_ranks, shuffle;
    int64_t chunks_per_step, steps_per_epoch;
    uint32_t num_chunks;
    uint64_t seed;
    uint32_t *first_chunk;  /* per utterance, and num_chunks at the end */
    int32_t *utterance_of;  /* per chunk */
    pthread_mutex_t orders; /* guards the list below */
    order *newest;
};

static int64_t chunks_of(int32_t frames, int32_t width) {
    return ((int64_t)frames + width - 1) / width;
}

static int lay_out(km_plan *plan, km_error *error) {
    int64_t total = 0;
    for (int32_t u = 0; u < plan->num_utterances; u++)
        total += chunks_of(plan->num_frames[u], plan->width);
    if (total > UINT32_MAX)
        return km_fail(error, -1, "%" PRId64 " chunks are more than fit in 32 bits: use wider ones", total);
    plan->num_chunks = (uint32_t)total;
    plan->first_chunk = calloc((size_t)plan->num_utterances + 1, sizeof *plan->first_chunk);
    plan->utterance_of = calloc(plan->num_chunks, sizeof *plan->utterance_of);
    if (plan->first_chunk == NULL || plan->utterance_of == NULL)
        return km_fail(error, -1, "out of memory: a plan of %" PRId64 " chunks", total);
    uint32_t chunk = 0;
    for (int32_t u = 0; u < plan->num_utterances; u++) {
        plan->first_chunk[u] = chunk;
        for (int64_t n = chunks_of(plan->num_frames[u], plan->width); n > 0; n--)
            plan->utterance_of[chunk++] = u;
    }
    plan->first_chunk[plan->num_utterances] = chunk;
    plan->steps_per_epoch = (total + plan->chunks_per_step - 1) / plan->chunks_per_step;
    return KM_OK;
}

km_plan *km_plan_new(const int32_t *num_frames, int32_t num_utterances, int32_t width,
                     int32_t chunks_per_minibatch, int32_t num_ranks, uint64_t seed, int32_t shuffle,
                     km_error *error) {
    if (num_utterances <= 0 || width <= 0 || chunks_per_minibatch <= 0 || num_ranks <= 0) {
        (void)km_fail(error, -1, "a plan needs utterances, a width, chunks and ranks");
        return NULL;
    }
    km_plan *plan = calloc(1, sizeof *plan);
    if (plan == NULL) {
        (void)km_fail(error, -1, "out of memory: a plan");
        return NULL;
    }
    plan->num_frames = num_frames;
    plan->num_utterances = num_utterances;
    plan->width = width;
    plan->num_ranks = num_ranks;
    plan->chunks_per_step = (int64_t)chunks_per_minibatch * num_ranks;
    plan->seed = seed;
    plan->shuffle = shuffle;
    if (pthread_mutex_init(&plan->orders, NULL) != 0) {
        free(plan);
        (void)km_fail(error, -1, "cannot create a mutex");
        return NULL;
    }
    if (lay_out(plan, error) == KM_OK) return plan;
    km_plan_free(plan);
    return NULL;
}

static void free_order(order *o) {
    free(o->chunks);
    free(o);
}

void km_plan_free(km_plan *plan) {
    if (plan == NULL) return;
    while (plan->newest != NULL) {
        order *next = plan->newest->next;
        free_order(plan->newest);
        plan->newest = next;
    }
    (void)pthread_mutex_destroy(&plan->orders);
    free(plan->first_chunk);
    free(plan->utterance_of);
    free(plan);
}

int64_t km_plan_num_chunks(const km_plan *plan) {
    return plan->num_chunks;
}

int64_t km_plan_steps_per_epoch(const km_plan *plan) {
    return plan->steps_per_epoch;
}

km_span km_plan_step(const km_plan *plan, int64_t step) {
    km_span span = {(step % plan->steps_per_epoch) * plan->chunks_per_step, plan->chunks_per_step};
    if (span.first + span.count > plan->num_chunks) span.count = plan->num_chunks - span.first;
    return span;
}

km_span km_plan_share(const km_plan *plan, int64_t step, int32_t rank) {
    const km_span all = km_plan_step(plan, step);
    const int64_t from = all.count * rank / plan->num_ranks, to = all.count * (rank + 1) / plan->num_ranks;
    const km_span share = {all.first + from, to - from};
    return share;
}

km_chunk km_plan_chunk(const km_plan *plan, uint32_t chunk) {
    const int32_t utterance = plan->utterance_of[chunk], length = plan->num_frames[utterance];
    const int32_t nominal = (int32_t)(chunk - plan->first_chunk[utterance]) * plan->width;
    const int moved = nominal > length - plan->width; /* the last one, of an uneven length */
    const int32_t start = moved ? (length > plan->width ? length - plan->width : 0) : nominal;
    const km_chunk result = {utterance, (int32_t)(chunk - plan->first_chunk[utterance]), start, nominal,
                             moved ? length : nominal + plan->width};
    return result;
}

int64_t km_plan_frames(const km_plan *plan, const uint32_t *chunks, km_span span) {
    int64_t frames = 0;
    for (int64_t i = span.first; i < span.first + span.count; i++) {
        const km_chunk chunk = km_plan_chunk(plan, chunks[i]);
        frames += chunk.end_label - chunk.first_label;
    }
    return frames;
}

static order *new_order(const km_plan *plan, int64_t epoch, km_error *error) {
    order *made = calloc(1, sizeof *made);
    if (made != NULL) made->chunks = malloc((size_t)plan->num_chunks * sizeof *made->chunks);
    if (made == NULL || made->chunks == NULL) {
        free(made);
        (void)km_fail(error, -1, "out of memory: an order of %" PRIu32 " chunks", plan->num_chunks);
        return NULL;
    }
    made->epoch = epoch;
    if (plan->shuffle) {
        km_permutation(plan->seed, (uint64_t)epoch, plan->num_chunks, made->chunks);
    } else {
        for (uint32_t i = 0; i < plan->num_chunks; i++)
            made->chunks[i] = i;
    }
    return made;
}

/* Frees unused orders, except for the IDLE_ORDERS that were used last. */
static void forget_orders(km_plan *plan) {
    int idle = 0;
    for (order **at = &plan->newest; *at != NULL;) {
        order *o = *at;
        if (o->users == 0 && ++idle > IDLE_ORDERS) {
            *at = o->next;
            free_order(o);
        } else {
            at = &o->next;
        }
    }
}

const uint32_t *km_plan_acquire(km_plan *plan, int64_t step, km_error *error) {
    const int64_t epoch = step / plan->steps_per_epoch;
    const uint32_t *chunks = NULL;
    (void)pthread_mutex_lock(&plan->orders);
    order **at = &plan->newest;
    while (*at != NULL && (*at)->epoch != epoch)
        at = &(*at)->next;
    order *found = *at;
    if (found != NULL)
        *at = found->next;
    else
        found = new_order(plan, epoch, error); /* others wait for it: they would need the same one */
    if (found != NULL) {
        found->next = plan->newest;
        plan->newest = found;
        found->users++;
        chunks = found->chunks;
        forget_orders(plan);
    }
    (void)pthread_mutex_unlock(&plan->orders);
    return chunks;
}

void km_plan_release(km_plan *plan, int64_t step) {
    const int64_t epoch = step / plan->steps_per_epoch;
    (void)pthread_mutex_lock(&plan->orders);
    for (order *o = plan->newest; o != NULL; o = o->next)
        if (o->epoch == epoch) o->users--;
    forget_orders(plan);
    (void)pthread_mutex_unlock(&plan->orders);
}

int64_t km_plan_frames_of_step(km_plan *plan, int64_t step, km_error *error) {
    if (step < 0) return km_fail(error, -1, "negative step");
    const uint32_t *chunks = km_plan_acquire(plan, step, error);
    if (chunks == NULL) return -1;
    const int64_t frames = km_plan_frames(plan, chunks, km_plan_step(plan, step));
    km_plan_release(plan, step);
    return frames;
}
