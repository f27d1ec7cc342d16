/* gw_validator_paths.h - the compiled forms of the pass (gw_validator_pass.h), for gw_validator.c alone. */
#ifndef GW_VALIDATOR_PATHS_H
#define GW_VALIDATOR_PATHS_H

#include "gw_validator.h"

/* `verdict` is zeroed and body_bytes < 2^32. Returns verdict->code. The rest is as for gw_validate_item. */
typedef int gw_validate_path(const uint8_t *body, size_t body_bytes, const uint64_t hash_key[2], bool names_device,
                             gw_verdict *verdict, size_t *end);

gw_validate_path gw_validate_portable, gw_validate_sse2, gw_validate_avx2, gw_validate_neon;

#endif
