/* Rows of floats, one a sequence, in vectors that the compiler keeps in registers of whatever width there is.
 *
 * Vectors are written out: of plain loops over a row, some were compiled to one number at a time. */
#ifndef KALDI_MPI_LANES_H
#define KALDI_MPI_LANES_H

#include <stddef.h>
#include <stdint.h>

#if defined(__has_attribute)
#if __has_attribute(target_clones) && defined(__x86_64__) && defined(__gnu_linux__)
/* Each such function exists twice, and the loader takes the one with the widest vectors that the machine has.
 * Products and sums are not fused in either, so that both give the same floats. */
#define KM_WIDEST __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifdef KM_WIDEST
enum { KM_WIDTH = 8 };
#else
#define KM_WIDEST
enum { KM_WIDTH = 4 };
#endif

typedef float km_floats __attribute__((vector_size(4 * KM_WIDTH)));
typedef int32_t km_ints __attribute__((vector_size(4 * KM_WIDTH)));

/* `yes` where the mask is all ones, `no` where it is 0. */
#define KM_SELECT(mask, yes, no) ((km_floats)(((mask) & (km_ints)(yes)) | (~(mask) & (km_ints)(no))))

/* Has a row on its way into the cache, a line of 64 bytes after the other. */
#define KM_FETCH(row)                                                                                        \
    do {                                                                                                     \
        for (size_t byte = 0; byte < sizeof *(row); byte += 64)                                              \
            __builtin_prefetch((const char *)(row) + byte, 0, 2);                                            \
    } while (0)

#endif
