/* A small generator of random numbers whose sequence is part of the package's promises: the order of
 * training data depends on it, so it must be the same on every machine and in every version.
 *
 * xoshiro256** 1.0 (Blackman and Vigna), its state filled by splitmix64 from a seed and a stream number.
 */
#ifndef KALDI_MPI_RANDOM_H
#define KALDI_MPI_RANDOM_H

#include <stdint.h>

typedef struct {
    uint64_t state[4];
} km_random;

/* Streams of one seed are independent: the epoch is the stream. */
void km_random_seed(km_random *random, uint64_t seed, uint64_t stream);

uint64_t km_random_next(km_random *random);

/* A number in 0 .. bound-1, each equally likely (Lemire's multiplication with rejection); bound > 0. */
uint32_t km_random_below(km_random *random, uint32_t bound);

/* python: begin */
/* Fills out with 0 .. count-1 in the order of the given seed and stream (Fisher-Yates from the end). */
void km_permutation(uint64_t seed, uint64_t stream, uint32_t count, uint32_t *out);
/* python: end */

#endif
