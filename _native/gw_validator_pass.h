/* gw_validator_pass.h - the pass over one event, compiled once for each scan path (its includer names the path).
 *
 * The shape of the event is the shape of the code: top level, `metrics` and `tags` are loops that expect exactly what
 * the rules allow, so that nothing there can nest. Only `payload` nests; its loop keeps one bit for each open object or
 * array and stops at depth 33. So there is no recursion and no stack that an input could grow.
 *
 * Each step consumes one token and then applies the rules of gw_validator.h in their order. A function that returns a
 * position returns NULL once it has written a refusal to the verdict. */
#ifndef GW_VALIDATOR_PASS_H
#define GW_VALIDATOR_PASS_H

#include "gw_validator_tokens.h"

/* The same with the inner key that the rule is about. */
static __attribute__((noinline, cold)) const uint8_t *refuse_key(struct pass *s, enum gw_code code, enum gw_field field,
                                                                 const uint8_t *at, const uint8_t *key, size_t bytes)
{
    s->verdict->field_offset = (uint32_t)(key - s->body);
    s->verdict->field_bytes = (uint32_t)bytes;
    return refuse(s, code, field, at);
}

/* A value of the wrong type breaks the field's rule at its first byte; what cannot begin a value is not JSON. */
static __attribute__((noinline, cold)) int begins_value(uint8_t c)
{
    return c == '{' || c == '[' || c == '"' || c == '-' || (c >= '0' && c <= '9') || c == 't' || c == 'f' || c == 'n';
}

/* ------------------------------------------------------------------------------------------------ fields */

/* The object of `metrics` or of `tags`, from its opening brace. */
GW_INLINE const uint8_t *flat_object(struct pass *s, const uint8_t *p, const enum gw_field field)
{
    const uint8_t *const body = s->body, *const end = s->end;
    const int metrics = field == GW_FIELD_METRICS;
    const uint32_t limit = metrics ? GW_METRICS_MAX : GW_TAGS_MAX;
    gw_names *const names = &s->names;
    if (GW_UNLIKELY(*p != '{'))
        return begins_value(*p) ? refuse(s, GW_CODE_NOT_AN_OBJECT, field, p) : malformed(s, p);
    p++;
    GW_NEXT();
    if (*p == '}')
        return p + 1;
    gw_names_clear(names);
    for (;;) {
        /* Key. A run of [a-z0-9_] up to the quote is nearly always all of it. */
        if (GW_UNLIKELY(*p != '"'))
            return malformed(s, p);
        const uint8_t *const quote = p, *const key = p + 1, *name = key, *limit_of_name = end;
        size_t saved = 0;
        const uint8_t *close = scan_name(body, key, end);
        int well_named = 1;
        if (GW_UNLIKELY(close == end || *close != '"')) {
            close = string_rest(s, close, &saved);
            if (close == NULL)
                return NULL;
            well_named = 0;
        }
        const size_t key_bytes = (size_t)(close - key), name_bytes = key_bytes - saved;
        if (GW_UNLIKELY(++s->members > GW_MEMBERS_MAX))
            return refuse(s, GW_CODE_TOO_MANY_MEMBERS, GW_FIELD_NONE, quote);
        if (GW_UNLIKELY(names->count == limit))
            return refuse(s, metrics ? GW_CODE_TOO_MANY_METRICS : GW_CODE_TOO_MANY_TAGS, field, quote);
        if (GW_UNLIKELY(!well_named) && saved && name_bytes <= GW_NAME_BYTES_MAX) {
            uint8_t *spare = names->spare[names->count];
            gw_unescape(key, key_bytes, spare);
            name = spare, limit_of_name = spare + GW_NAME_BYTES_MAX;
            well_named = 1;
            for (size_t i = 0; i < name_bytes; i++)
                well_named &= !stops_name(spare[i]);
        }
        if (GW_UNLIKELY(!well_named || name_bytes - 1 >= GW_NAME_BYTES_MAX || name[0] < 'a' || name[0] > 'z'))
            return refuse_key(s, metrics ? GW_CODE_BAD_METRIC_KEY : GW_CODE_BAD_TAG_KEY, field, quote, key, key_bytes);
        if (GW_UNLIKELY(!gw_names_add(names, name, name_bytes, limit_of_name)))
            return refuse_key(s, GW_CODE_DUPLICATE_KEY, field, quote, key, key_bytes);

        p = close + 1;
        GW_EXPECT(':');
        GW_NEXT();

        /* Value. */
        const uint8_t *const value = p;
        if (metrics) {
            if (GW_UNLIKELY(!is_digit(*p) && *p != '-'))
                return begins_value(*p) ? refuse_key(s, GW_CODE_BAD_METRIC_VALUE, field, p, key, key_bytes)
                                        : malformed(s, p);
            int wide;
            p = number_end(s, p, &wide);
            if (GW_UNLIKELY(p == NULL))
                return NULL;
            if (GW_UNLIKELY(wide) && !gw_number_finite(value, p))
                return refuse_key(s, GW_CODE_BAD_METRIC_VALUE, field, value, key, key_bytes);
        } else {
            if (GW_UNLIKELY(*p != '"'))
                return begins_value(*p) ? refuse_key(s, GW_CODE_BAD_TAG_VALUE, field, p, key, key_bytes)
                                        : malformed(s, p);
            p = string_end(s, p + 1, &saved);
            if (GW_UNLIKELY(p == NULL))
                return NULL;
            if (GW_UNLIKELY((size_t)(p - value) - 1 - saved > GW_TAG_VALUE_BYTES_MAX))
                return refuse_key(s, GW_CODE_BAD_TAG_VALUE, field, value, key, key_bytes);
            p++;
        }

        GW_NEXT();
        if (*p == '}')
            return p + 1;
        if (GW_UNLIKELY(*p != ','))
            return malformed(s, p);
        p++;
        GW_NEXT();
    }
}

