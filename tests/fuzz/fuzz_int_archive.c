/* An archive of int32 vectors. */
#include "fuzz.h"
#include "int_archive.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const int64_t end = (int64_t)size;
    int64_t at = 0;
    while (at < end) {
        km_int_entry entry;
        km_error error = {0};
        if (km_int_archive_entry(data, end, at, &entry, &error) != KM_OK) {
            fuzz_check_error(&error);
            FUZZ_REQUIRE(error.offset <= end);
            return 0;
        }
        FUZZ_REQUIRE(entry.next > at && entry.next <= end && entry.key_length > 0);
        FUZZ_REQUIRE(entry.count >= 0 && entry.count <= entry.next - at);
        int32_t *values = fuzz_memory(entry.count, sizeof *values);
        km_int_archive_values(data, &entry, values);
        free(values);
        at = entry.next;
    }
    return 0;
}
