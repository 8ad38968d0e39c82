/* Archives of posteriors, parsed from memory like those of int32 vectors (int_archive.h): for every frame
 * some pairs (id, weight).
 *
 * An entry is: key, a space or tab, then either
 *   binary   \0 B, int32 T, then per frame int32 n and n pairs (int32 id, float weight), every number behind
 *            a size byte: 4, or 8 for a weight written as a double
 *   text     per frame "[ id weight id weight ]", up to the end of the line
 */
#ifndef KALDI_MPI_POSTERIOR_H
#define KALDI_MPI_POSTERIOR_H

#include "error.h"

/* python: begin */
typedef struct {
    int64_t key_length; /* bytes, > 0; the key is where the entry starts */
    int64_t values;     /* byte offset of the first frame */
    int64_t frames;     /* >= 0; each takes at least two bytes of the archive */
    int64_t pairs;      /* over all frames; each takes at least two bytes */
    int64_t next;       /* byte offset of the next entry, == size after the last one */
    int32_t binary;     /* 1 or 0 */
    int32_t incomplete; /* after a failure: 1 where the data only ends too early */
} km_posterior_entry;

/* Finds the entry that starts at byte `at` of an archive of `size` bytes, and checks it as a whole: ids of
 * any value, weights finite. */
int km_posterior_find(const unsigned char *data, int64_t size, int64_t at, km_posterior_entry *entry,
                      km_error *error);

/* Writes an entry found above in the same data: frames + 1 offsets of the frames' first pairs (the last one
 * is the number of pairs), and ids and weights of all pairs. */
void km_posterior_values(const unsigned char *data, const km_posterior_entry *entry, int64_t *offsets,
                         int32_t *ids, float *weights);
/* python: end */

#endif
