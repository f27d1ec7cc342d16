/* gw_validator_avx2.c - the pass with AVX2 scans; empty on other machines. */
#if defined(__x86_64__)
#define GW_SCAN_AVX2
#include "gw_validator_pass.h"
#include "gw_validator_paths.h"

GW_PASS(avx2)
#else
typedef int gw_validator_avx2_is_for_other_machines;
#endif
