/* The interface of the library, called from Python through ctypes (__init__.py) and by the fuzzer. */
#ifndef DECODE_H
#define DECODE_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* Increase this with every change below, here and in __init__.py: a library with another number is not used. */
#define INTERFACE 2
#define MESSAGE_LENGTH 200

enum { JPEG = 0, RAW = 1 };
/* Faster code that may be used. It does not change the results. */
enum { AVX2 = 1, OWN_HUFFMAN = 2 };

EXPORT int decoder_interface(void);
/* The features that this machine supports. */
EXPORT int decoder_features(void);

/* Cuts windows out of `count` images, resizes them with antialiasing to size x size pixels and mirrors them.
 *
 * data, lengths: the bytes of each image, JPEG or (encoding RAW) uint8 [height, width, 3]. dimensions: [count][width,
 * height], which the images must have. most_scans: a JPEG with more is refused. windows: [count][x, y, width, height,
 * flip]; pixels outside the image are black. filter: BILINEAR or BICUBIC (resample.h). out: uint8
 * [count][size][size][3]. messages: [count][MESSAGE_LENGTH]; empty on success, else the reason of the failure, and the
 * pixels are undefined.
 *
 * Returns the number of images that failed. Safe for arbitrary bytes. No state outlives the call, so it is thread-safe.
 * */
EXPORT int decoder_decode(int count, int encoding, const uint8_t *const *data, const size_t *lengths, const int32_t *dimensions,
                          int most_scans, const int32_t *windows, int size, int filter, int features, uint8_t *out,
                          char *messages);

#endif
