/* gw_hash.h - SipHash-1-3 (Aumasson, Bernstein: "SipHash: a fast short-input PRF"), keyed with 128 secret bits.
 * Used where an outsider chooses the input: duplicate keys, log markers, the idempotency index. */
#ifndef GW_HASH_H
#define GW_HASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define GW_ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define GW_SIPROUND(v0, v1, v2, v3)                                     \
    do {                                                                \
        v0 += v1, v1 = GW_ROTL(v1, 13), v1 ^= v0, v0 = GW_ROTL(v0, 32); \
        v2 += v3, v3 = GW_ROTL(v3, 16), v3 ^= v2;                       \
        v0 += v3, v3 = GW_ROTL(v3, 21), v3 ^= v0;                       \
        v2 += v1, v1 = GW_ROTL(v1, 17), v1 ^= v2, v2 = GW_ROTL(v2, 32); \
    } while (0)

static inline uint64_t gw_siphash(const uint64_t key[2], const void *data, size_t bytes)
{
    const uint8_t *in = (const uint8_t *)data;
    uint64_t v0 = 0x736f6d6570736575ull ^ key[0], v1 = 0x646f72616e646f6dull ^ key[1];
    uint64_t v2 = 0x6c7967656e657261ull ^ key[0], v3 = 0x7465646279746573ull ^ key[1];
    size_t left = bytes;
    for (; left >= 8; left -= 8, in += 8) {
        uint64_t m;
        memcpy(&m, in, 8);
        v3 ^= m;
        GW_SIPROUND(v0, v1, v2, v3);
        v0 ^= m;
    }
    uint64_t last = (uint64_t)bytes << 56;
    for (size_t i = 0; i < left; i++)
        last |= (uint64_t)in[i] << (8 * i);
    v3 ^= last;
    GW_SIPROUND(v0, v1, v2, v3);
    v0 ^= last;
    v2 ^= 0xff;
    GW_SIPROUND(v0, v1, v2, v3);
    GW_SIPROUND(v0, v1, v2, v3);
    GW_SIPROUND(v0, v1, v2, v3);
    return v0 ^ v1 ^ v2 ^ v3;
}

#endif
