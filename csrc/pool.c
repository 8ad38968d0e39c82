#include "pool.h"

#include "random.h"

#include <stdlib.h>
#include <string.h>

int64_t km_group_size(const km_plan_config *config, int32_t shape) {
    return (int64_t)config->chunks_per_minibatch[shape] * config->num_ranks;
}

void km_pool_free(km_pool *pool) {
    if (pool == NULL) return;
    free(pool->units);
    free(pool->chunks);
    free(pool->steps);
    free(pool);
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
static km_ref *shuffled_chunks(const km_walk *walk, int32_t number, const int32_t *units, int32_t num_units,
                               int64_t *num_chunks) {
    int64_t total = 0;
    for (int32_t s = 0; s < walk->config->num_shapes; s++) {
        const int64_t *before = walk->layout->chunks + (int64_t)number * walk->config->num_shapes + s;
        total += before[walk->config->num_shapes] - before[0];
    }
    km_ref *plain = malloc((size_t)total * sizeof *plain);
    if (plain == NULL) return NULL;
    int64_t at = 0;
    for (int32_t i = 0; i < num_units; i++) {
        const int32_t chunks = km_layout_cut(walk->config, units[i]).count;
        for (int32_t c = 0; c < chunks; c++)
            plain[at++] = (km_ref){units[i], c};
    }
    *num_chunks = total;
    if (!walk->config->shuffle) return plain;
    uint32_t *order = malloc((size_t)total * sizeof *order);
    km_ref *shuffled = malloc((size_t)total * sizeof *shuffled);
    if (order != NULL && shuffled != NULL) {
        const uint64_t stream = (uint64_t)walk->layout->epoch + ((uint64_t)number << 32);
        km_permutation(walk->config->seed, stream, (uint32_t)total, order);
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
    int64_t *frames;   /* and labelled frames of these */
    int64_t *position; /* how many chunks of the shape the epoch has had, the ones left out included */
} gathering;

static void free_gathering(gathering *g, int32_t num_shapes) {
    for (int32_t s = 0; g->open != NULL && s < num_shapes; s++)
        free(g->open[s]);
    free(g->open);
    free(g->size);
    free(g->frames);
    free(g->position);
}

static int new_gathering(const km_walk *walk, gathering *g) {
    const size_t shapes = (size_t)walk->config->num_shapes;
    *g = (gathering){calloc(shapes, sizeof *g->open), calloc(shapes, sizeof(int64_t)),
                     calloc(shapes, sizeof(int64_t)), calloc(shapes, sizeof(int64_t))};
    if (g->open == NULL || g->size == NULL || g->frames == NULL || g->position == NULL) return 0;
    for (int32_t s = 0; s < walk->config->num_shapes; s++) {
        /* Never more than the epoch has: a group may be asked to be larger than the corpus. */
        const int64_t most = walk->chunks_of_shape[s] < km_group_size(walk->config, s)
                                 ? walk->chunks_of_shape[s]
                                 : km_group_size(walk->config, s);
        g->open[s] = malloc((size_t)(most > 0 ? most : 1) * sizeof(km_ref));
        if (g->open[s] == NULL) return 0;
    }
    return 1;
}

/* Closes a group as the pool's next step; `pool` NULL: it is of an earlier pool, and forgotten. */
static void close_group(km_pool *pool, gathering *g, int32_t shape) {
    if (pool != NULL) {
        km_group *step = pool->steps + pool->num_steps;
        step->first = pool->num_steps > 0 ? step[-1].first + step[-1].count : 0;
        step->count = g->size[shape];
        step->frames = g->frames[shape];
        step->shape = shape;
        memcpy(pool->chunks + step->first, g->open[shape], (size_t)step->count * sizeof(km_ref));
        pool->num_steps++;
    }
    g->size[shape] = g->frames[shape] = 0;
}

/* Walks through the chunks of one pool; its steps go into `pool`, unless that is NULL. */
static int walk_pool(const km_walk *walk, int32_t number, const int32_t *units, int32_t num_units,
                     gathering *g, km_pool *pool) {
    const int64_t *taken = walk->taken;
    int64_t num_chunks;
    km_ref *chunks = shuffled_chunks(walk, number, units, num_units, &num_chunks);
    if (chunks == NULL) return 0;
    km_cut cut = {{0, {0, 0}, 0}, 0};
    km_chunk chunk;
    for (int64_t i = 0; i < num_chunks; i++) {
        if (walk->config->shape_of == NULL) cut = km_layout_cut(walk->config, chunks[i].unit);
        const int32_t s = km_layout_chunk(walk->config, &cut, chunks[i].unit, chunks[i].number, &chunk);
        if (g->position[s]++ < (taken != NULL ? taken[s] : 0)) continue;
        g->open[s][g->size[s]++] = chunks[i];
        g->frames[s] += chunk.end_label - chunk.first_label;
        if (g->size[s] == km_group_size(walk->config, s)) close_group(pool, g, s);
    }
    free(chunks);
    return 1;
}

/* The pool to start walking from, so that the groups that are open at the beginning of `number` are known:
 * the last one before it at which no group that is still open had begun. */
static int32_t walk_from(const km_walk *walk, int32_t number) {
    const int64_t *taken = walk->taken;
    const int32_t shapes = walk->config->num_shapes;
    int32_t first = number;
    for (int32_t s = 0; s < shapes; s++) {
        const int64_t before = walk->layout->chunks[(int64_t)number * shapes + s];
        const int64_t left = before - (taken != NULL ? taken[s] : 0);
        const int64_t carried = left > 0 ? left % km_group_size(walk->config, s) : 0;
        while (first > 0 && walk->layout->chunks[(int64_t)first * shapes + s] > before - carried)
            first--;
    }
    return first;
}

/* Puts the gathering into the state of a pool's beginning, with groups begun earlier as they are but for
 * their first chunks, which are missing: only their number counts until the group is closed and forgotten. */
static void start_at(const km_walk *walk, int32_t number, gathering *g) {
    const int64_t *taken = walk->taken;
    for (int32_t s = 0; s < walk->config->num_shapes; s++) {
        g->position[s] = walk->layout->chunks[(int64_t)number * walk->config->num_shapes + s];
        const int64_t left = g->position[s] - (taken != NULL ? taken[s] : 0);
        g->size[s] = left > 0 ? left % km_group_size(walk->config, s) : 0;
        memset(g->open[s], 0, (size_t)g->size[s] * sizeof(km_ref));
    }
}

/* At the end of an epoch: the groups that are left, and who begins where there are fewer chunks than ranks.
 */
static void close_epoch(const km_walk *walk, km_pool *pool, gathering *g) {
    int32_t turn = 0;
    for (int32_t s = 0; s < walk->config->num_shapes; s++) {
        if (g->size[s] == 0) continue;
        const int64_t size = g->size[s];
        close_group(pool, g, s);
        if (size < walk->config->num_ranks) {
            pool->steps[pool->num_steps - 1].turn = turn;
            turn = (int32_t)((turn + size) % walk->config->num_ranks);
        }
    }
}

static int fill_pool(const km_walk *walk, km_pool *pool, gathering *g) {
    const int32_t from = walk_from(walk, pool->number);
    start_at(walk, from, g);
    for (int32_t earlier = from; earlier < pool->number; earlier++) {
        int32_t num_units;
        int32_t *units = units_of(walk->layout, earlier, &num_units);
        const int walked = units != NULL && walk_pool(walk, earlier, units, num_units, g, NULL);
        free(units);
        if (!walked) return 0;
    }
    const int64_t steps = walk->layout->first_step[pool->number + 1] - pool->first_step;
    int64_t chunks = 0; /* at most: those of the pool and those carried into it */
    for (int32_t s = 0; s < walk->config->num_shapes; s++) {
        const int64_t *before = walk->layout->chunks + (int64_t)pool->number * walk->config->num_shapes + s;
        chunks += g->size[s] + before[walk->config->num_shapes] - before[0];
    }
    pool->units = units_of(walk->layout, pool->number, &pool->num_units);
    pool->chunks = malloc((size_t)chunks * sizeof *pool->chunks);
    pool->steps = calloc((size_t)(steps > 0 ? steps : 1), sizeof *pool->steps);
    if (pool->units == NULL || pool->chunks == NULL || pool->steps == NULL) return 0;
    pool->bytes =
        chunks * (int64_t)sizeof *pool->chunks + steps * (int64_t)sizeof *pool->steps + pool->num_units * 4;
    if (!walk_pool(walk, pool->number, pool->units, pool->num_units, g, pool)) return 0;
    if (pool->number == walk->layout->num_pools - 1) close_epoch(walk, pool, g);
    return 1;
}

km_pool *km_pool_new(const km_walk *walk, int32_t number) {
    gathering g = {0};
    km_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL) return NULL;
    pool->epoch = walk->layout->epoch;
    pool->number = number;
    pool->first_step = walk->layout->first_step[number];
    const int made = new_gathering(walk, &g) && fill_pool(walk, pool, &g);
    free_gathering(&g, walk->config->num_shapes);
    if (made) return pool;
    km_pool_free(pool);
    return NULL;
}
