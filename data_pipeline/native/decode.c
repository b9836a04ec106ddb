/* Decode windows of JPEGs, or cut them from raw pixels, and resize them.
 *
 * Only the part that the window needs is decoded: rows above it are entropy-decoded and dropped, columns beside it get
 * no inverse DCT, and reading stops below it. Each row is resampled as soon as it is decoded. Warnings of libjpeg are
 * errors here: a damaged image is refused, unless the damage lies below the window (the checksum in the index detects
 * that). */
#include "decode.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#include "huffman.h"
#include "resample.h"

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000000 || LIBJPEG_TURBO_VERSION_NUMBER >= 4000000
#error "libjpeg-turbo 2 or 3 is needed"
#endif

/* Pixels around the window that are also decoded. Upsampling uses one chroma sample, that is two pixels, on each side;
 * with this padding the window is bit-identical to the same part of the whole image. */
enum { PADDING = 2 };
/* Rows that are decoded before they are resampled. With one at a time, decoding and resampling would evict each other's
 * code and data from the caches. */
enum { ROWS = 8 };
/* Sides of a window, in pixels. A crop of an image that is 100 times as wide as high can be 100,000 pixels wide.
 * Sums of 4 * LARGEST_WINDOW weights times 255 fit into 32 bits: 2^22 * 255 * 1.09 for a bicubic kernel, and half of
 * 255 for each weight that is rounded. */
enum { LARGEST_WINDOW = 1 << 20 };
/* Limit of the coefficients of a progressive image, which libjpeg holds in memory: 1 GiB. */
#define LARGEST_COEFFICIENTS ((uint64_t)1 << 30)
/* Outcomes of an attempt to decode an image. GAVE_UP: huffman.c met data that it does not handle. */
enum { DONE, FAILED, GAVE_UP };

typedef struct {
    int32_t x, y, width, height, flip;
} Window;

/* The part [left, right) x [top, bottom) of the image inside a window, `before` pixels right of the window's left edge.
 * */
typedef struct {
    int left, right, top, bottom, before;
} Part;

typedef struct {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    struct jpeg_progress_mgr progress;
    jmp_buf ended;
    char *message;
    int encoding, most_scans, height, width, filter, features; /* height, width: of the outputs */
    Huffman huffman;
    Resampler resampler;
    Buffer rows; /* rows of the window for the resampler, black outside the image */
} Decoder;

EXPORT int decoder_interface(void) { return INTERFACE; }

EXPORT int decoder_features(void) {
#if HAVE_AVX2
    return OWN_HUFFMAN | (__builtin_cpu_supports("avx2") ? AVX2 : 0);
#else
    return OWN_HUFFMAN;
#endif
}

/* Abort this image and return to `attempt`. */
static _Noreturn __attribute__((format(printf, 2, 3))) void fail(Decoder *decoder, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(decoder->message, MESSAGE_LENGTH, format, arguments);
    va_end(arguments);
    longjmp(decoder->ended, FAILED);
}

static _Noreturn void on_error(j_common_ptr jpeg) {
    char message[JMSG_LENGTH_MAX];
    jpeg->err->format_message(jpeg, message);
    fail(jpeg->client_data, "%s", message);
}

static void on_message(j_common_ptr jpeg, int level) {
    if (level < 0) on_error(jpeg); /* negative levels are warnings, others are traces */
}

static void on_progress(j_common_ptr jpeg) {
    Decoder *decoder = jpeg->client_data;
    if (decoder->jpeg.input_scan_number > decoder->most_scans) fail(decoder, "it has more than %d scans", decoder->most_scans);
}

Huffman *huffman_of(j_decompress_ptr jpeg) { return &((Decoder *)jpeg->client_data)->huffman; }

_Noreturn void huffman_give_up(j_decompress_ptr jpeg) { longjmp(((Decoder *)jpeg->client_data)->ended, GAVE_UP); }

