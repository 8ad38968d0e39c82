#define _POSIX_C_SOURCE 200809L

#include "plan.h"

#include "layout.h"
#include "random.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* Pools and layouts that nobody uses are kept up to this many, because the next step will ask for the same
 * ones. */
enum { IDLE_POOLS = 2, IDLE_LAYOUTS = 2 };

typedef struct {
    int64_t first; /* of its chunks in the pool's list */
    int64_t count;
    int32_t shape, turn;
} group;

struct km_pool {
    int64_t epoch, first_step, num_steps;
    int32_t number, users;
    int32_t num_units;
    int32_t *units; /* ascending */
    km_ref *chunks; /* step by step */
    group *steps;
    int64_t bytes;        /* that it takes in memory */
    struct km_pool *next; /* the plan's list runs from the last used one to the one used longest ago */
};

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

static int64_t group_size(const km_plan *plan, int32_t shape) {
    return (int64_t)plan->config.chunks_per_minibatch[shape] * plan->config.num_ranks;
}

static const int64_t *taken_of(const km_plan *plan, int64_t epoch) {
    return epoch == plan->config.epoch ? plan->taken : NULL;
}

static int64_t steps_without(const km_plan *plan, const int64_t *taken) {
    int64_t steps = 0;
    for (int32_t s = 0; s < plan->config.num_shapes; s++) {
        const int64_t left = plan->chunks_of_shape[s] - (taken != NULL ? taken[s] : 0);
        steps += (left + group_size(plan, s) - 1) / group_size(plan, s);
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
                           ": a place in other data",
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

static void free_pool(km_pool *pool) {
    if (pool == NULL) return;
    free(pool->units);
    free(pool->chunks);
    free(pool->steps);
    free(pool);
}

void km_plan_free(km_plan *plan) {
    if (plan == NULL) return;
    for (km_pool *pool = plan->pools, *next; pool != NULL; pool = next) {
        next = pool->next;
        free_pool(pool);
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

int64_t km_plan_chunks_of_shape(const km_plan *plan, int32_t shape) {
    return plan->chunks_of_shape[shape];
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

static int ascending(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* The units of a pool, ascending: `*count` of them; NULL on failure. */
static int32_t *units_of(const km_layout *layout, int32_t number, int32_t *num_units) {
    const int32_t first = layout->first_unit[number];
    *num_units = layout->first_unit[number + 1] - first;
    int32_t *units = calloc((size_t)*num_units, sizeof *units);
    if (units == NULL) return NULL;
    for (int32_t i = 0; i < *num_units; i++)
        units[i] = layout->units != NULL ? layout->units[first + i] : first + i;
    if (layout->units != NULL) qsort(units, (size_t)*num_units, sizeof *units, ascending);
    return units;
}

/* The chunks of some units in the order of the pool that has them; NULL on failure. */
static km_ref *shuffled_chunks(const km_plan *plan, const km_layout *layout, int32_t number,
                               const int32_t *units, int32_t num_units, int64_t *num_chunks) {
    int64_t total = 0;
    for (int32_t s = 0; s < plan->config.num_shapes; s++) {
        const int64_t *before = layout->chunks + (int64_t)number * plan->config.num_shapes + s;
        total += before[plan->config.num_shapes] - before[0];
    }
    km_ref *plain = malloc((size_t)total * sizeof *plain);
    if (plain == NULL) return NULL;
    int64_t at = 0;
    for (int32_t i = 0; i < num_units; i++) {
        const int32_t chunks = km_layout_cut(&plan->config, units[i]).count;
        for (int32_t c = 0; c < chunks; c++)
            plain[at++] = (km_ref){units[i], c};
    }
    *num_chunks = total;
    if (!plan->config.shuffle) return plain;
    uint32_t *order = malloc((size_t)total * sizeof *order);
    km_ref *shuffled = malloc((size_t)total * sizeof *shuffled);
    if (order != NULL && shuffled != NULL) {
        const uint64_t stream = (uint64_t)layout->epoch + ((uint64_t)number << 32);
        km_permutation(plan->config.seed, stream, (uint32_t)total, order);
        for (int64_t i = 0; i < total; i++)
            shuffled[i] = plain[order[i]];
    } else {
        free(shuffled);
        shuffled = NULL;
    }
    free(order);
    free(plain);
    return shuffled;
}

/* Where the groups of a pool's steps are gathered. */
typedef struct {
    km_ref **open;     /* per shape: the chunks of the group that is being filled */
    int64_t *size;     /* how many there are */
    int64_t *position; /* how many chunks of the shape the epoch has had, the ones left out included */
} gathering;

static void free_gathering(gathering *g, int32_t num_shapes) {
    for (int32_t s = 0; g->open != NULL && s < num_shapes; s++)
        free(g->open[s]);
    free(g->open);
    free(g->size);
    free(g->position);
}

static int new_gathering(const km_plan *plan, gathering *g) {
    const size_t shapes = (size_t)plan->config.num_shapes;
    *g = (gathering){calloc(shapes, sizeof *g->open), calloc(shapes, sizeof(int64_t)),
                     calloc(shapes, sizeof(int64_t))};
    if (g->open == NULL || g->size == NULL || g->position == NULL) return 0;
    for (int32_t s = 0; s < plan->config.num_shapes; s++) {
        /* Never more than the epoch has: a group may be asked to be larger than the corpus. */
        const int64_t most =
            plan->chunks_of_shape[s] < group_size(plan, s) ? plan->chunks_of_shape[s] : group_size(plan, s);
        g->open[s] = malloc((size_t)(most > 0 ? most : 1) * sizeof(km_ref));
        if (g->open[s] == NULL) return 0;
    }
    return 1;
}

/* Closes a group as the pool's next step; `pool` NULL: it is of an earlier pool, and forgotten. */
static void close_group(km_pool *pool, gathering *g, int32_t shape) {
    if (pool != NULL) {
        group *step = pool->steps + pool->num_steps;
        step->first = pool->num_steps > 0 ? step[-1].first + step[-1].count : 0;
        step->count = g->size[shape];
        step->shape = shape;
        memcpy(pool->chunks + step->first, g->open[shape], (size_t)step->count * sizeof(km_ref));
        pool->num_steps++;
    }
    g->size[shape] = 0;
}

/* Walks through the chunks of one pool; its steps go into `pool`, unless that is NULL. */
static int walk(const km_plan *plan, const km_layout *layout, int32_t number, const int32_t *units,
                int32_t num_units, gathering *g, km_pool *pool) {
    const int64_t *taken = taken_of(plan, layout->epoch);
    int64_t num_chunks;
    km_ref *chunks = shuffled_chunks(plan, layout, number, units, num_units, &num_chunks);
    if (chunks == NULL) return 0;
    km_cut cut = {{0, {0, 0}, 0}, 0};
    for (int64_t i = 0; i < num_chunks; i++) {
        if (plan->config.shape_of == NULL) cut = km_layout_cut(&plan->config, chunks[i].unit);
        const int32_t s = km_layout_chunk(&plan->config, &cut, chunks[i].unit, chunks[i].number, NULL);
        if (g->position[s]++ < (taken != NULL ? taken[s] : 0)) continue;
        g->open[s][g->size[s]++] = chunks[i];
        if (g->size[s] == group_size(plan, s)) close_group(pool, g, s);
    }
    free(chunks);
    return 1;
}

/* The pool to start walking from, so that the groups that are open at the beginning of `number` are known:
 * the last one before it at which no group that is still open had begun. */
static int32_t walk_from(const km_plan *plan, const km_layout *layout, int32_t number) {
    const int64_t *taken = taken_of(plan, layout->epoch);
    const int32_t shapes = plan->config.num_shapes;
    int32_t first = number;
    for (int32_t s = 0; s < shapes; s++) {
        const int64_t before = layout->chunks[(int64_t)number * shapes + s];
        const int64_t left = before - (taken != NULL ? taken[s] : 0);
        const int64_t carried = left > 0 ? left % group_size(plan, s) : 0;
        while (first > 0 && layout->chunks[(int64_t)first * shapes + s] > before - carried)
            first--;
    }
    return first;
}

/* Puts the gathering into the state of a pool's beginning, with groups begun earlier as they are but for
 * their first chunks, which are missing: only their number counts until the group is closed and forgotten. */
static void start_at(const km_plan *plan, const km_layout *layout, int32_t number, gathering *g) {
    const int64_t *taken = taken_of(plan, layout->epoch);
    for (int32_t s = 0; s < plan->config.num_shapes; s++) {
        g->position[s] = layout->chunks[(int64_t)number * plan->config.num_shapes + s];
        const int64_t left = g->position[s] - (taken != NULL ? taken[s] : 0);
        g->size[s] = left > 0 ? left % group_size(plan, s) : 0;
        memset(g->open[s], 0, (size_t)g->size[s] * sizeof(km_ref));
    }
}

/* At the end of an epoch: the groups that are left, and who begins where there are fewer chunks than ranks.
 */
static void close_epoch(const km_plan *plan, km_pool *pool, gathering *g) {
    int32_t turn = 0;
    for (int32_t s = 0; s < plan->config.num_shapes; s++) {
        if (g->size[s] == 0) continue;
        const int64_t size = g->size[s];
        close_group(pool, g, s);
        if (size < plan->config.num_ranks) {
            pool->steps[pool->num_steps - 1].turn = turn;
            turn = (int32_t)((turn + size) % plan->config.num_ranks);
        }
    }
}

static int fill_pool(km_plan *plan, const km_layout *layout, km_pool *pool, gathering *g) {
    const int32_t from = walk_from(plan, layout, pool->number);
    start_at(plan, layout, from, g);
    for (int32_t earlier = from; earlier < pool->number; earlier++) {
        int32_t num_units;
        int32_t *units = units_of(layout, earlier, &num_units);
        const int walked = units != NULL && walk(plan, layout, earlier, units, num_units, g, NULL);
        free(units);
        if (!walked) return 0;
    }
    const int64_t steps = layout->first_step[pool->number + 1] - pool->first_step;
    int64_t chunks = 0; /* at most: those of the pool and those carried into it */
    for (int32_t s = 0; s < plan->config.num_shapes; s++) {
        const int64_t *before = layout->chunks + (int64_t)pool->number * plan->config.num_shapes + s;
        chunks += g->size[s] + before[plan->config.num_shapes] - before[0];
    }
    pool->units = units_of(layout, pool->number, &pool->num_units);
    pool->chunks = malloc((size_t)chunks * sizeof *pool->chunks);
    pool->steps = calloc((size_t)(steps > 0 ? steps : 1), sizeof *pool->steps);
    if (pool->units == NULL || pool->chunks == NULL || pool->steps == NULL) return 0;
    pool->bytes =
        chunks * (int64_t)sizeof *pool->chunks + steps * (int64_t)sizeof *pool->steps + pool->num_units * 4;
    if (!walk(plan, layout, pool->number, pool->units, pool->num_units, g, pool)) return 0;
    if (pool->number == layout->num_pools - 1) close_epoch(plan, pool, g);
    return 1;
}

static km_pool *new_pool(km_plan *plan, const km_layout *layout, int32_t number, km_error *error) {
    gathering g = {0};
    km_pool *pool = calloc(1, sizeof *pool);
    int made = 0;
    if (pool != NULL) {
        pool->epoch = layout->epoch;
        pool->number = number;
        pool->first_step = layout->first_step[number];
        made = new_gathering(plan, &g) && fill_pool(plan, layout, pool, &g);
        free_gathering(&g, plan->config.num_shapes);
    }
    if (made) return pool;
    free_pool(pool);
    (void)km_fail(error, -1, "out of memory: the order of a pool");
    return NULL;
}

/* Frees unused pools, except for the IDLE_POOLS that were used last. */
static void forget_pools(km_plan *plan) {
    int idle = 0;
    for (km_pool **at = &plan->pools; *at != NULL;) {
        km_pool *pool = *at;
        if (pool->users == 0 && ++idle > IDLE_POOLS) {
            *at = pool->next;
            free_pool(pool);
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
    const group *g = pool->steps + number;
    *found = (km_step){pool, pool->epoch, g->shape, g->turn, g->count, pool->chunks + g->first};
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

int64_t km_plan_frames(const km_plan *plan, const km_step *step, km_span span) {
    int64_t frames = 0;
    for (int64_t i = span.first; i < span.first + span.count; i++) {
        const km_ref ref = step->chunks[i];
        const km_cut cut = km_layout_cut(&plan->config, ref.unit);
        km_chunk chunk;
        (void)km_layout_chunk(&plan->config, &cut, ref.unit, ref.number, &chunk);
        frames += chunk.end_label - chunk.first_label;
    }
    return frames;
}

int km_plan_summary(km_plan *plan, int64_t step, km_step_summary *summary, km_error *error) {
    km_step found;
    if (step < 0) return km_fail(error, -1, "negative step");
    if (km_plan_acquire(plan, step, &found, error) != KM_OK) return KM_FAILED;
    const km_span all = {0, found.count};
    *summary = (km_step_summary){found.epoch, found.count, km_plan_frames(plan, &found, all), found.shape};
    km_plan_release(plan, found.pool);
    return KM_OK;
}

int km_plan_place(km_plan *plan, int64_t step, int64_t *epoch, int64_t *taken, km_error *error) {
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
            taken[s] = start + (had > 0 ? had - had % group_size(plan, s) : 0);
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
