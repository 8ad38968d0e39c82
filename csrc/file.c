#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64

#include "file.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

_Static_assert(sizeof(off_t) == 8, "archives may be larger than 2 GiB");
_Static_assert(sizeof(size_t) == 8, "sizes are computed in 64 bits");
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Kaldi's archives are little endian, and so must be the machine that reads them"
#endif

void km_scratch_free(km_scratch *scratch) {
    free(scratch->data);
    scratch->data = NULL;
    scratch->size = 0;
}

int km_scratch_reserve(km_scratch *scratch, int64_t size, km_error *error) {
    if (size < 0) return km_fail(error, -1, "negative size %" PRId64, size);
    if ((size_t)size <= scratch->size) return KM_OK;
    size_t grown = scratch->size * 2 > (size_t)size ? scratch->size * 2 : (size_t)size;
    unsigned char *data = malloc(grown);
    if (data == NULL) return km_fail(error, -1, "out of memory: %" PRId64 " bytes for a read", size);
    free(scratch->data);
    scratch->data = data;
    scratch->size = grown;
    return KM_OK;
}

int km_read_some(const km_file *file, int64_t offset, int64_t size, void *out, int64_t *got,
                 km_scratch *scratch, km_error *error) {
    int64_t done = 0;
    while (done < size) {
        ssize_t now = pread(file->fd, (unsigned char *)out + done, (size_t)(size - done), offset + done);
        if (now == 0) break;
        if (now < 0) {
            if (errno == EINTR) continue;
            return km_fail(error, offset + done, "cannot read: %s", strerror(errno));
        }
        done += now;
    }
    scratch->bytes_read += done;
    *got = done;
    return KM_OK;
}

int64_t km_view_size(const km_view *view) {
    return view->file != NULL ? view->file->size : view->end;
}

int km_view_holds(const km_view *view, int64_t offset, int64_t size) {
    return view->data != NULL && size >= 0 && offset >= view->begin && offset <= view->end &&
           size <= view->end - offset;
}

/* That the file, as it was when it was opened, has these bytes: so that no size from a header is believed. */
static int check_inside(const km_view *view, int64_t offset, int64_t size, km_error *error) {
    const int64_t left = km_view_size(view) - offset;
    if (offset >= 0 && size >= 0 && size <= left && view->file != NULL) return KM_OK;
    return km_fail(error, offset,
                   "truncated: %" PRId64 " bytes are needed here, and the file ends after %" PRId64, size,
                   left > 0 ? left : 0);
}

int km_view_copy(const km_view *view, int64_t offset, int64_t size, void *out, km_scratch *scratch,
                 km_error *error) {
    if (km_view_holds(view, offset, size)) {
        memcpy(out, view->data + (offset - view->begin), (size_t)size);
        return KM_OK;
    }
    if (check_inside(view, offset, size, error) != KM_OK) return KM_FAILED;
    return km_read(view->file, offset, size, out, scratch, error);
}

const unsigned char *km_view_bytes(const km_view *view, int64_t offset, int64_t size, km_scratch *scratch,
                                   km_error *error) {
    if (km_view_holds(view, offset, size)) return view->data + (offset - view->begin);
    if (check_inside(view, offset, size, error) != KM_OK) return NULL;
    if (km_scratch_reserve(scratch, size, error) != KM_OK) return NULL;
    if (km_read(view->file, offset, size, scratch->data, scratch, error) != KM_OK) return NULL;
    return scratch->data;
}

int km_read(const km_file *file, int64_t offset, int64_t size, void *out, km_scratch *scratch,
            km_error *error) {
    int64_t got;
    if (km_read_some(file, offset, size, out, &got, scratch, error) != KM_OK) return KM_FAILED;
    if (got < size)
        return km_fail(error, offset,
                       "truncated: %" PRId64 " bytes are needed here, and the file ends after %" PRId64, size,
                       got);
    return KM_OK;
}
