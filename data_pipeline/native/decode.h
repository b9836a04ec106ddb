/* The interface of the library, called from Python through ctypes (__init__.py) and by the fuzzer. */
#ifndef DECODE_H
#define DECODE_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* Increase this with every change below, here and in __init__.py: a library with another number is not used. */
#define INTERFACE 4
#define MESSAGE_LENGTH 200

enum { JPEG = 0, RAW = 1 };
/* Faster code that may be used. It does not change the results. */
enum { AVX2 = 1, OWN_HUFFMAN = 2 };
/* An outcome of decoder_read; the others are 0 and errno. */
enum { UNSOUND = -1 };

EXPORT int decoder_interface(void);
/* The features that this machine supports. */
EXPORT int decoder_features(void);

/* Cuts windows out of `count` images, resizes them with antialiasing to height x width pixels, mirrors them.
 *
 * data, lengths: the bytes of each image, JPEG or (encoding RAW) uint8 [height, width, 3]. dimensions: [count][width,
 * height], which the images must have. most_scans: a JPEG with more is refused. windows: [count][x, y, width, height,
 * flip]; pixels outside the image are black. filter: BILINEAR or BICUBIC (resample.h). out: uint8
 * [count][height][width][3]. messages: [count][MESSAGE_LENGTH]; empty on success, else the reason of the failure, and
 * the pixels are undefined.
 *
 * Returns the number of images that failed. Safe for arbitrary bytes. No state outlives the call, so it is thread-safe.
 * */
EXPORT int decoder_decode(int count, int encoding, const uint8_t *const *data, const size_t *lengths, const int32_t *dimensions,
                          int most_scans, const int32_t *windows, int height, int width, int filter, int features,
                          uint8_t *out, char *messages);

/* Reads `count` samples, sample i from the open file files[i], into out + starts[i], and checks them.
 *
 * offsets, lengths: in bytes. checksums: the CRC-32 that the bytes must have. outcomes: 0; UNSOUND if the file is too
 * short or the checksum differs; or the errno of the read. Returns the number of samples that failed. Thread-safe. */
EXPORT int decoder_read(int count, const int32_t *files, const int64_t *offsets, const int64_t *lengths,
                        const uint32_t *checksums, const int64_t *starts, uint8_t *out, int32_t *outcomes);

/* Asks the system to read these parts of files ahead. Errors are left to the reading. */
EXPORT void decoder_will_need(int count, const int32_t *files, const int64_t *offsets, const int64_t *lengths);

#endif
