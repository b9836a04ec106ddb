/* The two passes with AVX2. pmaddwd multiplies 16 by 16 bits and adds pairs in 32 bits, so the results equal the scalar
 * ones. */
#include "resample.h"

#if HAVE_AVX2
#include <immintrin.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2")))

/* Two outputs of a row, k and k + 4 of a group of 8, one in each half of a vector. A 16-byte load has four taps (12
 * bytes); a shuffle makes 16-bit pairs (tap, next tap) of each channel. pairs: number of pairs of taps. */
AVX2 static inline __attribute__((always_inline)) __m256i two_outputs(const uint8_t *low, const uint8_t *high, const __m256i *weights, int pairs, __m256i half) {
    const __m256i first = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, /**/
                                           0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
    const __m256i second = _mm256_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1, /**/
                                            6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    __m256i sum = half;
    for (int p = 0; p < pairs; p += 2) {
        const __m256i pixels = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(low + 2 * p * CHANNELS))),
                                                       _mm_loadu_si128((const __m128i *)(high + 2 * p * CHANNELS)), 1);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, first), _mm256_load_si256(weights + p)));
        if (p + 1 < pairs)
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, second), _mm256_load_si256(weights + p + 1)));
    }
    return sum;
}

AVX2 static inline __attribute__((always_inline)) void horizontal(const Axis *axis, const uint8_t *row, int size, uint8_t *out, int pairs) {
    const __m256i precision = _mm256_set1_epi32(axis->precision);
    const __m256i half = _mm256_set1_epi32(1 << (axis->precision - 1));
    const __m256i dense = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1, /**/
                                           0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    const __m256i *weights = (const __m256i *)axis->wide;
    const int32_t *first = axis->first;
    for (int i = 0; i < size; i += 8, first += 8, weights += 4 * pairs, out += 8 * CHANNELS) {
#define OUTPUTS(k)                                                                                                                          \
    _mm256_srav_epi32(two_outputs(row + (size_t)first[k] * CHANNELS, row + (size_t)first[k + 4] * CHANNELS, weights + k * pairs, pairs, half), precision)
        const __m256i pixels0145 = _mm256_packs_epi32(OUTPUTS(0), OUTPUTS(1)), pixels2367 = _mm256_packs_epi32(OUTPUTS(2), OUTPUTS(3));
#undef OUTPUTS
        const __m256i all = _mm256_shuffle_epi8(_mm256_packus_epi16(pixels0145, pixels2367), dense);
        _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(all));
        _mm_storeu_si128((__m128i *)(out + 4 * CHANNELS), _mm256_extracti128_si256(all, 1));
    }
}

AVX2 void horizontal_avx2(const Axis *axis, const uint8_t *row, int size, uint8_t *out) {
    switch (axis->taps / 2) { /* unroll the usual numbers */
    case 1: horizontal(axis, row, size, out, 1); break;
    case 2: horizontal(axis, row, size, out, 2); break;
    case 3: horizontal(axis, row, size, out, 3); break;
    case 4: horizontal(axis, row, size, out, 4); break;
    case 5: horizontal(axis, row, size, out, 5); break;
    case 6: horizontal(axis, row, size, out, 6); break;
    default: horizontal(axis, row, size, out, axis->taps / 2);
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
    if (start < bytes) vertical_block(weights, taps, precision, rows, bytes - 32, out); /* the last 32, some twice */
}
#endif
