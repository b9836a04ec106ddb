/* JPEGs or raw pixels, and a window of each → squares of pixels.
 *
 * Only what the window needs is decoded: rows above it are entropy-decoded and dropped, columns beside it get no inverse DCT, and reading
 * stops below it. Rows are resampled as they come. libjpeg's warnings are errors here: a damaged image is refused, unless the damage lies
 * below the window, where it is not seen (the checksum in the index covers that). */
#include "decode.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#include "resample.h"

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000000
#error "libjpeg-turbo 2.0 or newer is needed"
#endif

/* Pixels around the window that are decoded too: the upsampling of chroma looks one chroma sample, that is two pixels, to each side. With
 * them the window is bit-identical to the same part of the whole image. */
enum { PADDING = 2 };
enum { LARGEST_WINDOW = 1 << 16 };
/* A progressive image is held as coefficients: 1 GiB of them. */
#define LARGEST_COEFFICIENTS ((uint64_t)1 << 30)
/* A progressive scan can cost a few bytes in the file and a pass over the whole image. */
enum { MOST_SCANS = 500 };

typedef struct {
    int32_t x, y, width, height, flip;
} Window;

typedef struct {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    struct jpeg_progress_mgr progress;
    jmp_buf failed;
    char *message;
    Resampler resampler;
    Buffer row; /* a row of the window as it goes to the resampler, black outside the image */
} Decoder;

EXPORT int decoder_interface(void) { return INTERFACE; }

EXPORT int decoder_has_avx2(void) {
#if HAVE_AVX2
    return __builtin_cpu_supports("avx2") != 0;
#else
    return 0;
#endif
}

/* Ends the image: back to decode_one. */
static _Noreturn __attribute__((format(printf, 2, 3))) void fail(Decoder *decoder, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(decoder->message, MESSAGE_LENGTH, format, arguments);
    va_end(arguments);
    longjmp(decoder->failed, 1);
}

static void on_error(j_common_ptr jpeg) {
    char message[JMSG_LENGTH_MAX];
    jpeg->err->format_message(jpeg, message);
    fail(jpeg->client_data, "%s", message);
}

static void on_message(j_common_ptr jpeg, int level) {
    if (level < 0) on_error(jpeg); /* a warning; the others are traces */
}

static void on_progress(j_common_ptr jpeg) {
    Decoder *decoder = jpeg->client_data;
    if (decoder->jpeg.input_scan_number > MOST_SCANS) fail(decoder, "it has more than %d scans", MOST_SCANS);
}

