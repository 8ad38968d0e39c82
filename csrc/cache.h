/* The cache: the bytes of one pool of units in memory, and of the next, read ahead in large blocks by a
 * thread of its own.
 *
 * It changes where bytes come from, and never which: what it does not have (carried chunks of an earlier
 * pool, a pool that could not be read) is read from the file by whoever needs it, who then meets the error
 * too.
 *
 * Memory: two pools at most, each as large as its units are on disk. Readers acquire a pool and release it;
 * one that is wanted while both others are in use is not loaded.
 */
#ifndef KALDI_MPI_CACHE_H
#define KALDI_MPI_CACHE_H

#include "plan.h"

/* python: begin */
/* Where the bytes of each unit are. All borrowed. */
typedef struct {
    int32_t num_units;
    const km_file *files;
    const int32_t *file_of; /* per unit */
    const int64_t *begin;   /* per unit: bytes begin .. end-1 of the file */
    const int64_t *end;
} km_units;
/* python: end */

typedef struct km_cache km_cache;

/* bytes_per_second: reads no faster than that (0: as fast as it can). NULL on failure. */
km_cache *km_cache_new(const km_units *units, km_plan *plan, int64_t bytes_per_second, km_error *error);

/* Has the thread stop, and everybody who waits return; waits for nobody. */
void km_cache_stop(km_cache *cache);

/* The same, and joins the thread; nobody may have a pool of it. */
void km_cache_free(km_cache *cache);

typedef struct km_resident km_resident;

/* Waits until the pool is in memory, and has the one after it read next. NULL: the pool will not be in
 * memory. The seconds waited are added to `waited`. */
const km_resident *km_cache_acquire(km_cache *cache, km_pool *pool, double *waited);
void km_cache_release(km_cache *cache, const km_resident *resident);

/* The unit's file, with its bytes if they are in memory; `resident` may be NULL. */
km_view km_cache_view(const km_cache *cache, const km_resident *resident, int32_t unit);

/* Bytes read from files so far, and bytes of memory that are in use. */
int64_t km_cache_bytes_read(km_cache *cache);
int64_t km_cache_memory(km_cache *cache);

#endif
