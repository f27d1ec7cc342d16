/* gw_validator_neon.c - the pass with NEON scans; empty on other machines. */
#if defined(__aarch64__) && !defined(__AARCH64EB__)
#define GW_SCAN_NEON
#include "gw_validator_pass.h"
#include "gw_validator_paths.h"

GW_PASS(neon)
#else
typedef int gw_validator_neon_is_for_other_machines;
#endif
