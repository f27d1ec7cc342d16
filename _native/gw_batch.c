/* gw_batch.c - see gw_batch.h for the picture, the framing and the crash story. */
#include "gw_batch.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- pass 1: where the events are -------------------------------------------------------------------------------- */

static inline bool is_space(uint8_t c)
{
    return c == ' ' || c == '\n' || c == '\r' || c == '\t';
}

static inline const uint8_t *skip_space(const uint8_t *p, const uint8_t *end)
{
    while (p < end && is_space(*p))
        p++;
    return p;
}

enum class { PLAIN, SPACE, QUOTE, BACKSLASH, COMMA, COLON, OPEN, CLOSE };

static inline enum class class_of(uint8_t c) {
    static const uint8_t classes[256] =
        {
            [' '] = SPACE,
            ['\t'] = SPACE,
            ['\n'] = SPACE,
            ['\r'] = SPACE,
            ['"'] = QUOTE,
            ['\\'] = BACKSLASH,
            [','] = COMMA,
            [':'] = COLON,
            ['['] = OPEN,
            ['{'] = OPEN,
            [']'] = CLOSE,
            ['}'] = CLOSE,
        };
    return (enum class)classes[c];
}

/* Behind the string whose text begins at p; NULL: it has no end. */
static const uint8_t *string_end(const uint8_t *p, const uint8_t *end)
{
    for (; p < end; p++) {
        if (*p == '"')
            return p + 1;
        if (*p == '\\')
            p++;
    }
    return NULL;
}

/* Behind the value at p, whatever its inside is; NULL: the framing breaks at *wrong. */
static const uint8_t *value_end(const uint8_t *p, const uint8_t *end, const uint8_t **wrong)
{
    enum { TYPED = 64 };
    uint64_t objects = 0; /* a bit for each open bracket, innermost lowest: 1 for a brace */
    size_t depth = 0;
    const uint8_t *const value = p;
    while (p < end) {
        const uint8_t c = *p;
        switch (class_of(c)) {
        case QUOTE: {
            if (!depth && p > value)
                return p;
            const uint8_t *const behind = string_end(p + 1, end);
            if (!behind) {
                *wrong = end;
                return NULL;
            }
            if (!depth)
                return behind;
            p = behind;
            break;
        }
        case OPEN:
            if (!depth && p > value)
                return p;
            if (depth++ < TYPED)
                objects = objects << 1 | (c == '{');
            p++;
            break;
        case CLOSE:
            if (!depth && p > value)
                return p;
            if (!depth || (depth <= TYPED && (objects & 1) != (c == '}'))) {
                *wrong = p;
                return NULL;
            }
            if (depth-- <= TYPED)
                objects >>= 1;
            p++;
            if (!depth)
                return p;
            break;
        case BACKSLASH:
            *wrong = p;
            return NULL;
        case SPACE:
        case COMMA:
        case COLON:
            if (!depth) {
                if (p > value)
                    return p;
                *wrong = p;
                return NULL;
            }
            p++;
            break;
        case PLAIN:
            p++;
            break;
        }
    }
    if (!depth && p > value)
        return p;
    *wrong = end;
    return NULL;
}

typedef struct splitter {
    gw_batch *batch;
    const uint8_t *body;
    const uint64_t *hash_key;
    gw_batch_limits limits;
    bool names_device;
} splitter;

static int refuse_all(splitter *s, enum gw_code code, const uint8_t *at)
{
    s->batch->offset = (uint32_t)(at - s->body);
    return s->batch->code = (uint16_t)code;
}

/* Twice as many as there are, or all that there may be. Also for refusals: pass 2 must not fail for want of memory. */
static bool grow(gw_batch *batch, uint32_t most)
{
    enum { LEAST = 1024 };
    const uint64_t twice = batch->room < LEAST ? LEAST : 2ull * batch->room;
    const size_t room = twice < most ? (size_t)twice : most;
    gw_item *item = realloc(batch->item, room * sizeof *item);
    batch->item = item ? item : batch->item;
    uint64_t *lsns = realloc(batch->lsns, room * sizeof *lsns);
    batch->lsns = lsns ? lsns : batch->lsns;
    gw_batch_refusal *refusal = realloc(batch->refusal, room * sizeof *refusal);
    batch->refusal = refusal ? refusal : batch->refusal;
    if (!item || !lsns || !refusal)
        return false;
    batch->room = (uint32_t)room;
    return true;
}