/* `ts`, from its opening quote. */
GW_INLINE const uint8_t *timestamp(struct pass *s, const uint8_t *p)
{
    if (GW_UNLIKELY(*p != '"'))
        return begins_value(*p) ? refuse(s, GW_CODE_BAD_TS, GW_FIELD_TS, p) : malformed(s, p);
    const uint8_t *const text = p + 1, *close;
    /* Most are exactly this long, and none of twenty bytes that pass is a quote or a backslash. */
    if (GW_LIKELY(s->end - text > 20) && text[20] == '"' && gw_timestamp_ok(text, 20)) {
        close = text + 20;
    } else {
        size_t saved;
        close = string_end(s, text, &saved);
        if (GW_UNLIKELY(close == NULL))
            return NULL;
        const size_t bytes = (size_t)(close - text);
        if (GW_UNLIKELY(!(saved ? gw_timestamp_escaped_ok(text, bytes) : gw_timestamp_ok(text, bytes))))
            return refuse(s, GW_CODE_BAD_TS, GW_FIELD_TS, p);
    }
    s->verdict->ts_offset = (uint32_t)(text - s->body);
    s->verdict->ts_bytes = (uint32_t)(close - text);
    s->verdict->flags |= GW_EVENT_HAS_TS;
    return close + 1;
}

/* `seq` or `boot`: an integer literal 0 ... 2^63-1. */
GW_INLINE const uint8_t *counter(struct pass *s, const uint8_t *p, enum gw_field field)
{
    const enum gw_code code = field == GW_FIELD_SEQ ? GW_CODE_BAD_SEQ : GW_CODE_BAD_BOOT;
    const uint8_t *const number = p, *const end = s->end;
    if (GW_UNLIKELY(!is_digit(*p))) {
        if (*p != '-')
            return begins_value(*p) ? refuse(s, code, field, p) : malformed(s, p);
        int wide;
        return number_end(s, p, &wide) ? refuse(s, code, field, number) : NULL;
    }
    uint64_t value = *p++ - (uint64_t)'0';
    if (value != 0)
        for (; p < end && is_digit(*p) && p - number < 19; p++)
            value = value * 10 + (*p - (uint64_t)'0');
    /* Nineteen digits fit 64 bits. What follows decides whether that was all of the number. */
    if (GW_UNLIKELY((p < end && (*p == '.' || (*p | 0x20) == 'e' || (is_digit(*p) && p - number == 19))) ||
                    value > INT64_MAX)) {
        int wide;
        return number_end(s, number, &wide) ? refuse(s, code, field, number) : NULL;
    }
    if (field == GW_FIELD_SEQ) {
        s->verdict->seq = value;
        s->verdict->flags |= GW_EVENT_HAS_SEQ;
    } else {
        s->verdict->boot = value;
        s->verdict->flags |= GW_EVENT_HAS_BOOT;
    }
    return p;
}