static int larger(int64_t a, int64_t b) { return (int)(a > b ? a : b); }
static int smaller(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

/* Allocate `count` black rows, plus the bytes that the resampler may read past the last one. */
static uint8_t *start_rows(Decoder *decoder, size_t pixels, int count) {
    const size_t bytes = pixels * CHANNELS * count + resample_slack(&decoder->resampler);
    if (!buffer_reserve(&decoder->rows, bytes)) fail(decoder, "out of memory");
    memset(decoder->rows.data, 0, bytes);
    return decoder->rows.data;
}

static void black_rows(Decoder *decoder, int count, int width) {
    if (count == 0) return;
    const uint8_t *row = start_rows(decoder, width, 1);
    for (int i = 0; i < count; i++) resample_row(&decoder->resampler, row);
}

static void raw_rows(Decoder *decoder, const uint8_t *pixels, size_t length, int image_width, Window window, Part part) {
    uint8_t *copy = start_rows(decoder, window.width, 1);
    const size_t bytes = (size_t)(part.right - part.left) * CHANNELS;
    for (int y = part.top; y < part.bottom; y++) {
        const size_t offset = ((size_t)y * image_width + part.left) * CHANNELS;
        if (part.right - part.left == window.width && offset + bytes + resample_slack(&decoder->resampler) <= length) {
            resample_row(&decoder->resampler, pixels + offset);
        } else {
            memcpy(copy + (size_t)part.before * CHANNELS, pixels + offset, bytes);
            resample_row(&decoder->resampler, copy);
        }
    }
}

static void open_jpeg(Decoder *decoder, const uint8_t *data, size_t length, int width, int height) {
    j_decompress_ptr jpeg = &decoder->jpeg;
    jpeg_create_decompress(jpeg);
    jpeg->progress = &decoder->progress;
    jpeg_mem_src(jpeg, data, length);
    jpeg_read_header(jpeg, TRUE);
    if (jpeg->image_width != (JDIMENSION)width || jpeg->image_height != (JDIMENSION)height)
        fail(decoder, "it is %ux%u pixels where the index says %dx%d", jpeg->image_width, jpeg->image_height, width, height);
    if (jpeg->jpeg_color_space == JCS_CMYK || jpeg->jpeg_color_space == JCS_YCCK) fail(decoder, "it is CMYK");
    if (jpeg->jpeg_color_space != JCS_YCbCr && jpeg->jpeg_color_space != JCS_RGB && jpeg->jpeg_color_space != JCS_GRAYSCALE)
        fail(decoder, "it has %d channels that are neither RGB nor gray", jpeg->num_components);
    if (jpeg->arith_code) fail(decoder, "it is arithmetic-coded");
    if (jpeg_has_multiple_scans(jpeg) && (uint64_t)width * height * jpeg->num_components * sizeof(JCOEF) > LARGEST_COEFFICIENTS)
        fail(decoder, "it is progressive and of %dx%d pixels, which would take more than 1 GiB", width, height);
    jpeg->out_color_space = JCS_RGB;
}

/* Whether a progressive image has all bits of all coefficients. libjpeg guesses missing ones from neighbouring blocks.
 * */
static bool is_complete(j_decompress_ptr jpeg) {
    if (!jpeg->progressive_mode) return true;
    for (int component = 0; component < jpeg->num_components; component++)
        for (int k = 0; k < DCTSIZE2; k++)
            if (jpeg->coef_bits[component][k] != 0) return false;
    return true;
}

static void jpeg_rows(Decoder *decoder, Window window, Part part) {
    j_decompress_ptr jpeg = &decoder->jpeg;
    jpeg_start_decompress(jpeg);
    if (decoder->features & OWN_HUFFMAN) huffman_install(&decoder->huffman, jpeg);
    const bool partly = is_complete(jpeg); /* the guesses would differ if only a part of the image is decoded */
    JDIMENSION left = partly ? larger(part.left - PADDING, 0) : 0;
    JDIMENSION width = partly ? smaller((int64_t)part.right + PADDING, jpeg->output_width) - left : jpeg->output_width;
    jpeg_crop_scanline(jpeg, &left, &width); /* moves `left` to the left edge of a block */
    const size_t excess = part.left - left;
    const size_t pixels = part.before + excess + larger(width, window.width);
    uint8_t *rows = start_rows(decoder, pixels, ROWS);
    JSAMPROW decoded[ROWS];
    for (int i = 0; i < ROWS; i++) decoded[i] = rows + (i * pixels + part.before) * CHANNELS;

    const JDIMENSION top = part.top, bottom = part.bottom;
    if (partly && top > PADDING) jpeg_skip_scanlines(jpeg, top - PADDING);
    while (jpeg->output_scanline < top) jpeg_read_scanlines(jpeg, decoded, 1);
    while (jpeg->output_scanline < bottom) {
        const JDIMENSION wanted = smaller(ROWS, bottom - jpeg->output_scanline);
        JDIMENSION there = 0;
        while (there < wanted) there += jpeg_read_scanlines(jpeg, decoded + there, wanted - there);
        for (JDIMENSION i = 0; i < wanted; i++) resample_row(&decoder->resampler, rows + (i * pixels + excess) * CHANNELS);
    }
}

static void decode_one(Decoder *decoder, const uint8_t *data, size_t length, int width, int height, Window window, uint8_t *out) {
    if (width < 1 || height < 1) fail(decoder, "the index says that it is %dx%d pixels", width, height);
    if (window.width < 1 || window.width > LARGEST_WINDOW || window.height < 1 || window.height > LARGEST_WINDOW)
        fail(decoder, "its window is %dx%d pixels, not 1 to %d each way", window.width, window.height, LARGEST_WINDOW);
    if (decoder->encoding == JPEG) {
        open_jpeg(decoder, data, length, width, height);
    } else if (length != (uint64_t)width * height * CHANNELS) {
        const unsigned long long wanted = (uint64_t)width * height * CHANNELS;
        fail(decoder, "it has %zu bytes where %dx%d pixels take %llu", length, width, height, wanted);
    }
    if (!resample_start(&decoder->resampler, window.width, window.height, decoder->height, decoder->width,
                        decoder->filter, window.flip != 0, (decoder->features & AVX2) != 0, out))
        fail(decoder, "out of memory");

    const int64_t x = window.x, y = window.y;
    if (x >= width || x + window.width <= 0 || y >= height || y + window.height <= 0) {
        black_rows(decoder, window.height, window.width);
        return;
    }
    const Part part = {larger(x, 0), smaller(x + window.width, width), larger(y, 0), smaller(y + window.height, height), larger(-x, 0)};
    black_rows(decoder, (int)(part.top - y), window.width);
    if (decoder->encoding == JPEG)
        jpeg_rows(decoder, window, part);
    else
        raw_rows(decoder, data, length, width, window, part);
    black_rows(decoder, (int)(y + window.height - part.bottom), window.width);
}

static int attempt(Decoder *decoder, const uint8_t *data, size_t length, const int32_t *dimensions, Window window, uint8_t *out) {
    switch (setjmp(decoder->ended)) {
    case 0: decode_one(decoder, data, length, dimensions[0], dimensions[1], window, out); return DONE;
    case GAVE_UP: return GAVE_UP;
    default: return FAILED;
    }
}

/* Returns true on success; otherwise the message has the reason. */
static bool decode(Decoder *decoder, const uint8_t *data, size_t length, const int32_t *dimensions, Window window, uint8_t *out) {
    decoder->message[0] = 0;
    int outcome = attempt(decoder, data, length, dimensions, window, out);
    jpeg_destroy_decompress(&decoder->jpeg);
    if (outcome == GAVE_UP) {
        decoder->features &= ~OWN_HUFFMAN;
        outcome = attempt(decoder, data, length, dimensions, window, out);
        jpeg_destroy_decompress(&decoder->jpeg);
        decoder->features |= OWN_HUFFMAN;
    }
    return outcome == DONE;
}

EXPORT int decoder_decode(int count, int encoding, const uint8_t *const *data, const size_t *lengths, const int32_t *dimensions,
                          int most_scans, const int32_t *windows, int height, int width, int filter, int features,
                          uint8_t *out, char *messages) {
    Decoder *decoder = calloc(1, sizeof *decoder);
    if (!decoder) {
        for (int i = 0; i < count; i++) strcpy(messages + (size_t)i * MESSAGE_LENGTH, "out of memory");
        return count;
    }
    decoder->jpeg.err = jpeg_std_error(&decoder->errors);
    decoder->jpeg.client_data = decoder;
    decoder->errors.error_exit = on_error;
    decoder->errors.emit_message = on_message;
    decoder->progress.progress_monitor = on_progress;
    decoder->encoding = encoding, decoder->most_scans = most_scans, decoder->filter = filter;
    decoder->height = height, decoder->width = width;
    decoder->features = features & decoder_features();
    const size_t bytes = (size_t)height * width * CHANNELS;
    int failures = 0;
    for (int i = 0; i < count; i++) {
        Window window;
        memcpy(&window, windows + 5 * (size_t)i, sizeof window);
        decoder->message = messages + (size_t)i * MESSAGE_LENGTH;
        failures += !decode(decoder, data[i], lengths[i], dimensions + 2 * (size_t)i, window, out + i * bytes);
    }
    resample_free(&decoder->resampler);
    buffer_free(&decoder->rows);
    free(decoder);
    return failures;
}
