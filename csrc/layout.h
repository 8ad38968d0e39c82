/* The layout of an epoch: its permutation of the units, cut into pools, and how many chunks and steps come
 * before each pool. Made from the plan's configuration alone, without reading data.
 */
#ifndef KALDI_MPI_LAYOUT_H
#define KALDI_MPI_LAYOUT_H

#include "plan.h"

/* What a unit is cut into. */
typedef struct {
    km_cover cover; /* of utterances */
    int32_t count;  /* chunks */
} km_cut;

km_cut km_layout_cut(const km_plan_config *config, int32_t unit);

/* The shape of chunk `number` of a unit; what else is known of it goes into `chunk`, unless that is NULL. */
int32_t km_layout_chunk(const km_plan_config *config, const km_cut *cut, int32_t unit, int32_t number,
                        km_chunk *chunk);

typedef struct km_layout {
    int64_t epoch;
    int32_t num_pools;
    int32_t *units;      /* in their order of this epoch; NULL: in that of the corpus */
    int32_t *first_unit; /* per pool, an index into units; and their number at the end */
    int64_t *first_step; /* per pool, of this epoch; and their number at the end */
    int64_t *chunks; /* [pool][shape] of the epoch before the pool, the ones left out included; and all at the
                        end */
    struct km_layout *next; /* the plan's list */
} km_layout;

/* Chunks of each shape and of all of an epoch: (num_shapes) values. */
void km_layout_count(const km_plan_config *config, int64_t *chunks);

/* NULL on failure. `taken`: chunks of each shape that are left out, from the epoch's beginning; NULL: none.
 */
km_layout *km_layout_new(const km_plan_config *config, int64_t epoch, const int64_t *taken, km_error *error);
void km_layout_free(km_layout *layout);

int64_t km_layout_memory(const km_plan_config *config, const km_layout *layout);

#endif
