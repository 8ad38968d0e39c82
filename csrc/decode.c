#include "decode.h"

#include <math.h>
#include <string.h>

/* x86-64 processors with AVX2 have a loop of their own, chosen when the program runs: built packages stay
 * usable on all others. */
#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_AVX2_LOOP 1
#include <immintrin.h>
#else
#define HAVE_AVX2_LOOP 0
#endif

/* Of the largest and of infinite floats, and of NaN: all bits of the exponent are set in the last two. */
static const uint32_t EXPONENT = 0x7F800000U;

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

int km_all_finite(const float *values, int64_t count) {
    /* Integers, because the order in which floats are summed may not be changed, and a sum in order is slow.
     */
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; i++)
        bad |= (bits_of(values[i]) & EXPONENT) == EXPONENT;
    return bad == 0;
}

/* What is copied at a time, so that it is still in the fastest cache when it is looked at. */
enum { BLOCK = 2048 };

int km_decode_floats(const unsigned char *bytes, int64_t count, float *out) {
    int finite = 1;
    for (int64_t at = 0; at < count; at += BLOCK) {
        const int64_t now = count - at < BLOCK ? count - at : BLOCK;
        memcpy(out + at, bytes + 4 * at, 4 * (size_t)now);
        finite &= km_all_finite(out + at, now);
    }
    return finite;
}

int km_decode_doubles(const unsigned char *bytes, int64_t count, float *restrict out) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; i++) {
        double value;
        memcpy(&value, bytes + 8 * i, sizeof value);
        out[i] = (float)value;
        bad |= (bits_of(out[i]) & EXPONENT) == EXPONENT;
    }
    return bad == 0;
}

static float unit16(float range) {
    return (float)((double)range * (1.0 / 65535.0));
}

static float unit8(float range) {
    return (float)((double)range * (1.0 / 255.0));
}

int km_linear16_is_finite(float min, float range) {
    return isfinite(min + 65535.0F * unit16(range));
}

int km_linear8_is_finite(float min, float range) {
    return isfinite(min + 255.0F * unit8(range));
}

void km_decode_linear16(const unsigned char *restrict bytes, int64_t count, float min, float range,
                        float *restrict out) {
    const float unit = unit16(range);
    for (int64_t i = 0; i < count; i++) {
        uint16_t code;
        memcpy(&code, bytes + 2 * i, sizeof code);
        out[i] = min + (float)code * unit;
    }
}

void km_decode_linear8(const unsigned char *restrict bytes, int64_t count, float min, float range,
                       float *restrict out) {
    const float unit = unit8(range);
    for (int64_t i = 0; i < count; i++)
        out[i] = min + (float)bytes[i] * unit;
}

/* The curves' pieces are the codes 0..64, 65..192 and 193..255. */
enum { FIRST_ENDS = 64, SECOND_ENDS = 192 };

/* 1 / 65535 as Kaldi has it. */
static const float PERCENTILE_UNIT = 1.52590218966964e-05F;

typedef struct {
    float p[4];
} curve;

static curve curve_of(const km_columns *columns, int64_t col) {
    curve result;
    uint16_t percentile[4];
    memcpy(percentile, columns->percentiles + col * 8, sizeof percentile);
    for (int i = 0; i < 4; i++)
        result.p[i] = columns->min + columns->range * PERCENTILE_UNIT * (float)percentile[i];
    return result;
}

/* In Kaldi's precisions: differences and product are floats, and are scaled and added in double. */
static void decode_plainly(const km_columns *columns, int32_t first, int32_t count, float *restrict out) {
    const int64_t cols = columns->cols;
    for (int64_t col = first; col < first + count; col++) {
        const curve of = curve_of(columns, col);
        const unsigned char *codes = columns->codes + col * columns->stride;
        const float *p = of.p, slope0 = p[1] - p[0], slope1 = p[2] - p[1], slope2 = p[3] - p[2];
        for (int32_t row = 0; row < columns->rows; row++) {
            const int code = codes[row], first_piece = code <= FIRST_ENDS, second = code <= SECOND_ENDS;
            const float base = first_piece ? p[0] : second ? p[1] : p[2];
            const float slope = first_piece ? slope0 : second ? slope1 : slope2;
            const int from = first_piece ? 0 : second ? FIRST_ENDS : SECOND_ENDS;
            const double unit = first_piece ? 1.0 / 64.0 : second ? 1.0 / 128.0 : 1.0 / 63.0;
            out[row * cols + col] = (float)((double)base + (double)(slope * (float)(code - from)) * unit);
        }
    }
}

int km_decode_columns_plainly(const km_columns *columns, float *out) {
    decode_plainly(columns, 0, columns->cols, out);
    return km_all_finite(out, (int64_t)columns->rows * columns->cols);
}

