/* An archive of posteriors. */
#include "fuzz.h"
#include "posterior.h"

#include <math.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const int64_t end = (int64_t)size;
    int64_t at = 0;
    while (at < end) {
        km_posterior_entry entry = {0};
        km_error error = {0};
        if (km_posterior_find(data, end, at, &entry, &error) != KM_OK) {
            fuzz_check_error(&error);
            FUZZ_REQUIRE(error.offset <= end);
            return 0;
        }
        FUZZ_REQUIRE(entry.next > at && entry.next <= end && entry.key_length > 0);
        FUZZ_REQUIRE(entry.frames >= 0 && entry.pairs >= 0 && entry.frames + entry.pairs <= end);
        int64_t *offsets = fuzz_memory(entry.frames + 1, sizeof *offsets);
        int32_t *ids = fuzz_memory(entry.pairs, sizeof *ids);
        float *weights = fuzz_memory(entry.pairs, sizeof *weights);
        km_posterior_values(data, &entry, offsets, ids, weights);
        FUZZ_REQUIRE(offsets[0] == 0 && offsets[entry.frames] == entry.pairs);
        for (int64_t i = 0; i < entry.frames; i++)
            FUZZ_REQUIRE(offsets[i] <= offsets[i + 1]);
        for (int64_t i = 0; i < entry.pairs; i++)
            FUZZ_REQUIRE(isfinite(weights[i]));
        free(offsets);
        free(ids);
        free(weights);
        at = entry.next;
    }
    return 0;
}
