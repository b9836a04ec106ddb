/* Antialiased separable resampling of uint8 RGB images, row by row as they are decoded. */
#ifndef RESAMPLE_H
#define RESAMPLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CHANNELS 3

enum { BILINEAR = 0, BICUBIC = 1 };

/* Memory that is reused from image to image and only grows. */
typedef struct {
    void *data;
    size_t capacity;
} Buffer;

/* Allocate at least `bytes`, aligned to 64; the contents are lost. Returns false if there is no memory. */
bool buffer_reserve(Buffer *buffer, size_t bytes);
void buffer_free(Buffer *buffer);

/* One direction: output i is the sum over t < taps of weight(i, t) * input(first[i] + t), in units of 2^-precision.
 * Weights of inputs past the end of the window are zero. taps is 0 if this direction is copied. */
typedef struct {
    int taps; /* even */
    int precision;
    const int32_t *first;
    const int16_t *weights; /* [size rounded up to 8][taps] */
    const int16_t *wide;    /* the same weights in the order of resample_avx2.c, [size rounded up to 8][taps / 2][8] */
    Buffer memory, wide_memory, exact_memory;
} Axis;

typedef struct {
    int width, height; /* of the window */
    int out_width, out_height;
    bool avx2;
    Axis horizontal, vertical;
    Buffer ring;   /* the last vertical.taps rows after the horizontal pass */
    size_t stride; /* of the ring, in bytes */
    Buffer rows;
    int received, written;
    uint8_t *out;
} Resampler;

/* Start an image: a window of width x height pixels becomes out_width x out_height pixels at `out` (uint8 [out_height,
 * out_width, 3]), mirrored left to right if `flip`. Returns false if there is no memory. A new resampler is all zeros.
 */
bool resample_start(Resampler *resampler, int width, int height, int out_height, int out_width, int filter, bool flip,
                    bool avx2, uint8_t *out);

/* Pass the next row of the window, from the top. resample_slack() bytes past its end must be readable, with any
 * contents. The output is complete after `height` rows. */
void resample_row(Resampler *resampler, const uint8_t *row);
size_t resample_slack(const Resampler *resampler);
void resample_free(Resampler *resampler);

/* The two passes for one row, without and with AVX2; both use integer arithmetic and give the same bits. The horizontal
 * pass may write HORIZONTAL_EXCESS bytes past its row. The vertical pass may read its rows up to a multiple of
 * RING_ALIGNMENT. */
#define HORIZONTAL_EXCESS 32
#define RING_ALIGNMENT 64
typedef uint8_t const *const *Rows;
void horizontal_scalar(const Axis *axis, const uint8_t *row, int size, uint8_t *out);
void vertical_scalar(const int16_t *weights, int taps, int precision, Rows rows, int bytes, uint8_t *out);
#if defined(__x86_64__)
#define HAVE_AVX2 1
void horizontal_avx2(const Axis *axis, const uint8_t *row, int size, uint8_t *out);
void vertical_avx2(const int16_t *weights, int taps, int precision, Rows rows, int bytes, uint8_t *out);
#else
#define HAVE_AVX2 0
#endif

#endif
