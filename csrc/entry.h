/* What every archive's entry starts with, in memory: a key, a blank, and then a binary or a text object.
 *
 * The data may be the beginning of a longer stream. A failure that more of the stream could turn into an
 * entry is marked as such (`incomplete`), so that a caller can read on and try again; at the stream's end the
 * same failure means that it is truncated.
 */
#ifndef KALDI_MPI_ENTRY_H
#define KALDI_MPI_ENTRY_H

#include "error.h"

#include <stdint.h>

typedef struct {
    int64_t key_end; /* byte offset after the key */
    int64_t object;  /* byte offset of the object: its \0, or the first byte of its text */
    int binary;      /* 1: \0 stands at `object` */
} km_entry_start;

int km_is_blank(unsigned char byte);

/* The first byte from `at` on that is no blank (space, tab or return); `end` if there is none. */
int64_t km_skip_blanks(const unsigned char *data, int64_t at, int64_t end);

int32_t km_int32_at(const unsigned char *bytes);

/* Reads the key at `at`. */
int km_entry_begin(const unsigned char *data, int64_t size, int64_t at, km_entry_start *start,
                   int32_t *incomplete, km_error *error);

/* Reads the decimal integer at *at and moves *at behind it; what follows it is the caller's to check. */
int km_text_int32(const unsigned char *data, int64_t end, int64_t *at, int32_t *value, km_error *error);

#endif
