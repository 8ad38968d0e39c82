#include "supervision.h"

#include <inttypes.h>
#include <math.h>

enum {
    FST_MAGIC = 2125659606,
    FST_VERSION = 2,
    ELEMENT_BYTES = 12,
    LABEL_AT = 0,
    COST_AT = 4,
    NEXT_AT = 8,
    NO_LABEL = -1,
    NOT_REACHED = -1
};

/* An FST at the cursor, once its header is known. */
typedef struct {
    int64_t states, arcs; /* as the header says */
    int64_t first;        /* offset of first[] */
    int64_t elements;     /* offset of the first element */
    int64_t count;        /* elements */
} compact;

static int64_t int64_at(const unsigned char *bytes) {
    int64_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static int64_t uint32_at(const unsigned char *bytes) {
    uint32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static float float_at(const unsigned char *bytes) {
    float value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

/* Goes over a length and so many letters, which must be these. */
static int take_word(km_cursor *cursor, const char *what, const char *word, km_error *error) {
    const int32_t length = (int32_t)strlen(word);
    const unsigned char *bytes = km_cursor_peek(cursor, 4 + length, error);
    if (bytes == NULL) return KM_FAILED;
    if (km_int32_at(bytes) != length || memcmp(bytes + 4, word, (size_t)length) != 0)
        return km_fail(error, cursor->at, "%s is not '%s'", what, word);
    cursor->at += 4 + length;
    return KM_OK;
}

static int take_fst_header(km_cursor *cursor, compact *fst, km_error *error) {
    const unsigned char *bytes = km_cursor_peek(cursor, 4, error);
    if (bytes == NULL) return KM_FAILED;
    if (km_int32_at(bytes) != FST_MAGIC) return km_fail(error, cursor->at, "no FST of OpenFst here");
    cursor->at += 4;
    if (take_word(cursor, "the type of the FST", "compact_acceptor", error) != KM_OK ||
        take_word(cursor, "the type of the FST's arcs", "standard", error) != KM_OK)
        return KM_FAILED;
    bytes = km_cursor_peek(cursor, 40, error);
    if (bytes == NULL) return KM_FAILED;
    const int32_t version = km_int32_at(bytes), flags = km_int32_at(bytes + 4);
    if (version != FST_VERSION)
        return km_fail(error, cursor->at, "an FST of version %" PRId32 ", not %d", version, FST_VERSION);
    if (flags != 0)
        return km_fail(error, cursor->at + 4, "the FST's flags are %" PRId32 ", not 0: %s", flags,
                       flags & 3 ? "it has tables of symbols" : "it is aligned");
    fst->states = int64_at(bytes + 24);
    fst->arcs = int64_at(bytes + 32);
    if (fst->states < 1 || fst->states >= INT32_MAX)
        return km_fail(error, cursor->at + 24, "an FST of %" PRId64 " states", fst->states);
    if (int64_at(bytes + 16) != 0)
        return km_fail(error, cursor->at + 16, "the FST starts in state %" PRId64 ", and must in state 0",
                       int64_at(bytes + 16));
    cursor->at += 40;
    return KM_OK;
}

/* Goes over first[], which says where each state's elements are. */
static int take_offsets(km_cursor *cursor, compact *fst, km_error *error) {
    const unsigned char *bytes = km_cursor_peek(cursor, (fst->states + 1) * 4, error);
    if (bytes == NULL) return KM_FAILED;
    int64_t last = 0;
    for (int64_t state = 0; state <= fst->states; state++) {
        const int64_t offset = uint32_at(bytes + 4 * state);
        if (offset < last || (state == 0 && offset != 0))
            return km_fail(error, cursor->at + 4 * state,
                           "the elements of state %" PRId64 " begin at %" PRId64 ", after %" PRId64, state,
                           offset, last);
        last = offset;
    }
    fst->first = cursor->at;
    fst->count = last;
    cursor->at += (fst->states + 1) * 4;
    if (km_cursor_peek(cursor, last * ELEMENT_BYTES, error) == NULL) return KM_FAILED;
    fst->elements = cursor->at;
    cursor->at += last * ELEMENT_BYTES;
    return KM_OK;
}

static int64_t first_of(const km_cursor *cursor, const compact *fst, int64_t state) {
    return uint32_at(km_cursor_bytes(cursor, fst->first + 4 * state));
}

static const unsigned char *element_of(const km_cursor *cursor, const compact *fst, int64_t number) {
    return km_cursor_bytes(cursor, fst->elements + number * ELEMENT_BYTES);
}

/* Whether the element is a final cost, and no arc. */
static int is_final(const unsigned char *element) {
    return km_int32_at(element + LABEL_AT) == NO_LABEL;
}

/* Checks all elements for themselves, and their number. */
static int check_elements(const km_cursor *cursor, const compact *fst, int32_t label_dim, km_error *error) {
    int64_t finals = 0;
    for (int64_t state = 0; state < fst->states; state++) {
        const int64_t first = first_of(cursor, fst, state), end = first_of(cursor, fst, state + 1);
        for (int64_t number = first; number < end; number++) {
            const unsigned char *element = element_of(cursor, fst, number);
            const int64_t offset = fst->elements + number * ELEMENT_BYTES;
            const int32_t label = km_int32_at(element + LABEL_AT), next = km_int32_at(element + NEXT_AT);
            if (!isfinite(float_at(element + COST_AT)))
                return km_fail(error, offset + COST_AT, "a cost at state %" PRId64 " is not a finite number",
                               state);
            if (label == NO_LABEL) {
                if (number > first || next != NO_LABEL)
                    return km_fail(error, offset, "a final cost of state %" PRId64 " among its arcs", state);
                finals++;
                continue;
            }
            if (label == 0)
                return km_fail(error, offset, "an arc without a label (epsilon) at state %" PRId64, state);
            if (label < 0 || label > label_dim)
                return km_fail(error, offset,
                               "label %" PRId32 " at state %" PRId64 ", where 1 to %" PRId32 " are possible",
                               label, state, label_dim);
            if (next < 0 || next >= fst->states)
                return km_fail(error, offset + NEXT_AT,
                               "an arc of state %" PRId64 " leads to state %" PRId32 " of %" PRId64, state,
                               next, fst->states);
        }
    }
    if (finals == 0) return km_fail(error, fst->first, "no state of the FST is final");
    if (fst->count - finals != fst->arcs)
        return km_fail(error, fst->first, "the FST has %" PRId64 " arcs, and its header says %" PRId64,
                       fst->count - finals, fst->arcs);
    return KM_OK;
}

/* Checks that each state has one time, in ascending order, and that all paths have so many arcs. */
static int check_times(const km_cursor *cursor, const compact *fst, int64_t frames, km_scratch *scratch,
                       km_error *error) {
    if (km_scratch_reserve(scratch, fst->states * 4, error) != KM_OK) return KM_FAILED;
    int32_t *times = (int32_t *)(void *)scratch->data; /* malloc'ed, so aligned */
    for (int64_t state = 1; state < fst->states; state++)
        times[state] = NOT_REACHED;
    times[0] = 0;
    for (int64_t state = 0; state < fst->states; state++) {
        const int64_t first = first_of(cursor, fst, state), end = first_of(cursor, fst, state + 1);
        const int64_t at = fst->first + 4 * state;
        if (times[state] == NOT_REACHED)
            return km_fail(error, at, "no arc leads to state %" PRId64 " from the states before it", state);
        if (state > 0 && times[state] < times[state - 1])
            return km_fail(error, at, "state %" PRId64 " is not in the order of time", state);
        if (end == first) return km_fail(error, at, "no path leads on from state %" PRId64, state);
        for (int64_t number = first; number < end; number++) {
            const unsigned char *element = element_of(cursor, fst, number);
            const int64_t offset = fst->elements + number * ELEMENT_BYTES;
            if (is_final(element)) {
                if (times[state] == frames) continue;
                return km_fail(error, offset,
                               "a path of %" PRId32 " arcs, where there are %" PRId64 " frames", times[state],
                               frames);
            }
            const int32_t next = km_int32_at(element + NEXT_AT);
            if (next <= state)
                return km_fail(error, offset + NEXT_AT, "an arc of state %" PRId64 " leads back to %" PRId32,
                               state, next);
            if (times[state] >= frames)
                return km_fail(error, offset, "a path of more arcs than there are frames: %" PRId64, frames);
            if (times[next] != NOT_REACHED && times[next] != times[state] + 1)
                return km_fail(error, offset + NEXT_AT,
                               "paths of different numbers of arcs lead to state %" PRId32, next);
            times[next] = times[state] + 1;
        }
    }
    return KM_OK;
}

static int take_fst(km_cursor *cursor, km_supervision *found, km_scratch *scratch, km_error *error) {
    const int64_t begin = cursor->at;
    compact fst;
    if (take_fst_header(cursor, &fst, error) != KM_OK || take_offsets(cursor, &fst, error) != KM_OK ||
        check_elements(cursor, &fst, found->label_dim, error) != KM_OK)
        return KM_FAILED;
    const int64_t frames = (int64_t)found->sequences * found->frames;
    if (!found->end2end && check_times(cursor, &fst, frames, scratch, error) != KM_OK) return KM_FAILED;
    if (fst.states >= INT32_MAX - found->states)
        return km_fail(error, begin, "FSTs of more than %" PRId32 " states", INT32_MAX);
    found->states += (int32_t)fst.states;
    found->arcs += fst.arcs;
    return KM_OK;
}

/* Goes over the pdf-ids of an alignment, which may be there and are of no use here. */
static int take_alignment(km_cursor *cursor, const km_supervision *found, km_error *error) {
    if (km_cursor_peek(cursor, 2, error) == NULL) return KM_FAILED;
    if (!km_cursor_is_at(cursor, "<A")) return KM_OK;
    int32_t count;
    if (km_cursor_expect(cursor, "<AlignmentPdfs> ", error) != KM_OK ||
        km_cursor_int32(cursor, "the number of aligned pdf-ids", 0, &count, error) != KM_OK)
        return KM_FAILED;
    const unsigned char *bytes = km_cursor_peek(cursor, (int64_t)count * 4, error);
    if (bytes == NULL) return KM_FAILED;
    const int64_t frames = (int64_t)found->sequences * found->frames;
    if (count != 0 && count != frames)
        return km_fail(error, cursor->at - 4, "%" PRId32 " aligned pdf-ids for %" PRId64 " frames", count,
                       frames);
    for (int32_t i = 0; i < count; i++) {
        const int32_t pdf = km_int32_at(bytes + 4 * (int64_t)i);
        if (pdf < 0 || pdf >= found->label_dim)
            return km_fail(error, cursor->at + 4 * (int64_t)i, "aligned pdf-id %" PRId32 " of %" PRId32, pdf,
                           found->label_dim);
    }
    cursor->at += (int64_t)count * 4;
    return KM_OK;
}

static int take_bool(km_cursor *cursor, int32_t *value, km_error *error) {
    const unsigned char *bytes = km_cursor_peek(cursor, 1, error);
    if (bytes == NULL) return KM_FAILED;
    if (bytes[0] != 'T' && bytes[0] != 'F')
        return km_fail(error, cursor->at, "T or F is expected here, not byte %d", bytes[0]);
    *value = bytes[0] == 'T';
    cursor->at += 1;
    return KM_OK;
}

static int take_head(km_cursor *cursor, km_supervision *found, km_error *error) {
    if (km_cursor_expect(cursor, "<Supervision> ", error) != KM_OK ||
        km_cursor_expect(cursor, "<Weight> ", error) != KM_OK ||
        km_cursor_float(cursor, "the weight", &found->weight, error) != KM_OK ||
        km_cursor_expect(cursor, "<NumSequences> ", error) != KM_OK ||
        km_cursor_int32(cursor, "the number of sequences", 1, &found->sequences, error) != KM_OK ||
        km_cursor_expect(cursor, "<FramesPerSeq> ", error) != KM_OK ||
        km_cursor_int32(cursor, "the number of frames", 1, &found->frames, error) != KM_OK)
        return KM_FAILED;
    if ((int64_t)found->sequences * found->frames >= INT32_MAX)
        return km_fail(error, cursor->at - 4, "%" PRId32 " frames in each of %" PRId32 " sequences",
                       found->frames, found->sequences);
    if (km_cursor_expect(cursor, "<LabelDim> ", error) != KM_OK ||
        km_cursor_int32(cursor, "the number of labels", 1, &found->label_dim, error) != KM_OK ||
        km_cursor_expect(cursor, "<End2End> ", error) != KM_OK)
        return KM_FAILED;
    return take_bool(cursor, &found->end2end, error);
}

int km_supervision_take(km_cursor *cursor, km_supervision *found, km_scratch *scratch, km_error *error) {
    if (take_head(cursor, found, error) != KM_OK ||
        (found->end2end && km_cursor_expect(cursor, "<Fsts> ", error) != KM_OK))
        return KM_FAILED;
    found->first = cursor->at;
    found->fsts = found->end2end ? found->sequences : 1;
    found->states = 0;
    found->arcs = 0;
    for (int32_t i = 0; i < found->fsts; i++)
        if (take_fst(cursor, found, scratch, error) != KM_OK) return KM_FAILED;
    if ((found->end2end && km_cursor_expect(cursor, "</Fsts> ", error) != KM_OK) ||
        take_alignment(cursor, found, error) != KM_OK)
        return KM_FAILED;
    return km_cursor_expect(cursor, "</Supervision> ", error);
}

/* Writes where what is in them ends. */
static void close_graphs(km_graphs *graphs) {
    graphs->first_state[graphs->num_fsts] = graphs->num_states;
    graphs->first_sequence[graphs->num_fsts] = graphs->num_sequences;
    graphs->first_arc[graphs->num_states] = graphs->num_arcs;
}

void km_graphs_begin(km_graphs *graphs) {
    graphs->num_fsts = graphs->num_states = graphs->num_sequences = 0;
    graphs->num_arcs = 0;
    close_graphs(graphs);
}

static void append_fst(const km_cursor *cursor, const compact *fst, km_graphs *graphs) {
    const int32_t base = graphs->num_states;
    if (graphs->times != NULL) graphs->times[base] = 0;
    for (int64_t state = 0; state < fst->states; state++) {
        const int64_t end = first_of(cursor, fst, state + 1);
        graphs->first_arc[graphs->num_states] = graphs->num_arcs;
        graphs->finals[graphs->num_states++] = INFINITY;
        for (int64_t number = first_of(cursor, fst, state); number < end; number++) {
            const unsigned char *element = element_of(cursor, fst, number);
            const float cost = float_at(element + COST_AT);
            if (is_final(element)) {
                graphs->finals[graphs->num_states - 1] = cost;
                continue;
            }
            graphs->pdfs[graphs->num_arcs] = km_int32_at(element + LABEL_AT) - 1;
            graphs->costs[graphs->num_arcs] = cost;
            const int32_t next = base + km_int32_at(element + NEXT_AT);
            graphs->nexts[graphs->num_arcs++] = next;
            /* States are in the order of time, so this one has its own. */
            if (graphs->times != NULL) graphs->times[next] = graphs->times[base + state] + 1;
        }
    }
}

void km_supervision_append(const km_cursor *cursor, const km_supervision *supervision, km_graphs *graphs) {
    km_cursor at = *cursor;
    km_error none; /* all has been checked */
    at.at = supervision->first;
    for (int32_t i = 0; i < supervision->fsts; i++) {
        compact fst;
        if (take_fst_header(&at, &fst, &none) != KM_OK || take_offsets(&at, &fst, &none) != KM_OK) return;
        graphs->first_state[graphs->num_fsts] = graphs->num_states;
        graphs->first_sequence[graphs->num_fsts] = graphs->num_sequences;
        append_fst(&at, &fst, graphs);
        graphs->num_fsts++;
        graphs->num_sequences += supervision->end2end ? 1 : supervision->sequences;
    }
    close_graphs(graphs);
}
