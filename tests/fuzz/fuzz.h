/* What every fuzz target is: a function that gets arbitrary bytes and must survive them under the sanitizers.
 * libFuzzer calls it, or driver.c where there is none. */
#ifndef KALDI_MPI_FUZZ_H
#define KALDI_MPI_FUZZ_H

#include "file.h"

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Something that must hold for every input. */
#define FUZZ_REQUIRE(condition)                                                                              \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);                    \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

/* Memory of exactly `count` elements, so that a write beyond it is seen. */
static inline void *fuzz_memory(int64_t count, size_t size) {
    void *memory = malloc(count > 0 ? (size_t)count * size : 1);
    FUZZ_REQUIRE(memory != NULL);
    return memory;
}

/* That an error is one line and at a place. */
static inline void fuzz_check_error(const km_error *error) {
    FUZZ_REQUIRE(memchr(error->cause, '\0', sizeof error->cause) != NULL);
    FUZZ_REQUIRE(error->cause[0] != '\0' && strchr(error->cause, '\n') == NULL);
    FUZZ_REQUIRE(error->offset >= 0);
}

/* The bytes as a file, which is the same one at every call; it lies in memory or where temporary files do. */
km_file fuzz_file(const uint8_t *data, size_t size);

#endif