/* `device_id`, from its opening quote. */
GW_INLINE const uint8_t *device_id(struct pass *s, const uint8_t *p)
{
    if (GW_UNLIKELY(*p != '"'))
        return begins_value(*p) ? refuse(s, GW_CODE_BAD_DEVICE_ID, GW_FIELD_DEVICE_ID, p) : malformed(s, p);
    const uint8_t *const text = p + 1;
    size_t saved;
    const uint8_t *const close = string_end(s, text, &saved);
    if (GW_UNLIKELY(close == NULL))
        return NULL;
    const size_t bytes = (size_t)(close - text);
    if (GW_UNLIKELY(!gw_device_id_ok(text, bytes))) /* an escape is a backslash, which no id has */
        return refuse(s, GW_CODE_BAD_DEVICE_ID, GW_FIELD_DEVICE_ID, p);
    s->verdict->device_offset = (uint32_t)(text - s->body);
    s->verdict->device_bytes = bytes;
    return close + 1;
}

/* Any JSON value of depth <= 32. */
GW_INLINE const uint8_t *payload(struct pass *s, const uint8_t *p, const uint64_t *hash_key)
{
    const uint8_t *const body = s->body, *const end = s->end;
    uint64_t objects = 0; /* one bit for each open container, innermost lowest: 1 for an object */
    uint32_t depth = 0;
    gw_keys *const keys = &s->keys;
    gw_object *object = NULL; /* the open object at `depth`, if it is one */
    gw_keys_begin(keys, body, end, hash_key);

value: /* p is at its first byte */
    switch (*p) {
    case '"': {
        size_t saved;
        p = string_end(s, p + 1, &saved);
        if (GW_UNLIKELY(p == NULL))
            return NULL;
        p++;
        goto behind_value;
    }
    case '-':
    case '0' ... '9': {
        const uint8_t *const number = p;
        int wide;
        p = number_end(s, p, &wide);
        if (GW_UNLIKELY(p == NULL))
            return NULL;
        if (GW_UNLIKELY(wide) && !gw_number_finite(number, p))
            return malformed(s, number);
        goto behind_value;
    }
    case 't':
    case 'f':
    case 'n':
        p = literal_end(s, p);
        if (GW_UNLIKELY(p == NULL))
            return NULL;
        goto behind_value;
    case '[':
    case '{':
        if (GW_UNLIKELY(depth == GW_PAYLOAD_DEPTH_MAX))
            return refuse(s, GW_CODE_PAYLOAD_TOO_DEEP, GW_FIELD_PAYLOAD, p);
        depth++;
        objects <<= 1;
        if (*p++ == '[') {
            GW_NEXT();
            if (*p != ']')
                goto value;
            goto close;
        }
        objects |= 1;
        object = gw_keys_open_object(keys, depth);
        GW_NEXT();
        if (*p != '}')
            goto key;
        goto close;
    default:
        return malformed(s, p);
    }

key : { /* p is where its opening quote must be */
    if (GW_UNLIKELY(*p != '"'))
        return malformed(s, p);
    const uint8_t *const quote = p;
    size_t saved;
    p = string_end(s, p + 1, &saved);
    if (GW_UNLIKELY(p == NULL))
        return NULL;
    if (GW_UNLIKELY(++s->members > GW_MEMBERS_MAX))
        return refuse(s, GW_CODE_TOO_MANY_MEMBERS, GW_FIELD_NONE, quote);
    if (GW_UNLIKELY(!gw_keys_add(keys, object, quote + 1, (size_t)(p - quote - 1), saved)))
        return refuse(s, GW_CODE_DUPLICATE_KEY, GW_FIELD_PAYLOAD, quote);
    p++;
    GW_EXPECT(':');
    GW_NEXT();
    goto value;
}

close: /* p is at the closing brace or bracket, which is the right one */
    p++;
    depth--;
    objects >>= 1;
    object = &keys->object[depth];

behind_value:
    if (depth == 0)
        return p;
    GW_NEXT();
    if (*p == ',') {
        p++;
        GW_NEXT();
        if (objects & 1)
            goto key;
        goto value;
    }
    if (GW_LIKELY(*p == (objects & 1 ? '}' : ']')))
        goto close;
    return malformed(s, p);
}