/* The event at p, of `bytes`, or, where `framed` is not, to the end that it has itself: *behind, or NULL. */
static inline int add(splitter *s, const uint8_t *p, size_t bytes, bool framed, const uint8_t **behind)
{
    gw_batch *batch = s->batch;
    if (batch->items == s->limits.events_max)
        return refuse_all(s, GW_CODE_BATCH_TOO_LARGE, p);
    if (batch->items == batch->room && !grow(batch, s->limits.events_max))
        return refuse_all(s, GW_CODE_INTERNAL, p);
    gw_verdict verdict;
    size_t length = bytes;
    int code = gw_validate_item(p, bytes, s->hash_key, s->names_device, &verdict, framed ? NULL : &length);
    if (code && !framed) {
        const uint8_t *wrong, *const end = value_end(p, p + bytes, &wrong);
        if (!end)
            return refuse_all(s, GW_CODE_MALFORMED_JSON, wrong);
        length = (size_t)(end - p);
    }
    if (length > s->limits.event_bytes_max)
        code = GW_CODE_BODY_TOO_LARGE;
    batch->item[batch->items++] = (gw_item){.seq = verdict.seq,
                                            .boot = verdict.boot,
                                            .offset = (uint32_t)(p - s->body),
                                            .bytes = (uint32_t)length,
                                            .device_offset = verdict.device_offset,
                                            .code = (uint16_t)code,
                                            .device_id_bytes = (uint8_t)verdict.device_bytes,
                                            .flags = verdict.flags};
    *behind = p + length;
    return 0;
}

static int split_lines(splitter *s, const uint8_t *p, const uint8_t *end)
{
    while ((p = skip_space(p, end)) < end) { /* over blank lines as well */
        const uint8_t *line_end = memchr(p, '\n', (size_t)(end - p)), *behind;
        if (!line_end)
            line_end = end;
        const uint8_t *last = line_end;
        while (is_space(last[-1]))
            last--;
        if (add(s, p, (size_t)(last - p), true, &behind))
            return s->batch->code;
        p = line_end;
    }
    return s->batch->items ? 0 : refuse_all(s, GW_CODE_EMPTY_BATCH, end);
}

static int split_array(splitter *s, const uint8_t *p, const uint8_t *end)
{
    p = skip_space(p + 1, end);
    if (p < end && *p == ']') {
        p = skip_space(p + 1, end);
        return p < end ? refuse_all(s, GW_CODE_MALFORMED_JSON, p) : refuse_all(s, GW_CODE_EMPTY_BATCH, end);
    }
    for (;;) {
        if (p == end)
            return refuse_all(s, GW_CODE_MALFORMED_JSON, end);
        if (add(s, p, (size_t)(end - p), false, &p))
            return s->batch->code;
        p = skip_space(p, end);
        if (p == end || (*p != ',' && *p != ']'))
            return refuse_all(s, GW_CODE_MALFORMED_JSON, p);
        const bool last = *p == ']';
        p = skip_space(p + 1, end);
        if (last)
            return p < end ? refuse_all(s, GW_CODE_MALFORMED_JSON, p) : 0;
    }
}

static int split_one(splitter *s, const uint8_t *p, const uint8_t *end)
{
    const uint8_t *behind;
    while (is_space(end[-1]))
        end--;
    if (*p != '{') {
        gw_verdict verdict;
        gw_validate_item(p, (size_t)(end - p), s->hash_key, s->names_device, &verdict, NULL);
        return refuse_all(s, (enum gw_code)verdict.code, p + verdict.offset);
    }
    return add(s, p, (size_t)(end - p), true, &behind);
}

