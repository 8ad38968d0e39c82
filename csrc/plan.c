#define _POSIX_C_SOURCE 200809L

#include "plan.h"

#include "pool.h"
#include "random.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* Pools and layouts that nobody uses are kept up to this many, because the next step will ask for the same
 * ones. */
enum { IDLE_POOLS = 2, IDLE_LAYOUTS = 2 };

struct km_plan {
    km_plan_config config;
    int32_t *chunks_per_minibatch; /* copies of what the configuration lends */
    int64_t *taken;
    int64_t *chunks_of_shape; /* of an epoch */
    int64_t steps_per_epoch, steps_of_first;
    pthread_mutex_t mutex; /* guards the lists below */
    km_layout *layouts;
    km_pool *pools;
};

static const int64_t *taken_of(const km_plan *plan, int64_t epoch) {
    return epoch == plan->config.epoch ? plan->taken : NULL;
}

static int64_t steps_without(const km_plan *plan, const int64_t *taken) {
    int64_t steps = 0;
    for (int32_t s = 0; s < plan->config.num_shapes; s++) {
        const int64_t left = plan->chunks_of_shape[s] - (taken != NULL ? taken[s] : 0);
        steps += (left + km_group_size(&plan->config, s) - 1) / km_group_size(&plan->config, s);
    }
    return steps;
}

static int check(const km_plan_config *config, km_error *error) {
    if (config->num_units <= 0 || config->num_shapes <= 0 || config->num_ranks <= 0)
        return km_fail(error, -1, "a plan needs units, shapes and ranks");
    for (int32_t s = 0; s < config->num_shapes; s++)
        if (config->chunks_per_minibatch[s] <= 0)
            return km_fail(error, -1, "a plan needs chunks per minibatch");
    if (config->shape_of == NULL &&
        (config->split.num_widths <= 0 || config->split.num_widths > KM_MAX_WIDTHS))
        return km_fail(error, -1, "a plan of utterances needs 1 to %d widths", KM_MAX_WIDTHS);
    return KM_OK;
}

static int count(km_plan *plan, km_error *error) {
    int64_t total = 0;
    km_layout_count(&plan->config, plan->chunks_of_shape);
    for (int32_t s = 0; s < plan->config.num_shapes; s++) {
        total += plan->chunks_of_shape[s];
        if (plan->taken != NULL && (plan->taken[s] < 0 || plan->taken[s] > plan->chunks_of_shape[s]))
            return km_fail(error, -1,
                           "%" PRId64 " chunks are to be left out where an epoch has %" PRId64
                           ": a position in other data",
                           plan->taken[s], plan->chunks_of_shape[s]);
    }
    if (total > UINT32_MAX)
        return km_fail(error, -1, "%" PRId64 " chunks are more than fit in 32 bits: use wider ones", total);
    plan->steps_per_epoch = steps_without(plan, NULL);
    plan->steps_of_first = steps_without(plan, plan->taken);
    return KM_OK;
}

static void *copy_of(const void *data, size_t size) {
    void *copy = malloc(size);
    if (copy != NULL) memcpy(copy, data, size);
    return copy;
}

km_plan *km_plan_new(const km_plan_config *config, km_error *error) {
    if (check(config, error) != KM_OK) return NULL;
    const size_t shapes = (size_t)config->num_shapes;
    km_plan *plan = calloc(1, sizeof *plan);
    if (plan == NULL) {
        (void)km_fail(error, -1, "out of memory: a plan");
        return NULL;
    }
    if (pthread_mutex_init(&plan->mutex, NULL) != 0) {
        free(plan);
        (void)km_fail(error, -1, "cannot create a mutex");
        return NULL;
    }
    plan->config = *config;
    plan->chunks_of_shape = calloc(shapes, sizeof(int64_t));
    plan->chunks_per_minibatch = copy_of(config->chunks_per_minibatch, shapes * sizeof(int32_t));
    plan->taken = config->taken != NULL ? copy_of(config->taken, shapes * sizeof(int64_t)) : NULL;
    plan->config.chunks_per_minibatch = plan->chunks_per_minibatch;
    plan->config.taken = plan->taken;
    int status = KM_OK;
    if (plan->chunks_of_shape == NULL || plan->chunks_per_minibatch == NULL ||
        (config->taken != NULL && plan->taken == NULL))
        status = km_fail(error, -1, "out of memory: a plan of %zu shapes", shapes);
    else
        status = count(plan, error);
    if (status == KM_OK) return plan;
    km_plan_free(plan);
    return NULL;
}

