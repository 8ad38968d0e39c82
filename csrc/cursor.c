#include "cursor.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

enum { MAX_NAME = 200 };

const unsigned char *km_cursor_peek(km_cursor *cursor, int64_t size, km_error *error) {
    if (size <= cursor->end - cursor->at) return km_cursor_bytes(cursor, cursor->at);
    cursor->wanted = cursor->at + size;
    (void)km_fail(error, cursor->at,
                  "truncated: %" PRId64 " bytes are needed here, and the file ends after %" PRId64, size,
                  cursor->size - cursor->at);
    return NULL;
}

int km_cursor_is_at(const km_cursor *cursor, const char *bytes) {
    const size_t length = strlen(bytes);
    return (int64_t)length <= cursor->end - cursor->at &&
           memcmp(km_cursor_bytes(cursor, cursor->at), bytes, length) == 0;
}

void km_cursor_printable(const km_cursor *cursor, char out[24]) {
    const unsigned char *bytes = km_cursor_bytes(cursor, cursor->at);
    size_t at = 0;
    for (int64_t i = 0; i < cursor->end - cursor->at && at < 19; i++) {
        if (i > 0 && bytes[i] == ' ') break;
        if (bytes[i] > 32 && bytes[i] < 127)
            out[at++] = (char)bytes[i];
        else
            at += (size_t)snprintf(out + at, 24 - at, "\\x%02x", bytes[i]);
    }
    out[at] = '\0';
}

int km_cursor_expect(km_cursor *cursor, const char *token, km_error *error) {
    const size_t length = strlen(token);
    const unsigned char *bytes = km_cursor_peek(cursor, (int64_t)length, error);
    if (bytes == NULL) return KM_FAILED;
    if (memcmp(bytes, token, length) != 0) {
        char shown[24];
        km_cursor_printable(cursor, shown);
        return km_fail(error, cursor->at, "'%s' is expected here, not '%s'", token, shown);
    }
    cursor->at += (int64_t)length;
    return KM_OK;
}

int km_cursor_int32(km_cursor *cursor, const char *what, int32_t low, int32_t *value, km_error *error) {
    const unsigned char *bytes = km_cursor_peek(cursor, 5, error);
    if (bytes == NULL) return KM_FAILED;
    if (bytes[0] != 4) return km_fail(error, cursor->at, "size byte of %s is %d, not 4", what, bytes[0]);
    *value = km_int32_at(bytes + 1);
    if (*value < low)
        return km_fail(error, cursor->at + 1, "%s is %" PRId32 ", and must be at least %" PRId32, what,
                       *value, low);
    cursor->at += 5;
    return KM_OK;
}

int km_cursor_float(km_cursor *cursor, const char *what, float *value, km_error *error) {
    const unsigned char *bytes = km_cursor_peek(cursor, 5, error);
    if (bytes == NULL) return KM_FAILED;
    if (bytes[0] != 4) return km_fail(error, cursor->at, "size byte of %s is %d, not 4", what, bytes[0]);
    memcpy(value, bytes + 1, sizeof *value);
    if (!isfinite(*value))
        return km_fail(error, cursor->at + 1, "%s is %g, which is not a finite number", what, (double)*value);
    cursor->at += 5;
    return KM_OK;
}

int km_cursor_name(km_cursor *cursor, int64_t *name, int32_t *name_length, km_error *error) {
    const int64_t left = cursor->end - cursor->at;
    const unsigned char *bytes = km_cursor_bytes(cursor, cursor->at);
    int32_t length = 0;
    while (length < left && length < MAX_NAME && bytes[length] > ' ' && bytes[length] != 127)
        length++;
    if (length == left) return km_cursor_peek(cursor, length + 1, error) == NULL ? KM_FAILED : KM_OK;
    if (length == 0 || bytes[length] != ' ')
        return km_fail(error, cursor->at,
                       "the name of an input or output is expected here, and a space after it");
    *name = cursor->at;
    *name_length = length;
    cursor->at += length + 1;
    return KM_OK;
}
