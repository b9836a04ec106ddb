/* Huffman decoding of a sequential JPEG with a single scan (ITU T.81, F.2.2).
 *
 * Decoding a photograph spends most of its time here. libjpeg looks up a code and then reads the bits of its
 * coefficient. Here, if both fit into LOOK bits, one lookup gives the number of zeros before the coefficient, the
 * coefficient, and the length of both.
 *
 * The coefficients are the same. On unexpected data (an unknown code, a 65th coefficient, the end of the data),
 * decode.c starts the image again with libjpeg's own decoder, which decides. */
#include "huffman.h"

#include <string.h>

/* The beginning of a structure that jpeglib.h does not declare. It is the same in libjpeg 6 (1995) to libjpeg-turbo 3.
 * */
struct jpeg_entropy_decoder {
    void (*start_pass)(j_decompress_ptr);
    boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW *);
};

/* The place of the k-th coefficient. A run can go 15 places past the last one, which is checked at the end of the
 * block. */
static const uint8_t ZIGZAG[DCTSIZE2 + 15] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33,
                                              40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36,
                                              29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
                                              47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

/* An entry of HuffmanTable.look: the length in bits (0: the code is longer than LOOK), the number of zeros before the
 * coefficient, the number of bits of the coefficient that are still to be read, and the coefficient. */
#define ENTRY(length, run, extra, value) ((int32_t)((uint32_t)(value) << 16 | (uint32_t)(extra) << 10 | (uint32_t)(run) << 6 | (length)))
#define LENGTH(entry) ((entry) & 63)
#define RUN(entry) ((entry) >> 6 & 15)
#define EXTRA(entry) ((entry) >> 10 & 15)
#define VALUE(entry) ((entry) >> 16)

/* Bytes that libjpeg may have read ahead: 8, and twice as many if each is an 0xFF, which takes two. */
enum { AHEAD = 16 };

/* The number that `size` bits encode (T.81, F.2.2.1, EXTEND). */
static inline int32_t extend(uint32_t bits, int size) { return (int32_t)bits - (bits >> (size - 1) ? 0 : (1 << size) - 1); }

/* libjpeg has checked that the codes of the source fit into their lengths. */
static void build(HuffmanTable *table, const JHUFF_TBL *source, bool ac) {
    if (!memcmp(table->counts, source->bits, sizeof table->counts) && !memcmp(table->symbols, source->huffval, sizeof table->symbols)) return;
    memcpy(table->counts, source->bits, sizeof table->counts);
    memcpy(table->symbols, source->huffval, sizeof table->symbols);
    memset(table->look, 0, sizeof table->look);
    int32_t code = 0, place = 0;
    for (int length = 1; length <= 16; length++, code <<= 1) {
        table->place[length] = place - code;
        for (int i = 0; i < source->bits[length]; i++, code++, place++) {
            if (length > LOOK) continue;
            const int symbol = source->huffval[place], run = ac ? symbol >> 4 : 0, size = symbol & 15, rest = LOOK - length;
            int32_t *entries = table->look + ((size_t)code << rest);
            for (int following = 0; following < 1 << rest; following++)
                entries[following] = size && size <= rest ? ENTRY(length + size, run, 0, extend(following >> (rest - size), size))
                                                          : ENTRY(length, run, size, 0);
        }
        table->limit[length] = source->bits[length] ? code : 0;
    }
}

