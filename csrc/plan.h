/* The plan: which chunks there are, and which of them each rank takes at each step of each epoch. It reads no
 * data: it is made of the lengths of utterances alone (or of the shapes of examples).
 *
 * Units are utterances, cut into chunks of one or several shapes, or examples, of which each is a chunk or is
 * cut into its labelled frames, as an utterance into chunks of width 1. An epoch is a permutation of all
 * units (or of runs of them), drawn by (seed, epoch) and cut into *pools*: as many units as have at most
 * pool_bytes on disk (or one unit, if that has more). Within a pool all chunks are permuted, drawn by (seed,
 * epoch, pool). Walking through the epoch's chunks in this order, each one joins the group of its shape, and
 * a group that has N * B chunks is a *step*: of N ranks with B chunks each, B being that of the shape. What
 * is left at the end of the epoch are steps too. So groups may have chunks of earlier pools, and no chunk is
 * lost.
 *
 * Of a step's M chunks rank r takes M*r/N .. M*(r+1)/N - 1; where M < N, M ranks take one each, and other
 * ones at the next such step of the epoch. So minibatches of two ranks in an epoch never differ by more than
 * one.
 *
 * Steps are numbered from the position where the plan starts, over all epochs. A plan may be used by several
 * threads.
 */
#ifndef KALDI_MPI_PLAN_H
#define KALDI_MPI_PLAN_H

#include "split.h"

/* python: begin */
typedef struct km_plan km_plan;

typedef struct {
    int32_t num_units;
    const int32_t *num_frames; /* labelled frames of each unit, > 0; borrowed */
    const int64_t *unit_bytes; /* of each unit; 0: the same as those of the unit before, with which it is kept
                                  together; borrowed; NULL: there is one pool */
    int64_t pool_bytes;
    int64_t run_bytes; /* units that lie together on disk, up to so many bytes, are permuted together; 0: each
                          alone */
    const int32_t *shape_of; /* whole examples: the shape of each unit; borrowed. NULL: units are */
    km_split split;          /* cut by this, and the shape is */
    int32_t shape_at[KM_MAX_WIDTHS][2][2]; /* [width][chunk is the first][chunk is the last] */
    int32_t num_shapes;
    const int32_t *chunks_per_minibatch; /* B of each shape, > 0; copied */
    int32_t num_ranks;
    int32_t shuffle;
    uint64_t seed;
    int64_t epoch;        /* where the plan starts: its first epoch, */
    const int64_t *taken; /* and chunks of each shape of that epoch that are left out; copied; NULL: none */
} km_plan_config;

/* NULL on failure. */
km_plan *km_plan_new(const km_plan_config *config, km_error *error);
void km_plan_free(km_plan *plan);

/* Of an epoch, over all shapes. */
int64_t km_plan_num_chunks(const km_plan *plan);

/* Of a whole epoch, and of the first one, of which the start may have left out a part. */
int64_t km_plan_steps_per_epoch(const km_plan *plan);
int64_t km_plan_steps_of_first_epoch(const km_plan *plan);

typedef struct {
    int64_t chunks; /* over all ranks */
    int64_t frames; /* labelled, over all ranks */
} km_step_summary;

int km_plan_summary(km_plan *plan, int64_t step, km_step_summary *summary, km_error *error);

/* The position before a step: its epoch, and how many chunks of each shape the steps before it have taken. */
int km_plan_position(km_plan *plan, int64_t step, int64_t *epoch, int64_t *taken, km_error *error);

/* Bytes of memory that the plan has now. */
int64_t km_plan_memory(km_plan *plan);
/* python: end */

/* A chunk of a unit. */
typedef struct {
    int32_t unit, number;
} km_ref;

/* The order of one pool, valid until it is released. */
typedef struct km_pool km_pool;

typedef struct {
    km_pool *pool;
    int64_t epoch;
    int32_t shape;
    int32_t turn;         /* which rank is first to take a chunk where there are fewer chunks than ranks */
    int64_t count;        /* over all ranks */
    int64_t frames;       /* labelled, over all ranks */
    const km_ref *chunks; /* `count` of them */
} km_step;

int km_plan_acquire(km_plan *plan, int64_t step, km_step *found, km_error *error);
void km_plan_release(km_plan *plan, km_pool *pool);

/* One more user of a pool that is in use, to be released as well. */
void km_plan_hold(km_plan *plan, km_pool *pool);

/* The chunks of a step that one rank takes: a range of step->chunks. */
typedef struct {
    int64_t first, count;
} km_span;

km_span km_plan_share(const km_plan *plan, const km_step *step, int32_t rank);

km_chunk km_plan_chunk(const km_plan *plan, int64_t epoch, km_ref ref);

/* The units that a pool is cut from, in ascending order; carried chunks may be of others. */
const int32_t *km_pool_units(const km_pool *pool, int32_t *count);

/* Tells pools apart: of one that holds the whole corpus there is but one. */
int64_t km_pool_id(const km_plan *plan, const km_pool *pool);

/* The pool that comes after it, acquired; NULL on failure or where there is but one. */
km_pool *km_plan_acquire_next(km_plan *plan, const km_pool *pool);

#endif
