/* The library's one door, called from Python through ctypes (__init__.py) and by the fuzzer. */
#ifndef DECODE_H
#define DECODE_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* To be raised with every change of what follows, here and in __init__.py: a library that was built from older sources is not used. */
#define INTERFACE 2
#define MESSAGE_LENGTH 200

enum { JPEG = 0, RAW = 1 };
/* The faster code that may be used. The results are the same with and without. */
enum { AVX2 = 1, OWN_HUFFMAN = 2 };

EXPORT int decoder_interface(void);
/* What this machine has of it. */
EXPORT int decoder_features(void);

/* Cuts windows out of `count` images, resizes them with antialiasing to size x size pixels and mirrors them.
 *
 * data, lengths: an image's bytes, JPEG or (encoding RAW) uint8 [height, width, 3]. dimensions: [count][width, height], which the image
 * must have. most_scans: a JPEG with more is refused. windows: [count][x, y, width, height, flip]; what lies outside the image is black.
 * filter: BILINEAR or BICUBIC (resample.h). out: uint8 [count][size][size][3]. messages: [count][MESSAGE_LENGTH]; empty, or why the image
 * could not be decoded; then its pixels mean nothing.
 *
 * Returns the number of images that failed. Any bytes are safe. No state outlives the call, so threads may call at once. */
EXPORT int decoder_decode(int count, int encoding, const uint8_t *const *data, const size_t *lengths, const int32_t *dimensions,
                          int most_scans, const int32_t *windows, int size, int filter, int features, uint8_t *out,
                          char *messages);

#endif
