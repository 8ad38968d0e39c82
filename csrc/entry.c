#include "entry.h"

#include <string.h>

int km_is_blank(unsigned char byte) {
    return byte == ' ' || byte == '\t' || byte == '\r';
}

int64_t km_skip_blanks(const unsigned char *data, int64_t at, int64_t end) {
    while (at < end && km_is_blank(data[at]))
        at++;
    return at;
}

int32_t km_int32_at(const unsigned char *bytes) {
    int32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

int km_entry_begin(const unsigned char *data, int64_t size, int64_t at, km_entry_start *start,
                   int32_t *incomplete, km_error *error) {
    *incomplete = 1;
    if (at < 0 || at >= size) return km_fail(error, at, "no entry at the end of the archive");
    int64_t end = at;
    while (end < size && data[end] > ' ')
        end++;
    if (end == size) return km_fail(error, at, "truncated archive: it ends in a key");
    *incomplete = 0;
    if (end == at) return km_fail(error, at, "a key is expected here, not byte %d", data[at]);
    start->key_end = end;
    start->object = end + (data[end] != '\n'); /* "key\n" is an empty text object */
    if (data[end] != ' ' && data[end] != '\t' && data[end] != '\n')
        return km_fail(error, end, "a space is expected after the key, not byte %d", data[end]);
    *incomplete = start->object == size;
    if (*incomplete) return km_fail(error, at, "truncated archive: it ends after a key");
    start->binary = data[start->object] == '\0';
    if (!start->binary) return KM_OK;
    *incomplete = size - start->object < 2;
    if (*incomplete) return km_fail(error, start->object, "truncated archive: it ends after a key");
    if (data[start->object + 1] != 'B')
        return km_fail(error, start->object + 1, "\\0 without the B of a binary object");
    return KM_OK;
}

int km_text_int32(const unsigned char *data, int64_t end, int64_t *at, int32_t *value, km_error *error) {
    const int64_t start = *at;
    const int negative = start < end && data[start] == '-';
    int64_t sum = 0, i = start + negative;
    while (i < end && data[i] >= '0' && data[i] <= '9' && sum <= INT32_MAX)
        sum = sum * 10 + (data[i++] - '0');
    if (i == start + negative) return km_fail(error, start, "not an integer");
    if (sum > (int64_t)INT32_MAX + negative) return km_fail(error, start, "integer beyond 32 bits");
    *at = i;
    *value = (int32_t)(negative ? -sum : sum);
    return KM_OK;
}
