#include "egs_scan.h"

#include "chain_scan.h"

#include <inttypes.h>
#include <string.h>

enum { BLOCK_BYTES = 1 << 22, MAX_EXAMPLE_BYTES = 1 << 30, MAX_KEY = 4096, MAX_ROWS = 1 << 24 };

/* The rows of one n in one input or output. */
typedef struct {
    int32_t first, last; /* t */
    int32_t count;
} times;

/* What a sub-example has been found to be. */
typedef struct {
    times input, output;
    int32_t ivectors, frames;
} member;

typedef struct {
    const km_file *file;
    const char *output;
    km_egs_index *index;
    km_scratch block, members;
} scan;

/* Takes the next row of an n: consecutive times, or an error. */
static int add_time(times *rows, const km_index *at, const km_nnet_io *io, const char *name,
                    km_error *error) {
    const int64_t step = (int64_t)at->t - rows->last;
    if (at->x != 0) return km_fail(error, io->indexes, "an Index of '%s' has x %" PRId32, name, at->x);
    if (rows->count == 0)
        rows->first = at->t;
    else if (rows->count == 1 && step > 1)
        return km_fail(error, io->indexes,
                       "rows of '%s' are %" PRId64 " frames apart: frame subsampling is not supported", name,
                       step);
    else if (step != 1)
        return km_fail(error, io->indexes,
                       "rows of '%s' are not in order of time: t %" PRId32 " after %" PRId32, name, at->t,
                       rows->last);
    rows->last = at->t;
    rows->count++;
    return KM_OK;
}

/* How many sub-examples the output has room for, and zeroed members for them. */
static int find_members(scan *s, const km_cursor *cursor, const km_nnet_io *output, int32_t *count,
                        km_error *error) {
    const unsigned char *bytes = km_cursor_bytes(cursor, output->indexes);
    km_index at = {0, 0, 0};
    int32_t most = 0;
    for (int32_t row = 0; row < output->rows; row++) {
        bytes = km_index_next(bytes, &at);
        if (at.n < 0 || at.n >= output->rows)
            return km_fail(error, output->indexes, "an Index of '%s' with %" PRId32 " rows has n %" PRId32,
                           s->output, output->rows, at.n);
        if (at.n > most) most = at.n;
    }
    *count = most + 1;
    const int64_t size = (int64_t)*count * (int64_t)sizeof(member);
    if (km_scratch_reserve(&s->members, size, error) != KM_OK) return KM_FAILED;
    memset(s->members.data, 0, (size_t)size);
    return KM_OK;
}

static int read_input(const km_cursor *cursor, const km_nnet_io *io, member *members, int32_t count,
                      int ivector, km_error *error) {
    const unsigned char *bytes = km_cursor_bytes(cursor, io->indexes);
    const char *name = ivector ? "ivector" : "input";
    km_index at = {0, 0, 0};
    for (int32_t row = 0; row < io->rows; row++) {
        bytes = km_index_next(bytes, &at);
        if (at.n < 0 || at.n >= count)
            return km_fail(error, io->indexes, "'%s' has rows with n %" PRId32 ", and the output has none",
                           name, at.n);
        member *m = members + at.n;
        if (ivector)
            m->ivectors++;
        else if (add_time(&m->input, &at, io, name, error) != KM_OK)
            return KM_FAILED;
    }
    return KM_OK;
}

static int read_targets(scan *s, const km_cursor *cursor, const km_nnet_io *io, member *members,
                        km_targets *targets, km_error *error) {
    const unsigned char *bytes = km_cursor_bytes(cursor, io->indexes);
    km_egs_index *index = s->index;
    km_index at = {0, 0, 0};
    for (int32_t row = 0; row < io->rows; row++) {
        bytes = km_index_next(bytes, &at);
        member *m = members + at.n;
        if (add_time(&m->output, &at, io, s->output, error) != KM_OK) return KM_FAILED;
        if (km_targets_next(targets, error) != KM_OK) return KM_FAILED;
        if (targets->count > 0) m->frames++;
        if (targets->count > index->num_targets) index->num_targets = targets->count;
        for (int32_t i = 0; i < targets->count; i++)
            if (targets->pairs[i].weight != 1.0F) index->has_weights = 1;
    }
    return KM_OK;
}

