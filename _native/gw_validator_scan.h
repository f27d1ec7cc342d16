/* gw_validator_scan.h - finding the next byte that matters, one backend for each instruction set.
 *
 * Contract
 *   scan_plain(begin, p, end)  first byte from p on that ends a run of plain string text: '"', '\', < 0x20, >= 0x80
 *   scan_space(begin, p, end)  first byte that is not space, tab, LF or CR
 *   scan_name(begin, p, end)   first byte that is not of [a-z0-9_]
 *   Each returns `end` when there is none. No byte outside [begin, end) is read: what is left of less than a vector
 *   is looked at in the vector that ends at `end`, with the bytes before p shifted out.
 *
 * The file that includes this one has defined one of GW_SCAN_PORTABLE, GW_SCAN_SSE2, GW_SCAN_AVX2, GW_SCAN_NEON.
 * A backend is a width and three functions from a vector's address to a mask, GW_MASK_BITS of it for each byte, the
 * first byte lowest. The masks are exact in every bit (the usual SWAR tricks are exact in the lowest hit only; that
 * would be wrong here, since low bits are shifted out). */
#ifndef GW_VALIDATOR_SCAN_H
#define GW_VALIDATOR_SCAN_H

#include "gw_validator_text.h"

#if defined(GW_SCAN_AVX2)
#define GW_TARGET __attribute__((target("avx2,bmi,bmi2")))
#else
#define GW_TARGET
#endif
#define GW_INLINE static inline __attribute__((always_inline)) GW_TARGET
#define GW_LIKELY(x) __builtin_expect(!!(x), 1)
#define GW_UNLIKELY(x) __builtin_expect(!!(x), 0)

static inline int stops_plain(uint8_t c)
{
    return c == '"' || c == '\\' || c < 0x20 || c >= 0x80;
}

static inline int stops_space(uint8_t c)
{
    return c != ' ' && c != '\n' && c != '\r' && c != '\t';
}