static int larger(int64_t a, int64_t b) { return (int)(a > b ? a : b); }
static int smaller(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

static uint8_t *start_row(Decoder *decoder, size_t pixels) {
    const size_t bytes = pixels * CHANNELS + resample_slack(&decoder->resampler);
    if (!buffer_reserve(&decoder->row, bytes)) fail(decoder, "out of memory");
    memset(decoder->row.data, 0, bytes);
    return decoder->row.data;
}

static void black_rows(Decoder *decoder, int count, int width) {
    const uint8_t *row = count > 0 ? start_row(decoder, width) : NULL;
    for (int i = 0; i < count; i++) resample_row(&decoder->resampler, row);
}

/* The part [left, right) x [top, bottom) of the image, `before` pixels to the right of the window's left edge. */
typedef struct {
    int left, right, top, bottom, before;
} Part;

static void raw_rows(Decoder *decoder, const uint8_t *pixels, int image_width, Window window, Part part) {
    uint8_t *row = start_row(decoder, window.width);
    for (int y = part.top; y < part.bottom; y++) {
        memcpy(row + (size_t)part.before * CHANNELS, pixels + ((size_t)y * image_width + part.left) * CHANNELS,
               (size_t)(part.right - part.left) * CHANNELS);
        resample_row(&decoder->resampler, row);
    }
}

static void open_jpeg(Decoder *decoder, const uint8_t *data, size_t length, int width, int height) {
    struct jpeg_decompress_struct *jpeg = &decoder->jpeg;
    jpeg_mem_src(jpeg, data, length);
    jpeg_read_header(jpeg, TRUE);
    if (jpeg->image_width != (JDIMENSION)width || jpeg->image_height != (JDIMENSION)height)
        fail(decoder, "it is %ux%u pixels where the index says %dx%d", jpeg->image_width, jpeg->image_height, width, height);
    if (jpeg->jpeg_color_space != JCS_YCbCr && jpeg->jpeg_color_space != JCS_RGB && jpeg->jpeg_color_space != JCS_GRAYSCALE)
        fail(decoder, "it has %d channels that are neither RGB nor gray", jpeg->num_components);
    if (jpeg_has_multiple_scans(jpeg) && (uint64_t)width * height * jpeg->num_components * sizeof(JCOEF) > LARGEST_COEFFICIENTS)
        fail(decoder, "it is progressive and of %dx%d pixels, which takes more than 1 GiB", width, height);
    jpeg->out_color_space = JCS_RGB;
}

static void jpeg_rows(Decoder *decoder, Window window, Part part) {
    struct jpeg_decompress_struct *jpeg = &decoder->jpeg;
    jpeg_start_decompress(jpeg);
    JDIMENSION left = larger(part.left - PADDING, 0);
    JDIMENSION width = smaller(part.right + PADDING, jpeg->output_width) - left;
    jpeg_crop_scanline(jpeg, &left, &width); /* moves `left` to the edge of a block */
    const size_t excess = part.left - left;
    uint8_t *buffer = start_row(decoder, part.before + excess + larger(width, window.width));
    JSAMPROW decoded = buffer + (size_t)part.before * CHANNELS;
    const JDIMENSION top = larger(part.top - PADDING, 0);
    if (top > 0) jpeg_skip_scanlines(jpeg, top);
    for (JDIMENSION y = top; y < (JDIMENSION)part.bottom; y++) {
        jpeg_read_scanlines(jpeg, &decoded, 1);
        if (y >= (JDIMENSION)part.top) resample_row(&decoder->resampler, buffer + excess * CHANNELS);
    }
}

static void decode(Decoder *decoder, int encoding, const uint8_t *data, size_t length, int width, int height, Window window, int size,
                   int filter, bool avx2, uint8_t *out) {
    if (width < 1 || height < 1) fail(decoder, "the index says that it is %dx%d pixels", width, height);
    if (window.width < 1 || window.width > LARGEST_WINDOW || window.height < 1 || window.height > LARGEST_WINDOW)
        fail(decoder, "its window is %dx%d pixels, not 1 to %d each way", window.width, window.height, LARGEST_WINDOW);
    if (encoding == JPEG)
        open_jpeg(decoder, data, length, width, height);
    else if (length != (uint64_t)width * height * CHANNELS)
        fail(decoder, "it has %zu bytes where %dx%d pixels take %llu", length, width, height,
             (unsigned long long)width * height * CHANNELS);
    if (!resample_start(&decoder->resampler, window.width, window.height, size, filter, window.flip != 0, avx2, out))
        fail(decoder, "out of memory");

    const int64_t x = window.x, y = window.y;
    if (x >= width || x + window.width <= 0 || y >= height || y + window.height <= 0) {
        black_rows(decoder, window.height, window.width);
        return;
    }
    const Part part = {larger(x, 0), smaller(x + window.width, width), larger(y, 0), smaller(y + window.height, height), larger(-x, 0)};
    black_rows(decoder, (int)(part.top - y), window.width);
    if (encoding == JPEG)
        jpeg_rows(decoder, window, part);
    else
        raw_rows(decoder, data, width, window, part);
    black_rows(decoder, (int)(y + window.height - part.bottom), window.width);
}

/* True where it worked; else the message says why it did not. */
static bool decode_one(Decoder *decoder, char *message, int encoding, const uint8_t *data, size_t length, const int32_t *dimensions,
                       Window window, int size, int filter, bool avx2, uint8_t *out) {
    decoder->message = message;
    message[0] = 0;
    if (setjmp(decoder->failed) == 0) {
        if (encoding == JPEG) {
            jpeg_create_decompress(&decoder->jpeg);
            decoder->jpeg.progress = &decoder->progress;
        }
        decode(decoder, encoding, data, length, dimensions[0], dimensions[1], window, size, filter, avx2, out);
    }
    if (encoding == JPEG) jpeg_destroy_decompress(&decoder->jpeg);
    return !message[0];
}

EXPORT int decoder_decode(int count, int encoding, const uint8_t *const *data, const size_t *lengths, const int32_t *dimensions,
                          const int32_t *windows, int size, int filter, int avx2, uint8_t *out, char *messages) {
    Decoder decoder = {0};
    decoder.jpeg.err = jpeg_std_error(&decoder.errors);
    decoder.jpeg.client_data = &decoder;
    decoder.errors.error_exit = on_error;
    decoder.errors.emit_message = on_message;
    decoder.progress.progress_monitor = on_progress;
    int failures = 0;
    for (int i = 0; i < count; i++) {
        Window window;
        memcpy(&window, windows + 5 * (size_t)i, sizeof window);
        failures += !decode_one(&decoder, messages + (size_t)i * MESSAGE_LENGTH, encoding, data[i], lengths[i], dimensions + 2 * (size_t)i,
                                window, size, filter, avx2 != 0, out + (size_t)i * size * size * CHANNELS);
    }
    resample_free(&decoder.resampler);
    buffer_free(&decoder.row);
    return failures;
}
