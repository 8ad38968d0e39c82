#include "random.h"

static uint64_t splitmix64(uint64_t *state) {
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static uint64_t rotate_left(uint64_t x, int by) {
    return (x << by) | (x >> (64 - by));
}

void km_random_seed(km_random *random, uint64_t seed, uint64_t stream) {
    /* The seed is mixed before the stream comes in, so that (seed, stream + 1) and (seed + 1, stream) are
     * unrelated. */
    uint64_t state = seed;
    state = splitmix64(&state) ^ stream;
    for (int i = 0; i < 4; i++)
        random->state[i] = splitmix64(&state);
}

uint64_t km_random_next(km_random *random) {
    uint64_t *s = random->state;
    const uint64_t result = rotate_left(s[1] * 5, 7) * 9;
    const uint64_t t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate_left(s[3], 45);
    return result;
}

uint32_t km_random_below(km_random *random, uint32_t bound) {
    uint64_t product = (km_random_next(random) >> 32) * bound;
    if ((uint32_t)product < bound) {
        /* 2^32 mod bound: below it, some results would be drawn once more often than others. */
        const uint32_t threshold = (uint32_t)(-bound) % bound;
        while ((uint32_t)product < threshold)
            product = (km_random_next(random) >> 32) * bound;
    }
    return (uint32_t)(product >> 32);
}

void km_permutation(uint64_t seed, uint64_t stream, uint32_t count, uint32_t *out) {
    km_random random;
    km_random_seed(&random, seed, stream);
    for (uint32_t i = 0; i < count; i++)
        out[i] = i;
    for (uint32_t i = count; i > 1; i--) {
        const uint32_t j = km_random_below(&random, i);
        const uint32_t swapped = out[i - 1];
        out[i - 1] = out[j];
        out[j] = swapped;
    }
}
