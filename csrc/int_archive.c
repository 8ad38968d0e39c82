#include "int_archive.h"

#include <inttypes.h>
#include <stddef.h>
#include <string.h>

static int is_blank(unsigned char byte) {
    return byte == ' ' || byte == '\t' || byte == '\r';
}

static int32_t int32_at(const unsigned char *bytes) {
    int32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static int binary_entry(const unsigned char *data, int64_t size, km_int_entry *entry, km_error *error) {
    const int64_t head = entry->values; /* at the \0 */
    if (size - head < 7) return km_fail(error, head, "truncated archive: it ends in the header of a vector");
    if (data[head + 1] != 'B') return km_fail(error, head + 1, "\\0 without the B of a binary object");
    if (data[head + 2] != 4)
        return km_fail(error, head + 2, "size byte of the vector's length is %d, not 4", data[head + 2]);
    const int32_t count = int32_at(data + head + 3);
    if (count < 0) return km_fail(error, head + 3, "negative vector length %" PRId32, count);
    const int64_t left = size - (head + 7);
    if (left / 5 < count)
        return km_fail(error, head + 3,
                       "truncated archive: a vector of %" PRId32 " values, and %" PRId64 " bytes follow",
                       count, left);
    entry->values = head + 7;
    entry->count = count;
    entry->next = entry->values + 5 * (int64_t)count;
    entry->binary = 1;
    for (int64_t at = entry->values; at < entry->next; at += 5)
        if (data[at] != 4) return km_fail(error, at, "size byte of a value is %d, not 4", data[at]);
    return KM_OK;
}

/* Reads the integer at *at, which must be followed by a blank or the end of the line. */
static int text_value(const unsigned char *data, int64_t end, int64_t *at, int32_t *value, km_error *error) {
    const int64_t start = *at;
    const int negative = data[start] == '-';
    int64_t sum = 0, i = start + negative;
    while (i < end && data[i] >= '0' && data[i] <= '9' && sum <= INT32_MAX)
        sum = sum * 10 + (data[i++] - '0');
    if (i == start + negative || (i < end && !is_blank(data[i]) && !(data[i] >= '0' && data[i] <= '9')))
        return km_fail(error, start, "not an integer in a text vector");
    if (sum > INT32_MAX) return km_fail(error, start, "integer beyond 32 bits in a text vector");
    *at = i;
    *value = (int32_t)(negative ? -sum : sum);
    return KM_OK;
}

static int64_t skip_blanks(const unsigned char *data, int64_t at, int64_t end) {
    while (at < end && is_blank(data[at]))
        at++;
    return at;
}

static int text_entry(const unsigned char *data, int64_t size, km_int_entry *entry, km_error *error) {
    const unsigned char *line_end = memchr(data + entry->values, '\n', (size_t)(size - entry->values));
    if (line_end == NULL)
        return km_fail(error, entry->values, "truncated archive: the last line of text has no end");
    const int64_t end = line_end - data;
    entry->count = 0;
    entry->next = end + 1;
    entry->binary = 0;
    for (int64_t at = skip_blanks(data, entry->values, end); at < end; at = skip_blanks(data, at, end)) {
        int32_t value;
        if (text_value(data, end, &at, &value, error) != KM_OK) return KM_FAILED;
        entry->count++;
    }
    return KM_OK;
}

int km_int_archive_entry(const unsigned char *data, int64_t size, int64_t at, km_int_entry *entry,
                         km_error *error) {
    if (at < 0 || at >= size) return km_fail(error, at, "no entry at the end of the archive");
    int64_t end = at;
    while (end < size && data[end] > ' ')
        end++;
    if (end == at) return km_fail(error, at, "a key is expected here, not byte %d", data[at]);
    if (end == size) return km_fail(error, at, "truncated archive: it ends in a key");
    entry->key = at;
    entry->key_length = end - at;
    entry->values = end + (data[end] != '\n'); /* "key\n" is an empty text vector */
    if (data[end] != ' ' && data[end] != '\t' && data[end] != '\n')
        return km_fail(error, end, "a space is expected after the key, not byte %d", data[end]);
    if (entry->values == size) return km_fail(error, at, "truncated archive: it ends after a key");
    if (data[entry->values] == '\0') return binary_entry(data, size, entry, error);
    return text_entry(data, size, entry, error);
}

void km_int_archive_values(const unsigned char *data, const km_int_entry *entry, int32_t *out) {
    if (entry->binary) {
        for (int64_t i = 0; i < entry->count; i++)
            out[i] = int32_at(data + entry->values + 5 * i + 1);
        return;
    }
    km_error ignored; /* the entry was checked when it was found */
    int64_t at = entry->values;
    for (int64_t i = 0; i < entry->count; i++) {
        at = skip_blanks(data, at, entry->next);
        (void)text_value(data, entry->next - 1, &at, out + i, &ignored);
    }
}