void km_plan_free(km_plan *plan) {
    if (plan == NULL) return;
    for (km_pool *pool = plan->pools, *next; pool != NULL; pool = next) {
        next = pool->next;
        km_pool_free(pool);
    }
    for (km_layout *layout = plan->layouts, *next; layout != NULL; layout = next) {
        next = layout->next;
        km_layout_free(layout);
    }
    (void)pthread_mutex_destroy(&plan->mutex);
    free(plan->chunks_of_shape);
    free(plan->chunks_per_minibatch);
    free(plan->taken);
    free(plan);
}

int64_t km_plan_num_chunks(const km_plan *plan) {
    int64_t total = 0;
    for (int32_t s = 0; s < plan->config.num_shapes; s++)
        total += plan->chunks_of_shape[s];
    return total;
}

int64_t km_plan_steps_per_epoch(const km_plan *plan) {
    return plan->steps_per_epoch;
}

int64_t km_plan_steps_of_first_epoch(const km_plan *plan) {
    return plan->steps_of_first;
}

/* The epoch of a step, and which step of it that is. */
static int64_t epoch_of(const km_plan *plan, int64_t step, int64_t *rest) {
    if (step < plan->steps_of_first) {
        *rest = step;
        return plan->config.epoch;
    }
    *rest = (step - plan->steps_of_first) % plan->steps_per_epoch;
    return plan->config.epoch + 1 + (step - plan->steps_of_first) / plan->steps_per_epoch;
}

/* With the mutex held: the layout of an epoch, moved to the head of the list. */
static km_layout *layout_of(km_plan *plan, int64_t epoch, km_error *error) {
    km_layout **at = &plan->layouts;
    while (*at != NULL && (*at)->epoch != epoch)
        at = &(*at)->next;
    km_layout *found = *at;
    if (found != NULL)
        *at = found->next;
    else
        found = km_layout_new(&plan->config, epoch, taken_of(plan, epoch), error);
    if (found == NULL) return NULL;
    found->next = plan->layouts;
    plan->layouts = found;
    int kept = 0;
    for (at = &plan->layouts; *at != NULL;) {
        km_layout *layout = *at;
        if (++kept > IDLE_LAYOUTS) {
            *at = layout->next;
            km_layout_free(layout);
        } else {
            at = &layout->next;
        }
    }
    return found;
}

static km_pool *new_pool(km_plan *plan, const km_layout *layout, int32_t number, km_error *error) {
    const km_walk walk = {&plan->config, plan->chunks_of_shape, taken_of(plan, layout->epoch), layout};
    km_pool *pool = km_pool_new(&walk, number);
    if (pool == NULL) (void)km_fail(error, -1, "out of memory: the order of a pool");
    return pool;
}

/* Frees unused pools, except for the IDLE_POOLS that were used last. */
static void forget_pools(km_plan *plan) {
    int idle = 0;
    for (km_pool **at = &plan->pools; *at != NULL;) {
        km_pool *pool = *at;
        if (pool->users == 0 && ++idle > IDLE_POOLS) {
            *at = pool->next;
            km_pool_free(pool);
        } else {
            at = &pool->next;
        }
    }
}

/* With the mutex held: a pool, made if need be, with one more user. */
static km_pool *use_pool(km_plan *plan, const km_layout *layout, int32_t number, km_error *error) {
    km_pool **at = &plan->pools;
    while (*at != NULL && ((*at)->epoch != layout->epoch || (*at)->number != number))
        at = &(*at)->next;
    km_pool *found = *at;
    if (found != NULL)
        *at = found->next;
    else
        found = new_pool(plan, layout, number, error); /* others wait for it: they would need the same one */
    if (found == NULL) return NULL;
    found->next = plan->pools;
    plan->pools = found;
    found->users++;
    forget_pools(plan);
    return found;
}

/* With the mutex held: the pool of a step and the step's number in it, with one more user; NULL on failure.
 */
static km_pool *use_pool_of(km_plan *plan, int64_t step, int64_t *number, km_error *error) {
    int64_t rest;
    const km_layout *layout = layout_of(plan, epoch_of(plan, step, &rest), error);
    if (layout == NULL) return NULL;
    int32_t low = 0, high = layout->num_pools -
                            1; /* the last pool that begins at the step or before it, and has steps */
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (layout->first_step[middle + 1] > rest)
            high = middle;
        else
            low = middle + 1;
    }
    *number = rest - layout->first_step[low];
    return use_pool(plan, layout, low, error);
}

int km_plan_acquire(km_plan *plan, int64_t step, km_step *found, km_error *error) {
    int64_t number;
    (void)pthread_mutex_lock(&plan->mutex);
    km_pool *pool = use_pool_of(plan, step, &number, error);
    (void)pthread_mutex_unlock(&plan->mutex);
    if (pool == NULL) return KM_FAILED;
    const km_group *g = pool->steps + number;
    *found = (km_step){pool, pool->epoch, g->shape, g->turn, g->count, g->frames, pool->chunks + g->first};
    return KM_OK;
}

