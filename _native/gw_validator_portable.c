/* gw_validator_portable.c - the pass with eight bytes at a time in a plain register; what the others are tested against. */
#define GW_SCAN_PORTABLE
#include "gw_validator_pass.h"
#include "gw_validator_paths.h"

GW_PASS(portable)