/* Read eight bytes, the first one highest. */
static inline uint64_t read8(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

/* Whether one of eight bytes is 0xFF, which begins a marker or an escaped byte. */
static inline bool has_ff(const uint8_t *bytes) {
    const uint64_t word = read8(bytes);
    return (~word - 0x0101010101010101) & word & 0x8080808080808080;
}

/* Fill up to at least 56 bits, with zeros after the end of the data. */
static inline void refill(Huffman *h) {
    if (h->end - h->next >= 8) {
        if (!has_ff(h->next)) {
            const uint64_t word = read8(h->next);
            h->bits |= word >> h->count;
            h->next += (63 - h->count) >> 3;
            h->count |= 56;
            return;
        }
    }
    while (h->count < 56) {
        uint64_t byte = 0;
        if (h->next < h->end && *h->next != 0xFF) {
            byte = *h->next++;
        } else if (h->end - h->next >= 2 && h->next[1] == 0) { /* the byte 0xFF is stored as 0xFF 0x00 */
            byte = 0xFF;
            h->next += 2;
        } else {
            h->invented += 8;
        }
        h->bits |= byte << (56 - h->count);
        h->count += 8;
    }
}

static inline void drop(Huffman *h, int bits) {
    h->bits <<= bits;
    h->count -= bits;
}

static inline uint32_t take(Huffman *h, int bits) {
    const uint32_t taken = (uint32_t)(h->bits >> (64 - bits));
    drop(h, bits);
    return taken;
}

/* The entry of a code that is longer than LOOK, or 0. */
static int32_t long_code(uint64_t bits, const HuffmanTable *table, bool ac) {
    for (int length = LOOK + 1; length <= 16; length++) {
        const int32_t code = (int32_t)(bits >> (64 - length));
        if (code < table->limit[length]) {
            const int symbol = table->symbols[(code + table->place[length]) & 255];
            return ENTRY(length, ac ? symbol >> 4 : 0, symbol & 15, 0);
        }
    }
    return 0;
}

static void restart(Huffman *h, j_decompress_ptr jpeg) {
    /* Less than a byte must be left, and the marker must be the next one in the sequence. */
    if (h->count - h->invented >= 8 || h->end - h->next < 2 || h->next[0] != 0xFF || h->next[1] != JPEG_RST0 + h->restart_number)
        huffman_give_up(jpeg);
    h->next += 2;
    h->bits = 0, h->count = h->invented = 0;
    h->restart_number = (h->restart_number + 1) % 8;
    h->until_restart = h->restart_interval;
    memset(h->last_dc, 0, sizeof h->last_dc);
}

/* Whether libjpeg must decide about the data ahead. libjpeg reads ahead and warns if the file ends without a marker;
 * how far it reads, and so whether it warns, cannot be determined here. The same holds for repeated 0xFF, which are
 * allowed before a marker and which libjpeg skips. */
static bool is_unclear_ahead(const Huffman *h) {
    const uint8_t *byte = h->next, *end = h->end;
    if (end - byte >= AHEAD) {
        if (!has_ff(byte) && !has_ff(byte + 8)) return false;
        end = byte + AHEAD;
    }
    for (; byte < end; byte++) {
        if (*byte != 0xFF) continue;
        if (++byte == h->end || *byte == 0xFF) return true;
        if (*byte != 0) return false; /* a marker: libjpeg does not read past it */
    }
    return h->end - h->next < AHEAD;
}

static boolean decode_mcu(j_decompress_ptr jpeg, JBLOCKROW *blocks) {
    Huffman *const state = huffman_of(jpeg);
    if (state->restart_interval) {
        if (state->until_restart == 0) restart(state, jpeg);
        state->until_restart--;
    }
    Huffman h; /* a local copy of the reader's fields, which the compiler keeps in registers */
    h.next = state->next, h.end = state->end, h.bits = state->bits, h.count = state->count, h.invented = state->invented;
    JBLOCK nowhere; /* libjpeg passes no blocks for rows that are skipped */

    for (int b = 0; b < state->blocks; b++) {
        JCOEF *block = blocks ? *blocks[b] : nowhere;
        const HuffmanTable *table = state->dc[b];
        refill(&h);
        int32_t entry = table->look[h.bits >> (64 - LOOK)];
        if (!LENGTH(entry) && !(entry = long_code(h.bits, table, false))) huffman_give_up(jpeg);
        drop(&h, LENGTH(entry));
        int32_t *dc = &state->last_dc[state->component[b]];
        *dc += EXTRA(entry) ? extend(take(&h, EXTRA(entry)), EXTRA(entry)) : VALUE(entry);
        if (*dc < INT16_MIN || *dc > INT16_MAX) huffman_give_up(jpeg);
        block[0] = (JCOEF)*dc;

        table = state->ac[b];
        int k = 1;
        do {
            refill(&h); /* enough for three lookups with a coefficient, or two and a code of 16 bits with 15 more */
#define LOOK_ONCE                                                \
    entry = table->look[h.bits >> (64 - LOOK)];                  \
    if (__builtin_expect(!VALUE(entry), 0)) goto no_coefficient; \
    drop(&h, LENGTH(entry));                                     \
    k += RUN(entry);                                             \
    block[ZIGZAG[k]] = (JCOEF)VALUE(entry);                      \
    if (++k >= DCTSIZE2) break;

            LOOK_ONCE
            LOOK_ONCE
            LOOK_ONCE
#undef LOOK_ONCE
            continue;

        no_coefficient:
            if (!LENGTH(entry) && !(entry = long_code(h.bits, table, true))) huffman_give_up(jpeg);
            drop(&h, LENGTH(entry));
            k += RUN(entry);
            if (EXTRA(entry))
                block[ZIGZAG[k]] = (JCOEF)extend(take(&h, EXTRA(entry)), EXTRA(entry));
            else if (RUN(entry) != 15)
                goto end_of_block;
            k++;
        } while (k < DCTSIZE2);
        if (k > DCTSIZE2) huffman_give_up(jpeg);
    end_of_block:;
    }
    if (h.invented > h.count || is_unclear_ahead(&h)) huffman_give_up(jpeg);
    state->next = h.next, state->bits = h.bits, state->count = h.count, state->invented = h.invented;
    return TRUE;
}

void huffman_install(Huffman *h, j_decompress_ptr jpeg) {
    if (jpeg->progressive_mode || jpeg->arith_code || jpeg->data_precision != 8 || jpeg_has_multiple_scans(jpeg)) return;
    if (jpeg->Ss != 0 || jpeg->Se != DCTSIZE2 - 1 || jpeg->Ah != 0 || jpeg->Al != 0) return;
    h->blocks = jpeg->blocks_in_MCU;
    for (int b = 0; b < h->blocks; b++) {
        const jpeg_component_info *component = jpeg->cur_comp_info[jpeg->MCU_membership[b]];
        HuffmanTable *dc = &h->tables[0][component->dc_tbl_no], *ac = &h->tables[1][component->ac_tbl_no];
        build(dc, jpeg->dc_huff_tbl_ptrs[component->dc_tbl_no], false);
        build(ac, jpeg->ac_huff_tbl_ptrs[component->ac_tbl_no], true);
        h->component[b] = jpeg->MCU_membership[b];
        h->dc[b] = dc, h->ac[b] = ac;
    }
    h->next = jpeg->src->next_input_byte;
    h->end = h->next + jpeg->src->bytes_in_buffer;
    h->bits = 0, h->count = h->invented = 0;
    memset(h->last_dc, 0, sizeof h->last_dc);
    h->restart_interval = h->until_restart = jpeg->restart_interval;
    h->restart_number = 0;
    jpeg->entropy->decode_mcu = decode_mcu;
}