static int add_unit(scan *s, const km_roles *roles, const member *m, int32_t n, int64_t begin, int64_t end,
                    km_error *error) {
    const int64_t left = (int64_t)m->output.first - m->input.first;
    const int64_t right = (int64_t)m->input.last - m->output.last;
    const int64_t at = roles->input.indexes;
    if (m->input.count == 0) return km_fail(error, at, "'input' has no row with n %" PRId32, n);
    if (left < 0 || right < 0)
        return km_fail(error, at,
                       "'input' has t %" PRId32 " to %" PRId32 ", which does not cover the output's %" PRId32
                       " to %" PRId32,
                       m->input.first, m->input.last, m->output.first, m->output.last);
    if (left >= MAX_ROWS || right >= MAX_ROWS || m->output.count >= MAX_ROWS)
        return km_fail(error, at, "a chunk of %" PRId32 " frames is not supported", m->input.count);
    if (roles->ivector.name_length != 0 && m->ivectors != 1)
        return km_fail(error, roles->ivector.indexes,
                       "'ivector' has %" PRId32 " rows with n %" PRId32 ", and must have one", m->ivectors,
                       n);
    const km_shape shape = {m->output.count, (int32_t)left, (int32_t)right, 0, 1, 1};
    const km_unit unit = {begin, (int32_t)(end - begin), n, m->frames, 0};
    return km_egs_index_add(s->index, &unit, &shape, NULL, error);
}

/* The nnet3 example at the cursor. After a failure the index may have part of it. */
static int read_nnet3(scan *s, km_cursor *cursor, km_error *error) {
    km_egs_index *index = s->index;
    const int64_t begin = cursor->at;
    km_roles roles;
    int32_t count = 0;
    if (km_example_roles(cursor, s->output, &roles, error) != KM_OK) return KM_FAILED;
    const int32_t ivector_dim = roles.ivector.name_length != 0 ? roles.ivector.cols : 0;
    const int64_t at = roles.input.name;
    if (km_egs_index_dim(index, &index->feat_dim, roles.input.cols, at, "input", error) != KM_OK ||
        km_egs_index_dim(index, &index->ivector_dim, ivector_dim, at, "ivector", error) != KM_OK ||
        km_egs_index_dim(index, &index->num_pdfs, roles.output.cols, at, s->output, error) != KM_OK ||
        find_members(s, cursor, &roles.output, &count, error) != KM_OK)
        return KM_FAILED;
    member *members = (member *)(void *)s->members.data;
    if (read_input(cursor, &roles.input, members, count, 0, error) != KM_OK) return KM_FAILED;
    if (ivector_dim > 0 && read_input(cursor, &roles.ivector, members, count, 1, error) != KM_OK)
        return KM_FAILED;
    km_targets targets;
    km_targets_begin(&targets, cursor, &roles.output);
    const int status = read_targets(s, cursor, &roles.output, members, &targets, error);
    km_targets_free(&targets);
    if (status != KM_OK) return status;
    for (int32_t n = 0; n < count; n++) {
        const member *m = members + n;
        if (m->output.count == 0 && m->input.count == 0 && m->ivectors == 0) continue;
        if (m->output.count == 0)
            return km_fail(error, roles.output.indexes, "'%s' has no row with n %" PRId32, s->output, n);
        if (add_unit(s, &roles, m, n, begin, cursor->at, error) != KM_OK) return KM_FAILED;
    }
    return KM_OK;
}

/* The example at the cursor. After a failure the index may have part of it. */
static int read_example(scan *s, km_cursor *cursor, km_error *error) {
    km_egs_index *index = s->index;
    const int64_t begin = cursor->at;
    if ((index->chain ? km_chain_scan(cursor, s->output, index, &s->members, error)
                      : read_nnet3(s, cursor, error)) != KM_OK)
        return KM_FAILED;
    if (cursor->at - begin > MAX_EXAMPLE_BYTES)
        return km_fail(error, begin, "an example of more than 1 GiB is not supported");
    index->num_examples++;
    return KM_OK;
}

/* Goes over a key and its space. */
static int skip_key(const scan *s, km_cursor *cursor, km_error *error) {
    const unsigned char *bytes = km_cursor_bytes(cursor, cursor->at);
    const int64_t left = cursor->end - cursor->at;
    int64_t length = 0;
    while (length < left && length < MAX_KEY && bytes[length] > ' ')
        length++;
    if (length == left) {
        cursor->wanted = cursor->end + 1;
        return km_fail(error, cursor->at, "truncated: the archive ends in a key");
    }
    if (length == 0 || length == MAX_KEY || bytes[length] != ' ')
        return km_fail(error, cursor->at, "a key and a space are expected here");
    cursor->at += length + 1;
    if (left - length > 3 && memcmp(bytes + length + 1, "<Nn", 3) == 0)
        return km_fail(error, cursor->at,
                       "a text archive, which cannot be trained on: nnet3-%scopy-egs ark,t:... ark:...",
                       s->index->chain ? "chain-" : "");
    return KM_OK;
}

