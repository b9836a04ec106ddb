/* The two passes with AVX2. Integer arithmetic: pmaddwd multiplies 16 by 16 bits and adds pairs in 32, so the bits are the scalar ones. */
#include "resample.h"

#if HAVE_AVX2
#include <immintrin.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2")))

/* Four taps of three channels at a time: 12 of 16 loaded bytes become, in the lower half of a vector, the 16-bit pairs (tap 0, tap 1) of
 * each channel, and in the upper half (tap 2, tap 3). The halves are added at the end. */
AVX2 static inline __m256i one_output(const uint8_t *pixel, const __m256i *weights, int groups, __m256i spread, __m256i half) {
    __m256i sum = half;
    for (int g = 0; g < groups; g++) {
        const __m256i pixels = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(pixel + 4 * CHANNELS * g)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, spread), _mm256_load_si256(weights + g)));
    }
    return sum;
}

/* (a, b) → a vector with the sum of a's halves below and of b's above. */
AVX2 static inline __m256i add_halves(__m256i a, __m256i b, __m256i precision) {
    const __m256i sum = _mm256_add_epi32(_mm256_blend_epi32(a, b, 0xF0), _mm256_permute2x128_si256(a, b, 0x21));
    return _mm256_srav_epi32(sum, precision);
}

AVX2 static inline __attribute__((always_inline)) void horizontal(const Axis *axis, const uint8_t *row, int size, uint8_t *out, int groups) {
    const __m256i precision = _mm256_set1_epi32(axis->precision);
    const int rounding = 1 << (axis->precision - 1);
    const __m256i half = _mm256_setr_epi32(rounding, rounding, rounding, rounding, 0, 0, 0, 0);
    const __m256i spread = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, /**/
                                            6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m256i dense = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1, /**/
                                           0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    const __m256i *weights = (const __m256i *)axis->wide;
    const int32_t *first = axis->first;
    for (int i = 0; i < size; i += 8, first += 8, weights += 8 * groups, out += 8 * CHANNELS) {
#define OUTPUT(k) one_output(row + (size_t)first[k] * CHANNELS, weights + (k) * groups, groups, spread, half)
        const __m256i pixels04 = add_halves(OUTPUT(0), OUTPUT(4), precision), pixels15 = add_halves(OUTPUT(1), OUTPUT(5), precision);
        const __m256i pixels0145 = _mm256_packs_epi32(pixels04, pixels15);
        const __m256i pixels26 = add_halves(OUTPUT(2), OUTPUT(6), precision), pixels37 = add_halves(OUTPUT(3), OUTPUT(7), precision);
        const __m256i pixels2367 = _mm256_packs_epi32(pixels26, pixels37);
#undef OUTPUT
        const __m256i all = _mm256_shuffle_epi8(_mm256_packus_epi16(pixels0145, pixels2367), dense);
        _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(all));
        _mm_storeu_si128((__m128i *)(out + 4 * CHANNELS), _mm256_extracti128_si256(all, 1));
    }
}

AVX2 void horizontal_avx2(const Axis *axis, const uint8_t *row, int size, uint8_t *out) {
    switch (axis->taps / 4) { /* the usual numbers unrolled: up to 1 x, 2 x and 3 x smaller with bicubic */
    case 1: horizontal(axis, row, size, out, 1); break;
    case 2: horizontal(axis, row, size, out, 2); break;
    case 3: horizontal(axis, row, size, out, 3); break;
    default: horizontal(axis, row, size, out, axis->taps / 4);
    }
}

/* 32 bytes of the output at a time, two rows (taps) at a time. */
AVX2 static inline void vertical_block(const int16_t *weights, int taps, int precision, Rows rows, int start, uint8_t *out) {
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (precision - 1)), shift = _mm256_set1_epi32(precision);
    __m256i sum0 = half, sum1 = half, sum2 = half, sum3 = half;
    for (int t = 0; t < taps; t += 2) {
        const __m256i a = _mm256_loadu_si256((const __m256i *)(rows[t] + start)), b = _mm256_loadu_si256((const __m256i *)(rows[t + 1] + start));
        int32_t pair;
        memcpy(&pair, weights + t, sizeof pair);
        const __m256i weight = _mm256_set1_epi32(pair), low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
        sum0 = _mm256_add_epi32(sum0, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
        sum1 = _mm256_add_epi32(sum1, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
        sum2 = _mm256_add_epi32(sum2, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
        sum3 = _mm256_add_epi32(sum3, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
    }
    const __m256i words01 = _mm256_packs_epi32(_mm256_srav_epi32(sum0, shift), _mm256_srav_epi32(sum1, shift));
    const __m256i words23 = _mm256_packs_epi32(_mm256_srav_epi32(sum2, shift), _mm256_srav_epi32(sum3, shift));
    _mm256_storeu_si256((__m256i *)(out + start), _mm256_packus_epi16(words01, words23));
}

AVX2 void vertical_avx2(const int16_t *weights, int taps, int precision, Rows rows, int bytes, uint8_t *out) {
    if (bytes < 32) {
        vertical_scalar(weights, taps, precision, rows, bytes, out);
        return;
    }
    int start = 0;
    for (; start <= bytes - 32; start += 32) vertical_block(weights, taps, precision, rows, start, out);
    if (start < bytes) vertical_block(weights, taps, precision, rows, bytes - 32, out); /* the last 32 again, some of them twice */
}
#endif
