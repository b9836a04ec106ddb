/* A target for libFuzzer. An input is a file followed by 16 bytes of parameters: windows, height, width, flip, filter.
 *
 * Besides the sanitizers' checks, it tests two guarantees of the decoder: the result is the same with and without the
 * faster code, and if plain libjpeg decodes the whole image without a warning, the window has the same pixels. */
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#include "../decode.h"
#include "../resample.h"

enum { PARAMETERS = 16, MOST_PIXELS = 1 << 18, MOST_SCANS = 500 };

struct failure {
    struct jpeg_error_mgr manager;
    jmp_buf jump;
};

static void on_error(j_common_ptr jpeg) { longjmp(((struct failure *)jpeg->err)->jump, 1); }
static void on_message(j_common_ptr jpeg, int level) {
    if (level < 0) on_error(jpeg);
}

typedef struct {
    int32_t dimensions[2]; /* 0 if the header cannot be read */
    uint8_t *pixels;       /* NULL if it cannot be decoded, would take long, or has too many scans */
} Reference;

static void on_progress(j_common_ptr jpeg) {
    if (((j_decompress_ptr)jpeg)->input_scan_number > MOST_SCANS) on_error(jpeg);
}

/* Decode the whole image with libjpeg alone, as strictly as the decoder. */
static void read_reference(Reference *reference, const uint8_t *data, size_t length) {
    struct jpeg_decompress_struct jpeg = {0};
    struct failure failure;
    struct jpeg_progress_mgr progress = {.progress_monitor = on_progress};
    jpeg.err = jpeg_std_error(&failure.manager);
    failure.manager.error_exit = on_error;
    failure.manager.emit_message = on_message;
    if (setjmp(failure.jump)) {
        free(reference->pixels);
        reference->pixels = NULL;
        jpeg_destroy_decompress(&jpeg);
        return;
    }
    jpeg_create_decompress(&jpeg);
    jpeg.progress = &progress;
    jpeg_mem_src(&jpeg, data, length);
    jpeg_read_header(&jpeg, TRUE);
    reference->dimensions[0] = jpeg.image_width, reference->dimensions[1] = jpeg.image_height;
    if ((uint64_t)jpeg.image_width * jpeg.image_height <= MOST_PIXELS && !jpeg.arith_code) {
        jpeg.out_color_space = JCS_RGB;
        jpeg_start_decompress(&jpeg);
        const size_t stride = (size_t)jpeg.output_width * CHANNELS;
        reference->pixels = malloc(stride * jpeg.output_height);
        while (jpeg.output_scanline < jpeg.output_height) {
            JSAMPROW row = reference->pixels + jpeg.output_scanline * stride;
            jpeg_read_scanlines(&jpeg, &row, 1);
        }
        jpeg_finish_decompress(&jpeg);
    }
    jpeg_destroy_decompress(&jpeg);
}

static int read16(const uint8_t *bytes) { return bytes[0] | bytes[1] << 8; }

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t input_length);

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t input_length) {
    if (input_length < PARAMETERS) return 0;
    const size_t length = input_length - PARAMETERS;
    const uint8_t *parameters = input + length;
    uint8_t *data = malloc(length ? length : 1); /* a copy that ends with the file, to detect reads past it */
    memcpy(data, input, length);

    Reference reference = {0};
    read_reference(&reference, data, length);
    int32_t *dimensions = reference.dimensions;
    if ((int64_t)dimensions[0] * dimensions[1] > MOST_PIXELS) dimensions[0]++; /* too slow: must be refused */

    const int choice = parameters[9], height = 1 + parameters[8] % 48, filter = choice & 1;
    const int width = choice & 128 ? 1 + (parameters[8] * 7 + parameters[13]) % 48 : height;
    /* Two windows, so that state left by the first can affect the second. */
    int32_t windows[2][5] = {
        {(int16_t)read16(parameters), (int16_t)read16(parameters + 2), 1 + read16(parameters + 4) % 256, 1 + read16(parameters + 6) % 256},
        {parameters[10], parameters[11], 1 + parameters[12], 1 + parameters[13]},
    };
    if (choice & 2) windows[0][0] %= 64, windows[0][1] %= 64;
    if (choice & 4) windows[0][2] = width, windows[0][3] = height;
    /* Up to the maximal width and beyond, and far away; the height is then small, to keep it fast. */
    if (choice & 8) {
        windows[0][2] *= parameters[14] * (1 + parameters[15] % 17);
        windows[0][3] %= 8, windows[0][0] *= 65535;
    }
    if (choice & 16) windows[0][3] *= -(parameters[14] & 1), windows[0][1] *= 65535;
    windows[0][4] = choice >> 5 & 1, windows[1][4] = choice >> 6 & 1;

    const size_t bytes = (size_t)2 * height * width * CHANNELS;
    uint8_t *fast = malloc(bytes), *plain = malloc(bytes), *expected = malloc(bytes);
    memset(fast, 0, bytes), memset(plain, 0, bytes), memset(expected, 0, bytes);
    char messages[3][2][MESSAGE_LENGTH];
    const uint8_t *both[2] = {data, data};
    const size_t lengths[2] = {length, length};
    const int32_t twice[4] = {dimensions[0], dimensions[1], dimensions[0], dimensions[1]};
    decoder_decode(2, JPEG, both, lengths, twice, MOST_SCANS, windows[0], height, width, filter,
                   AVX2 | OWN_HUFFMAN, fast, messages[0][0]);
    decoder_decode(2, JPEG, both, lengths, twice, MOST_SCANS, windows[0], height, width, filter, 0, plain,
                   messages[1][0]);
    for (int i = 0; i < 2; i++) {
        if (strcmp(messages[0][i], messages[1][i])) abort();
        if (!messages[0][i][0] && memcmp(fast + i * bytes / 2, plain + i * bytes / 2, bytes / 2)) abort();
    }
    if (reference.pixels) {
        const uint8_t *pixels[2] = {reference.pixels, reference.pixels};
        const size_t exact = (size_t)dimensions[0] * dimensions[1] * CHANNELS, sizes[2] = {exact, exact};
        decoder_decode(2, RAW, pixels, sizes, twice, MOST_SCANS, windows[0], height, width, filter, AVX2, expected,
                       messages[2][0]);
        for (int i = 0; i < 2; i++) {
            if (strcmp(messages[0][i], messages[2][i])) abort();
            if (!messages[0][i][0] && memcmp(fast + i * bytes / 2, expected + i * bytes / 2, bytes / 2)) abort();
        }
    }
    /* Arbitrary bytes as pixels. */
    const int32_t columns = 1 + parameters[15], rows = length / CHANNELS / columns;
    const int32_t any[4] = {columns, rows, columns, 1 + parameters[14]};
    const size_t lengths_of_raw[] = {(size_t)any[0] * any[1] * CHANNELS, length};
    decoder_decode(2, RAW, both, lengths_of_raw, any, MOST_SCANS, windows[0], height, width, filter, AVX2, fast,
                   messages[0][0]);

    free(data), free(fast), free(plain), free(expected), free(reference.pixels);
    return 0;
}
