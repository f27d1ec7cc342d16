/* gw_validator.c - which form of the pass runs here, and the device id. The pass is gw_validator_pass.h.
 *
 * The choice is made once, when the library is loaded; gw_validator_select changes it for tests and benches, also while
 * other threads validate: a pointer is read once a call, and every path gives the same verdicts. */
#include "gw_validator.h"

#include <stdatomic.h>
#include <string.h>

#include "gw_validator_paths.h"

static int always(void)
{
    return 1;
}

#if defined(__x86_64__)
static int has_avx2(void)
{
    __builtin_cpu_init(); /* this may run before the C library's own constructors */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
#endif

static const struct path {
    const char *name;
    gw_validate_path *validate;
    int (*runs_here)(void);
} PATHS[] = {
/* best first */
#if defined(__x86_64__)
    {"avx2", gw_validate_avx2, has_avx2},
    {"sse2", gw_validate_sse2, always},
#elif defined(__aarch64__) && !defined(__AARCH64EB__)
    {"neon", gw_validate_neon, always},
#endif
    {"portable", gw_validate_portable, always},
};
enum { PATH_COUNT = sizeof PATHS / sizeof PATHS[0] };

static _Atomic(const struct path *) selected = &PATHS[PATH_COUNT - 1];

__attribute__((constructor)) static void select_best(void)
{
    for (int i = 0; i < PATH_COUNT; i++)
        if (PATHS[i].runs_here()) {
            atomic_store_explicit(&selected, &PATHS[i], memory_order_relaxed);
            return;
        }
}

int gw_validator_select(const char *name)
{
    for (int i = 0; i < PATH_COUNT; i++)
        if (strcmp(PATHS[i].name, name) == 0 && PATHS[i].runs_here()) {
            atomic_store_explicit(&selected, &PATHS[i], memory_order_relaxed);
            return 0;
        }
    return -1;
}

const char *gw_validator_selected(void)
{
    return atomic_load_explicit(&selected, memory_order_relaxed)->name;
}

const char *gw_validator_path(unsigned index)
{
    for (int i = 0; i < PATH_COUNT; i++)
        if (PATHS[i].runs_here() && index-- == 0)
            return PATHS[i].name;
    return NULL;
}

int gw_validate_item(const uint8_t *body, size_t body_bytes, const uint64_t hash_key[2], bool names_device,
                     gw_verdict *verdict, size_t *end)
{
    memset(verdict, 0, sizeof *verdict);
    if (__builtin_expect((uint64_t)body_bytes > UINT32_MAX, 0)) /* positions are 32 bits wide */
        return verdict->code = GW_CODE_BODY_TOO_LARGE;
    return atomic_load_explicit(&selected, memory_order_relaxed)
        ->validate(body, body_bytes, hash_key, names_device, verdict, end);
}

int gw_validate(const uint8_t *body, size_t body_bytes, const uint64_t hash_key[2], gw_verdict *verdict)
{
    return gw_validate_item(body, body_bytes, hash_key, false, verdict, NULL);
}

int gw_device_id_ok(const uint8_t *id, size_t id_bytes)
{
    if (id_bytes - 1 >= GW_DEVICE_ID_BYTES_MAX)
        return 0;
    for (size_t i = 0; i < id_bytes; i++) {
        const uint8_t c = id[i], letter = c | 0x20;
        if (!((letter >= 'a' && letter <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_'))
            return 0;
    }
    return 1;
}
