#include "numerator.h"

#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

/* A part of the graphs: one of them. */
typedef struct {
    int32_t state, states;    /* its first one, and how many */
    int32_t sequence, steps;  /* its first sequence; frames of all of its sequences */
    int64_t arc, arcs;        /* its first one, and how many */
    int64_t entry, per_frame; /* its first one; entries of each frame, of a cyclic one */
} graph;

static graph graph_at(const km_graphs *graphs, const km_numerator *numerator, int32_t index) {
    const int32_t state = graphs->first_state[index], end = graphs->first_state[index + 1];
    const int32_t sequence = graphs->first_sequence[index];
    graph found = {.state = state, .states = end - state, .sequence = sequence};
    found.steps = (graphs->first_sequence[index + 1] - sequence) * numerator->frames;
    found.arc = graphs->first_arc[state];
    found.arcs = graphs->first_arc[end] - found.arc;
    return found;
}

static graph prepared_at(const km_graphs *graphs, const km_numerator *numerator, int32_t index) {
    graph found = graph_at(graphs, numerator, index);
    found.entry = numerator->first_entry[index];
    found.per_frame = (numerator->first_entry[index + 1] - found.entry) / numerator->frames;
    return found;
}

static int is_final(const km_graphs *graphs, int32_t state) {
    return graphs->finals[state] < INFINITY;
}

static int bad_graph(int32_t index, km_error *error, const char *cause, int64_t number) {
    (void)km_fail(error, -1, cause, number);
    error->utterance = index;
    return KM_FAILED;
}

/* Arcs of the graph stay in it, and have pdfs that there are. */
static int check_arcs(const km_graphs *graphs, const km_numerator *numerator, int32_t index,
                      km_error *error) {
    const graph of = graph_at(graphs, numerator, index);
    for (int64_t arc = of.arc; arc < of.arc + of.arcs; arc++) {
        if (graphs->pdfs[arc] < 0 || graphs->pdfs[arc] >= numerator->num_pdfs)
            return bad_graph(index, error,
                             "supervision of pdf-id %" PRId64 ", which the network does not have",
                             graphs->pdfs[arc]);
        if (graphs->nexts[arc] < of.state || graphs->nexts[arc] >= of.state + of.states)
            return bad_graph(index, error, "supervision with an arc to state %" PRId64 ", which there is not",
                             (int64_t)graphs->nexts[arc] - of.state);
    }
    return KM_OK;
}

/* A state of a constrained graph, whose time is known, and its arcs; `first` is the first entry of this time.
 */
static int take_state(const km_graphs *graphs, const km_numerator *numerator, const graph *of, int32_t index,
                      int32_t state, int64_t first, int64_t *entries, int64_t *last, km_error *error) {
    const int32_t time = numerator->times[state];
    const int64_t begin = graphs->first_arc[state], end = graphs->first_arc[state + 1];
    if (is_final(graphs, state) != (time == of->steps))
        return bad_graph(index, error,
                         "supervision with a path that does not end after its %" PRId64 " frames", of->steps);
    if (time == of->steps && begin < end)
        return bad_graph(index, error, "supervision with a path of more than %" PRId64 " frames", of->steps);
    for (int64_t arc = begin; arc < end; arc++) {
        const int32_t next = graphs->nexts[arc], pdf = graphs->pdfs[arc];
        if (next <= state || (numerator->times[next] >= 0 && numerator->times[next] != time + 1))
            return bad_graph(index, error, "supervision whose state %" PRId64 " has more than one time",
                             (int64_t)next - of->state);
        numerator->times[next] = time + 1;
        if (last[pdf] < first) last[pdf] = (*entries)++;
        numerator->arc_entries[arc] = (int32_t)last[pdf];
    }
    return KM_OK;
}

static int prepare_layers(const km_graphs *graphs, const km_numerator *numerator, int32_t index,
                          int64_t *entries, int64_t *last, km_error *error) {
    const graph of = graph_at(graphs, numerator, index);
    int64_t first = *entries;
    int32_t time = 0;
    for (int32_t state = of.state; state < of.state + of.states; state++)
        numerator->times[state] = -1;
    numerator->times[of.state] = 0;
    for (int32_t state = of.state; state < of.state + of.states; state++) {
        const int32_t of_state = numerator->times[state];
        if (of_state < time)
            return bad_graph(index, error,
                             of_state < 0 ? "supervision whose state %" PRId64 " no path leads to"
                                          : "supervision whose state %" PRId64 " is not in the order of time",
                             (int64_t)state - of.state);
        if (of_state > time) first = *entries;
        time = of_state;
        if (take_state(graphs, numerator, &of, index, state, first, entries, last, error) != KM_OK)
            return KM_FAILED;
    }
    return KM_OK;
}

