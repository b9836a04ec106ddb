/* A faster Huffman decoder for the usual JPEG, which replaces the one inside libjpeg. */
#ifndef HUFFMAN_H
#define HUFFMAN_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include <jpeglib.h>

/* Bits that one table lookup decodes. With fewer, lookups are more frequent; with more, the tables exceed the L1 cache.
 * */
#define LOOK 11

typedef struct {
    int32_t look[1 << LOOK];
    int32_t limit[17]; /* one more than the largest code of each length, or 0 if there is none */
    int32_t place[17]; /* offset from a code of each length to the index of its symbol */
    uint8_t counts[17], symbols[256];
} HuffmanTable;

/* Initialised by zeros. It is reused from image to image, because most images have the same tables. */
typedef struct {
    const uint8_t *next, *end;
    uint64_t bits; /* bits that are not decoded yet, the first one highest */
    int count;     /* number of valid bits */
    int invented;  /* number of zeros among them that were appended after the end of the data */
    int blocks;    /* blocks of an MCU; below, the component and the tables of each */
    int component[D_MAX_BLOCKS_IN_MCU];
    const HuffmanTable *dc[D_MAX_BLOCKS_IN_MCU], *ac[D_MAX_BLOCKS_IN_MCU];
    int32_t last_dc[MAX_COMPS_IN_SCAN];
    unsigned restart_interval, until_restart;
    int restart_number;
    HuffmanTable tables[2][NUM_HUFF_TBLS]; /* [DC, AC] */
} Huffman;

/* Call this between jpeg_start_decompress and the first row. It takes over entropy decoding if the image is a usual
 * one. */
void huffman_install(Huffman *huffman, j_decompress_ptr jpeg);

/* Defined in decode.c: the Huffman of an image, and the handler of unexpected data, which must not return. */
Huffman *huffman_of(j_decompress_ptr jpeg);
_Noreturn void huffman_give_up(j_decompress_ptr jpeg);

#endif
