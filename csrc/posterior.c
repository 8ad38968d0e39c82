#include "posterior.h"

#include "decimal.h"
#include "entry.h"

#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

/* Kaldi's own reader refuses longer ones: such a length is not one of an utterance. */
enum { MOST_FRAMES = 10000000 };

/* Where the values of an entry go; all NULL while it is only checked. */
typedef struct {
    int64_t *offsets;
    int32_t *ids;
    float *weights;
} sink;

static int short_of_bytes(km_posterior_entry *entry, int64_t at, km_error *error) {
    entry->incomplete = 1;
    return km_fail(error, at, "truncated archive: it ends in a posterior");
}

/* An int32 behind its size byte. */
static int binary_int(const unsigned char *data, int64_t size, int64_t *at, const char *what, int32_t *value,
                      km_posterior_entry *entry, km_error *error) {
    if (*at >= size) return short_of_bytes(entry, *at, error);
    if (data[*at] != 4) return km_fail(error, *at, "size byte of %s is %d, not 4", what, data[*at]);
    if (size - *at < 5) return short_of_bytes(entry, *at, error);
    *value = km_int32_at(data + *at + 1);
    *at += 5;
    return KM_OK;
}

static int binary_weight(const unsigned char *data, int64_t size, int64_t *at, float *value,
                         km_posterior_entry *entry, km_error *error) {
    if (*at >= size) return short_of_bytes(entry, *at, error);
    const int width = data[*at];
    if (width != 4 && width != 8)
        return km_fail(error, *at, "size byte of a weight is %d, not 4 or 8", width);
    if (size - *at < 1 + width) return short_of_bytes(entry, *at, error);
    if (width == 4) {
        memcpy(value, data + *at + 1, sizeof *value);
    } else {
        double number;
        memcpy(&number, data + *at + 1, sizeof number);
        *value = (float)number;
    }
    if (!isfinite(*value)) return km_fail(error, *at + 1, "a weight that is not a finite number");
    *at += 1 + width;
    return KM_OK;
}

static int binary_frames(const unsigned char *data, int64_t size, km_posterior_entry *entry, const sink *out,
                         km_error *error) {
    int64_t at = entry->values, pairs = 0;
    for (int64_t frame = 0; frame < entry->frames; frame++) {
        int32_t count = 0, id = 0;
        float weight = 0.0F;
        const int64_t here = at;
        if (binary_int(data, size, &at, "a frame's number of ids", &count, entry, error) != KM_OK)
            return KM_FAILED;
        if (count < 0)
            return km_fail(error, here + 1, "frame with a negative number of ids, %" PRId32, count);
        if (out->offsets != NULL) out->offsets[frame] = pairs;
        for (int32_t i = 0; i < count; i++, pairs++) {
            if (binary_int(data, size, &at, "an id", &id, entry, error) != KM_OK ||
                binary_weight(data, size, &at, &weight, entry, error) != KM_OK)
                return KM_FAILED;
            if (out->offsets == NULL) continue;
            out->ids[pairs] = id;
            out->weights[pairs] = weight;
        }
    }
    if (out->offsets != NULL) out->offsets[entry->frames] = pairs;
    entry->pairs = pairs;
    entry->next = at;
    return KM_OK;
}

/* The frames of a line of text that ends at `end`. */
static int text_frames(const unsigned char *data, int64_t end, km_posterior_entry *entry, const sink *out,
                       km_error *error) {
    int64_t frames = 0, pairs = 0, at = km_skip_blanks(data, entry->values, end);
    for (; at < end; at = km_skip_blanks(data, at, end), frames++) {
        if (data[at] != '[')
            return km_fail(error, at, "'[' is expected here: an archive of posteriors, not of alignments?");
        if (out->offsets != NULL) out->offsets[frames] = pairs;
        at = km_skip_blanks(data, at + 1, end);
        for (; at < end && data[at] != ']'; at = km_skip_blanks(data, at, end), pairs++) {
            int32_t id = 0;
            double weight = 0.0;
            if (km_text_int32(data, end, &at, &id, error) != KM_OK) return KM_FAILED;
            if (at < end && !km_is_blank(data[at])) return km_fail(error, at, "not an integer");
            at = km_skip_blanks(data, at, end);
            if (km_text_number(data, end, &at, 1, &weight, error) != KM_OK) return KM_FAILED;
            if (at < end && !km_is_blank(data[at]) && data[at] != ']')
                return km_fail(error, at, "a space is expected after a weight");
            if (out->offsets == NULL) continue;
            out->ids[pairs] = id;
            out->weights[pairs] = (float)weight;
        }
        if (at == end) return km_fail(error, at, "the line ends before the frame's ']'");
        at++;
    }
    if (out->offsets != NULL) out->offsets[frames] = pairs;
    entry->frames = frames;
    entry->pairs = pairs;
    return KM_OK;
}

int km_posterior_find(const unsigned char *data, int64_t size, int64_t at, km_posterior_entry *entry,
                      km_error *error) {
    const sink nowhere = {NULL, NULL, NULL};
    km_entry_start start;
    if (km_entry_begin(data, size, at, &start, &entry->incomplete, error) != KM_OK) return KM_FAILED;
    entry->key_length = start.key_end - at;
    entry->values = start.object;
    entry->binary = start.binary;
    if (!start.binary) {
        const unsigned char *line_end = memchr(data + start.object, '\n', (size_t)(size - start.object));
        entry->incomplete = line_end == NULL;
        if (line_end == NULL)
            return km_fail(error, start.object, "truncated archive: the last line of text has no end");
        entry->next = line_end - data + 1;
        return text_frames(data, entry->next - 1, entry, &nowhere, error);
    }
    int32_t frames = 0;
    entry->values += 2;
    if (binary_int(data, size, &entry->values, "the number of frames", &frames, entry, error) != KM_OK)
        return KM_FAILED;
    if (frames < 0 || frames > MOST_FRAMES)
        return km_fail(error, start.object + 3, "number of frames %" PRId32 " is not between 0 and %d",
                       frames, (int)MOST_FRAMES);
    entry->frames = frames;
    return binary_frames(data, size, entry, &nowhere, error);
}

void km_posterior_values(const unsigned char *data, const km_posterior_entry *entry, int64_t *offsets,
                         int32_t *ids, float *weights) {
    const sink out = {offsets, ids, weights};
    km_posterior_entry again = *entry;
    km_error ignored; /* the entry was checked when it was found */
    if (entry->binary)
        (void)binary_frames(data, entry->next, &again, &out, &ignored);
    else
        (void)text_frames(data, entry->next - 1, &again, &out, &ignored);
}
