#include "denominator.h"

#include "lanes.h"

#include <math.h>
#include <stddef.h>
#include <string.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

/* TILE: pdfs that are turned from rows of a sequence to rows of a pdf at a time; PART: states that are summed
 * in float, and these sums in double; SEGMENT: frames whose alphas are kept, more than a usual chunk has. */
enum { LANES = KM_LANES, VECTORS = KM_LANES / KM_WIDTH, TILE = 128, PART = 32, SEGMENT = 128 };

/* A value of each lane: of a float, and of the doubles in which many are summed. */
typedef struct {
    km_floats v[VECTORS];
} one_row;
typedef struct {
    double v[LANES];
} total_row;

/* Rows of a sequence as they are turned; the same memory by vectors. */
typedef union {
    float v[LANES][TILE];
    km_floats vectors[LANES * TILE / KM_WIDTH];
} tile;

/* The memory of a block. Alphas and outputs are of the frames of a segment; those of long sequences are
 * computed again, segment by segment, from the first alphas of each on the way back. */
typedef struct {
    one_row *alphas;  /* (SEGMENT + 1, states), with the leak */
    one_row *firsts;  /* (segments, states): the first alphas of each, if there are several */
    one_row *outputs; /* (SEGMENT, pdfs), exponentiated */
    one_row *totals;  /* (frames + 1): sums of alpha without the leak */
    one_row *through; /* per group, of one frame: what a path gets from there on */
    one_row *betas;   /* per state, of one frame, without the leak */
    one_row *gammas;  /* per pdf, of one frame */
} block;

static size_t lay_out(const km_denominator_graph *graph, int32_t frames, float *memory, block *into) {
    const size_t states = (size_t)graph->num_states, pdfs = (size_t)graph->num_pdfs;
    const size_t segments = ((size_t)frames + SEGMENT - 1) / SEGMENT;
    const size_t kept = segments > 1 ? SEGMENT : (size_t)frames;
    const size_t lengths[] = {(kept + 1) * states,
                              segments > 1 ? segments * states : 0,
                              kept * pdfs,
                              (size_t)frames + 1,
                              (size_t)graph->num_groups,
                              states,
                              pdfs};
    size_t rows = 0;
    one_row *parts[7];
    for (size_t i = 0; i < 7; i++) {
        parts[i] = memory ? (one_row *)(void *)memory + rows : NULL;
        rows += lengths[i];
    }
    *into = (block){parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6]};
    return rows;
}

int64_t km_denominator_floats(const km_denominator_graph *graph, int32_t frames) {
    block unused;
    return (int64_t)(lay_out(graph, frames, NULL, &unused) * LANES);
}

static float lane_of(const one_row *row, size_t lane) {
    return row->v[lane / KM_WIDTH][lane % KM_WIDTH];
}

static void set_lane(one_row *row, size_t lane, float value) {
    row->v[lane / KM_WIDTH][lane % KM_WIDTH] = value;
}

/* exp of x within the limits; NaN is below them. x = k log 2 + r: 2^k is made of bits, exp(r) is its series
 * up to r^7, whose rest is below 1e-8; log 2 is taken off in two parts, the first of which times k is exact.
 */
static inline void limited_exp(km_floats *x) {
    const km_floats low = (km_floats){0} - 30.0F, high = (km_floats){0} + 30.0F;
    const km_floats shift = (km_floats){0} + 12582912.0F; /* 1.5 * 2^23: adding it rounds to an integer */
    const km_floats above = KM_SELECT(*x > low, *x, low), limited = KM_SELECT(above < high, above, high);
    const km_floats shifted = limited * 1.44269504F + shift, k = shifted - shift;
    const km_floats r = (limited - k * 0.693359375F) + k * 2.12194440e-4F;
    km_floats series = r * (1.0F / 5040.0F) + 1.0F / 720.0F;
    series = series * r + 1.0F / 120.0F;
    series = series * r + 1.0F / 24.0F;
    series = series * r + 1.0F / 6.0F;
    series = series * r + 0.5F;
    series = series * r + 1.0F;
    series = series * r + 1.0F;
    /* The last bits of `shifted` are k: they become the exponent. */
    *x = series * (km_floats)(((km_ints)shifted << 23) + (127 << 23));
}

