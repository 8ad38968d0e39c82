#include "int_archive.h"

#include "entry.h"

#include <inttypes.h>
#include <stddef.h>
#include <string.h>

static int binary_entry(const unsigned char *data, int64_t size, km_int_entry *entry, km_error *error) {
    const int64_t head = entry->values; /* at the \0 */
    entry->incomplete = size - head < 7;
    if (entry->incomplete)
        return km_fail(error, head, "truncated archive: it ends in the header of a vector");
    if (data[head + 2] != 4)
        return km_fail(error, head + 2, "size byte of the vector's length is %d, not 4", data[head + 2]);
    const int32_t count = km_int32_at(data + head + 3);
    if (count < 0) return km_fail(error, head + 3, "negative vector length %" PRId32, count);
    const int64_t left = size - (head + 7);
    entry->values = head + 7;
    entry->count = count;
    entry->next = entry->values + 5 * (int64_t)count;
    entry->binary = 1;
    /* What there is of it is checked even if it is not all there: nobody has to read on for a wrong length.
     */
    for (int64_t at = entry->values; at < (entry->next < size ? entry->next : size); at += 5)
        if (data[at] != 4) return km_fail(error, at, "size byte of a value is %d, not 4", data[at]);
    entry->incomplete = left / 5 < count;
    if (entry->incomplete)
        return km_fail(error, head + 3,
                       "truncated archive: a vector of %" PRId32 " values, and %" PRId64 " bytes follow",
                       count, left);
    return KM_OK;
}

/* Reads the integer at *at, which must be followed by a blank or the end of the line. */
static int text_value(const unsigned char *data, int64_t end, int64_t *at, int32_t *value, km_error *error) {
    const int64_t start = *at;
    if (km_text_int32(data, end, at, value, error) != KM_OK) return KM_FAILED;
    if (*at < end && !km_is_blank(data[*at])) return km_fail(error, start, "not an integer");
    return KM_OK;
}

static int text_entry(const unsigned char *data, int64_t size, km_int_entry *entry, km_error *error) {
    const unsigned char *line_end = memchr(data + entry->values, '\n', (size_t)(size - entry->values));
    entry->incomplete = line_end == NULL;
    if (line_end == NULL)
        return km_fail(error, entry->values, "truncated archive: the last line of text has no end");
    const int64_t end = line_end - data;
    entry->count = 0;
    entry->next = end + 1;
    entry->binary = 0;
    for (int64_t at = km_skip_blanks(data, entry->values, end); at < end;
         at = km_skip_blanks(data, at, end)) {
        int32_t value;
        if (text_value(data, end, &at, &value, error) != KM_OK) return KM_FAILED;
        entry->count++;
    }
    return KM_OK;
}

int km_int_archive_entry(const unsigned char *data, int64_t size, int64_t at, km_int_entry *entry,
                         km_error *error) {
    km_entry_start start;
    if (km_entry_begin(data, size, at, &start, &entry->incomplete, error) != KM_OK) return KM_FAILED;
    entry->key_length = start.key_end - at;
    entry->values = start.object;
    return (start.binary ? binary_entry : text_entry)(data, size, entry, error);
}

void km_int_archive_values(const unsigned char *data, const km_int_entry *entry, int32_t *out) {
    if (entry->binary) {
        for (int64_t i = 0; i < entry->count; i++)
            out[i] = km_int32_at(data + entry->values + 5 * i + 1);
        return;
    }
    km_error ignored; /* the entry was checked when it was found */
    int64_t at = entry->values;
    for (int64_t i = 0; i < entry->count; i++) {
        at = km_skip_blanks(data, at, entry->next);
        (void)text_value(data, entry->next - 1, &at, out + i, &ignored);
    }
}
