#define _POSIX_C_SOURCE 200809L

#include "cache.h"

#include "thread.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* One read asks for at most this many bytes, and reads over a gap of up to so many, or as many as it has had
 * that are wanted: on a network file system a round trip costs as much as reading them. */
enum { BLOCK_BYTES = 4 << 20, GAP_BYTES = 64 << 10, NUM_SLOTS = 2 };

enum state { EMPTY, WANTED, LOADING, LOADED, FAILED };

struct km_resident {
    enum state state;
    km_pool *pool; /* acquired; NULL where the slot is empty */
    int64_t id;
    int32_t users;
    int was_used; /* by a reader, since it was claimed */
    int follow;   /* the pool after it is to be claimed too, as soon as a slot is free */
    int64_t last_used;
    int32_t num_units;
    int32_t *units; /* ascending */
    int64_t *at;    /* per unit of the pool: where its bytes begin in the arena */
    unsigned char *arena;
    int64_t capacity;
};

struct km_cache {
    km_units units;
    km_plan *plan;
    int64_t bytes_per_second;
    pthread_t thread;
    pthread_mutex_t mutex; /* guards everything below but a slot that is LOADING, which is the thread's */
    pthread_cond_t work;   /* a slot is WANTED, or stop */
    pthread_cond_t loaded; /* a slot has been loaded, or has failed, or stop */
    int stop;
    int64_t clock;
    int64_t bytes_read;
    km_resident slots[NUM_SLOTS];
};

static int64_t bytes_of(const km_cache *cache, int32_t unit) {
    return cache->units.end[unit] - cache->units.begin[unit];
}

/* Row ranges of one matrix may begin at the same byte and end elsewhere. */
static int same_bytes(const km_cache *cache, int32_t unit, int32_t other) {
    const km_units *units = &cache->units;
    return units->file_of[unit] == units->file_of[other] && units->begin[unit] == units->begin[other] &&
           units->end[unit] == units->end[other];
}

static int is_stopped(km_cache *cache) {
    (void)pthread_mutex_lock(&cache->mutex);
    const int stop = cache->stop;
    (void)pthread_mutex_unlock(&cache->mutex);
    return stop;
}

/* Makes room for the pool's bytes, and lists where each unit's will be. Units that share bytes (the examples
 * of a merged one) share them here too. */
static int lay_out(km_cache *cache, km_resident *slot) {
    int32_t count;
    const int32_t *units = km_pool_units(slot->pool, &count);
    int32_t *kept = realloc(slot->units, (size_t)count * sizeof *kept);
    if (kept != NULL) slot->units = kept;
    int64_t *at = realloc(slot->at, (size_t)count * sizeof *at);
    if (at != NULL) slot->at = at;
    if (kept == NULL || at == NULL) return 0;
    slot->num_units = count;
    int64_t total = 0;
    for (int32_t i = 0; i < count; i++) {
        const int32_t unit = units[i], before = i > 0 ? units[i - 1] : -1;
        const int shared = before >= 0 && same_bytes(cache, unit, before);
        slot->units[i] = unit;
        slot->at[i] = shared ? slot->at[i - 1] : total;
        if (!shared) total += bytes_of(cache, unit);
    }
    if (total <= slot->capacity) return 1;
    free(slot->arena);
    slot->arena = malloc((size_t)total);
    slot->capacity = slot->arena != NULL ? total : 0;
    return slot->arena != NULL;
}

/* Sleeps for as long as the reading so far was too fast. */
static void hold_back(km_cache *cache, double since, int64_t bytes) {
    if (cache->bytes_per_second <= 0) return;
    const double due = since + (double)bytes / (double)cache->bytes_per_second;
    for (double left = due - km_seconds(); left > 0.0 && !is_stopped(cache); left = due - km_seconds())
        km_sleep(left < 0.02 ? left : 0.02);
}

/* One read of a file that holds units from..to-1 of the slot, scattered to their places. */
static int read_block(const km_cache *cache, km_resident *slot, int32_t from, int32_t to, int64_t begin,
                      int64_t end, km_scratch *block) {
    const km_file *file = cache->units.files + cache->units.file_of[slot->units[from]];
    km_error ignored; /* whoever needs these bytes will meet the error again */
    if (end > file->size) return 0;
    const int direct =
        to - from == 1 ||
        end - begin == slot->at[to - 1] + bytes_of(cache, slot->units[to - 1]) - slot->at[from];
    unsigned char *into = slot->arena + slot->at[from];
    if (!direct) {
        if (km_scratch_reserve(block, end - begin, &ignored) != KM_OK) return 0;
        into = block->data;
    }
    if (km_read(file, begin, end - begin, into, block, &ignored) != KM_OK) return 0;
    for (int32_t i = from; i < to && !direct; i++) {
        const int32_t unit = slot->units[i];
        memcpy(slot->arena + slot->at[i], into + (cache->units.begin[unit] - begin),
               (size_t)bytes_of(cache, unit));
    }
    return 1;
}