static void prepare_cycles(const km_graphs *graphs, const km_numerator *numerator, int32_t index,
                           int64_t *entries, int64_t *last) {
    const graph of = graph_at(graphs, numerator, index);
    const int64_t first = *entries;
    for (int64_t arc = of.arc; arc < of.arc + of.arcs; arc++) {
        const int32_t pdf = graphs->pdfs[arc];
        if (last[pdf] < first) last[pdf] = (*entries)++;
        numerator->arc_entries[arc] = (int32_t)(last[pdf] - first);
    }
    *entries = first + (*entries - first) * numerator->frames;
}

int km_numerator_prepare(const km_graphs *graphs, const km_numerator *numerator, int64_t *last,
                         km_error *error) {
    int64_t entries = 0;
    for (int32_t pdf = 0; pdf < numerator->num_pdfs; pdf++)
        last[pdf] = -1;
    for (int32_t index = 0; index < graphs->num_fsts; index++) {
        numerator->first_entry[index] = entries;
        if (check_arcs(graphs, numerator, index, error) != KM_OK) return KM_FAILED;
        if (numerator->cyclic)
            prepare_cycles(graphs, numerator, index, &entries, last);
        else if (prepare_layers(graphs, numerator, index, &entries, last, error) != KM_OK)
            return KM_FAILED;
        if (entries > INT32_MAX)
            return bad_graph(index, error, "supervision of more than %" PRId64 " outputs in a minibatch",
                             INT32_MAX);
    }
    numerator->first_entry[graphs->num_fsts] = entries;
    return KM_OK;
}

void km_numerator_entries(const km_graphs *graphs, const km_numerator *numerator, int64_t *entries) {
    const int64_t frames = numerator->frames, num_pdfs = numerator->num_pdfs;
    for (int32_t index = 0; index < graphs->num_fsts; index++) {
        const graph of = prepared_at(graphs, numerator, index);
        const int64_t row = of.sequence * frames;
        for (int32_t state = of.state; state < of.state + of.states; state++) {
            for (int64_t arc = graphs->first_arc[state]; arc < graphs->first_arc[state + 1]; arc++) {
                const int64_t entry = numerator->arc_entries[arc], pdf = graphs->pdfs[arc];
                if (numerator->cyclic)
                    for (int64_t t = 0; t < frames; t++)
                        entries[of.entry + t * of.per_frame + entry] = (row + t) * num_pdfs + pdf;
                else
                    entries[entry] = (row + numerator->times[state]) * num_pdfs + pdf;
            }
        }
    }
}

/* Betas and occupations of two frames, and each arc's share of its state, once or once a frame. */
static int64_t doubles_of(const graph *of, const km_numerator *numerator) {
    return 4 * (int64_t)of->states + of->arcs * (numerator->cyclic ? of->steps : 1);
}

int64_t km_numerator_doubles(const km_graphs *graphs, const km_numerator *numerator) {
    int64_t most = 0;
    for (int32_t index = 0; index < graphs->num_fsts; index++) {
        const graph of = graph_at(graphs, numerator, index);
        const int64_t doubles = doubles_of(&of, numerator);
        if (doubles > most) most = doubles;
    }
    return most;
}

/* The log of what paths get from a state on, and the share in it of each arc that leaves it. `betas` are
 * those of the states that arcs lead to; scores begin with the entry 0. */
static double leave_state(const km_graphs *graphs, const km_numerator *numerator, int32_t state,
                          int32_t first, const float *scores, const double *betas, double *shares) {
    const int64_t begin = graphs->first_arc[state], end = graphs->first_arc[state + 1];
    double most = -INFINITY, sum = 0.0;
    for (int64_t arc = begin; arc < end; arc++) {
        const double value = (double)scores[numerator->arc_entries[arc]] - (double)graphs->costs[arc] +
                             betas[graphs->nexts[arc] - first];
        /* Not `value > most`: NaN is to stay. */
        if (!(value <= most)) most = value;
        shares[arc - begin] = value;
    }
    if (most == -INFINITY) {
        memset(shares, 0, (size_t)(end - begin) * sizeof *shares);
        return most;
    }
    for (int64_t arc = begin; arc < end; arc++)
        sum += shares[arc - begin] = exp(shares[arc - begin] - most);
    for (int64_t arc = begin; arc < end; arc++)
        shares[arc - begin] /= sum;
    return most + log(sum);
}

