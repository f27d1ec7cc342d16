/* fuzz.h - what every harness shares: MUST, random numbers, and a main for builds without libFuzzer.
 *
 * With libFuzzer (clang -fsanitize=fuzzer) a harness is a fuzzer. With -DGW_FUZZ_MAIN any compiler makes it a program
 * that runs each file, or each file of a folder, once:
 *   ./fuzz_log [--mutate ROUNDS] [--seed SEED] CORPUS...       ROUNDS changed copies of each file as well
 * Its opening comment names the sources that it needs, for tests/native_build.py. One program includes this once. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(condition)                                                             \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                \
        }                                                                           \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
/* libFuzzer's own changes, for a harness with a mutator of its own. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t bytes, size_t bytes_max);
#ifdef FUZZ_MUTATOR
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t bytes, size_t bytes_max, unsigned seed);
#endif

/* xorshift64: the same numbers everywhere for a seed. */
typedef struct dice {
    uint64_t state;
} dice;

static inline dice dice_of(uint64_t seed)
{
    return (dice){(seed + 1) * 0x9e3779b97f4a7c15ull | 1};
}

static inline uint32_t roll(dice *d, uint32_t below)
{
    d->state ^= d->state << 13, d->state ^= d->state >> 7, d->state ^= d->state << 17;
    return (uint32_t)(d->state >> 32) % below;
}

#ifdef GW_FUZZ_MAIN
#include <dirent.h>

enum { FUZZ_BYTES_MAX = 1 << 20 };
static dice fuzz_dice;
static unsigned long fuzz_rounds, fuzz_inputs;

size_t LLVMFuzzerMutate(uint8_t *data, size_t bytes, size_t bytes_max)
{
    for (uint32_t changes = 1 + roll(&fuzz_dice, 3); bytes && changes; changes--) {
        const uint32_t at = roll(&fuzz_dice, (uint32_t)bytes);
        switch (roll(&fuzz_dice, 5)) {
        case 0:
            data[at] = (uint8_t)roll(&fuzz_dice, 256);
            break;
        case 1:
            data[at] = data[roll(&fuzz_dice, (uint32_t)bytes)];
            break;
        case 2:
            data[at] ^= (uint8_t)(1u << roll(&fuzz_dice, 8));
            break;
        case 3:
            if (bytes < bytes_max) {
                memmove(data + at + 1, data + at, bytes - at);
                bytes++;
            }
            break;
        default:
            bytes = roll(&fuzz_dice, 4) ? bytes : at;
            break;
        }
    }
    return bytes;
}

static void fuzz_file(const char *path)
{
    static uint8_t body[FUZZ_BYTES_MAX], changed[FUZZ_BYTES_MAX];
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        perror(path);
        exit(2);
    }
    const size_t bytes = fread(body, 1, sizeof body, file);
    fclose(file);
    fprintf(stderr, "%s\n", path); /* the last line before a crash names the input */
    LLVMFuzzerTestOneInput(body, bytes);
    fuzz_inputs++;
    for (unsigned long round = 0; round < fuzz_rounds; round++, fuzz_inputs++) {
        memcpy(changed, body, bytes);
        const size_t room = bytes + 256 < sizeof changed ? bytes + 256 : sizeof changed;
#ifdef FUZZ_MUTATOR
        const size_t now = LLVMFuzzerCustomMutator(changed, bytes, room, roll(&fuzz_dice, 1u << 31));
#else
        const size_t now = LLVMFuzzerMutate(changed, bytes, room);
#endif
        LLVMFuzzerTestOneInput(changed, now);
    }
}

int main(int argc, char **argv)
{
    unsigned long seed = 1;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--mutate") == 0 && i + 1 < argc) {
            fuzz_rounds = strtoul(argv[++i], NULL, 10);
            continue;
        }
        if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
            seed = strtoul(argv[++i], NULL, 10);
            continue;
        }
        fuzz_dice = dice_of(seed);
        struct dirent **entry;
        int count = scandir(argv[i], &entry, NULL, alphasort);
        if (count < 0)
            fuzz_file(argv[i]);
        for (int k = 0; k < count; k++) {
            char path[4096];
            snprintf(path, sizeof path, "%s/%s", argv[i], entry[k]->d_name);
            if (entry[k]->d_name[0] != '.')
                fuzz_file(path);
            free(entry[k]);
        }
        if (count >= 0)
            free(entry);
    }
    printf("%lu inputs, seed %lu\n", fuzz_inputs, seed);
    return fuzz_inputs ? 0 : 2;
}
#endif
#endif
