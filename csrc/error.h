/* Errors: what went wrong and where, carried by value out to Python, which adds file and key.
 *
 * Contract of every function here that takes a km_error: it returns KM_OK and leaves the error alone, or
 * returns KM_FAILED with the error filled in. The error belongs to the caller; nothing in it is allocated.
 */
#ifndef KALDI_MPI_ERROR_H
#define KALDI_MPI_ERROR_H

#include <stdint.h>

/* python: begin */
enum { KM_OK = 0, KM_FAILED = -1 };

typedef struct {
    int32_t utterance; /* index in the corpus, -1 where the caller knows it or there is none */
    int64_t offset;    /* byte offset in the file, -1 where none applies */
    char cause[240];   /* one line, NUL-terminated */
} km_error;
/* python: end */

#if defined(__GNUC__)
#define KM_PRINTF(format_at, values_at) __attribute__((format(printf, format_at, values_at)))
#else
#define KM_PRINTF(format_at, values_at)
#endif

/* Fills in the error (utterance -1) and returns KM_FAILED; a cause too long is cut. */
int km_fail(km_error *error, int64_t offset, const char *format, ...) KM_PRINTF(3, 4);

#endif
