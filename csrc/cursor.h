/* A cursor over bytes of a file that are in memory: goes over Kaldi's tokens and numbers, and checks them.
 *
 * Tokens end in one space; an int32 or a float stands behind a size byte (4; 8 for a double). The bytes may
 * be a part of the file: where they end too early, `wanted` says up to where more are needed.
 */
#ifndef KALDI_MPI_CURSOR_H
#define KALDI_MPI_CURSOR_H

#include "error.h"

#include <stdint.h>
#include <string.h>

/* python: begin */
typedef struct {
    const unsigned char *data; /* the bytes begin .. end-1 of a file */
    int64_t begin, end;
    int64_t size;   /* of the file, >= end */
    int64_t at;     /* the next byte to be read, as an offset in the file; begin <= at <= end */
    int64_t wanted; /* after a failure: the offset up to which bytes were needed, if that is beyond the end */
} km_cursor;
/* python: end */

/* Byte of a cursor's span. */
static inline const unsigned char *km_cursor_bytes(const km_cursor *cursor, int64_t offset) {
    return cursor->data + (offset - cursor->begin);
}

static inline int32_t km_int32_at(const unsigned char *bytes) {
    int32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

/* The next `size` bytes; the cursor stays. NULL if there are fewer. */
const unsigned char *km_cursor_peek(km_cursor *cursor, int64_t size, km_error *error);

/* Whether the next bytes are these; 0 also where there are fewer. */
int km_cursor_is_at(const km_cursor *cursor, const char *bytes);

/* Writes what stands there up to the next space in printable form, for messages. */
void km_cursor_printable(const km_cursor *cursor, char out[24]);

/* Goes over a token, given with its space. */
int km_cursor_expect(km_cursor *cursor, const char *token, km_error *error);

/* Goes over size byte and int32, which must be low or more; `what` is for messages. */
int km_cursor_int32(km_cursor *cursor, const char *what, int32_t low, int32_t *value, km_error *error);

/* Goes over size byte and float, which must be finite. */
int km_cursor_float(km_cursor *cursor, const char *what, float *value, km_error *error);

/* Goes over a name and its space. */
int km_cursor_name(km_cursor *cursor, int64_t *name, int32_t *length, km_error *error);

#endif