/* Reads the slot's units, in ascending order and as many at once as lie close together. */
static int load(km_cache *cache, km_resident *slot) {
    if (!lay_out(cache, slot)) return 0;
    const km_units *units = &cache->units;
    const double since = km_seconds();
    km_scratch block = {0};
    int good = 1;
    for (int32_t from = 0, to; from < slot->num_units && good; from = to) {
        const int32_t first = slot->units[from];
        const int64_t begin = units->begin[first];
        int64_t end = units->end[first], wanted = end - begin;
        for (to = from + 1; to < slot->num_units; to++) {
            const int32_t unit = slot->units[to];
            const int64_t gap = units->begin[unit] - end;
            const int same = same_bytes(cache, unit, slot->units[to - 1]);
            if (units->file_of[unit] != units->file_of[first] ||
                (!same && (gap < 0 || gap > GAP_BYTES || gap > wanted)))
                break;
            if (units->end[unit] - begin > BLOCK_BYTES) break;
            end = units->end[unit];
            wanted += same ? 0 : end - units->begin[unit];
        }
        good = read_block(cache, slot, from, to, begin, end, &block) && !is_stopped(cache);
        hold_back(cache, since, block.bytes_read);
    }
    (void)pthread_mutex_lock(&cache->mutex);
    cache->bytes_read += block.bytes_read;
    (void)pthread_mutex_unlock(&cache->mutex);
    km_scratch_free(&block);
    return good;
}

/* With the mutex held: the slot that has the pool, or is to have it. */
static km_resident *find(km_cache *cache, int64_t id) {
    for (int i = 0; i < NUM_SLOTS; i++)
        if (cache->slots[i].state != EMPTY && cache->slots[i].id == id) return cache->slots + i;
    return NULL;
}

/* With the mutex held: gives the slot that nobody has used for longest to a pool, which it holds from now on;
 * NULL where all are in use. */
static km_resident *claim(km_cache *cache, km_pool *pool) {
    km_resident *oldest = NULL;
    for (int i = 0; i < NUM_SLOTS; i++) {
        km_resident *slot = cache->slots + i;
        if (slot->users > 0 || slot->state == LOADING) continue;
        if (oldest == NULL || slot->last_used < oldest->last_used) oldest = slot;
    }
    if (oldest == NULL) return NULL;
    if (oldest->pool != NULL) km_plan_release(cache->plan, oldest->pool);
    km_plan_hold(cache->plan, pool);
    oldest->pool = pool;
    oldest->id = km_pool_id(cache->plan, pool);
    oldest->state = WANTED;
    oldest->follow = 1;
    oldest->was_used = 0;
    oldest->last_used = cache->clock++;
    (void)pthread_cond_signal(&cache->work);
    return oldest;
}

/* With the mutex held, which is let go meanwhile: claims a slot for the pool that comes after the slot's. */
static void follow(km_cache *cache, km_resident *slot) {
    slot->users++; /* so that it stays */
    (void)pthread_mutex_unlock(&cache->mutex);
    km_pool *next = km_plan_acquire_next(cache->plan, slot->pool);
    (void)pthread_mutex_lock(&cache->mutex);
    slot->follow = 0;
    if (next != NULL) {
        if (find(cache, km_pool_id(cache->plan, next)) == NULL) slot->follow = claim(cache, next) == NULL;
        km_plan_release(cache->plan, next);
    }
    slot->users--;
}

/* With the mutex held: what the thread does next; a pool that somebody waits for comes first. */
static km_resident *next_wanted(km_cache *cache) {
    km_resident *next = NULL;
    for (int i = 0; i < NUM_SLOTS; i++)
        if (cache->slots[i].state == WANTED && (next == NULL || cache->slots[i].users > 0))
            next = cache->slots + i;
    return next;
}

/* With the mutex held: the slot used last, if the pool after it is still to be claimed and there is a slot
 * for it. */
static km_resident *next_followed(km_cache *cache) {
    km_resident *last = NULL;
    int is_free = 0;
    for (int i = 0; i < NUM_SLOTS; i++)
        if (last == NULL || cache->slots[i].last_used > last->last_used) last = cache->slots + i;
    for (int i = 0; i < NUM_SLOTS; i++)
        is_free |= cache->slots + i != last && cache->slots[i].users == 0 && cache->slots[i].state != LOADING;
    /* Not before somebody has used it: else one pool would pull the next after it, without end. */
    return is_free && last->follow && last->was_used ? last : NULL;
}

static void *read_ahead(void *argument) {
    km_cache *cache = argument;
    (void)pthread_mutex_lock(&cache->mutex);
    while (!cache->stop) {
        km_resident *wanted = next_wanted(cache);
        km_resident *followed = wanted == NULL ? next_followed(cache) : NULL;
        if (followed != NULL) {
            follow(cache, followed);
        } else if (wanted != NULL) {
            wanted->state = LOADING;
            (void)pthread_mutex_unlock(&cache->mutex);
            const int good = load(cache, wanted);
            (void)pthread_mutex_lock(&cache->mutex);
            wanted->state = good ? LOADED : FAILED;
            (void)pthread_cond_broadcast(&cache->loaded);
        } else {
            (void)pthread_cond_wait(&cache->work, &cache->mutex);
        }
    }
    (void)pthread_mutex_unlock(&cache->mutex);
    return NULL;
}

