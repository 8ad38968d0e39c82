#define _GNU_SOURCE
#include "fuzz.h"

#include <sys/mman.h>
#include <unistd.h>

static int new_file(void) {
#if defined(__linux__)
    const int fd = memfd_create("fuzz", MFD_CLOEXEC);
    if (fd >= 0) return fd;
#endif
    FILE *file = tmpfile();
    FUZZ_REQUIRE(file != NULL);
    return dup(fileno(file));
}

km_file fuzz_file(const uint8_t *data, size_t size) {
    static int fd = -1;
    if (fd < 0) fd = new_file();
    FUZZ_REQUIRE(fd >= 0 && ftruncate(fd, 0) == 0);
    FUZZ_REQUIRE(pwrite(fd, data, size, 0) == (ssize_t)size);
    const km_file file = {.fd = fd, .size = (int64_t)size};
    return file;
}