int64_t km_columns_out_of_order(const unsigned char *percentiles, int32_t cols) {
    for (int64_t col = 0; col < cols; col++) {
        uint16_t of[4];
        memcpy(of, percentiles + 8 * col, sizeof of);
        if ((of[1] < of[0]) | (of[2] < of[1]) | (of[3] < of[2])) return col;
    }
    return -1;
}

#if HAVE_AVX2_LOOP
/* Eight columns at a time, by tiles of 16 rows that are transposed in registers.
 *
 * The first two pieces are computed in float throughout, with slopes divided by 64 and 128 beforehand: powers
 * of two change no rounding, and a sum of two floats rounded to double and then to float is the sum rounded
 * to float (53 >= 2 * 24 + 1). This needs that nothing overflows or becomes subnormal on the way, which
 * columns of ordinary sizes grant; others are decoded one value at a time. */
enum { TILE_COLS = 8, TILE_ROWS = 16, HALF_TILE = 8 };

#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE static inline __attribute__((target("avx2"), always_inline))

typedef struct {
    __m256 base0, base1;           /* where the first two pieces start */
    __m256d base2_low, base2_high; /* where the last one does, of columns 0-3 and 4-7 */
    __m256 slope0, slope1, slope2; /* by code; the first two divided */
} eight_curves;

/* Whether 0 or of an absolute value in 2^-100 .. 2^100, in all eight columns. */
AVX2_INLINE int is_ordinary(__m256 x) {
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0F), x);
    const __m256 zero = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ);
    const __m256 inside = _mm256_and_ps(_mm256_cmp_ps(size, _mm256_set1_ps(0x1p-100F), _CMP_GE_OQ),
                                        _mm256_cmp_ps(size, _mm256_set1_ps(0x1p100F), _CMP_LE_OQ));
    return _mm256_movemask_ps(_mm256_or_ps(zero, inside)) == 255;
}

/* The percentiles of columns `col` and `col` + 4, as values. */
AVX2_INLINE __m256 two_columns(const km_columns *columns, const unsigned char *percentiles) {
    const __m128i near = _mm_loadl_epi64((const void *)percentiles);
    const __m128i far = _mm_loadl_epi64((const void *)(percentiles + 32));
    const __m256 codes = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_unpacklo_epi64(near, far)));
    const __m256 rise = _mm256_mul_ps(_mm256_set1_ps(columns->range * PERCENTILE_UNIT), codes);
    return _mm256_add_ps(_mm256_set1_ps(columns->min), rise);
}

/* Returns whether the eight columns from `first` on are ordinary. */
AVX2_INLINE int read_curves(const km_columns *columns, int64_t first, eight_curves *curves) {
    const unsigned char *at = columns->percentiles + 8 * first;
    const __m256 a = two_columns(columns, at), b = two_columns(columns, at + 8);
    const __m256 c = two_columns(columns, at + 16), d = two_columns(columns, at + 24);
    const __m256 ab01 = _mm256_unpacklo_ps(a, b), cd01 = _mm256_unpacklo_ps(c, d);
    const __m256 ab23 = _mm256_unpackhi_ps(a, b), cd23 = _mm256_unpackhi_ps(c, d);
    const __m256 p0 = _mm256_shuffle_ps(ab01, cd01, 0x44), p1 = _mm256_shuffle_ps(ab01, cd01, 0xEE);
    const __m256 p2 = _mm256_shuffle_ps(ab23, cd23, 0x44), p3 = _mm256_shuffle_ps(ab23, cd23, 0xEE);
    const __m256 low = _mm256_sub_ps(p1, p0), middle = _mm256_sub_ps(p2, p1);
    curves->base0 = p0;
    curves->base1 = p1;
    curves->base2_low = _mm256_cvtps_pd(_mm256_castps256_ps128(p2));
    curves->base2_high = _mm256_cvtps_pd(_mm256_extractf128_ps(p2, 1));
    curves->slope0 = _mm256_mul_ps(low, _mm256_set1_ps(1.0F / 64.0F));
    curves->slope1 = _mm256_mul_ps(middle, _mm256_set1_ps(1.0F / 128.0F));
    curves->slope2 = _mm256_sub_ps(p3, p2);
    /* p3 need not be looked at: it is p2 and an ordinary difference. */
    return is_ordinary(low) & is_ordinary(middle) & is_ordinary(curves->slope2) & is_ordinary(p0) &
           is_ordinary(p1) & is_ordinary(p2);
}