void km_plan_release(km_plan *plan, km_pool *pool) {
    (void)pthread_mutex_lock(&plan->mutex);
    pool->users--;
    forget_pools(plan);
    (void)pthread_mutex_unlock(&plan->mutex);
}

void km_plan_hold(km_plan *plan, km_pool *pool) {
    (void)pthread_mutex_lock(&plan->mutex);
    pool->users++;
    (void)pthread_mutex_unlock(&plan->mutex);
}

km_pool *km_plan_acquire_next(km_plan *plan, const km_pool *pool) {
    km_error ignored; /* whoever needs the pool will be told */
    km_pool *next = NULL;
    (void)pthread_mutex_lock(&plan->mutex);
    const km_layout *layout = layout_of(plan, pool->epoch, &ignored);
    if (layout != NULL && layout->num_pools > 1) {
        int32_t number = pool->number + 1;
        if (number == layout->num_pools) {
            number = 0;
            layout = layout_of(plan, pool->epoch + 1, &ignored);
        }
        if (layout != NULL) next = use_pool(plan, layout, number, &ignored);
    }
    (void)pthread_mutex_unlock(&plan->mutex);
    return next;
}

const int32_t *km_pool_units(const km_pool *pool, int32_t *num_units) {
    *num_units = pool->num_units;
    return pool->units;
}

int64_t km_pool_id(const km_plan *plan, const km_pool *pool) {
    return pool->num_units == plan->config.num_units
               ? 0
               : 1 + pool->epoch * plan->config.num_units + pool->number;
}

km_span km_plan_share(const km_plan *plan, const km_step *step, int32_t rank) {
    const int64_t ranks = plan->config.num_ranks;
    if (step->count < ranks) {
        const int64_t mine = ((int64_t)rank - step->turn + ranks) % ranks;
        return (km_span){mine < step->count ? mine : 0, mine < step->count};
    }
    const int64_t from = step->count * rank / ranks, to = step->count * (rank + 1) / ranks;
    return (km_span){from, to - from};
}

km_chunk km_plan_chunk(const km_plan *plan, int64_t epoch, km_ref ref) {
    km_chunk chunk;
    const km_cut cut = km_layout_cut(&plan->config, ref.unit);
    (void)km_layout_chunk(&plan->config, &cut, ref.unit, ref.number, &chunk);
    km_random random;
    km_random_seed(&random, plan->config.seed ^ (uint64_t)epoch << 32,
                   (uint64_t)ref.unit << 32 | (uint32_t)ref.number);
    chunk.draw = km_random_next(&random);
    return chunk;
}

int km_plan_summary(km_plan *plan, int64_t step, km_step_summary *summary, km_error *error) {
    km_step found;
    if (step < 0) return km_fail(error, -1, "negative step");
    if (km_plan_acquire(plan, step, &found, error) != KM_OK) return KM_FAILED;
    *summary = (km_step_summary){found.count, found.frames};
    km_plan_release(plan, found.pool);
    return KM_OK;
}

int km_plan_position(km_plan *plan, int64_t step, int64_t *epoch, int64_t *taken, km_error *error) {
    const int32_t shapes = plan->config.num_shapes;
    int64_t number;
    (void)pthread_mutex_lock(&plan->mutex);
    km_pool *pool = use_pool_of(plan, step, &number, error);
    const km_layout *layout = pool != NULL ? layout_of(plan, pool->epoch, error) : NULL;
    if (layout != NULL) {
        const int64_t *left_out = taken_of(plan, pool->epoch);
        *epoch = pool->epoch;
        for (int32_t s = 0; s < shapes; s++) {
            const int64_t start = left_out != NULL ? left_out[s] : 0;
            const int64_t had = layout->chunks[(int64_t)pool->number * shapes + s] - start;
            taken[s] = start + (had > 0 ? had - had % km_group_size(&plan->config, s) : 0);
        }
        for (int64_t i = 0; i < number; i++)
            taken[pool->steps[i].shape] += pool->steps[i].count;
    }
    if (pool != NULL) pool->users--;
    (void)pthread_mutex_unlock(&plan->mutex);
    return layout != NULL ? KM_OK : KM_FAILED;
}

int64_t km_plan_memory(km_plan *plan) {
    int64_t bytes = 0;
    (void)pthread_mutex_lock(&plan->mutex);
    for (const km_pool *pool = plan->pools; pool != NULL; pool = pool->next)
        bytes += pool->bytes;
    for (const km_layout *layout = plan->layouts; layout != NULL; layout = layout->next)
        bytes += km_layout_memory(&plan->config, layout);
    (void)pthread_mutex_unlock(&plan->mutex);
    return bytes;
}
