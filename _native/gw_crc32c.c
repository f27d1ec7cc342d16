#include "gw_crc32c.h"

#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the log is little-endian"
#endif

static uint32_t table[8][256];

__attribute__((constructor(101))) static void make_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++)
            c = (c >> 1) ^ (0x82f63b78u & (0u - (c & 1)));
        table[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 1; k < 8; k++)
            table[k][i] = (table[k - 1][i] >> 8) ^ table[0][table[k - 1][i] & 0xff];
}

uint32_t gw_crc32c_portable(uint32_t crc, const void *data, size_t bytes)
{
    const uint8_t *p = data;
    uint32_t c = ~crc;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        w ^= c;
        c = table[7][w & 0xff] ^ table[6][(w >> 8) & 0xff] ^ table[5][(w >> 16) & 0xff] ^ table[4][(w >> 24) & 0xff] ^
            table[3][(w >> 32) & 0xff] ^ table[2][(w >> 40) & 0xff] ^ table[1][(w >> 48) & 0xff] ^ table[0][w >> 56];
    }
    for (; bytes; bytes--)
        c = (c >> 8) ^ table[0][(c ^ *p++) & 0xff];
    return ~c;
}

#if defined(__x86_64__)
#include <nmmintrin.h>

__attribute__((target("sse4.2"))) static uint32_t crc_hardware(uint32_t crc, const void *data, size_t bytes)
{
    const uint8_t *p = data;
    uint64_t c = ~crc;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        c = _mm_crc32_u64(c, w);
    }
    uint32_t d = (uint32_t)c;
    if (bytes & 4) {
        uint32_t w;
        memcpy(&w, p, 4);
        d = _mm_crc32_u32(d, w);
        p += 4;
    }
    for (bytes &= 3; bytes; bytes--)
        d = _mm_crc32_u8(d, *p++);
    return ~d;
}

static int hardware_here(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("sse4.2");
}
#define HARDWARE "sse4.2"
#elif defined(__aarch64__)
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
#pragma GCC push_options
#pragma GCC target("+crc")
#include <arm_acle.h>
static uint32_t crc_hardware(uint32_t crc, const void *data, size_t bytes)
{
    const uint8_t *p = data;
    uint32_t c = ~crc;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        c = __crc32cd(c, w);
    }
    for (; bytes; bytes--)
        c = __crc32cb(c, *p++);
    return ~c;
}
#pragma GCC pop_options

static int hardware_here(void)
{
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
}
#define HARDWARE "armv8"
#endif

static uint32_t (*crc_path)(uint32_t, const void *, size_t) = gw_crc32c_portable;

#ifdef HARDWARE
__attribute__((constructor(102))) static void choose(void)
{
    if (hardware_here())
        crc_path = crc_hardware;
}
#endif

uint32_t gw_crc32c(uint32_t crc, const void *data, size_t bytes)
{
    return crc_path(crc, data, bytes);
}

uint32_t gw_crc32c_u64(uint32_t crc, uint64_t word)
{
    return crc_path(crc, &word, 8);
}

const char *gw_crc32c_path(void)
{
#ifdef HARDWARE
    if (crc_path == crc_hardware)
        return HARDWARE;
#endif
    return "portable";
}
