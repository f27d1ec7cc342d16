/* gw_validator_tokens.h - the tokens of JSON, as the pass (gw_validator_pass.h) meets them: strings, numbers, literals,
 * and what stands between them. Compiled with it, once for each scan path.
 *
 * A function that returns a position returns NULL once it has written a refusal to the verdict. */
#ifndef GW_VALIDATOR_TOKENS_H
#define GW_VALIDATOR_TOKENS_H

#include "gw_validator.h"
#include "gw_validator_keys.h"
#include "gw_validator_scan.h"

struct pass {
    const uint8_t *body, *end;
    gw_verdict *verdict;
    uint32_t members; /* of all objects so far */
    bool names_device;
    union {
        gw_names names; /* while in metrics or tags */
        gw_keys keys;   /* while in payload */
    };
};

static __attribute__((noinline, cold)) const uint8_t *refuse(struct pass *s, enum gw_code code, enum gw_field field,
                                                             const uint8_t *at)
{
    s->verdict->code = (uint16_t)code;
    s->verdict->field = (uint8_t)field;
    s->verdict->flags = 0;
    s->verdict->offset = (uint32_t)(at - s->body);
    return NULL;
}

static __attribute__((noinline, cold)) const uint8_t *malformed(struct pass *s, const uint8_t *at)
{
    return refuse(s, GW_CODE_MALFORMED_JSON, GW_FIELD_NONE, at);
}

/* Skips whitespace and makes sure of a byte at p. */
#define GW_NEXT()                                 \
    do {                                          \
        if (GW_UNLIKELY(p == end || *p <= ' ')) { \
            if (p < end)                          \
                p = scan_space(body, p, end);     \
            if (p == end)                         \
                return malformed(s, end);         \
        }                                         \
    } while (0)

#define GW_EXPECT(byte)                              \
    do {                                             \
        if (GW_UNLIKELY(p == end || *p != (byte))) { \
            GW_NEXT();                               \
            if (*p != (byte))                        \
                return malformed(s, p);              \
        }                                            \
        p++;                                         \
    } while (0)

/* Length of the UTF-8 sequence at p (a byte >= 0x80), 0 if it is ill-formed (RFC 3629, section 4) or a noncharacter. */
GW_INLINE unsigned utf8_bytes(const uint8_t *p, const uint8_t *end)
{
    const uint8_t c = p[0];
    const size_t left = (size_t)(end - p);
    if (c < 0xE0)
        return c >= 0xC2 && left >= 2 && (p[1] & 0xC0) == 0x80 ? 2 : 0;
    if (c < 0xF0) {
        if (left < 3 || (p[1] & 0xC0) != 0x80 || (p[2] & 0xC0) != 0x80)
            return 0;
        if ((c == 0xE0 && p[1] < 0xA0) || (c == 0xED && p[1] >= 0xA0)) /* overlong; surrogate */
            return 0;
        if (c == 0xEF && ((p[1] == 0xBF && p[2] >= 0xBE) || (p[1] == 0xB7 && p[2] >= 0x90 && p[2] <= 0xAF)))
            return 0; /* U+FFFE, U+FFFF; U+FDD0 ... U+FDEF */
        return 3;
    }
    if (c > 0xF4 || left < 4 || (p[1] & 0xC0) != 0x80 || (p[2] & 0xC0) != 0x80 || (p[3] & 0xC0) != 0x80)
        return 0;
    if ((c == 0xF0 && p[1] < 0x90) || (c == 0xF4 && p[1] >= 0x90)) /* overlong; beyond U+10FFFF */
        return 0;
    return (p[1] & 0x0F) == 0x0F && p[2] == 0xBF && p[3] >= 0xBE ? 0 : 4; /* U+nFFFE, U+nFFFF */
}

