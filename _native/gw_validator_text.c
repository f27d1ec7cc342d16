/* gw_validator_text.c - escapes, the end of the double range, the calendar. See gw_validator_text.h. */
#include "gw_validator_text.h"

/* 2^1024 - 2^970, the midpoint between the largest double and the next power of two. */
static const char THRESHOLD[] =
    "1797693134862315807937289714053034150799341327100378269361737789804449682927647509466490179775872070963"
    "3028641669288791094655554785194040263065748867150582068190890200070838367627385484581771153176447573027"
    "0069855571366959622842914819860834936475292719074168444365510704342711559699508093042880177904174497792";
enum { THRESHOLD_DIGITS = 309 };
_Static_assert(sizeof THRESHOLD - 1 == THRESHOLD_DIGITS, "the threshold has 309 digits");

/* The value of a hexadecimal digit plus one, 0 for anything else. */
static const uint8_t HEX[256] = {
    ['0'] = 1,  ['1'] = 2,  ['2'] = 3,  ['3'] = 4,  ['4'] = 5,  ['5'] = 6,  ['6'] = 7,  ['7'] = 8,
    ['8'] = 9,  ['9'] = 10, ['a'] = 11, ['b'] = 12, ['c'] = 13, ['d'] = 14, ['e'] = 15, ['f'] = 16,
    ['A'] = 11, ['B'] = 12, ['C'] = 13, ['D'] = 14, ['E'] = 15, ['F'] = 16,
};

/* The code unit of \uXXXX at `p`, or negative. */
static inline int32_t unit_value(const uint8_t *p, const uint8_t *end)
{
    if (end - p < 6 || p[0] != '\\' || p[1] != 'u')
        return -1;
    const int32_t a = HEX[p[2]] - 1, b = HEX[p[3]] - 1, c = HEX[p[4]] - 1, d = HEX[p[5]] - 1;
    return (a | b | c | d) < 0 ? -1 : a << 12 | b << 8 | c << 4 | d;
}

unsigned gw_unit_escape_bytes(const uint8_t *p, const uint8_t *end, unsigned *saved)
{
    const int32_t unit = unit_value(p, end);
    if (unit < 0 || (unit >= 0xDC00 && unit <= 0xDFFF))
        return 0;
    if (unit >= 0xD800 && unit <= 0xDBFF) {
        const int32_t low = unit_value(p + 6, end);
        *saved = 12 - 4;
        /* The last two characters of a plane are noncharacters: the low surrogate is one of the last two, and the high
         * one ends with six bits all ones. */
        return low >= 0xDC00 && low <= 0xDFFF && !((unit & 0x3F) == 0x3F && low >= 0xDFFE) ? 12 : 0;
    }
    if (unit >= 0xFFFE || (unit >= 0xFDD0 && unit <= 0xFDEF)) /* noncharacters */
        return 0;
    *saved = 6 - (unit < 0x80 ? 1 : unit < 0x800 ? 2 : 3);
    return 6;
}

int gw_unescaper_next(gw_unescaper *walk)
{
    if (walk->pending_bytes) {
        int byte = walk->pending & 0xFF;
        walk->pending >>= 8;
        walk->pending_bytes--;
        return byte;
    }
    if (walk->at == walk->end)
        return -1;
    if (*walk->at != '\\')
        return *walk->at++;
    uint8_t letter = walk->at[1];
    if (letter != 'u') {
        walk->at += 2;
        switch (letter) {
        case 'b':
            return '\b';
        case 'f':
            return '\f';
        case 'n':
            return '\n';
        case 'r':
            return '\r';
        case 't':
            return '\t';
        default:
            return letter;
        }
    }
    uint32_t code = (uint32_t)unit_value(walk->at, walk->end);
    walk->at += 6;
    if (code < 0x80)
        return (int)code;
    if (code < 0x800) {
        walk->pending = 0x80 | (code & 0x3F);
        walk->pending_bytes = 1;
        return (int)(0xC0 | code >> 6);
    }
    if (code < 0xD800 || code > 0xDFFF) {
        walk->pending = (0x80 | (code >> 6 & 0x3F)) | (0x80 | (code & 0x3F)) << 8;
        walk->pending_bytes = 2;
        return (int)(0xE0 | code >> 12);
    }
    code = 0x10000 + ((code - 0xD800) << 10) + ((uint32_t)unit_value(walk->at, walk->end) - 0xDC00);
    walk->at += 6;
    walk->pending = (0x80 | (code >> 12 & 0x3F)) | (0x80 | (code >> 6 & 0x3F)) << 8 | (0x80 | (code & 0x3F)) << 16;
    walk->pending_bytes = 3;
    return (int)(0xF0 | code >> 18);
}

void gw_unescape(const uint8_t *text, size_t bytes, uint8_t *out)
{
    gw_unescaper walk = gw_unescaper_of(text, bytes);
    for (int byte; (byte = gw_unescaper_next(&walk)) >= 0;)
        *out++ = (uint8_t)byte;
}