km_cache *km_cache_new(const km_units *units, km_plan *plan, int64_t bytes_per_second, km_error *error) {
    km_cache *cache = calloc(1, sizeof *cache);
    if (cache == NULL) {
        (void)km_fail(error, -1, "out of memory: a cache");
        return NULL;
    }
    cache->units = *units;
    cache->plan = plan;
    cache->bytes_per_second = bytes_per_second;
    (void)pthread_mutex_init(&cache->mutex, NULL);
    (void)pthread_cond_init(&cache->work, NULL);
    (void)pthread_cond_init(&cache->loaded, NULL);
    if (km_thread_start(&cache->thread, read_ahead, cache) == 0) return cache;
    (void)km_fail(error, -1, "cannot start a thread that reads ahead");
    (void)pthread_cond_destroy(&cache->loaded);
    (void)pthread_cond_destroy(&cache->work);
    (void)pthread_mutex_destroy(&cache->mutex);
    free(cache);
    return NULL;
}

void km_cache_stop(km_cache *cache) {
    (void)pthread_mutex_lock(&cache->mutex);
    cache->stop = 1;
    (void)pthread_cond_broadcast(&cache->work);
    (void)pthread_cond_broadcast(&cache->loaded);
    (void)pthread_mutex_unlock(&cache->mutex);
}

void km_cache_free(km_cache *cache) {
    if (cache == NULL) return;
    km_cache_stop(cache);
    (void)pthread_join(cache->thread, NULL);
    for (int i = 0; i < NUM_SLOTS; i++) {
        km_resident *slot = cache->slots + i;
        if (slot->pool != NULL) km_plan_release(cache->plan, slot->pool);
        free(slot->units);
        free(slot->at);
        free(slot->arena);
    }
    (void)pthread_cond_destroy(&cache->loaded);
    (void)pthread_cond_destroy(&cache->work);
    (void)pthread_mutex_destroy(&cache->mutex);
    free(cache);
}

const km_resident *km_cache_acquire(km_cache *cache, km_pool *pool, double *waited) {
    (void)pthread_mutex_lock(&cache->mutex);
    km_resident *slot = find(cache, km_pool_id(cache->plan, pool));
    if (slot == NULL) slot = claim(cache, pool);
    if (slot != NULL) {
        slot->users++;
        slot->last_used = cache->clock++;
        if (!slot->was_used) (void)pthread_cond_signal(&cache->work);
        slot->was_used = 1;
        if (slot->state == WANTED || slot->state == LOADING) {
            const double since = km_seconds();
            while (!cache->stop && (slot->state == WANTED || slot->state == LOADING))
                (void)pthread_cond_wait(&cache->loaded, &cache->mutex);
            *waited += km_seconds() - since;
        }
        if (slot->state != LOADED) {
            slot->users--;
            slot = NULL;
        }
    }
    (void)pthread_mutex_unlock(&cache->mutex);
    return slot;
}

void km_cache_release(km_cache *cache, const km_resident *resident) {
    if (resident == NULL) return;
    (void)pthread_mutex_lock(&cache->mutex);
    if (--cache->slots[resident - cache->slots].users == 0) (void)pthread_cond_signal(&cache->work);
    (void)pthread_mutex_unlock(&cache->mutex);
}

km_view km_cache_view(const km_cache *cache, const km_resident *resident, int32_t unit) {
    const km_units *units = &cache->units;
    km_view view = {units->files + units->file_of[unit], NULL, 0, 0};
    if (resident == NULL) return view;
    int32_t low = 0, high = resident->num_units;
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (resident->units[middle] < unit)
            low = middle + 1;
        else
            high = middle;
    }
    if (low < resident->num_units && resident->units[low] == unit) {
        view.data = resident->arena + resident->at[low];
        view.begin = units->begin[unit];
        view.end = units->end[unit];
    }
    return view;
}

int64_t km_cache_bytes_read(km_cache *cache) {
    (void)pthread_mutex_lock(&cache->mutex);
    const int64_t bytes = cache->bytes_read;
    (void)pthread_mutex_unlock(&cache->mutex);
    return bytes;
}

int64_t km_cache_memory(km_cache *cache) {
    int64_t bytes = BLOCK_BYTES;
    (void)pthread_mutex_lock(&cache->mutex);
    for (int i = 0; i < NUM_SLOTS; i++)
        if (cache->slots[i].state != LOADING)
            bytes += cache->slots[i].capacity + 12 * (int64_t)cache->slots[i].num_units;
    (void)pthread_mutex_unlock(&cache->mutex);
    return bytes;
}