/* Outputs of one frame and of up to LANES sequences, exponentiated; lanes without a sequence have 0. */
KM_WIDEST
static void expose(const float *first, int64_t sequence_stride, size_t lanes, size_t pdfs, one_row *out) {
    for (size_t begin = 0; begin < pdfs; begin += TILE) {
        const size_t width = pdfs - begin < TILE ? pdfs - begin : TILE;
        tile of = {{{0}}};
        for (size_t lane = 0; lane < lanes; lane++)
            memcpy(of.v[lane], first + (int64_t)lane * sequence_stride + begin, width * sizeof(float));
        for (size_t i = 0; i < LANES * TILE / KM_WIDTH; i++)
            limited_exp(of.vectors + i);
        float (*restrict rows)[LANES] = (float (*)[LANES])(void *)(out + begin);
        for (size_t p = 0; p < width; p++)
            for (size_t lane = 0; lane < LANES; lane++)
                rows[p][lane] = of.v[lane][p];
    }
}

/* Rows of a pdf times `scale`, written to rows of a sequence. */
KM_WIDEST
static void write_rows(const one_row *in, size_t pdfs, float scale, size_t lanes, int64_t sequence_stride,
                       float *first) {
    for (size_t begin = 0; begin < pdfs; begin += TILE) {
        const size_t width = pdfs - begin < TILE ? pdfs - begin : TILE;
        const float (*restrict rows)[LANES] = (const float (*)[LANES])(const void *)(in + begin);
        tile of = {{{0}}};
        for (size_t p = 0; p < width; p++)
            for (size_t lane = 0; lane < LANES; lane++)
                of.v[lane][p] = rows[p][lane] * scale;
        for (size_t lane = 0; lane < lanes; lane++)
            memcpy(first + (int64_t)lane * sequence_stride + begin, of.v[lane], width * sizeof(float));
    }
}

/* Adds a part of a sum to the total, and begins the next part. */
static inline void end_part(total_row *total, one_row *part) {
    for (size_t lane = 0; lane < LANES; lane++)
        total->v[lane] += (double)lane_of(part, lane);
    *part = (one_row){0};
}

/* The sum over a group's arcs of probability times alpha. */
static inline one_row sum_arcs(const km_denominator_graph *graph, int32_t group, const one_row *alphas) {
    one_row sum = {0};
    for (int64_t arc = graph->first_in[group]; arc < graph->first_in[group + 1]; arc++) {
        const one_row *restrict alpha = alphas + graph->sources[arc];
        const float prob = graph->in_probs[arc];
        for (size_t i = 0; i < VECTORS; i++)
            sum.v[i] += alpha->v[i] * prob;
    }
    return sum;
}

static inline one_row inverse_of(const one_row *row) {
    one_row inverse;
    for (size_t i = 0; i < VECTORS; i++)
        inverse.v[i] = 1.0F / row->v[i];
    return inverse;
}

/* From alphas, with the leak, of one frame to those of the next, without, and their sum. */
KM_WIDEST
static void step_forward(const km_denominator_graph *graph, const one_row *alphas, const one_row *outputs,
                         const one_row *total, one_row *restrict next, one_row *next_total) {
    const one_row inverse = inverse_of(total);
    total_row all = {0};
    one_row part = {0};
    for (int32_t state = 0; state < graph->num_states; state++) {
        one_row sum = {0};
        for (int32_t group = graph->first_group[state]; group < graph->first_group[state + 1]; group++) {
            const one_row arcs = sum_arcs(graph, group, alphas);
            const one_row *restrict output = outputs + graph->group_pdfs[group];
            for (size_t i = 0; i < VECTORS; i++)
                sum.v[i] += arcs.v[i] * output->v[i];
        }
        for (size_t i = 0; i < VECTORS; i++) {
            sum.v[i] *= inverse.v[i];
            part.v[i] += sum.v[i];
        }
        next[state] = sum;
        if ((state + 1) % PART == 0) end_part(&all, &part);
    }
    end_part(&all, &part);
    for (size_t lane = 0; lane < LANES; lane++)
        set_lane(next_total, lane, (float)all.v[lane]);
}

/* alpha + leaky * total * initial, for all states. */
KM_WIDEST
static void add_leak(const km_denominator_graph *graph, float leaky, const one_row *total,
                     one_row *restrict alphas) {
    one_row leak;
    for (size_t i = 0; i < VECTORS; i++)
        leak.v[i] = leaky * total->v[i];
    for (int32_t state = 0; state < graph->num_states; state++)
        for (size_t i = 0; i < VECTORS; i++)
            alphas[state].v[i] += leak.v[i] * graph->initial[state];
}

/* Occupations of one frame's pdfs, and what a path gets by each group at that frame and from there on. The
 * leak is that of the next frame's betas. */
