#include "egs_index.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SHAPES = 4096 };

void km_egs_index_free(km_egs_index *index) {
    free(index->units);
    free(index->graphs);
    free(index->shapes);
    memset(index, 0, sizeof *index);
}

/* Makes room for one more element. */
static int grow(void **array, int64_t *size, int64_t count, size_t element, km_error *error) {
    if (count < *size) return KM_OK;
    const int64_t grown = *size < 64 ? 64 : *size + *size / 2;
    void *moved = realloc(*array, (size_t)grown * element);
    if (moved == NULL) return km_fail(error, -1, "out of memory: an index of %" PRId64 " chunks", grown);
    *array = moved;
    *size = grown;
    return KM_OK;
}

static int is_same(const km_shape *a, const km_shape *b) {
    return a->width == b->width && a->left == b->left && a->right == b->right &&
           a->subsampling == b->subsampling && a->sequences == b->sequences;
}

static int shape_id(km_egs_index *index, const km_shape *shape, int32_t *id, km_error *error) {
    for (*id = 0; *id < index->num_shapes; (*id)++)
        if (is_same(index->shapes + *id, shape)) return KM_OK;
    if (*id == MAX_SHAPES)
        return km_fail(error, -1, "chunks of more than %d different shapes are not supported", MAX_SHAPES);
    void *shapes = index->shapes;
    if (grow(&shapes, &index->shapes_room, index->num_shapes, sizeof *shape, error) != KM_OK)
        return KM_FAILED;
    index->shapes = shapes;
    index->shapes[index->num_shapes++] = *shape;
    return KM_OK;
}

int km_egs_index_dim(const km_egs_index *index, int32_t *known, int32_t found, int64_t offset,
                     const char *name, km_error *error) {
    if (index->num_examples == 0) *known = found;
    if (*known == found) return KM_OK;
    return km_fail(error, offset, "'%s' has dimension %" PRId32 ", and %" PRId32 " in the examples before",
                   name, found, *known);
}

int km_egs_index_add(km_egs_index *index, const km_unit *unit, const km_shape *shape,
                     const km_unit_graphs *graphs, km_error *error) {
    km_unit added = *unit;
    if (shape_id(index, shape, &added.shape, error) != KM_OK) return KM_FAILED;
    void *units = index->units;
    if (grow(&units, &index->units_room, index->num_units, sizeof added, error) != KM_OK) return KM_FAILED;
    index->units = units;
    if (graphs != NULL) {
        void *all = index->graphs;
        if (grow(&all, &index->graphs_room, index->num_units, sizeof *graphs, error) != KM_OK)
            return KM_FAILED;
        index->graphs = all;
        index->graphs[index->num_units] = *graphs;
    }
    index->units[index->num_units++] = added;
    return KM_OK;
}
