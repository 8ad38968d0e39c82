/* Positioned reads that know where the file ends, and the growing buffer that they read into.
 *
 * pread leaves no file position behind, so any number of threads read through one descriptor.
 */
#ifndef KALDI_MPI_FILE_H
#define KALDI_MPI_FILE_H

#include "error.h"

#include <stddef.h>
#include <stdint.h>

/* python: begin */
typedef struct {
    int fd;       /* open for reading; the owner closes it */
    int64_t size; /* bytes, when it was opened */
} km_file;
/* python: end */

/* Scratch memory of one thread. Zero-initialised is valid and empty. */
typedef struct {
    unsigned char *data; /* malloc'ed: aligned for any type */
    size_t size;
    int64_t bytes_read; /* counts all reads made with this scratch */
} km_scratch;

void km_scratch_free(km_scratch *scratch);

/* Makes scratch->data at least `size` bytes (contents are lost). Callers check `size` against the file's
 * size first, so that a malformed header cannot ask for more memory than its file has bytes. */
int km_scratch_reserve(km_scratch *scratch, int64_t size, km_error *error);

/* Reads exactly `size` bytes at `offset`; a file that ends earlier is an error naming both. */
int km_read(const km_file *file, int64_t offset, int64_t size, void *out, km_scratch *scratch,
            km_error *error);

/* Reads up to `size` bytes at `offset` and stores how many there were. */
int km_read_some(const km_file *file, int64_t offset, int64_t size, void *out, int64_t *got,
                 km_scratch *scratch, km_error *error);

#endif