/* Which field a top-level key names; GW_FIELD_UNKNOWN for none. */
GW_INLINE enum gw_field field_of(const uint8_t *key, size_t bytes)
{
    switch (bytes) {
    case 2:
        return memcmp(key, "ts", 2) == 0 ? GW_FIELD_TS : GW_FIELD_UNKNOWN;
    case 3:
        return memcmp(key, "seq", 3) == 0 ? GW_FIELD_SEQ : GW_FIELD_UNKNOWN;
    case 4:
        return memcmp(key, "tags", 4) == 0   ? GW_FIELD_TAGS
               : memcmp(key, "boot", 4) == 0 ? GW_FIELD_BOOT
                                             : GW_FIELD_UNKNOWN;
    case 7:
        return memcmp(key, "metrics", 7) == 0   ? GW_FIELD_METRICS
               : memcmp(key, "payload", 7) == 0 ? GW_FIELD_PAYLOAD
                                                : GW_FIELD_UNKNOWN;
    case 9:
        return memcmp(key, "device_id", 9) == 0 ? GW_FIELD_DEVICE_ID : GW_FIELD_UNKNOWN;
    default:
        return GW_FIELD_UNKNOWN;
    }
}

static __attribute__((noinline)) GW_TARGET enum gw_field field_of_escaped(const uint8_t *key, size_t key_bytes,
                                                                          size_t saved)
{
    uint8_t name[sizeof "device_id"];
    if (key_bytes - saved > sizeof name)
        return GW_FIELD_UNKNOWN;
    gw_unescape(key, key_bytes, name);
    return field_of(name, key_bytes - saved);
}

/* The field whose name and closing quote are at `key`, without looking for that quote: a comparison that is predicted
 * lets the next step begin at once, while a scan makes it wait for its result. GW_FIELD_UNKNOWN: scan. */
GW_INLINE enum gw_field field_at(const uint8_t *key, const uint8_t *end, size_t *bytes)
{
#define GW_IS(name) (*bytes = sizeof name - 1, memcmp(key, name "\"", sizeof name) == 0)
    if (GW_UNLIKELY(end - key < (ptrdiff_t)sizeof "device_id"))
        return GW_FIELD_UNKNOWN;
    switch (*key) {
    case 'm':
        return GW_IS("metrics") ? GW_FIELD_METRICS : GW_FIELD_UNKNOWN;
    case 't':
        return GW_IS("ts") ? GW_FIELD_TS : GW_IS("tags") ? GW_FIELD_TAGS : GW_FIELD_UNKNOWN;
    case 's':
        return GW_IS("seq") ? GW_FIELD_SEQ : GW_FIELD_UNKNOWN;
    case 'p':
        return GW_IS("payload") ? GW_FIELD_PAYLOAD : GW_FIELD_UNKNOWN;
    case 'b':
        return GW_IS("boot") ? GW_FIELD_BOOT : GW_FIELD_UNKNOWN;
    case 'd':
        return GW_IS("device_id") ? GW_FIELD_DEVICE_ID : GW_FIELD_UNKNOWN;
    default:
        return GW_FIELD_UNKNOWN;
    }
#undef GW_IS
}

