/* Read many samples from open files, and check them against their CRC-32: one call for a chunk, so that a thread of
 * Python gives up and takes back the interpreter's lock once, not once a sample. */
#define _XOPEN_SOURCE 700
#define _FILE_OFFSET_BITS 64
#include "decode.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

/* table[k][b]: the CRC-32 (reflected, polynomial 0xEDB88320, as zlib's) of byte b followed by k zero bytes. */
static uint32_t table[8][256];

static __attribute__((constructor)) void fill_table(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
        table[0][byte] = crc;
    }
    for (int zeros = 1; zeros < 8; zeros++)
        for (int byte = 0; byte < 256; byte++)
            table[zeros][byte] = table[zeros - 1][byte] >> 8 ^ table[0][table[zeros - 1][byte] & 255];
}

/* Eight bytes at a time ("slicing-by-8", Kounavis and Berry 2008). */
static uint32_t crc32(const uint8_t *data, size_t length) {
    uint32_t crc = ~0u;
    for (; length >= 8; data += 8, length -= 8) {
        const uint32_t low = crc ^ (data[0] | data[1] << 8 | data[2] << 16 | (uint32_t)data[3] << 24);
        crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24] ^
              table[3][data[4]] ^ table[2][data[5]] ^ table[1][data[6]] ^ table[0][data[7]];
    }
    for (; length > 0; data++, length--) crc = crc >> 8 ^ table[0][(crc ^ *data) & 255];
    return ~crc;
}

/* 0, UNSOUND if the file ends too early, or an errno. */
static int read_fully(int file, int64_t offset, size_t length, uint8_t *out) {
    while (length > 0) {
        const ssize_t got = pread(file, out, length, offset);
        if (got == 0) return UNSOUND;
        if (got > 0)
            out += got, offset += got, length -= got;
        else if (errno != EINTR)
            return errno;
    }
    return 0;
}

EXPORT int decoder_read(int count, const int32_t *files, const int64_t *offsets, const int64_t *lengths,
                        const uint32_t *checksums, const int64_t *starts, uint8_t *out, int32_t *outcomes) {
    int failures = 0;
    for (int i = 0; i < count; i++) {
        outcomes[i] = read_fully(files[i], offsets[i], lengths[i], out + starts[i]);
        if (outcomes[i] == 0 && crc32(out + starts[i], lengths[i]) != checksums[i]) outcomes[i] = UNSOUND;
        failures += outcomes[i] != 0;
    }
    return failures;
}

EXPORT void decoder_will_need(int count, const int32_t *files, const int64_t *offsets, const int64_t *lengths) {
    for (int i = 0; i < count; i++) posix_fadvise(files[i], offsets[i], lengths[i], POSIX_FADV_WILLNEED);
}