/* Past an escape or a run of UTF-8 at p, which is at a byte that is neither plain nor a quote. Adds to `saved`. */
GW_INLINE const uint8_t *special_end(struct pass *s, const uint8_t *p, size_t *saved)
{
    const uint8_t *const end = s->end;
    if (*p >= 0x80) {
        do {
            const unsigned bytes = utf8_bytes(p, end);
            if (GW_UNLIKELY(bytes == 0))
                return malformed(s, p);
            p += bytes;
        } while (p < end && *p >= 0x80);
        return p;
    }
    if (*p != '\\') /* a control character */
        return malformed(s, p);
    if (end - p >= 2 && gw_is_short_escape(p[1])) {
        *saved += 1;
        return p + 2;
    }
    unsigned fewer;
    const unsigned bytes = gw_unit_escape_bytes(p, end, &fewer);
    if (GW_UNLIKELY(bytes == 0))
        return malformed(s, p);
    *saved += fewer;
    return p + bytes;
}

/* The rest of a string that is not all plain; p may be anywhere in it, but not inside an escape or a UTF-8 sequence.
 * Stops are taken from one mask as long as it lasts: looking from each stop for the next would make every step wait for
 * the one before. */
static __attribute__((noinline)) GW_TARGET const uint8_t *string_rest(struct pass *s, const uint8_t *p, size_t *saved)
{
    const uint8_t *const body = s->body, *const end = s->end;
    size_t shorter = 0;
    while (end - p >= GW_WIDTH) {
        const uint8_t *const block = p;
        p += GW_WIDTH;
        for (uint64_t mask = mask_plain(block); mask;) {
            const uint8_t *stop = block + __builtin_ctzll(mask) / GW_MASK_BITS;
            if (*stop == '"') {
                *saved = shorter;
                return stop;
            }
            stop = special_end(s, stop, &shorter);
            if (GW_UNLIKELY(stop == NULL))
                return NULL;
            if (stop >= p) {
                p = stop;
                break;
            }
            mask &= ~0ull << (GW_MASK_BITS * (stop - block));
        }
    }
    while ((p = scan_plain(body, p, end)) < end) {
        if (*p == '"') {
            *saved = shorter;
            return p;
        }
        p = special_end(s, p, &shorter);
        if (GW_UNLIKELY(p == NULL))
            return NULL;
    }
    return malformed(s, end);
}

/* The closing quote of the string whose text begins at p. `saved`: bytes that unescaping takes off its length. */
GW_INLINE const uint8_t *string_end(struct pass *s, const uint8_t *p, size_t *saved)
{
    p = scan_plain(s->body, p, s->end);
    if (GW_LIKELY(p < s->end && *p == '"')) {
        *saved = 0;
        return p;
    }
    return string_rest(s, p, saved);
}

GW_INLINE int is_digit(uint8_t c)
{
    return (uint8_t)(c - '0') <= 9;
}

/* The end of the number at p ('-' or a digit). `wide`: only then can it be outside the range of a double. */
GW_INLINE const uint8_t *number_end(struct pass *s, const uint8_t *p, int *wide)
{
    const uint8_t *const end = s->end, *const number = p;
    int exponent = 0;
    if (*p == '-')
        p++;
    if (GW_UNLIKELY(p == end || !is_digit(*p)))
        return malformed(s, p);
    if (*p++ != '0')
        while (p < end && is_digit(*p))
            p++;
    if (p < end && *p == '.') {
        p++;
        if (GW_UNLIKELY(p == end || !is_digit(*p)))
            return malformed(s, p);
        do
            p++;
        while (p < end && is_digit(*p));
    }
    if (p < end && (*p | 0x20) == 'e') {
        exponent = 1;
        p++;
        if (p < end && (*p == '+' || *p == '-'))
            p++;
        if (GW_UNLIKELY(p == end || !is_digit(*p)))
            return malformed(s, p);
        do
            p++;
        while (p < end && is_digit(*p));
    }
    *wide = exponent || p - number > 308;
    return p;
}

/* true, false or null at p. */
GW_INLINE const uint8_t *literal_end(struct pass *s, const uint8_t *p)
{
    const size_t left = (size_t)(s->end - p);
    if (left >= 4 && (memcmp(p, "true", 4) == 0 || memcmp(p, "null", 4) == 0))
        return p + 4;
    if (left >= 5 && memcmp(p, "false", 5) == 0)
        return p + 5;
    return malformed(s, p);
}

#endif
