/* How an utterance is cut into chunks of one or several widths.
 *
 * With the principal width w and the others, an utterance of L frames is covered by n chunks of width w and
 * at most two of other widths, such that the least is covered twice; if that is the same, with the fewest
 * chunks, and then with the fewest of other widths. They lie one behind the other, the principal ones first
 * and the wider before the narrower; the last one is moved back to end with the utterance, where that is
 * possible. So each frame is labelled in exactly one chunk: the last one leaves out what the one before it
 * has.
 */
#ifndef KALDI_MPI_SPLIT_H
#define KALDI_MPI_SPLIT_H

#include "corpus.h"

/* python: begin */
enum { KM_MAX_WIDTHS = 16 };

typedef struct {
    int32_t num_widths; /* 1 .. KM_MAX_WIDTHS */
    int32_t
        widths[KM_MAX_WIDTHS]; /* > 0; the principal one, then the others from the widest to the narrowest */
} km_split;

/* Chunks of an utterance of `frames` frames (> 0). */
int32_t km_split_count(const km_split *split, int32_t frames);
/* python: end */

/* The chunks of one utterance: `principal` of the first width, then those of the others named (indices; -1:
 * none). */
typedef struct {
    int32_t principal, other[2];
    int64_t excess; /* frames that are covered twice, or beyond a short utterance's end */
} km_cover;

km_cover km_split_cover(const km_split *split, int32_t frames);

int32_t km_cover_count(const km_cover *cover);

/* Which width (an index) a chunk of an utterance of `frames` frames has; its number, start and labelled
 * frames go into `chunk`. */
int32_t km_cover_chunk(const km_split *split, const km_cover *cover, int32_t frames, int32_t number,
                       km_chunk *chunk);

#endif
