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

/* A file of which a part may be in memory: the bytes begin .. end-1 of it at `data` (NULL: none are). Without
 * a file (NULL), memory is all there is, and it ends where the file would. */
typedef struct {
    const km_file *file;
    const unsigned char *data;
    int64_t begin, end;
} km_view;

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

/* The `size` bytes at `offset` of the file: where they are, if they are in memory, else read into the
 * scratch and valid until its next use. NULL on failure; a file that ends earlier is an error naming both. */
const unsigned char *km_view_bytes(const km_view *view, int64_t offset, int64_t size, km_scratch *scratch,
                                   km_error *error);

/* The same, copied to `out`: read there directly where they are not in memory. */
int km_view_copy(const km_view *view, int64_t offset, int64_t size, void *out, km_scratch *scratch,
                 km_error *error);

/* Whether these bytes are in memory. */
int km_view_holds(const km_view *view, int64_t offset, int64_t size);

/* Bytes that the file has. */
int64_t km_view_size(const km_view *view);

/* Reads up to `size` bytes at `offset` and stores how many there were. */
int km_read_some(const km_file *file, int64_t offset, int64_t size, void *out, int64_t *got,
                 km_scratch *scratch, km_error *error);

#endif
