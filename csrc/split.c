#include "split.h"

enum { NONE = -1 };

static int64_t width_of(const km_split *split, int32_t which) {
    return which == NONE ? 0 : split->widths[which];
}

static int32_t num_others(const km_cover *c) {
    return (c->other[0] != NONE) + (c->other[1] != NONE);
}

static int is_better(const km_cover *a, const km_cover *b) {
    if (a->excess != b->excess) return a->excess < b->excess;
    const int32_t chunks = km_cover_count(a), fewest = km_cover_count(b);
    return chunks != fewest ? chunks < fewest : num_others(a) < num_others(b);
}

static km_cover with_others(const km_split *split, int32_t frames, int32_t first, int32_t second) {
    const int64_t principal = split->widths[0], others = width_of(split, first) + width_of(split, second);
    km_cover c = {0, {first, second}, others - frames};
    if (others < frames) {
        c.principal = (int32_t)((frames - others + principal - 1) / principal);
        c.excess += (int64_t)c.principal * principal;
    }
    return c;
}

km_cover km_split_cover(const km_split *split, int32_t frames) {
    km_cover best = with_others(split, frames, NONE, NONE);
    for (int32_t first = 1; first < split->num_widths && best.excess > 0; first++) {
        const km_cover one = with_others(split, frames, first, NONE);
        if (is_better(&one, &best)) best = one;
        for (int32_t second = first; second < split->num_widths; second++) {
            const km_cover two = with_others(split, frames, first, second);
            if (is_better(&two, &best)) best = two;
        }
    }
    return best;
}

int32_t km_cover_count(const km_cover *cover) {
    return cover->principal + num_others(cover);
}

int32_t km_split_count(const km_split *split, int32_t frames) {
    const km_cover cover = km_split_cover(split, frames);
    return km_cover_count(&cover);
}

int32_t km_cover_chunk(const km_split *split, const km_cover *cover, int32_t frames, int32_t number,
                       km_chunk *chunk) {
    int32_t which = 0;
    int64_t at = (int64_t)number * split->widths[0];
    if (number >= cover->principal) {
        const int32_t index = number - cover->principal; /* 0 or 1 */
        which = cover->other[index];
        at =
            (int64_t)cover->principal * split->widths[0] + (index > 0 ? width_of(split, cover->other[0]) : 0);
    }
    const int64_t width = split->widths[which], end = at + width;
    const int64_t moved = frames > width ? frames - width : 0;
    chunk->number = number;
    chunk->start = (int32_t)(end > frames ? moved : at);
    chunk->first_label = (int32_t)at;
    chunk->end_label = (int32_t)(end > frames ? frames : end);
    return which;
}