KM_WIDEST
static void pass_groups(const km_denominator_graph *graph, const block *of, const one_row *alphas,
                        const one_row *outputs, const one_row *total, const one_row *leak) {
    const one_row inverse = inverse_of(total);
    one_row *restrict through = of->through, *restrict gammas = of->gammas;
    memset(gammas, 0, (size_t)graph->num_pdfs * sizeof(one_row));
    for (int32_t state = 0; state < graph->num_states; state++) {
        one_row beta = of->betas[state];
        for (size_t i = 0; i < VECTORS; i++)
            beta.v[i] = (beta.v[i] + leak->v[i]) * inverse.v[i];
        for (int32_t group = graph->first_group[state]; group < graph->first_group[state + 1]; group++) {
            const int32_t pdf = graph->group_pdfs[group];
            const one_row arcs = sum_arcs(graph, group, alphas);
            one_row on = outputs[pdf], gamma = gammas[pdf];
            for (size_t i = 0; i < VECTORS; i++) {
                on.v[i] *= beta.v[i];
                gamma.v[i] += arcs.v[i] * on.v[i];
            }
            through[group] = on;
            gammas[pdf] = gamma;
        }
    }
}

/* Betas of one frame, without the leak, and the leak that is added to each of them. On the way the alphas are
 * fetched that the frame before will read, from here and there: those of a block are more than a cache holds.
 */
KM_WIDEST
static void step_backward(const km_denominator_graph *graph, float leaky, const one_row *through,
                          const one_row *alphas_before, one_row *restrict betas, one_row *leak) {
    total_row all = {0};
    one_row part = {0};
    for (int32_t state = 0; state < graph->num_states; state++) {
        const float initial = graph->initial[state];
        one_row sum = {0};
        KM_FETCH(alphas_before + state);
        for (int64_t arc = graph->first_out[state]; arc < graph->first_out[state + 1]; arc++) {
            const one_row *restrict on = through + graph->out_groups[arc];
            const float prob = graph->out_probs[arc];
            for (size_t i = 0; i < VECTORS; i++)
                sum.v[i] += on->v[i] * prob;
        }
        betas[state] = sum;
        for (size_t i = 0; i < VECTORS; i++)
            part.v[i] += sum.v[i] * initial;
        if ((state + 1) % PART == 0) end_part(&all, &part);
    }
    end_part(&all, &part);
    for (size_t lane = 0; lane < LANES; lane++)
        set_lane(leak, lane, leaky * (float)all.v[lane]);
}

/* The sum over rows of a, or of a times b. */
static total_row sum_rows(const one_row *a, const one_row *b, int32_t rows) {
    total_row sum = {0};
    for (int32_t row = 0; row < rows; row++)
        for (size_t lane = 0; lane < LANES; lane++)
            sum.v[lane] += (double)lane_of(a + row, lane) * (b ? (double)lane_of(b + row, lane) : 1.0);
    return sum;
}

static double sum_initial(const km_denominator_graph *graph) {
    double sum = 0.0;
    for (int32_t state = 0; state < graph->num_states; state++)
        sum += (double)graph->initial[state];
    return sum;
}

static void begin_forward(const km_denominator_graph *graph, float leaky, const block *of) {
    const double sum = sum_initial(graph);
    for (size_t lane = 0; lane < LANES; lane++)
        set_lane(of->totals, lane, (float)sum);
    for (int32_t state = 0; state < graph->num_states; state++)
        for (size_t lane = 0; lane < LANES; lane++)
            set_lane(of->alphas + state, lane, graph->initial[state]);
    add_leak(graph, leaky, of->totals, of->alphas);
}

/* The log-probabilities of a block from its last alphas; its betas of the last frame and their leak. */
static total_row end_forward(const km_denominator_graph *graph, float leaky, int32_t frames,
                             const one_row *alphas, const block *of, one_row *leak) {
    const total_row last = sum_rows(alphas, NULL, graph->num_states);
    const double sum = sum_initial(graph);
    total_row log_probs;
    for (size_t lane = 0; lane < LANES; lane++) {
        log_probs.v[lane] = log(last.v[lane]);
        for (int32_t t = 0; t < frames; t++)
            log_probs.v[lane] += log((double)lane_of(of->totals + t, lane));
        set_lane(leak, lane, leaky * (float)(sum / last.v[lane]));
    }
    for (int32_t state = 0; state < graph->num_states; state++)
        for (size_t lane = 0; lane < LANES; lane++)
            set_lane(of->betas + state, lane, (float)(1.0 / last.v[lane]));
    return log_probs;
}

/* What is the same for all frames of a block: `lanes` sequences from `begin` on. */
typedef struct {
    const km_denominator_graph *graph;
    const km_outputs *outputs;
    const km_denominator_sums *sums;
    float leaky;
    int32_t begin;
    size_t lanes;
} task;

