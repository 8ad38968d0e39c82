#include "passes.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

/* Rows that are summed in float, and columns that are worked on at a time, whose sums stay in the first
 * cache. Narrower tiles, of which the rows would stay in the second one, were slower: rows are read best from
 * end to end. */
enum { BLOCK = 32, TILE = 1024 };

typedef float one_row[TILE];
typedef double total_row[TILE];

static size_t width_of(size_t begin, size_t columns) {
    return columns - begin < TILE ? columns - begin : TILE;
}

/* Adds a block's sums to the total, and begins the next block, where one ends with this row. */
static void end_block(size_t row, size_t rows, size_t width, double *restrict total, float *restrict part) {
    if (row + 1 != rows && (row + 1) % BLOCK != 0) return;
    for (size_t c = 0; c < width; c++) {
        total[c] += (double)part[c];
        part[c] = 0.0F;
    }
}

/* Of one tile: sums over rows of a, and of a * b. */
static void sum_products(const float *restrict a, const float *restrict b, size_t rows, size_t stride,
                         size_t width, total_row sums, total_row products) {
    one_row sum = {0}, product = {0};
    memset(sums, 0, sizeof(total_row));
    memset(products, 0, sizeof(total_row));
    for (size_t row = 0; row < rows; row++, a += stride, b += stride) {
        for (size_t c = 0; c < width; c++) {
            sum[c] += a[c];
            product[c] += a[c] * b[c];
        }
        end_block(row, rows, width, sums, sum);
        end_block(row, rows, width, products, product);
    }
}

void km_batch_norm(const float *x, int64_t rows, int64_t columns, double epsilon, double target_rms,
                   float *out, float *means, float *squares, float *scales) {
    const size_t height = (size_t)rows, stride = (size_t)columns;
    for (size_t begin = 0; begin < stride; begin += TILE) {
        const size_t width = width_of(begin, stride);
        total_row sums, products;
        one_row mean, scale;
        sum_products(x + begin, x + begin, height, stride, width, sums, products);
        for (size_t c = 0; c < width; c++) {
            const double m = sums[c] / (double)rows, square = products[c] / (double)rows;
            const double variance = square - m * m;
            mean[c] = means[begin + c] = (float)m;
            squares[begin + c] = (float)square;
            scale[c] = (float)(target_rms / sqrt((variance > 0.0 ? variance : 0.0) + epsilon));
        }
        memcpy(scales + begin, scale, width * sizeof *scale);
        for (size_t row = 0; row < height; row++) {
            const float *restrict a = x + row * stride + begin;
            float *restrict z = out + row * stride + begin;
            for (size_t c = 0; c < width; c++)
                z[c] = (a[c] - mean[c]) * scale[c];
        }
    }
}

void km_batch_norm_backward(const float *d, const float *z, int64_t rows, int64_t columns, double target_rms,
                            const float *scales, float *out) {
    const size_t height = (size_t)rows, stride = (size_t)columns;
    for (size_t begin = 0; begin < stride; begin += TILE) {
        const size_t width = width_of(begin, stride);
        total_row sums, products;
        one_row mean, along, scale;
        sum_products(d + begin, z + begin, height, stride, width, sums, products);
        memcpy(scale, scales + begin, width * sizeof *scale);
        for (size_t c = 0; c < width; c++) {
            mean[c] = (float)(sums[c] / (double)rows);
            along[c] = (float)(products[c] / (double)rows / (target_rms * target_rms));
        }
        for (size_t row = 0; row < height; row++) {
            const float *restrict a = d + row * stride + begin;
            const float *restrict b = z + row * stride + begin;
            float *restrict to = out + row * stride + begin;
            for (size_t c = 0; c < width; c++)
                to[c] = (a[c] - mean[c] - b[c] * along[c]) * scale[c];
        }
    }
}

/* Below 0 only: NaN stays, so that the optimiser sees it. */
static float positive(float x) {
    return x < 0.0F ? 0.0F : x;
}

static void rectify(const float *restrict x, size_t width, float *restrict out, float *restrict sum,
                    float *restrict slope) {
    /* Two loops: in one, the compiler would follow the comparison's two outcomes apart, value by value. */
    for (size_t c = 0; c < width; c++)
        out[c] = positive(x[c]);
    for (size_t c = 0; c < width; c++) {
        sum[c] += out[c];
        slope[c] += out[c] > 0.0F ? 1.0F : 0.0F;
    }
}

void km_relu(const float *x, int64_t rows, int64_t columns, float *out, double *sums, double *slopes) {
    const size_t height = (size_t)rows, stride = (size_t)columns;
    if (!sums) {
        for (size_t i = 0; i < height * stride; i++)
            out[i] = positive(x[i]);
        return;
    }
    memset(sums, 0, stride * sizeof *sums);
    memset(slopes, 0, stride * sizeof *slopes);
    for (size_t begin = 0; begin < stride; begin += TILE) {
        const size_t width = width_of(begin, stride);
        one_row sum = {0}, slope = {0};
        for (size_t row = 0; row < height; row++) {
            rectify(x + row * stride + begin, width, out + row * stride + begin, sum, slope);
            end_block(row, height, width, sums + begin, sum);
            end_block(row, height, width, slopes + begin, slope);
        }
    }
}

static void pass_back(const float *restrict d, const float *restrict y, const float *restrict add,
                      size_t width, float *restrict out) {
    for (size_t c = 0; c < width; c++) {
        const float through = d[c];
        out[c] = (y[c] <= 0.0F ? 0.0F : through) + add[c];
    }
}

void km_relu_backward(const float *d, const float *y, int64_t rows, int64_t columns, const float *add,
                      float *out, double *squares) {
    const size_t height = (size_t)rows, stride = (size_t)columns;
    if (squares) memset(squares, 0, stride * sizeof *squares);
    for (size_t begin = 0; begin < stride; begin += TILE) {
        const size_t width = width_of(begin, stride);
        one_row square = {0}, more = {0};
        if (add) memcpy(more, add + begin, width * sizeof *more);
        for (size_t row = 0; row < height; row++) {
            const float *from = d + row * stride + begin;
            pass_back(from, y + row * stride + begin, more, width, out + row * stride + begin);
            if (!squares) continue;
            for (size_t c = 0; c < width; c++)
                square[c] += from[c] * from[c];
            end_block(row, height, width, squares + begin, square);
        }
    }
}

void km_keep_memory(void) {
#ifdef __GLIBC__
    const int larger_than_a_matrix = 1 << 28;
    (void)mallopt(M_MMAP_THRESHOLD, larger_than_a_matrix);
    (void)mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
}