static inline int stops_name(uint8_t c)
{
    return !((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_');
}

#if defined(GW_SCAN_PORTABLE) /* eight bytes in a register; no carry crosses a byte */

enum { GW_WIDTH = 8, GW_MASK_BITS = 8 };
#define GW_BYTES(c) ((uint64_t)(c)*0x0101010101010101ull)
#define GW_HIGH GW_BYTES(0x80)

/* High bit of each byte of `low` (all < 0x80) that is >= n. */
#define GW_AT_LEAST(low, n) ((low) + GW_BYTES(0x80 - (n)))

GW_INLINE uint64_t mask_plain(const uint8_t *p)
{
    const uint64_t x = gw_load64(p), low = x & ~GW_HIGH;
    const uint64_t text =
        GW_AT_LEAST(low, 0x20) & GW_AT_LEAST(low ^ GW_BYTES('"'), 1) & GW_AT_LEAST(low ^ GW_BYTES('\\'), 1);
    return (~text | x) & GW_HIGH;
}

GW_INLINE uint64_t mask_space(const uint8_t *p)
{
    const uint64_t x = gw_load64(p), low = x & ~GW_HIGH;
    return ((GW_AT_LEAST(low ^ GW_BYTES(' '), 1) & GW_AT_LEAST(low ^ GW_BYTES('\n'), 1) &
             GW_AT_LEAST(low ^ GW_BYTES('\r'), 1) & GW_AT_LEAST(low ^ GW_BYTES('\t'), 1)) |
            x) &
           GW_HIGH;
}

GW_INLINE uint64_t mask_name(const uint8_t *p)
{
    const uint64_t x = gw_load64(p), low = x & ~GW_HIGH;
    const uint64_t letter = GW_AT_LEAST(low, 'a') & ~GW_AT_LEAST(low, 'z' + 1);
    const uint64_t digit = GW_AT_LEAST(low, '0') & ~GW_AT_LEAST(low, '9' + 1);
    const uint64_t underscore = ~GW_AT_LEAST(low ^ GW_BYTES('_'), 1);
    return (~(letter | digit | underscore) | x) & GW_HIGH;
}

#elif defined(GW_SCAN_SSE2)
#include <emmintrin.h>

enum { GW_WIDTH = 16, GW_MASK_BITS = 1 };

GW_INLINE uint64_t mask_plain(const uint8_t *p)
{
    const __m128i x = _mm_loadu_si128((const __m128i *)p);
    /* The comparison is signed, so that it finds bytes >= 0x80 as well as control characters. */
    const __m128i stop =
        _mm_or_si128(_mm_cmplt_epi8(x, _mm_set1_epi8(0x20)),
                     _mm_or_si128(_mm_cmpeq_epi8(x, _mm_set1_epi8('"')), _mm_cmpeq_epi8(x, _mm_set1_epi8('\\'))));
    return (uint32_t)_mm_movemask_epi8(stop);
}

GW_INLINE uint64_t mask_space(const uint8_t *p)
{
    const __m128i x = _mm_loadu_si128((const __m128i *)p);
    const __m128i space =
        _mm_or_si128(_mm_or_si128(_mm_cmpeq_epi8(x, _mm_set1_epi8(' ')), _mm_cmpeq_epi8(x, _mm_set1_epi8('\n'))),
                     _mm_or_si128(_mm_cmpeq_epi8(x, _mm_set1_epi8('\r')), _mm_cmpeq_epi8(x, _mm_set1_epi8('\t'))));
    return (uint32_t)_mm_movemask_epi8(space) ^ 0xFFFFu;
}

/* [first, last] moved to the bottom of the signed range, then one comparison. */
GW_INLINE __m128i between(__m128i x, int first, int last)
{
    return _mm_cmplt_epi8(_mm_add_epi8(x, _mm_set1_epi8((char)(-128 - first))),
                          _mm_set1_epi8((char)(-128 + last - first + 1)));
}

GW_INLINE uint64_t mask_name(const uint8_t *p)
{
    const __m128i x = _mm_loadu_si128((const __m128i *)p);
    const __m128i name =
        _mm_or_si128(_mm_cmpeq_epi8(x, _mm_set1_epi8('_')), _mm_or_si128(between(x, 'a', 'z'), between(x, '0', '9')));
    return (uint32_t)_mm_movemask_epi8(name) ^ 0xFFFFu;
}

#elif defined(GW_SCAN_AVX2)
#include <immintrin.h>

enum { GW_WIDTH = 32, GW_MASK_BITS = 1 };

GW_INLINE uint64_t mask_plain(const uint8_t *p)
{
    const __m256i x = _mm256_loadu_si256((const __m256i *)p);
    const __m256i stop = _mm256_or_si256(
        _mm256_cmpgt_epi8(_mm256_set1_epi8(0x20), x),
        _mm256_or_si256(_mm256_cmpeq_epi8(x, _mm256_set1_epi8('"')), _mm256_cmpeq_epi8(x, _mm256_set1_epi8('\\'))));
    return (uint32_t)_mm256_movemask_epi8(stop);
}

GW_INLINE uint64_t mask_space(const uint8_t *p)
{
    const __m256i x = _mm256_loadu_si256((const __m256i *)p);
    const __m256i space = _mm256_or_si256(
        _mm256_or_si256(_mm256_cmpeq_epi8(x, _mm256_set1_epi8(' ')), _mm256_cmpeq_epi8(x, _mm256_set1_epi8('\n'))),
        _mm256_or_si256(_mm256_cmpeq_epi8(x, _mm256_set1_epi8('\r')), _mm256_cmpeq_epi8(x, _mm256_set1_epi8('\t'))));
    return (uint32_t)~_mm256_movemask_epi8(space);
}

GW_INLINE __m256i between(__m256i x, int first, int last)
{
    return _mm256_cmpgt_epi8(_mm256_set1_epi8((char)(-128 + last - first + 1)),
                             _mm256_add_epi8(x, _mm256_set1_epi8((char)(-128 - first))));
}

GW_INLINE uint64_t mask_name(const uint8_t *p)
{
    const __m256i x = _mm256_loadu_si256((const __m256i *)p);
    const __m256i name = _mm256_or_si256(_mm256_cmpeq_epi8(x, _mm256_set1_epi8('_')),
                                         _mm256_or_si256(between(x, 'a', 'z'), between(x, '0', '9')));
    return (uint32_t)~_mm256_movemask_epi8(name);
}

#elif defined(GW_SCAN_NEON)
#include <arm_neon.h>

enum { GW_WIDTH = 16, GW_MASK_BITS = 4 };

/* NEON has no movemask: a narrowing shift leaves four bits for each byte. */
GW_INLINE uint64_t mask_of(uint8x16_t hits)
{
    return vget_lane_u64(vreinterpret_u64_u8(vshrn_n_u16(vreinterpretq_u16_u8(hits), 4)), 0);
}

GW_INLINE uint64_t mask_plain(const uint8_t *p)
{
    const uint8x16_t x = vld1q_u8(p);
    return mask_of(vorrq_u8(vcltq_s8(vreinterpretq_s8_u8(x), vdupq_n_s8(0x20)),
                            vorrq_u8(vceqq_u8(x, vdupq_n_u8('"')), vceqq_u8(x, vdupq_n_u8('\\')))));
}

GW_INLINE uint64_t mask_space(const uint8_t *p)
{
    const uint8x16_t x = vld1q_u8(p);
    return ~mask_of(vorrq_u8(vorrq_u8(vceqq_u8(x, vdupq_n_u8(' ')), vceqq_u8(x, vdupq_n_u8('\n'))),
                             vorrq_u8(vceqq_u8(x, vdupq_n_u8('\r')), vceqq_u8(x, vdupq_n_u8('\t')))));
}

GW_INLINE uint64_t mask_name(const uint8_t *p)
{
    const uint8x16_t x = vld1q_u8(p);
    const uint8x16_t letter = vcleq_u8(vsubq_u8(x, vdupq_n_u8('a')), vdupq_n_u8('z' - 'a'));
    const uint8x16_t digit = vcleq_u8(vsubq_u8(x, vdupq_n_u8('0')), vdupq_n_u8('9' - '0'));
    return ~mask_of(vorrq_u8(vceqq_u8(x, vdupq_n_u8('_')), vorrq_u8(letter, digit)));
}

#else
#error "define one of GW_SCAN_PORTABLE, GW_SCAN_SSE2, GW_SCAN_AVX2, GW_SCAN_NEON"
#endif

#define GW_SCAN(name)                                                                                     \
    GW_INLINE const uint8_t *scan_##name(const uint8_t *begin, const uint8_t *p, const uint8_t *end)      \
    {                                                                                                     \
        for (; end - p >= GW_WIDTH; p += GW_WIDTH) {                                                      \
            const uint64_t mask = mask_##name(p);                                                         \
            if (mask)                                                                                     \
                return p + __builtin_ctzll(mask) / GW_MASK_BITS;                                          \
        }                                                                                                 \
        if (p == end)                                                                                     \
            return end;                                                                                   \
        if (GW_LIKELY(end - begin >= GW_WIDTH)) {                                                         \
            const uint64_t mask = mask_##name(end - GW_WIDTH) >> (GW_MASK_BITS * (GW_WIDTH - (end - p))); \
            return mask ? p + __builtin_ctzll(mask) / GW_MASK_BITS : end;                                 \
        }                                                                                                 \
        while (p < end && !stops_##name(*p))                                                              \
            p++;                                                                                          \
        return p;                                                                                         \
    }

GW_SCAN(plain)
GW_SCAN(space)
GW_SCAN(name)

#endif
