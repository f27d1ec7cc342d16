/* gw_validator_portable.c - the pass with eight bytes at a time in a register; the others are tested against it. */
#define GW_SCAN_PORTABLE
#include "gw_validator_pass.h"
#include "gw_validator_paths.h"

GW_PASS(portable)
