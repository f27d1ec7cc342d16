/* fuzz_validator.c - any bytes: no over-read, no undefined behaviour, the same verdict from every scan path, and one
 * that keeps the contract of gw_validator.h.
 *
 * With libFuzzer (clang), with AFL++ (afl-clang-fast, persistent mode by the same function), or alone to replay files:
 *   clang -std=gnu11 -g -O1 -fsanitize=fuzzer,address,undefined -I_native tests/fuzz/fuzz_validator.c \
 *       _native/gw_validator*.c -o fuzz && python tests/json_cases.py corpus && ./fuzz corpus
 *   gcc -std=gnu11 -g -O1 -fsanitize=address,undefined -DGW_FUZZ_MAIN -I_native tests/fuzz/fuzz_validator.c \
 *       _native/gw_validator*.c -o replay && ./replay [--mutate ROUNDS] corpus/...
 * `--mutate` changes each file at random that many times: a poor man's fuzzer for machines without clang. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gw_validator.h"

#define MUST(condition)                                                             \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                \
        }                                                                           \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static const uint64_t hash_key[2] = {1, 2};
    uint8_t *exact = malloc(bytes ? bytes : 1);
    gw_verdict first, other;
    if (bytes)
        memcpy(exact, data, bytes);
    for (unsigned i = 0; gw_validator_path(i) != NULL; i++) {
        MUST(gw_validator_select(gw_validator_path(i)) == 0);
        gw_verdict *verdict = i ? &other : &first;
        memset(verdict, 0xA5, sizeof *verdict);
        MUST(gw_validate(exact, bytes, hash_key, verdict) == verdict->code);
        MUST(i == 0 || memcmp(&first, &other, sizeof first) == 0); /* the struct has no padding that is not zeroed */
    }
    MUST(first.code <= GW_CODE_DUPLICATE_KEY && first.field <= GW_FIELD_UNKNOWN);
    MUST(first.offset <= bytes && first.object_offset <= bytes);
    MUST((size_t)first.field_offset + first.field_bytes <= bytes && (size_t)first.ts_offset + first.ts_bytes <= bytes);
    if (first.code == GW_CODE_ACCEPTED) {
        MUST(first.field == GW_FIELD_NONE && first.offset == 0 && exact[first.object_offset] == '{');
        MUST(!(first.flags & GW_EVENT_HAS_TS) || (first.ts_bytes >= 20 && exact[first.ts_offset - 1] == '"' &&
                                                  exact[first.ts_offset + first.ts_bytes] == '"'));
        MUST(first.seq <= INT64_MAX && first.boot <= INT64_MAX);
    } else {
        MUST(first.flags == 0);
        MUST(first.offset < bytes || first.code == GW_CODE_MALFORMED_JSON);
    }
    free(exact);
    return 0;
}

#ifdef GW_FUZZ_MAIN
static uint32_t random_below(uint32_t n)
{
    static uint64_t state = 88172645463325252ull;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32) % n;
}

int main(int argc, char **argv)
{
    unsigned long rounds = 0, inputs = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--mutate") == 0 && i + 1 < argc) {
            rounds = strtoul(argv[++i], NULL, 10);
            continue;
        }
        FILE *file = fopen(argv[i], "rb");
        if (file == NULL) {
            perror(argv[i]);
            return 2;
        }
        static uint8_t body[1 << 20], changed[sizeof body];
        const size_t bytes = fread(body, 1, sizeof body, file);
        fclose(file);
        LLVMFuzzerTestOneInput(body, bytes);
        inputs++;
        if (bytes == 0 || bytes > 4096)
            continue;
        for (unsigned long round = 0; round < rounds; round++, inputs++) {
            memcpy(changed, body, bytes);
            size_t now = bytes;
            for (uint32_t changes = 1 + random_below(3); changes; changes--) {
                const uint32_t at = random_below((uint32_t)now);
                switch (random_below(4)) {
                case 0:
                    changed[at] = (uint8_t)random_below(256);
                    break;
                case 1:
                    changed[at] = (uint8_t) "\"\\{}[],: 0-eu"[random_below(13)];
                    break;
                case 2:
                    changed[at] ^= (uint8_t)(1u << random_below(8));
                    break;
                default:
                    now = now > 1 ? at + (at == 0) : now;
                    break;
                }
            }
            LLVMFuzzerTestOneInput(changed, now);
        }
    }
    printf("%lu inputs\n", inputs);
    return 0;
}
#endif
