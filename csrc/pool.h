/* A pool's order: its chunks permuted and gathered into steps. Made by the plan, which also keeps it.
 *
 * Groups of chunks of one shape go on from pool to pool, so a pool's first steps may have chunks of earlier
 * ones. Which these are is found by walking through those earlier pools too, as far back as the oldest group
 * that is open at the pool's beginning: mostly one. No data are read for that.
 */
#ifndef KALDI_MPI_POOL_H
#define KALDI_MPI_POOL_H

#include "layout.h"

/* A step's chunks in the pool's list. */
typedef struct {
    int64_t first, count;
    int64_t frames; /* labelled */
    int32_t shape, turn;
} km_group;

struct km_pool {
    int64_t epoch, first_step, num_steps;
    int32_t number, users;
    int32_t num_units;
    int32_t *units; /* ascending */
    km_ref *chunks; /* step by step */
    km_group *steps;
    int64_t bytes;        /* that it takes in memory */
    struct km_pool *next; /* the plan's list runs from the last used one to the one used longest ago */
};

/* What an epoch's pools are made from. */
typedef struct {
    const km_plan_config *config;
    const int64_t *chunks_of_shape; /* of a whole epoch */
    const int64_t *taken;           /* chunks of each shape that this epoch leaves out; NULL: none */
    const km_layout *layout;
} km_walk;

/* Chunks of a whole step of this shape, over all ranks. */
int64_t km_group_size(const km_plan_config *config, int32_t shape);

/* NULL: there is no memory. */
km_pool *km_pool_new(const km_walk *walk, int32_t number);
void km_pool_free(km_pool *pool);

#endif
