/* gw_crc32c.h - CRC32C (Castagnoli, RFC 3720 B.4), in hardware where there is any (SSE4.2, ARMv8 CRC), chosen once at
 * load; the portable path is slicing by 8. All agree; tests/native/test_log.c holds them together. */
#ifndef GW_CRC32C_H
#define GW_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Extend `crc` (0 to begin with) by `bytes` bytes. */
uint32_t gw_crc32c(uint32_t crc, const void *data, size_t bytes);
uint32_t gw_crc32c_portable(uint32_t crc, const void *data, size_t bytes);
/* The crc of 8 bytes that are a little-endian word. */
uint32_t gw_crc32c_u64(uint32_t crc, uint64_t word);
const char *gw_crc32c_path(void); /* "sse4.2", "armv8" or "portable" */

#endif
