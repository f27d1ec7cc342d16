/* fuzz_validator.c - any bytes: no over-read, no undefined behaviour, the same verdict from every scan path, at every
 * alignment and under every hash key, and one that keeps the contract of gw_validator.h.
 *
 * Sources: _native/gw_validator*.c. An input is a body. */
#include "fuzz.h"

#include "gw_validator.h"

/* `body` in memory of its own, `shift` bytes behind an aligned address: the sanitizer sees one byte too many. */
static gw_verdict verdict_of(const uint8_t *body, size_t bytes, size_t shift, uint64_t key)
{
    uint8_t *exact = malloc(bytes + shift + !(bytes + shift));
    MUST(exact != NULL);
    if (bytes)
        memcpy(exact + shift, body, bytes);
    gw_verdict verdict;
    memset(&verdict, 0xA5, sizeof verdict);
    const uint64_t hash_key[2] = {key, ~key};
    MUST(gw_validate(exact + shift, bytes, hash_key, &verdict) == verdict.code);
    free(exact);
    return verdict;
}

static void accepted_stays_accepted(const uint8_t *body, size_t bytes, const gw_verdict *was)
{
    uint8_t *changed = malloc(bytes + 2);
    MUST(changed != NULL);
    changed[0] = '\n';
    memcpy(changed + 1, body, bytes);
    changed[bytes + 1] = ' ';
    gw_verdict now = verdict_of(changed, bytes + 2, 0, 1);
    now.object_offset--;
    now.ts_offset -= now.ts_offset != 0;
    MUST(memcmp(&now, was, sizeof now) == 0); /* space around it changes nothing but positions */
    changed[bytes + 1] = '}';
    MUST(verdict_of(changed, bytes + 2, 0, 1).code == GW_CODE_MALFORMED_JSON);
    free(changed);

    while (body[bytes - 1] != '}')
        bytes--;
    MUST(verdict_of(body, bytes - 1, 0, 1).code == GW_CODE_MALFORMED_JSON); /* no document is another one's beginning */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    gw_verdict first = {0};
    for (unsigned i = 0; gw_validator_path(i) != NULL; i++) {
        MUST(gw_validator_select(gw_validator_path(i)) == 0);
        const gw_verdict verdict = verdict_of(data, bytes, i * 3, i);
        if (i == 0)
            first = verdict;
        MUST(memcmp(&first, &verdict, sizeof first) == 0); /* the struct has no padding that is not zeroed */
    }
    MUST(first.code <= GW_CODE_DUPLICATE_KEY && first.field <= GW_FIELD_UNKNOWN);
    MUST(first.offset <= bytes && first.object_offset <= bytes);
    MUST((size_t)first.field_offset + first.field_bytes <= bytes && (size_t)first.ts_offset + first.ts_bytes <= bytes);
    if (first.code == GW_CODE_ACCEPTED) {
        MUST(first.field == GW_FIELD_NONE && first.offset == 0 && data[first.object_offset] == '{');
        MUST(!(first.flags & GW_EVENT_HAS_TS) || (first.ts_bytes >= 20 && data[first.ts_offset - 1] == '"' &&
                                                  data[first.ts_offset + first.ts_bytes] == '"'));
        MUST(first.seq <= INT64_MAX && first.boot <= INT64_MAX);
        accepted_stays_accepted(data, bytes, &first);
    } else {
        MUST(first.flags == 0);
        MUST(first.offset < bytes || first.code == GW_CODE_MALFORMED_JSON);
    }
    return 0;
}
