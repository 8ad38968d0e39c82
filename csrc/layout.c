#include "layout.h"

#include "random.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* Epochs' permutations of units are apart from pools' permutations of chunks, whose streams are smaller. */
#define UNITS_STREAM (UINT64_C(1) << 63)

km_cut km_layout_cut(const km_plan_config *config, int32_t unit) {
    km_cut cut = {{1, {-1, -1}, 0}, 1};
    if (config->shape_of == NULL) {
        cut.cover = km_split_cover(&config->split, config->num_frames[unit]);
        cut.count = km_cover_count(&cut.cover);
    }
    return cut;
}

int32_t km_layout_chunk(const km_plan_config *config, const km_cut *cut, int32_t unit, int32_t number,
                        km_chunk *chunk) {
    const int32_t frames = config->num_frames[unit];
    km_chunk unused;
    if (chunk == NULL) chunk = &unused;
    memset(chunk, 0, sizeof *chunk);
    chunk->utterance = unit;
    if (config->shape_of != NULL) {
        chunk->end_label = frames;
        return config->shape_of[unit];
    }
    const int32_t width = km_cover_chunk(&config->split, &cut->cover, frames, number, chunk);
    return config->shape_at[width][number == 0][number == cut->count - 1];
}

static void count_unit(const km_plan_config *config, int32_t unit, int64_t *chunks) {
    const km_cut cut = km_layout_cut(config, unit);
    /* All but a few are of the principal width and in the middle: single frames are too many to look at each.
     */
    const int32_t middle = config->shape_of == NULL ? cut.cover.principal - 2 : 0;
    for (int32_t number = 0; number < cut.count; number++) {
        if (number == 1 && middle > 0) {
            chunks[config->shape_at[0][0][0]] += middle;
            number += middle;
        }
        chunks[km_layout_chunk(config, &cut, unit, number, NULL)]++;
    }
}

void km_layout_count(const km_plan_config *config, int64_t *chunks) {
    memset(chunks, 0, (size_t)config->num_shapes * sizeof *chunks);
    for (int32_t unit = 0; unit < config->num_units; unit++)
        count_unit(config, unit, chunks);
}

static int32_t unit_at(const km_layout *layout, int32_t i) {
    return layout->units != NULL ? layout->units[i] : i;
}

/* Where the pool ends that begins at unit `first` of the order. */
static int32_t pool_end(const km_plan_config *config, const km_layout *layout, int32_t first) {
    if (config->unit_bytes == NULL) return config->num_units;
    int64_t bytes = config->unit_bytes[unit_at(layout, first)];
    int32_t end = first + 1;
    for (; end < config->num_units; end++) {
        const int64_t more = config->unit_bytes[unit_at(layout, end)];
        if (more > 0 && more > config->pool_bytes - bytes) break;
        bytes += more;
    }
    return end;
}

/* Where runs begin: of units that are permuted together. Returns how many there are; `first` may be NULL. */
static int32_t find_runs(const km_plan_config *config, int32_t *first) {
    int32_t runs = 0;
    int64_t bytes = 0;
    for (int32_t unit = 0; unit < config->num_units; unit++) {
        const int64_t more = config->unit_bytes[unit];
        bytes += more;
        if (unit > 0 && (more == 0 || bytes <= config->run_bytes)) continue;
        if (first != NULL) first[runs] = unit;
        runs++;
        bytes = more;
    }
    return runs;
}

/* Has layout->units be a permutation of the units, run by run. */
static int permute(const km_plan_config *config, km_layout *layout) {
    const int32_t runs = find_runs(config, NULL);
    layout->units = calloc((size_t)config->num_units, sizeof *layout->units);
    uint32_t *order = calloc((size_t)runs, sizeof *order);
    int32_t *first = calloc((size_t)runs + 1, sizeof *first);
    const int made = layout->units != NULL && order != NULL && first != NULL;
    if (made) {
        int32_t at = 0;
        (void)find_runs(config, first);
        first[runs] = config->num_units;
        km_permutation(config->seed, UNITS_STREAM | (uint64_t)layout->epoch, (uint32_t)runs, order);
        for (int32_t run = 0; run < runs; run++)
            for (int32_t unit = first[order[run]]; unit < first[order[run] + 1]; unit++)
                layout->units[at++] = unit;
    }
    free(order);
    free(first);
    return made;
}

static int allocate_pools(const km_plan_config *config, km_layout *layout) {
    const size_t ends = (size_t)layout->num_pools + 1;
    layout->first_unit = calloc(ends, sizeof *layout->first_unit);
    layout->first_step = calloc(ends, sizeof *layout->first_step);
    layout->chunks = calloc(ends * (size_t)config->num_shapes, sizeof *layout->chunks);
    return layout->first_unit != NULL && layout->first_step != NULL && layout->chunks != NULL;
}

/* Steps that have all their chunks when `chunks` of each shape have come; the last pool's are all steps. */
static int64_t steps_before(const km_plan_config *config, const int64_t *chunks, const int64_t *taken,
                            int is_last) {
    int64_t steps = 0;
    for (int32_t s = 0; s < config->num_shapes; s++) {
        const int64_t group = (int64_t)config->chunks_per_minibatch[s] * config->num_ranks;
        const int64_t left = chunks[s] - (taken != NULL ? taken[s] : 0);
        if (left > 0) steps += is_last ? (left + group - 1) / group : left / group;
    }
    return steps;
}

static void cut_into_pools(const km_plan_config *config, km_layout *layout, const int64_t *taken) {
    const size_t shapes = (size_t)config->num_shapes;
    int32_t unit = 0;
    for (int32_t pool = 0; pool < layout->num_pools; pool++) {
        const int32_t end = pool_end(config, layout, unit);
        const int64_t *before = layout->chunks + (size_t)pool * shapes;
        int64_t *after = layout->chunks + (size_t)(pool + 1) * shapes;
        memcpy(after, before, shapes * sizeof *after);
        for (; unit < end; unit++)
            count_unit(config, unit_at(layout, unit), after);
        layout->first_unit[pool + 1] = end;
        layout->first_step[pool + 1] = steps_before(config, after, taken, pool == layout->num_pools - 1);
    }
}

km_layout *km_layout_new(const km_plan_config *config, int64_t epoch, const int64_t *taken, km_error *error) {
    km_layout *layout = calloc(1, sizeof *layout);
    if (layout == NULL) goto no_memory;
    layout->epoch = epoch;
    /* In a single pool the order of units is without effect. */
    if (config->shuffle && pool_end(config, layout, 0) < config->num_units && !permute(config, layout))
        goto no_memory;
    for (int32_t unit = 0; unit < config->num_units; layout->num_pools++)
        unit = pool_end(config, layout, unit);
    if (!allocate_pools(config, layout)) goto no_memory;
    cut_into_pools(config, layout, taken);
    return layout;
no_memory:
    km_layout_free(layout);
    (void)km_fail(error, -1, "out of memory: an order of %" PRId32 " units", config->num_units);
    return NULL;
}

void km_layout_free(km_layout *layout) {
    if (layout == NULL) return;
    free(layout->units);
    free(layout->first_unit);
    free(layout->first_step);
    free(layout->chunks);
    free(layout);
}

int64_t km_layout_memory(const km_plan_config *config, const km_layout *layout) {
    const int64_t ends = layout->num_pools + 1;
    return (layout->units != NULL ? (int64_t)config->num_units * 4 : 0) +
           ends * (12 + 8 * (int64_t)config->num_shapes);
}