/* The codes of one row of eight columns: the low 8 bytes. */
AVX2_INLINE void decode_eight(const eight_curves *curves, __m128i bytes, float *out) {
    const __m256i codes = _mm256_cvtepu8_epi32(bytes);
    const __m256i second = _mm256_cmpgt_epi32(codes, _mm256_set1_epi32(FIRST_ENDS));
    const __m256i third = _mm256_cmpgt_epi32(codes, _mm256_set1_epi32(SECOND_ENDS));
    const __m256i from =
        _mm256_add_epi32(_mm256_and_si256(second, _mm256_set1_epi32(FIRST_ENDS)),
                         _mm256_and_si256(third, _mm256_set1_epi32(SECOND_ENDS - FIRST_ENDS)));
    const __m256 in_second = _mm256_castsi256_ps(second), in_third = _mm256_castsi256_ps(third);
    const __m256 base = _mm256_blendv_ps(curves->base0, curves->base1, in_second);
    const __m256 slope = _mm256_blendv_ps(_mm256_blendv_ps(curves->slope0, curves->slope1, in_second),
                                          curves->slope2, in_third);
    const __m256 rise = _mm256_mul_ps(slope, _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, from)));
    const __m256d unit = _mm256_set1_pd(1.0 / 63.0);
    const __m256d low = _mm256_mul_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(rise)), unit);
    const __m256d high = _mm256_mul_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(rise, 1)), unit);
    const __m128 low_sum = _mm256_cvtpd_ps(_mm256_add_pd(curves->base2_low, low));
    const __m128 high_sum = _mm256_cvtpd_ps(_mm256_add_pd(curves->base2_high, high));
    const __m256 far = _mm256_insertf128_ps(_mm256_castps128_ps256(low_sum), high_sum, 1);
    _mm256_storeu_ps(out, _mm256_blendv_ps(_mm256_add_ps(base, rise), far, in_third));
}

/* 16 or 8 rows of eight columns; the columns' bytes are `stride` apart, the rows' floats `cols`. */
AVX2_INLINE void decode_tile(const eight_curves *curves, const unsigned char *codes, int64_t stride, int rows,
                             float *out, int64_t cols) {
    __m128i x[TILE_COLS], y[TILE_COLS];
    for (int i = 0; i < TILE_COLS; i++) {
        const void *column = codes + i * stride;
        x[i] = rows == TILE_ROWS ? _mm_loadu_si128(column) : _mm_loadl_epi64(column);
    }
    /* Three rounds of interleaving column i with column i + 4 bring the bytes of a row side by side. */
    for (int i = 0; i < 4; i++) {
        y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 4]);
        y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 4]);
    }
    for (int i = 0; i < 4; i++) {
        x[2 * i] = _mm_unpacklo_epi8(y[i], y[i + 4]);
        x[2 * i + 1] = _mm_unpackhi_epi8(y[i], y[i + 4]);
    }
    for (int i = 0; i < 4; i++) {
        y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 4]);
        y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 4]);
    }
    for (int i = 0; i < rows / 2; i++) {
        decode_eight(curves, y[i], out + 2 * i * cols);
        decode_eight(curves, _mm_unpackhi_epi64(y[i], y[i]), out + (2 * i + 1) * cols);
    }
}

/* All rows of eight columns. */
AVX2 static void decode_strip(const km_columns *columns, int64_t first, const eight_curves *curves,
                              float *out) {
    const unsigned char *codes = columns->codes + first * columns->stride;
    const int64_t rows = columns->rows, cols = columns->cols;
    out += first;
    if (rows < HALF_TILE) {
        unsigned char tile[TILE_COLS * HALF_TILE] = {0};
        float floats[HALF_TILE * TILE_COLS];
        for (int i = 0; i < TILE_COLS; i++)
            memcpy(tile + i * HALF_TILE, codes + i * columns->stride, (size_t)rows);
        decode_tile(curves, tile, HALF_TILE, HALF_TILE, floats, TILE_COLS);
        for (int64_t row = 0; row < rows; row++)
            memcpy(out + row * cols, floats + row * TILE_COLS, TILE_COLS * sizeof(float));
        return;
    }
    int64_t row = 0;
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
        decode_tile(curves, codes + row, columns->stride, TILE_ROWS, out + row * cols, cols);
    /* Half tiles do the rest; the last overlaps what is done. */
    for (; row < rows; row += HALF_TILE) {
        const int64_t at = row + HALF_TILE <= rows ? row : rows - HALF_TILE;
        decode_tile(curves, codes + at, columns->stride, HALF_TILE, out + at * cols, cols);
    }
}

/* The last strip overlaps the one before it. */
AVX2 static int decode_by_tiles(const km_columns *columns, float *out) {
    int ordinary = 1;
    for (int32_t col = 0; col < columns->cols; col += TILE_COLS) {
        const int32_t first = col + TILE_COLS <= columns->cols ? col : columns->cols - TILE_COLS;
        eight_curves curves;
        if (read_curves(columns, first, &curves)) {
            decode_strip(columns, first, &curves, out);
        } else {
            decode_plainly(columns, first, TILE_COLS, out);
            ordinary = 0;
        }
    }
    return ordinary || km_all_finite(out, (int64_t)columns->rows * columns->cols);
}
#endif

int km_decode_columns(const km_columns *columns, float *out) {
#if HAVE_AVX2_LOOP
    if (columns->cols >= TILE_COLS && __builtin_cpu_supports("avx2")) return decode_by_tiles(columns, out);
#endif
    return km_decode_columns_plainly(columns, out);
}
