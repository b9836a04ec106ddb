/* A faster Huffman decoder for the usual JPEG, put into libjpeg in place of its own. */
#ifndef HUFFMAN_H
#define HUFFMAN_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include <jpeglib.h>

#define LOOK 11 /* bits that one look into a table decodes; fewer look more often, with more the tables leave the first-level cache */

typedef struct {
    int32_t look[1 << LOOK];
    int32_t limit[17]; /* one more than the largest code of a length, or 0 where there is none */
    int32_t place[17]; /* what to add to a code of a length to get its symbol's place */
    uint8_t counts[17], symbols[256];
} HuffmanTable;

/* All zeros is a new one. It is kept from image to image, for its tables: most images use the same. */
typedef struct {
    const uint8_t *next, *end;
    uint64_t bits; /* not yet decoded, the first one highest */
    int count;     /* of them */
    int invented;  /* zeros among them, that stand for what is missing behind the data's end */
    int blocks;    /* of an MCU: the component of each, and its tables */
    int component[D_MAX_BLOCKS_IN_MCU];
    const HuffmanTable *dc[D_MAX_BLOCKS_IN_MCU], *ac[D_MAX_BLOCKS_IN_MCU];
    int32_t last_dc[MAX_COMPS_IN_SCAN];
    unsigned restart_interval, until_restart;
    int restart_number;
    HuffmanTable tables[2][NUM_HUFF_TBLS]; /* [DC, AC] */
} Huffman;

/* To be called between jpeg_start_decompress and the first row. Takes over the entropy decoding, if the image is of the usual kind. */
void huffman_install(Huffman *huffman, j_decompress_ptr jpeg);

/* For decode.c to define: the Huffman of an image, and what to do where the data is not as it should be, which must not return. */
Huffman *huffman_of(j_decompress_ptr jpeg);
_Noreturn void huffman_give_up(j_decompress_ptr jpeg);

#endif
