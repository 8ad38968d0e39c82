/* The supervision of chain (LF-MMI) training, as an example holds it:
 *
 *   <Supervision> <Weight> float <NumSequences> int32 <FramesPerSeq> int32 <LabelDim> int32 <End2End> T or F,
 *   FSTs, <AlignmentPdfs> size byte 4, int32 count, count times int32 (may be missing) </Supervision>
 *
 * An FST is OpenFst's compact_acceptor over the tropical semiring: int32 magic, type and arc type (int32
 * length and letters), int32 version 2, int32 flags 0, uint64 properties, int64 start 0, states and arcs;
 * then uint32 first[states + 1] and first[states] elements: int32 label, float cost, int32 next state. A
 * state's final cost is its first element, with label and next state -1. Label - 1 is a pdf-id.
 *
 * Constrained: there is one FST, for all sequences one after the other. Every state has one time, which is
 * how many arcs lead there from the start; states are in the order of time, and final are only those at the
 * end. End to end (and unconstrained): <Fsts>, one FST for each sequence, which may have cycles, </Fsts>.
 */
#ifndef KALDI_MPI_SUPERVISION_H
#define KALDI_MPI_SUPERVISION_H

#include "cursor.h"
#include "file.h"

/* python: begin */
/* The FSTs of some supervisions, one after the other. States are numbered through, over all FSTs; an FST
 * starts in its first state. The arrays belong to the caller. */
typedef struct {
    int32_t num_fsts, num_states, num_sequences; /* that are in it so far */
    int64_t num_arcs;
    int32_t *first_state;    /* per FST; and num_states */
    int32_t *first_sequence; /* per FST: the first of its sequences; and num_sequences */
    int64_t *first_arc;      /* per state; and num_arcs */
    float *finals;           /* per state: cost, INFINITY where it is not final */
    int32_t *times; /* per state of constrained FSTs: arcs from the start; NULL: they are not wanted */
    int32_t *pdfs;  /* per arc */
    float *costs;   /* per arc */
    int32_t *nexts; /* per arc: the state it leads to */
} km_graphs;
/* python: end */

/* What one has been found to be. */
typedef struct {
    float weight;
    int32_t sequences, frames; /* > 0; frames are of each sequence */
    int32_t label_dim;         /* > 0: labels are 1 .. label_dim */
    int32_t end2end;           /* 1 or 0 */
    int32_t fsts;              /* 1, or as many as sequences */
    int32_t states;            /* of all FSTs together, > 0 */
    int64_t arcs;
    int64_t first; /* offset of the first FST */
} km_supervision;

/* Goes over one and checks all of it; the scratch is used on the way. */
int km_supervision_take(km_cursor *cursor, km_supervision *found, km_scratch *scratch, km_error *error);

/* Has nothing in the arrays, in which there is room for this at least: the ends of nothing. */
void km_graphs_begin(km_graphs *graphs);

/* Appends the FSTs of one that the cursor has gone over; the arrays have room for them. */
void km_supervision_append(const km_cursor *cursor, const km_supervision *supervision, km_graphs *graphs);

#endif
