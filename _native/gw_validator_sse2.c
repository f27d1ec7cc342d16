/* gw_validator_sse2.c - the pass with SSE2 scans; empty on other machines. */
#if defined(__x86_64__)
#define GW_SCAN_SSE2
#include "gw_validator_pass.h"
#include "gw_validator_paths.h"

GW_PASS(sse2)
#else
typedef int gw_validator_sse2_is_for_other_machines;
#endif
