/* gw_validator_text.h - what the validator rarely has to know about the inside of a token: escapes, the end of the
 * double range, the calendar.
 *
 * Every function here takes a token that the pass has already found well-formed (a string without its quotes, a
 * number), reads only that token, allocates nothing and is linear in it. */
#ifndef GW_VALIDATOR_TEXT_H
#define GW_VALIDATOR_TEXT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Loads of any alignment, first byte in memory in the lowest bits. The caller knows that the bytes are there. */
static inline uint64_t gw_load64(const uint8_t *p)
{
    uint64_t word;
    memcpy(&word, p, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

/* Walks the unescaped UTF-8 bytes of a string. */
typedef struct gw_unescaper {
    const uint8_t *at, *end;
    uint32_t pending; /* bytes of a character that was written as \uXXXX, next one lowest */
    uint32_t pending_bytes;
} gw_unescaper;

static inline gw_unescaper gw_unescaper_of(const uint8_t *text, size_t bytes)
{
    return (gw_unescaper){.at = text, .end = text + bytes};
}

/* The next byte, or -1 behind the last one. */
int gw_unescaper_next(gw_unescaper *walk);

/* Copies the unescaped bytes; the caller knows their number. */
void gw_unescape(const uint8_t *text, size_t bytes, uint8_t *out);

/* The letters behind a backslash that stand for one character. */
static inline int gw_is_short_escape(uint8_t letter)
{
    return letter == '"' || letter == '\\' || letter == '/' ||
           (letter >= 'b' && letter <= 't' &&
            ((1u << (letter - 'b')) &
             (1u << ('b' - 'b') | 1u << ('f' - 'b') | 1u << ('n' - 'b') | 1u << ('r' - 'b') | 1u << ('t' - 'b'))));
}

/* One \uXXXX, or a pair of them, at `p` (a backslash): how many bytes it is written with, 0 if it is not one (bad hex,
 * lone surrogate, noncharacter, cut off by `end`). `saved`: by how many bytes the character itself is shorter. */
unsigned gw_unit_escape_bytes(const uint8_t *p, const uint8_t *end, unsigned *saved);

/* 1 if the number, correctly rounded, is a finite double. Decided exactly, by the digits: it is refused from the
 * midpoint between DBL_MAX and 2^1024 on, which rounds to infinity (ties go to even). */
int gw_number_finite(const uint8_t *number, const uint8_t *end);

/* 1 if the unescaped text is an RFC 3339 date-time (the header gw_validator.h says which readings are taken). */
int gw_timestamp_ok(const uint8_t *text, size_t bytes);

/* The same for a string that was written with escapes. */
int gw_timestamp_escaped_ok(const uint8_t *text, size_t bytes);

#endif
