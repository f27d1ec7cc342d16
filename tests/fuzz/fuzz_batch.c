/* fuzz_batch.c - any bytes as a batch: no over-read, the same items from every scan path; each item has the verdict
 * that it gets alone; an array is split where a plain reading of it, with a stack of all its brackets, splits it; what
 * is taken can be put together again and is split the same.
 *
 * Sources: _native/gw_batch.c _native/gw_ingest.c _native/gw_crc32c.c _native/gw_log*.c _native/gw_validator*.c
 *
 * An input: byte 0: bit 0 lines, bit 1 events name their devices, bits 2 and 3 limits; the rest is the body. */
#include "fuzz.h"

#include "gw_batch.h"

enum { DEEP = 64 };
static const uint64_t HASH_KEY[2] = {1, 2};

/* ---- the plain reading ------------------------------------------------------------------------------------------ */

typedef struct reading {
    size_t count, *from, *to;
    bool ok, deep; /* deep: a bracket deeper than 64 is of another kind than the one that it closes */
} reading;

static bool is_space(uint8_t c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

static reading read_array(const uint8_t *body, size_t bytes)
{
    reading r = {0, calloc(bytes + 1, sizeof(size_t)), calloc(bytes + 1, sizeof(size_t)), false, false};
    uint8_t *stack = malloc(bytes + 1);
    MUST(r.from && r.to && stack);
    size_t depth = 0, i = 0;
    enum { START, VALUE_OR_END, VALUE, INSIDE, COMMA_OR_END, DONE } state = START;
    for (; i < bytes; i++) {
        const uint8_t c = body[i];
        if (is_space(c))
            continue;
        if (state == DONE || c == '\\')
            goto out;
        if (state == START) {
            if (c != '[')
                goto out;
            state = VALUE_OR_END;
            continue;
        }
        if (state == COMMA_OR_END) {
            if (c != ',' && c != ']')
                goto out;
            state = c == ',' ? VALUE : DONE;
            continue;
        }
        if (state != INSIDE) {
            if (c == ']' && state == VALUE_OR_END) {
                state = DONE;
                continue;
            }
            if (c == ']' || c == '}' || c == ',' || c == ':')
                goto out;
            r.from[r.count] = i;
            if (c != '[' && c != '{' && c != '"') {
                while (i + 1 < bytes && !is_space(body[i + 1]) &&
                       !strchr("[]{},:\"\\", body[i + 1] ? body[i + 1] : 'x'))
                    i++;
                r.to[r.count++] = i + 1;
                state = COMMA_OR_END;
                continue;
            }
        }
        if (c == '"') {
            for (i++; i < bytes && body[i] != '"'; i++)
                i += body[i] == '\\';
            if (i >= bytes)
                goto out;
        } else if (c == '[' || c == '{') {
            stack[depth++] = c;
        } else if (c == ']' || c == '}') {
            if (stack[depth - 1] != (c == ']' ? '[' : '{')) {
                if (depth <= DEEP)
                    goto out;
                r.deep = true;
            }
            depth--;
        }
        state = INSIDE;
        if (!depth) {
            r.to[r.count++] = i + 1;
            state = COMMA_OR_END;
        }
    }
    r.ok = state == DONE;
out:
    free(stack);
    return r;
}

/* ---- the checks -------------------------------------------------------------------------------------------------- */

static gw_batch split(const uint8_t *body, size_t bytes, bool lines, bool names_device, gw_batch_limits limits)
{
    gw_batch batch = {0};
    uint8_t *exact = malloc(bytes + !bytes); /* the sanitizer sees one byte too many */
    MUST(exact != NULL);
    if (bytes)
        memcpy(exact, body, bytes);
    MUST(gw_batch_split(&batch, exact, bytes, lines, names_device, HASH_KEY, limits) == batch.code);
    free(exact);
    return batch;
}

static void same(const gw_batch *a, const gw_batch *b)
{
    MUST(a->code == b->code && a->offset == b->offset && a->items == b->items);
    for (uint32_t i = 0; i < a->items; i++) {
        const gw_item *x = &a->item[i], *y = &b->item[i];
        MUST(x->offset == y->offset && x->bytes == y->bytes && x->code == y->code);
        MUST(x->code || (x->seq == y->seq && x->boot == y->boot && x->flags == y->flags));
        MUST(x->code || (x->device_offset == y->device_offset && x->device_id_bytes == y->device_id_bytes));
    }
}

static void item_is_as_alone(const uint8_t *body, const gw_item *item, bool names_device, uint32_t bytes_max)
{
    gw_verdict verdict;
    uint8_t *exact = malloc(item->bytes);
    MUST(item->bytes && exact);
    memcpy(exact, body + item->offset, item->bytes);
    const int code = gw_validate_item(exact, item->bytes, HASH_KEY, names_device, &verdict, NULL);
    MUST(item->code == (item->bytes > bytes_max ? GW_CODE_BODY_TOO_LARGE : code));
    if (!item->code) {
        MUST(exact[0] == '{' && exact[item->bytes - 1] == '}' && verdict.object_offset == 0);
        MUST(item->seq == verdict.seq && item->boot == verdict.boot && item->flags == verdict.flags);
        if (names_device)
            MUST(gw_device_id_ok(exact + item->device_offset, item->device_id_bytes) &&
                 exact[item->device_offset - 1] == '"' && exact[item->device_offset + item->device_id_bytes] == '"');
    }
    free(exact);
}

static void array_is_as_read(const uint8_t *body, size_t bytes, const gw_batch *batch, uint32_t events_max)
{
    const reading r = read_array(body, bytes);
    if (batch->code == GW_CODE_BATCH_TOO_LARGE)
        MUST(r.count >= events_max);
    else
        MUST(r.ok == (batch->code == 0 || batch->code == GW_CODE_EMPTY_BATCH));
    MUST(!r.ok || batch->code || r.count == batch->items);
    for (uint32_t i = 0; i < batch->items; i++)
        MUST(i >= r.count ||
             (r.from[i] == batch->item[i].offset && r.to[i] == batch->item[i].offset + batch->item[i].bytes));
    free(r.from);
    free(r.to);
}

/* The same events as lines (those that have no line end inside), or as an array without white space. */
static void put_together(const uint8_t *body, const gw_batch *batch, bool lines, bool names_device,
                         gw_batch_limits limits)
{
    size_t bytes = 2;
    for (uint32_t i = 0; i < batch->items; i++)
        bytes += batch->item[i].bytes + 1;
    uint8_t *other = malloc(bytes), *p = other;
    MUST(other != NULL);
    uint32_t good = 0;
    if (!lines)
        *p++ = '[';
    for (uint32_t i = 0; i < batch->items; i++) {
        const gw_item *item = &batch->item[i];
        if (item->code || (lines && memchr(body + item->offset, '\n', item->bytes)))
            continue;
        if (good++)
            *p++ = lines ? '\n' : ',';
        memcpy(p, body + item->offset, item->bytes);
        p += item->bytes;
    }
    if (!lines)
        *p++ = ']';
    gw_batch again = split(other, (size_t)(p - other), lines, names_device, limits);
    MUST(again.code == (good ? 0 : GW_CODE_EMPTY_BATCH) && again.items == good);
    for (uint32_t i = 0; i < good; i++)
        MUST(!again.item[i].code);
    gw_batch_free(&again);
    free(other);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (!bytes)
        return 0;
    const bool lines = data[0] & 1, names_device = data[0] & 2;
    const gw_batch_limits limits = {data[0] & 4 ? 40 : 65536, data[0] & 8 ? 3 : 10000};
    const uint8_t *const body = data + 1;
    bytes--;
    gw_batch first = {0};
    for (unsigned i = 0; gw_validator_path(i) != NULL; i++) {
        MUST(gw_validator_select(gw_validator_path(i)) == 0);
        gw_batch batch = split(body, bytes, lines, names_device, limits);
        if (i) {
            same(&first, &batch);
            gw_batch_free(&batch);
        } else {
            first = batch;
        }
    }
    MUST(first.items <= limits.events_max && first.offset <= bytes);
    uint32_t from = 0;
    for (uint32_t i = 0; i < first.items; i++) {
        MUST(first.item[i].offset >= from && first.item[i].offset + first.item[i].bytes <= bytes);
        from = first.item[i].offset + first.item[i].bytes;
        item_is_as_alone(body, &first.item[i], names_device, limits.event_bytes_max);
    }
    size_t space = 0;
    while (space < bytes && is_space(body[space]))
        space++;
    if (!lines && space < bytes && body[space] == '[')
        array_is_as_read(body, bytes, &first, limits.events_max);
    if (!first.code) {
        put_together(body, &first, true, names_device, limits);
        put_together(body, &first, false, names_device, limits);
    }
    gw_batch_free(&first);
    return 0;
}