int gw_batch_split(gw_batch *batch, const uint8_t *body, size_t body_bytes, bool lines, bool names_device,
                   const uint64_t hash_key[2], gw_batch_limits limits)
{
    splitter s = {batch, body, hash_key, limits, names_device};
    batch->items = batch->offset = batch->looked_at = batch->accepted = batch->duplicates = batch->refused = 0;
    batch->code = batch->stop = 0;
    batch->used_percent = 0;
    batch->lsn = batch->accepted_bytes = 0;
    if (body_bytes > UINT32_MAX)
        return refuse_all(&s, GW_CODE_BATCH_TOO_LARGE, body);
    const uint8_t *const end = body + body_bytes;
    if (lines)
        return split_lines(&s, body, end);
    const uint8_t *const p = skip_space(body, end);
    if (p == end)
        return refuse_all(&s, GW_CODE_MALFORMED_JSON, end);
    return *p == '[' ? split_array(&s, p, end) : split_one(&s, p, end);
}

/* ---- pass 2: into the log ---------------------------------------------------------------------------------------- */

typedef struct appending {
    gw_ingest *ingest;
    gw_batch *batch;
    const uint8_t *device_id, *body;
    uint8_t device_id_bytes;
    uint64_t received_at_ns, waited_ns;
} appending;

static inline gw_event event_of(const appending *a, const gw_item *item)
{
    const uint8_t *const event = a->body + item->offset;
    return (gw_event){.device_id = a->device_id ? a->device_id : event + item->device_offset,
                      .body = event,
                      .body_bytes = item->bytes,
                      .device_id_bytes = a->device_id ? a->device_id_bytes : item->device_id_bytes,
                      .flags = item->flags,
                      .splice = 1, /* an item begins with its brace */
                      .received_at_ns = a->received_at_ns,
                      .seq = item->seq,
                      .boot = item->boot,
                      .key_hash = item->key_hash};
}

static unsigned refuse_item(appending *a, uint32_t index, unsigned code)
{
    gw_batch *batch = a->batch;
    gw_batch_refusal *refusal = &batch->refusal[batch->refused++];
    const gw_item *item = &batch->item[index];
    refusal->index = index;
    /* Pass 1 kept only the code: verdicts of events that are refused are made once more, those of others never. */
    if (!item->code || item->code == GW_CODE_BODY_TOO_LARGE ||
        !gw_validate_item(a->body + item->offset, item->bytes, a->ingest->hash_key, !a->device_id, &refusal->verdict,
                          NULL))
        refusal->verdict = (gw_verdict){.code = (uint16_t)code};
    batch->lsns[index] = 0;
    return 0;
}

/* Another producer is writing this key: it is done in a moment, or dead and buried within a second. */
static gw_status append_busy(appending *a, const gw_event *event, uint64_t *lsn)
{
    enum { WAIT_NS = 50 * 1000000, NAP_NS = 200 * 1000 };
    gw_status status = GW_BUSY;
    while (status == GW_BUSY && a->waited_ns < WAIT_NS) {
        const uint64_t before = gw_monotonic_ns();
        nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
        a->waited_ns += gw_monotonic_ns() - before;
        status = gw_producer_append(a->ingest->producer, event, lsn);
    }
    return status;
}

/* 0, or why the batch ends before this item. */
static inline unsigned append(appending *a, uint32_t index)
{
    gw_batch *batch = a->batch;
    const gw_item *item = &batch->item[index];
    if (__builtin_expect(item->code != 0, 0))
        return refuse_item(a, index, item->code);
    const gw_event event = event_of(a, item);
    uint64_t *const lsn = &batch->lsns[index];
    gw_status status = gw_producer_append(a->ingest->producer, &event, lsn);
    if (__builtin_expect(status == GW_BUSY, 0))
        status = append_busy(a, &event, lsn);
    switch (status) {
    case GW_OK:
        batch->accepted++;
        batch->accepted_bytes += item->bytes;
        break;
    case GW_DUPLICATE:
        batch->duplicates++;
        break;
    case GW_CONFLICT:
        return refuse_item(a, index, GW_CODE_SEQ_CONFLICT);
    case GW_TOO_LARGE:
        return refuse_item(a, index, GW_CODE_BODY_TOO_LARGE);
    case GW_FULL:
        return GW_CODE_LOG_FULL;
    case GW_CLOSED:
        return GW_CODE_DRAINING;
    case GW_BUSY:
        return GW_CODE_ACCEPTED_PENDING;
    default:
        return GW_CODE_FAILED;
    }
    if (*lsn > batch->lsn)
        batch->lsn = *lsn;
    return 0;
}

