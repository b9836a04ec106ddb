/* Pillow's algorithm (Resample.c): separable convolution with a kernel that is widened by the scale if the image
 * shrinks; first the horizontal pass, whose result is rounded to uint8, then the vertical pass. Weights have 16 bits,
 * with as many fractional bits as the largest weight permits, as in Pillow-SIMD and in torch's antialiased
 * interpolate() of uint8, which gives the same bits. */
#include "resample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

bool buffer_reserve(Buffer *buffer, size_t bytes) {
    if (bytes <= buffer->capacity) return true;
    buffer_free(buffer);
    size_t capacity = (bytes + 63) / 64 * 64;
    buffer->data = aligned_alloc(64, capacity);
    if (!buffer->data) return false;
    memset(buffer->data, 0, capacity);
    buffer->capacity = capacity;
    return true;
}

void buffer_free(Buffer *buffer) {
    free(buffer->data);
    *buffer = (Buffer){0};
}

static double bilinear(double x) {
    x = fabs(x);
    return x < 1 ? 1 - x : 0;
}

/* Keys' cubic with a = -1/2 (IEEE Transactions on Acoustics, Speech, and Signal Processing 29(6), 1981). */
static double bicubic(double x) {
    x = fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
    return 0;
}

static bool axis_start(Axis *axis, int length, int size, int filter, bool mirrored) {
    const double scale = (double)length / size;
    const double stretch = scale > 1 ? scale : 1;
    const double inverse = 1 / stretch;
    const double support = (filter == BICUBIC ? 2 : 1) * stretch;
    const int limit = 2 * (int)ceil(support) + 1;

    if (!buffer_reserve(&axis->exact_memory, sizeof(double) * (size_t)size * limit + sizeof(int32_t) * size)) return false;
    double *exact = axis->exact_memory.data;
    int32_t *counts = (int32_t *)(exact + (size_t)size * limit);
    double largest = 0;
    int taps = 0;
    for (int i = 0; i < size; i++) {
        const double center = scale * (i + 0.5);
        const int first = center - support + 0.5 > 0 ? (int)(center - support + 0.5) : 0;
        const int last = center + support + 0.5 < length ? (int)(center + support + 0.5) : length;
        const int count = last - first < limit ? last - first : limit;
        double *weights = exact + (size_t)i * limit;
        double total = 0;
        for (int t = 0; t < count; t++) {
            const double x = (t + first - center + 0.5) * inverse;
            weights[t] = filter == BICUBIC ? bicubic(x) : bilinear(x);
            total += weights[t];
        }
        for (int t = 0; t < count; t++) {
            weights[t] /= total;
            if (weights[t] > largest) largest = weights[t];
        }
        counts[i] = count;
        if (count > taps) taps = count;
    }

    taps = (taps + 1) / 2 * 2; /* AVX2 multiplies by pairs of weights; the last one may be zero */
    int precision = 0;
    while (precision < 22 && (int)(0.5 + largest * (1 << (precision + 1))) < 1 << 15) precision++;
    /* Whole groups of 8 outputs for AVX2. */
    const size_t rows = ((size_t)size + 7) / 8 * 8;
    if (!buffer_reserve(&axis->memory, (sizeof(int32_t) + sizeof(int16_t) * taps) * rows)) return false;
    int32_t *first = axis->memory.data;
    int16_t *quantized = (int16_t *)(first + rows);
    memset(axis->memory.data, 0, (sizeof(int32_t) + sizeof(int16_t) * taps) * rows);
    for (int i = 0; i < size; i++) {
        const int to = mirrored ? size - 1 - i : i;
        const double center = scale * (i + 0.5);
        first[to] = center - support + 0.5 > 0 ? (int32_t)(center - support + 0.5) : 0;
        for (int t = 0; t < counts[i]; t++) {
            const double weight = exact[(size_t)i * limit + t] * (1 << precision);
            quantized[(size_t)to * taps + t] = (int16_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
    }
    axis->taps = taps;
    axis->precision = precision;
    axis->first = first;
    axis->weights = quantized;
    return true;
}

/* Weights in the order of resample_avx2.c: for outputs k and k + 4 of 8, a pair of weights, repeated for four channels.
 * */
static bool axis_widen(Axis *axis, int size) {
    const size_t groups = ((size_t)size + 7) / 8;
    const int pairs = axis->taps / 2;
    if (!buffer_reserve(&axis->wide_memory, groups * 8 * pairs * 4 * sizeof(int32_t))) return false;
    int32_t *wide = axis->wide_memory.data;
    for (size_t group = 0; group < groups; group++)
        for (int k = 0; k < 4; k++)
            for (int p = 0; p < pairs; p++)
                for (int half = 0; half < 2; half++, wide += 4) {
                    int32_t pair;
                    memcpy(&pair, axis->weights + (group * 8 + k + 4 * half) * axis->taps + 2 * p, sizeof pair);
                    wide[0] = wide[1] = wide[2] = wide[3] = pair;
                }
    axis->wide = axis->wide_memory.data;
    return true;
}

bool resample_start(Resampler *r, int width, int height, int out_height, int out_width, int filter, bool flip,
                    bool avx2, uint8_t *out) {
    r->width = width, r->height = height, r->out_width = out_width, r->out_height = out_height, r->out = out;
    r->avx2 = HAVE_AVX2 && avx2;
    r->received = r->written = 0;
    r->horizontal.taps = r->vertical.taps = 0;
    if (width != out_width || flip) {
        if (!axis_start(&r->horizontal, width, out_width, filter, flip)) return false;
        if (r->avx2 && !axis_widen(&r->horizontal, out_width)) return false;
    }
    if (height != out_height && !axis_start(&r->vertical, height, out_height, filter, false)) return false;
    const size_t kept = r->vertical.taps ? r->vertical.taps : 1;
    const size_t bytes = (size_t)out_width * CHANNELS + HORIZONTAL_EXCESS;
    r->stride = (bytes + RING_ALIGNMENT - 1) / RING_ALIGNMENT * RING_ALIGNMENT;
    return buffer_reserve(&r->ring, kept * r->stride) && buffer_reserve(&r->rows, kept * sizeof(uint8_t *));
}

/* The taps of the last outputs reach past the end with weights of zero, and a vector load has 16 bytes where 2 taps
 * have 6. */
size_t resample_slack(const Resampler *r) { return (size_t)CHANNELS * r->horizontal.taps + 10; }

void resample_row(Resampler *r, const uint8_t *row) {
    const Axis *vertical = &r->vertical;
    const int bytes = r->out_width * CHANNELS;
    uint8_t *kept = (uint8_t *)r->ring.data + (vertical->taps ? r->received % vertical->taps : 0) * r->stride;
    if (!r->horizontal.taps)
        memcpy(kept, row, bytes);
#if HAVE_AVX2
    else if (r->avx2)
        horizontal_avx2(&r->horizontal, row, r->out_width, kept);
#endif
    else
        horizontal_scalar(&r->horizontal, row, r->out_width, kept);
    r->received++;
    if (!vertical->taps) {
        memcpy(r->out + (size_t)r->written++ * bytes, kept, bytes);
        return;
    }

    while (r->written < r->out_height) {
        const int first = vertical->first[r->written];
        const int available = r->height - first < vertical->taps ? r->height - first : vertical->taps;
        if (r->received < first + available) return;
        const uint8_t **rows = r->rows.data;
        for (int t = 0; t < vertical->taps; t++) { /* below the window the weights are zero, so any row is valid */
            const int wanted = first + (t < available ? t : available - 1);
            rows[t] = (uint8_t *)r->ring.data + wanted % vertical->taps * r->stride;
        }
        const int16_t *weights = vertical->weights + (size_t)r->written * vertical->taps;
        uint8_t *out = r->out + (size_t)r->written * bytes;
#if HAVE_AVX2
        if (r->avx2)
            vertical_avx2(weights, vertical->taps, vertical->precision, (Rows)rows, bytes, out);
        else
#endif
            vertical_scalar(weights, vertical->taps, vertical->precision, (Rows)rows, bytes, out);
        r->written++;
    }
}

void resample_free(Resampler *r) {
    for (int i = 0; i < 2; i++) {
        Axis *axis = i ? &r->vertical : &r->horizontal;
        buffer_free(&axis->memory), buffer_free(&axis->wide_memory), buffer_free(&axis->exact_memory);
    }
    buffer_free(&r->ring), buffer_free(&r->rows);
}

static uint8_t clamp(int32_t value) { return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value; }

void horizontal_scalar(const Axis *axis, const uint8_t *row, int size, uint8_t *out) {
    const int32_t half = 1 << (axis->precision - 1);
    for (int i = 0; i < size; i++) {
        const int16_t *weights = axis->weights + (size_t)i * axis->taps;
        const uint8_t *pixel = row + (size_t)axis->first[i] * CHANNELS;
        int32_t sum[CHANNELS] = {half, half, half};
        for (int t = 0; t < axis->taps; t++)
            for (int c = 0; c < CHANNELS; c++) sum[c] += weights[t] * pixel[t * CHANNELS + c];
        for (int c = 0; c < CHANNELS; c++) out[i * CHANNELS + c] = clamp(sum[c] >> axis->precision);
    }
}

void vertical_scalar(const int16_t *weights, int taps, int precision, Rows rows, int bytes, uint8_t *out) {
    for (int start = 0; start < bytes; start += RING_ALIGNMENT) { /* a constant, so that the compiler vectorises */
        int32_t sum[RING_ALIGNMENT];
        for (int i = 0; i < RING_ALIGNMENT; i++) sum[i] = 1 << (precision - 1);
        for (int t = 0; t < taps; t++)
            for (int i = 0; i < RING_ALIGNMENT; i++) sum[i] += weights[t] * (int16_t)rows[t][start + i];
        for (int i = 0; i < RING_ALIGNMENT && start + i < bytes; i++) out[start + i] = clamp(sum[i] >> precision);
    }
}
