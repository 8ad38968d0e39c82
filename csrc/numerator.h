/* The numerators of chain (LF-MMI) training: forward and backward over the graphs of the supervision, in
 * double and in the log domain (Povey et al. 2016, section 2.4; Kaldi's chain-numerator and
 * chain-generic-numerator).
 *
 * Constrained graphs are layered by time; cyclic ones (unconstrained, end to end) are gone through once a
 * frame. Only outputs that occur are read: an entry is one of them, a pdf at a frame of a sequence, and each
 * has one score and one posterior. Graphs do not depend on each other. */
#ifndef KALDI_MPI_NUMERATOR_H
#define KALDI_MPI_NUMERATOR_H

#include "error.h"
#include "supervision.h"

/* python: begin */
/* What is found of a minibatch's graphs before any output is known. The arrays belong to the caller. */
typedef struct {
    int32_t frames;   /* of each sequence, > 0 */
    int32_t num_pdfs; /* > 0 */
    int32_t cyclic;   /* 1 or 0 */
    int32_t *times;   /* per state: arcs from the start of its graph; not of cyclic ones */
    int32_t
        *arc_entries; /* per arc: its entry; of cyclic graphs, the entry at frame 0 less the graph's first */
    int64_t *first_entry; /* per graph, and the number of entries */
} km_numerator;

/* Checks the graphs and fills in what is above; `last` has num_pdfs numbers, and is used on the way. Entries
 * of a graph are in the order of time. Fails where a pdf is not below num_pdfs, and for constrained graphs
 * where a state is reached at no time or at two, or an end is not at the last one; names the graph in
 * `utterance`. */
int km_numerator_prepare(const km_graphs *graphs, const km_numerator *numerator, int64_t *last,
                         km_error *error);

/* Where each entry is in the outputs (sequences, frames, pdfs): (sequence * frames + frame) * num_pdfs + pdf.
 */
void km_numerator_entries(const km_graphs *graphs, const km_numerator *numerator, int64_t *entries);

/* How many doubles of memory a call of the next takes. */
int64_t km_numerator_doubles(const km_graphs *graphs, const km_numerator *numerator);

/* Of graphs begin .. end - 1: the log of the sum over all paths of exp(scores - costs), and posteriors of
 * their entries, unless they are NULL. Where no path is left, -INFINITY and 0. NaN in a score of a path gives
 * NaN. */
void km_numerator_sums(const km_graphs *graphs, const km_numerator *numerator, const float *scores,
                       int32_t begin, int32_t end, double *log_probs, float *posteriors, double *memory);
/* python: end */

#endif