/* The document. Returns its end, or NULL. `alone`: nothing may stand behind it. */
GW_INLINE const uint8_t *document(struct pass *s, const uint64_t *hash_key, bool alone)
{
    const uint8_t *const body = s->body, *const end = s->end, *p = body;
    unsigned seen = 0; /* one bit for each enum gw_field */
    GW_NEXT();
    if (GW_UNLIKELY(*p != '{'))
        return begins_value(*p) ? refuse(s, GW_CODE_NOT_AN_OBJECT, GW_FIELD_NONE, p) : malformed(s, p);
    s->verdict->object_offset = (uint32_t)(p - body);
    p++;
    GW_NEXT();
    if (*p != '}')
        for (;;) {
            if (GW_UNLIKELY(*p != '"'))
                return malformed(s, p);
            const uint8_t *const quote = p, *const key = p + 1;
            size_t key_bytes;
            enum gw_field field = field_at(key, end, &key_bytes);
            if (GW_UNLIKELY(field == GW_FIELD_UNKNOWN)) {
                size_t saved;
                const uint8_t *close = string_end(s, key, &saved);
                if (close == NULL)
                    return NULL;
                key_bytes = (size_t)(close - key);
                field = saved ? field_of_escaped(key, key_bytes, saved) : field_of(key, key_bytes);
            }
            if (GW_UNLIKELY(++s->members > GW_MEMBERS_MAX))
                return refuse(s, GW_CODE_TOO_MANY_MEMBERS, GW_FIELD_NONE, quote);
            if (GW_UNLIKELY(field == GW_FIELD_UNKNOWN || (field == GW_FIELD_DEVICE_ID && !s->names_device)))
                return refuse_key(s, GW_CODE_UNKNOWN_FIELD, GW_FIELD_UNKNOWN, quote, key, key_bytes);
            if (GW_UNLIKELY(seen & 1u << field))
                return refuse(s, GW_CODE_DUPLICATE_KEY, field, quote);
            seen |= 1u << field;
            p = key + key_bytes + 1;
            GW_EXPECT(':');
            GW_NEXT();
            switch (field) {
            case GW_FIELD_METRICS:
                p = flat_object(s, p, GW_FIELD_METRICS);
                break;
            case GW_FIELD_TAGS:
                p = flat_object(s, p, GW_FIELD_TAGS);
                break;
            case GW_FIELD_TS:
                p = timestamp(s, p);
                break;
            case GW_FIELD_SEQ:
                p = counter(s, p, GW_FIELD_SEQ);
                break;
            case GW_FIELD_BOOT:
                p = counter(s, p, GW_FIELD_BOOT);
                break;
            case GW_FIELD_DEVICE_ID:
                p = device_id(s, p);
                break;
            default:
                p = payload(s, p, hash_key);
                break;
            }
            if (GW_UNLIKELY(p == NULL))
                return NULL;
            GW_NEXT();
            if (*p == '}')
                break;
            if (GW_UNLIKELY(*p != ','))
                return malformed(s, p);
            p++;
            GW_NEXT();
        }
    const uint8_t *const brace = p++;
    if (alone) {
        if (p < end)
            p = scan_space(body, p, end);
        if (GW_UNLIKELY(p < end))
            return malformed(s, p);
    }
    if (GW_UNLIKELY(!(seen & 1u << GW_FIELD_METRICS)))
        return refuse(s, GW_CODE_MISSING_METRICS, GW_FIELD_METRICS, brace);
    if (GW_UNLIKELY(s->names_device && !(seen & 1u << GW_FIELD_DEVICE_ID)))
        return refuse(s, GW_CODE_BAD_DEVICE_ID, GW_FIELD_DEVICE_ID, brace);
    return p;
}

/* Defines the entry of this path. */
#define GW_PASS(name)                                                                                    \
    GW_TARGET int gw_validate_##name(const uint8_t *body, size_t body_bytes, const uint64_t hash_key[2], \
                                     bool names_device, gw_verdict *verdict, size_t *end)                \
    {                                                                                                    \
        struct pass s;                                                                                   \
        s.body = body, s.end = body + body_bytes, s.verdict = verdict, s.members = 0;                    \
        s.names_device = names_device;                                                                   \
        const uint8_t *const behind = document(&s, hash_key, end == NULL);                               \
        if (end != NULL && behind != NULL)                                                               \
            *end = (size_t)(behind - body);                                                              \
        return verdict->code;                                                                            \
    }

#endif