static inline uint64_t record_bytes(const appending *a, const gw_item *item)
{
    return ((a->device_id ? a->device_id_bytes : item->device_id_bytes) + item->bytes + 64 + 7) & ~7u;
}

/* Bucket and place of an item that will be appended behind `ahead` bytes of others: they are far away, so they must be
 * asked for in time. */
static inline uint64_t look_ahead(const appending *a, uint32_t index, uint64_t ahead)
{
    gw_item *item = &a->batch->item[index];
    if (item->code)
        return 0;
    gw_event event = event_of(a, item);
    gw_producer_prefetch(a->ingest->producer, &event, ahead);
    item->key_hash = event.key_hash;
    return record_bytes(a, item);
}

int gw_ingest_batch(gw_ingest *ingest, gw_batch *batch, const uint8_t *device_id, size_t device_id_bytes,
                    const uint8_t *body, size_t body_bytes, bool lines, gw_batch_limits limits)
{
    enum { AHEAD = 8 };
    if (gw_batch_split(batch, body, body_bytes, lines, !device_id, ingest->hash_key, limits))
        return batch->code;
    if (device_id && !gw_device_id_ok(device_id, device_id_bytes))
        return batch->code = GW_CODE_BAD_DEVICE_ID;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    appending a = {.ingest = ingest,
                   .batch = batch,
                   .device_id = device_id,
                   .body = body,
                   .device_id_bytes = (uint8_t)device_id_bytes,
                   .received_at_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec};
    const uint32_t items = batch->items;
    uint64_t ahead = 0; /* bytes of the items between the one that is appended and the one that is looked at */
    uint32_t i = 0, far = 0;
    for (; i < items; i++) {
        for (; far < items && far <= i + AHEAD; far++)
            ahead += look_ahead(&a, far, ahead);
        const unsigned stop = append(&a, i);
        if (__builtin_expect(stop != 0, 0)) {
            batch->stop = (uint16_t)stop;
            break;
        }
        if (!batch->item[i].code)
            ahead -= record_bytes(&a, &batch->item[i]);
    }
    batch->looked_at = i;
    batch->used_percent = gw_ingest_used_percent(ingest->log);
    return 0;
}

void gw_batch_count(const gw_ingest *ingest, const gw_batch *batch, uint64_t started_ns)
{
    gw_counter_block *counters = ingest->counters;
    const unsigned refused = batch->code ? batch->code : batch->stop;
    gw_counter_add(counters, GW_COUNTER_RECEIVED, batch->looked_at + (refused != 0));
    gw_counter_add(counters, GW_COUNTER_ACCEPTED, batch->accepted);
    gw_counter_add(counters, GW_COUNTER_ACCEPTED_BYTES, batch->accepted_bytes);
    gw_counter_add(counters, GW_COUNTER_DUPLICATES, batch->duplicates);
    for (uint32_t i = 0; i < batch->refused; i++)
        gw_counter_add(counters, GW_COUNTER_REFUSED + batch->refusal[i].verdict.code, 1);
    if (refused)
        gw_counter_add(counters, GW_COUNTER_REFUSED + refused, 1);
    const uint64_t now = gw_monotonic_ns();
    gw_histogram_observe(counters, GW_COUNTER_REQUEST_NS, now > started_ns ? now - started_ns : 0);
}

void gw_batch_free(gw_batch *batch)
{
    free(batch->item);
    free(batch->lsns);
    free(batch->refusal);
    *batch = (gw_batch){0};
}