int gw_number_finite(const uint8_t *number, const uint8_t *end)
{
    /* The value is 0.d1d2d3... x 10^magnitude with d1 not 0, so it lies in [10^(magnitude-1), 10^magnitude). A body
     * has less than 2^32 digits and the exponent saturates far above that, so nothing here overflows. */
    const uint8_t *p = number, *first = NULL;
    int64_t magnitude = 0;
    int behind_point = 0;
    if (*p == '-')
        p++;
    for (; p < end && *p != 'e' && *p != 'E'; p++) {
        if (*p == '.')
            behind_point = 1;
        else if (first == NULL && *p == '0')
            magnitude -= behind_point;
        else {
            if (first == NULL)
                first = p;
            magnitude += !behind_point;
        }
    }
    if (first == NULL)
        return 1; /* zero, whatever its exponent */
    const uint8_t *digits_end = p;
    if (p < end) {
        int negative = *++p == '-';
        if (*p == '-' || *p == '+')
            p++;
        int64_t exponent = 0;
        for (; p < end; p++) {
            exponent = exponent * 10 + (*p - '0');
            if (exponent > (int64_t)1 << 40)
                exponent = (int64_t)1 << 40;
        }
        magnitude += negative ? -exponent : exponent;
    }
    if (magnitude != THRESHOLD_DIGITS)
        return magnitude < THRESHOLD_DIGITS;
    int i = 0;
    for (p = first; p < digits_end; p++) {
        if (*p == '.')
            continue;
        uint8_t limit = i < THRESHOLD_DIGITS ? (uint8_t)THRESHOLD[i++] : '0';
        if (*p != limit)
            return *p < limit;
    }
    for (; i < THRESHOLD_DIGITS; i++)
        if (THRESHOLD[i] != '0')
            return 1;
    return 0;
}

/* High bit set in each byte of `x` that is not a digit value, for bytes where `limit` is 0x76, or not zero, where it
 * is 0x7f. (A carry into the next byte needs a byte >= 0x80, which is itself an error.) */
static inline uint64_t misfits(uint64_t x, uint64_t limit)
{
    return (x | (x + limit)) & 0x8080808080808080ull;
}

static inline unsigned two_digits(const uint8_t *p)
{
    return (unsigned)(p[0] - '0') * 10 + (unsigned)(p[1] - '0');
}

static inline int is_digit(uint8_t c)
{
    return c >= '0' && c <= '9';
}

int gw_timestamp_ok(const uint8_t *text, size_t bytes)
{
    /*  0         1
     *  0123456789012345678 9
     *  YYYY-MM-DDTHH:MM:SS[.d+](Z|+hh:mm)    words at 0, 8 and 11 cover all nineteen */
    if (bytes < 20)
        return 0;
    const uint64_t date = gw_load64(text) ^ 0x2d30302d30303030ull;                        /* 0000-00- */
    const uint64_t middle = (gw_load64(text + 8) ^ 0x30303a3030543030ull) & ~0x200000ull; /* 00T00:00, t too */
    const uint64_t time = gw_load64(text + 11) ^ 0x30303a30303a3030ull;                   /* 00:00:00 */
    if (misfits(date, 0x7f76767f76767676ull) | misfits(middle, 0x76767f76767f7676ull) |
        misfits(time, 0x76767f76767f7676ull))
        return 0;
    const unsigned month = two_digits(text + 5), day = two_digits(text + 8);
    static const uint8_t MONTH_DAYS[13] = {0, 31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    if (month - 1 > 11 || day - 1 >= MONTH_DAYS[month])
        return 0;
    if (month == 2 && day == 29) {
        const unsigned century = two_digits(text), year = two_digits(text + 2);
        if ((year ? year : century) % 4 != 0)
            return 0;
    }
    if (two_digits(text + 11) > 23 || two_digits(text + 14) > 59 || two_digits(text + 17) > 59)
        return 0;
    const uint8_t *p = text + 19, *end = text + bytes;
    if (*p == '.') {
        const uint8_t *digits = ++p;
        while (p < end && is_digit(*p))
            p++;
        if (p == digits || p == end)
            return 0;
    }
    if (*p == 'Z' || *p == 'z')
        return p + 1 == end;
    return (*p == '+' || *p == '-') && end - p == 6 && p[3] == ':' && is_digit(p[1]) && is_digit(p[2]) &&
           is_digit(p[4]) && is_digit(p[5]) && two_digits(p + 1) <= 23 && two_digits(p + 4) <= 59;
}

int gw_timestamp_escaped_ok(const uint8_t *text, size_t bytes)
{
    /* Digits of the fraction beyond the first say nothing, so they are dropped and the rest fits a small buffer. */
    uint8_t plain[32];
    size_t n = 0;
    gw_unescaper walk = gw_unescaper_of(text, bytes);
    for (int byte; (byte = gw_unescaper_next(&walk)) >= 0;) {
        if (n == 21 && plain[19] == '.' && is_digit((uint8_t)byte))
            continue;
        if (n == sizeof plain)
            return 0;
        plain[n++] = (uint8_t)byte;
    }
    return gw_timestamp_ok(plain, n);
}