/* Has the block begin at `offset` and hold `size` bytes, or what there are to the end of the file. */
static int load(scan *s, km_cursor *cursor, int64_t offset, int64_t size, km_error *error) {
    const int64_t left = s->file->size - offset;
    if (size > left) size = left;
    if (km_scratch_reserve(&s->block, size, error) != KM_OK ||
        km_read(s->file, offset, size, s->block.data, &s->block, error) != KM_OK)
        return KM_FAILED;
    const km_cursor loaded = {s->block.data, offset, offset + size, s->file->size, offset, 0};
    *cursor = loaded;
    return KM_OK;
}

/* After an example that is not all in the block: has more of it in memory. The failure stands (KM_FAILED) if
 * there is no more, or the example wants more than is allowed. */
static int load_more(scan *s, km_cursor *cursor, int64_t entry, km_error *error) {
    if (cursor->wanted <= cursor->end || cursor->wanted > s->file->size) return KM_FAILED;
    int64_t size = cursor->wanted - entry;
    if (size > MAX_EXAMPLE_BYTES + MAX_KEY) return KM_FAILED;
    if (size < BLOCK_BYTES) size = BLOCK_BYTES;
    if (entry == cursor->begin && size < 2 * (cursor->end - cursor->begin))
        size = 2 * (cursor->end - cursor->begin);
    return load(s, cursor, entry, size, error);
}

/* The entry at the cursor; after a failure the index is as it was before. */
static int read_entry(scan *s, km_cursor *cursor, km_error *error) {
    km_egs_index *index = s->index;
    km_egs_index before = *index;
    if (skip_key(s, cursor, error) == KM_OK && read_example(s, cursor, error) == KM_OK) {
        index->entry = cursor->at;
        return KM_OK;
    }
    before.units = index->units; /* these may have grown, and so moved */
    before.units_room = index->units_room;
    before.graphs = index->graphs;
    before.graphs_room = index->graphs_room;
    before.shapes = index->shapes;
    before.shapes_room = index->shapes_room;
    *index = before;
    return KM_FAILED;
}

int km_egs_scan(const km_file *file, const char *output, km_egs_index *index, km_error *error) {
    scan s = {file, output, index, {0}, {0}};
    km_cursor cursor = {NULL, index->entry, index->entry, file->size, index->entry, 0};
    int status = KM_OK;
    while (status == KM_OK && index->entry < file->size) {
        cursor.at = index->entry;
        cursor.wanted = 0;
        if (cursor.at == cursor.end) status = load(&s, &cursor, index->entry, BLOCK_BYTES, error);
        if (status == KM_OK && read_entry(&s, &cursor, error) != KM_OK)
            status = load_more(&s, &cursor, index->entry, error);
    }
    km_scratch_free(&s.block);
    km_scratch_free(&s.members);
    return status;
}

/* Where in a span an entry begins, later than `after`; -1: nowhere. Its key is followed by `mark`. */
static int64_t find_entry(const km_cursor *span, const char *mark, size_t size, int64_t after) {
    const unsigned char *data = span->data, *end = data + (span->end - span->begin);
    for (const unsigned char *at = data; end - at >= (ptrdiff_t)size; at++) {
        at = memchr(at, mark[0], (size_t)(end - at) - size + 1);
        if (at == NULL) return -1;
        if (memcmp(at, mark, size) != 0) continue;
        const unsigned char *key = at;
        while (key > data && key[-1] > ' ' && at - key < MAX_KEY - 1)
            key--;
        const int64_t entry = span->begin + (key - data);
        if (key < at && entry > after) return entry;
    }
    return -1;
}

int km_egs_skip(const km_file *file, km_egs_index *index, km_error *error) {
    /* What stands between a key and the rest of an example. */
    static const char nnet3[] = " \0B<Nnet3Eg> ", chain[] = " \0B<Nnet3ChainEg> ";
    const char *mark = index->chain ? chain : nnet3;
    const size_t size = (index->chain ? sizeof chain : sizeof nnet3) - 1;
    scan s = {file, NULL, index, {0}, {0}};
    km_cursor span;
    const int64_t after = index->entry;
    int64_t begin = after, found = -1;
    int status = KM_OK;
    do {
        status = load(&s, &span, begin, BLOCK_BYTES, error);
        if (status == KM_OK) found = find_entry(&span, mark, size, after);
        begin = span.end - MAX_KEY - (int64_t)size; /* a key and a mark may be cut in two */
    } while (status == KM_OK && found < 0 && span.end < file->size);
    km_scratch_free(&s.block);
    if (status == KM_OK) index->entry = found < 0 ? file->size : found;
    return status;
}
