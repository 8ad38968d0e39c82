/* Archives of int32 vectors (alignments), parsed from memory: the caller has decompressed them, and may hand
 * over one piece after the other.
 *
 * An entry is: key, a space or tab, then either
 *   binary   \0 B, size byte 4 and int32 n, then n times size byte 4 and int32
 *   text     integers between blanks up to the end of the line
 * Binary and text entries may even be mixed, as in Kaldi's own reader.
 */
#ifndef KALDI_MPI_INT_ARCHIVE_H
#define KALDI_MPI_INT_ARCHIVE_H

#include "error.h"

/* python: begin */
typedef struct {
    int64_t key_length; /* bytes, > 0; the key is where the entry starts */
    int64_t values;     /* byte offset of the first value */
    int64_t count;      /* number of values, >= 0; each takes at least one byte of the archive */
    int64_t next;       /* byte offset of the next entry, == size after the last one */
    int32_t binary;     /* 1 or 0 */
    int32_t incomplete; /* after a failure: 1 where the data only ends too early */
} km_int_entry;

/* Finds the entry that starts at byte `at` of an archive of `size` bytes, and checks it as a whole. */
int km_int_archive_entry(const unsigned char *data, int64_t size, int64_t at, km_int_entry *entry,
                         km_error *error);

/* Writes the entry->count values of an entry found above in the same data. */
void km_int_archive_values(const unsigned char *data, const km_int_entry *entry, int32_t *out);
/* python: end */

#endif
