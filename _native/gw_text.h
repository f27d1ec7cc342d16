/* gw_text.h - numbers and times as text, for what writes JSON. */
#ifndef GW_TEXT_H
#define GW_TEXT_H

#include <stdint.h>
#include <string.h>

static inline unsigned gw_decimal_digits(uint64_t n)
{
    unsigned digits = 1;
    for (uint64_t limit = 10; digits < 20 && n >= limit; limit *= 10)
        digits++;
    return digits;
}

static inline uint8_t *gw_put_decimal(uint8_t *to, uint64_t n)
{
    uint8_t *const end = to + gw_decimal_digits(n);
    for (uint8_t *p = end; p > to; n /= 10)
        *--p = (uint8_t)('0' + n % 10);
    return end;
}

static inline void gw_put_digits(char *out, unsigned value, int digits)
{
    for (int i = digits - 1; i >= 0; i--, value /= 10)
        out[i] = (char)('0' + value % 10);
}

/* RFC 3339 up to the fraction of the second: "2025-09-23T11:18:41.", GW_RFC3339_SECONDS_BYTES bytes. Years
 * 1970 .. 9999. Days since 1970-01-01 to a date: Howard Hinnant, "chrono-compatible low-level date algorithms". */
enum { GW_RFC3339_SECONDS_BYTES = 20 };

static inline void gw_rfc3339_seconds(uint64_t unix_s, char *out)
{
    uint64_t days = unix_s / 86400, second = unix_s % 86400;
    uint64_t z = days + 719468, era = z / 146097, day_of_era = z % 146097;
    uint64_t year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146096) / 365;
    uint64_t day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    uint64_t shifted = (5 * day_of_year + 2) / 153; /* March is 0 */
    unsigned day = (unsigned)(day_of_year - (153 * shifted + 2) / 5 + 1);
    unsigned month = (unsigned)(shifted < 10 ? shifted + 3 : shifted - 9);
    unsigned year = (unsigned)(year_of_era + era * 400 + (month <= 2));
    memcpy(out, "0000-00-00T00:00:00.", GW_RFC3339_SECONDS_BYTES);
    gw_put_digits(out, year, 4);
    gw_put_digits(out + 5, month, 2);
    gw_put_digits(out + 8, day, 2);
    gw_put_digits(out + 11, (unsigned)(second / 3600), 2);
    gw_put_digits(out + 14, (unsigned)(second / 60 % 60), 2);
    gw_put_digits(out + 17, (unsigned)(second % 60), 2);
}

#endif