/* The alphas of a segment's frames, of which the first are there, and its exponentiated outputs. */
static void forward_segment(const task *of_task, const block *of, int32_t first, int32_t end) {
    const km_denominator_graph *graph = of_task->graph;
    const km_outputs *outputs = of_task->outputs;
    const float *values = outputs->values + of_task->begin * outputs->sequence_stride;
    one_row *alphas = of->alphas, *exposed = of->outputs;
    for (int32_t t = first; t < end; t++) {
        expose(values + t * outputs->frame_stride, outputs->sequence_stride, of_task->lanes,
               (size_t)graph->num_pdfs, exposed);
        step_forward(graph, alphas, exposed, of->totals + t, alphas + graph->num_states, of->totals + t + 1);
        alphas += graph->num_states;
        exposed += graph->num_pdfs;
        add_leak(graph, of_task->leaky, of->totals + t + 1, alphas);
    }
}

/* The occupations of a segment whose alphas are there; betas and leak are of the frame after it. */
static void backward_segment(const task *of_task, const block *of, int32_t first, int32_t end,
                             one_row *leak) {
    const km_denominator_graph *graph = of_task->graph;
    const km_outputs *outputs = of_task->outputs;
    const km_denominator_sums *sums = of_task->sums;
    float *derivative = sums->derivative + of_task->begin * outputs->sequence_stride;
    for (int32_t t = end - 1; t >= first; t--) {
        const one_row *alphas = of->alphas + (size_t)(t - first) * (size_t)graph->num_states;
        pass_groups(graph, of, alphas, of->outputs + (size_t)(t - first) * (size_t)graph->num_pdfs,
                    of->totals + t, leak);
        step_backward(graph, of_task->leaky, of->through, t > first ? alphas - graph->num_states : alphas,
                      of->betas, leak);
        write_rows(of->gammas, (size_t)graph->num_pdfs, sums->scale, of_task->lanes, outputs->sequence_stride,
                   derivative + t * outputs->frame_stride);
        if (t >= sums->checked) continue;
        const int64_t at = (int64_t)t * outputs->sequences + of_task->begin;
        const total_row of_states = sum_rows(alphas, of->betas, graph->num_states);
        const total_row of_pdfs = sum_rows(of->gammas, NULL, graph->num_pdfs);
        memcpy(sums->state_sums + at, of_states.v, of_task->lanes * sizeof(double));
        memcpy(sums->pdf_sums + at, of_pdfs.v, of_task->lanes * sizeof(double));
    }
}

static void do_block(const task *of_task, const block *of) {
    const km_denominator_graph *graph = of_task->graph;
    const size_t states = (size_t)graph->num_states;
    const int32_t frames = of_task->outputs->frames, last = (frames - 1) / SEGMENT * SEGMENT;
    one_row leak;
    begin_forward(graph, of_task->leaky, of);
    for (int32_t first = 0; first <= last; first += SEGMENT) {
        if (first > 0) memcpy(of->alphas, of->alphas + SEGMENT * states, states * sizeof(one_row));
        if (last > 0)
            memcpy(of->firsts + (size_t)(first / SEGMENT) * states, of->alphas, states * sizeof(one_row));
        forward_segment(of_task, of, first, first == last ? frames : first + SEGMENT);
    }
    const total_row log_probs =
        end_forward(graph, of_task->leaky, frames, of->alphas + (size_t)(frames - last) * states, of, &leak);
    memcpy(of_task->sums->log_probs + of_task->begin, log_probs.v, of_task->lanes * sizeof(double));
    if (!of_task->sums->derivative) return;
    for (int32_t first = last; first >= 0; first -= SEGMENT) {
        const int32_t end = first == last ? frames : first + SEGMENT;
        if (first < last) {
            memcpy(of->alphas, of->firsts + (size_t)(first / SEGMENT) * states, states * sizeof(one_row));
            forward_segment(of_task, of, first, end);
        }
        backward_segment(of_task, of, first, end, &leak);
    }
}

void km_denominator(const km_denominator_graph *graph, const km_outputs *outputs, float leaky, int32_t begin,
                    int32_t end, const km_denominator_sums *sums, float *memory) {
    block of;
    (void)lay_out(graph, outputs->frames, memory, &of);
#ifdef __SSE__
    /* Numbers below 1e-38 are 0 here: they add nothing, and some machines take a hundred times as long over
     * them. Each thread has a setting of its own, and gets it back. */
    const unsigned int setting = _mm_getcsr();
    _mm_setcsr(setting | 0x8040U);
#endif
    for (int32_t at = begin; at < end; at += LANES) {
        const size_t lanes = (size_t)(end - at < LANES ? end - at : LANES);
        do_block(&(task){graph, outputs, sums, leaky, at, lanes}, &of);
    }
#ifdef __SSE__
    _mm_setcsr(setting);
#endif
}