/* Hands a state's occupation on to what its arcs lead to, and to their entries. */
static void enter_arcs(const km_graphs *graphs, const km_numerator *numerator, int32_t state, int32_t first,
                       double occupation, const double *shares, double *nexts, float *posteriors) {
    if (occupation == 0.0) return;
    const int64_t begin = graphs->first_arc[state], end = graphs->first_arc[state + 1];
    for (int64_t arc = begin; arc < end; arc++) {
        const double part = occupation * shares[arc - begin];
        nexts[graphs->nexts[arc] - first] += part;
        posteriors[numerator->arc_entries[arc]] += (float)part;
    }
}

static double sum_layers(const km_graphs *graphs, const km_numerator *numerator, const graph *of,
                         const float *scores, float *posteriors, double *memory) {
    double *betas = memory, *occupations = betas + of->states, *shares = betas + 2 * (int64_t)of->states;
    for (int32_t i = of->states - 1; i >= 0; i--) {
        const int32_t state = of->state + i;
        betas[i] = is_final(graphs, state) ? -(double)graphs->finals[state]
                                           : leave_state(graphs, numerator, state, of->state, scores, betas,
                                                         shares + (graphs->first_arc[state] - of->arc));
    }
    if (!posteriors || betas[0] == -INFINITY) return betas[0];
    memset(occupations, 0, (size_t)of->states * sizeof *occupations);
    occupations[0] = 1.0;
    for (int32_t i = 0; i < of->states; i++)
        enter_arcs(graphs, numerator, of->state + i, of->state, occupations[i],
                   shares + (graphs->first_arc[of->state + i] - of->arc), occupations, posteriors);
    return betas[0];
}

static double sum_cycles(const km_graphs *graphs, const km_numerator *numerator, const graph *of,
                         const float *scores, float *posteriors, double *memory) {
    const int64_t states = of->states;
    double *betas = memory, *before = betas + states, *occupations = before + states;
    double *after = occupations + states, *shares = after + states;
    for (int32_t i = 0; i < of->states; i++)
        betas[i] = -(double)graphs->finals[of->state + i];
    for (int32_t t = of->steps - 1; t >= 0; t--) {
        for (int32_t i = 0; i < of->states; i++)
            before[i] = leave_state(graphs, numerator, of->state + i, of->state,
                                    scores + of->entry + t * of->per_frame, betas,
                                    shares + t * of->arcs + (graphs->first_arc[of->state + i] - of->arc));
        double *swap = betas;
        betas = before;
        before = swap;
    }
    if (!posteriors || betas[0] == -INFINITY) return betas[0];
    memset(occupations, 0, (size_t)states * sizeof *occupations);
    occupations[0] = 1.0;
    for (int32_t t = 0; t < of->steps; t++) {
        memset(after, 0, (size_t)states * sizeof *after);
        for (int32_t i = 0; i < of->states; i++)
            enter_arcs(graphs, numerator, of->state + i, of->state, occupations[i],
                       shares + t * of->arcs + (graphs->first_arc[of->state + i] - of->arc), after,
                       posteriors + of->entry + t * of->per_frame);
        double *swap = occupations;
        occupations = after;
        after = swap;
    }
    return betas[0];
}

void km_numerator_sums(const km_graphs *graphs, const km_numerator *numerator, const float *scores,
                       int32_t begin, int32_t end, double *log_probs, float *posteriors, double *memory) {
    for (int32_t index = begin; index < end; index++) {
        const graph of = prepared_at(graphs, numerator, index);
        if (posteriors) {
            const int64_t entries = numerator->first_entry[index + 1] - of.entry;
            memset(posteriors + of.entry, 0, (size_t)entries * sizeof *posteriors);
        }
        log_probs[index] = numerator->cyclic ? sum_cycles(graphs, numerator, &of, scores, posteriors, memory)
                                             : sum_layers(graphs, numerator, &of, scores, posteriors, memory);
    }
}
