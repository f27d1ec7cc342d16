/* gw_validator_keys.h - "no duplicate keys": two sets, because two kinds of object need it.
 *
 *   gw_names   the keys of `metrics` or `tags`: at most 32 of at most 32 bytes of [a-z0-9_]. Their number is bounded,
 *              so a bloom word and a linear look are enough, and no secret is needed.
 *   gw_keys    the keys of the objects inside `payload`: any strings, up to GW_MEMBERS_MAX in one document. An object
 *              keeps its first GW_KEYS_LINEAR keys in place (a filter, then one by one); the next key moves them all
 *              into one open-addressed table that the objects of the document share. Its slots come from SipHash
 *              under a key of the process and of the object, so that an outsider cannot make two keys meet; what
 *              meets is compared exactly, byte by byte after unescaping, so that a collision never refuses an event.
 *
 * Both live on the stack of gw_validate and are not initialised: only counters and, when the first object outgrows
 * its linear part, the 4 KiB of slots. A small document touches a few hundred bytes of the 35 KiB. */
#ifndef GW_VALIDATOR_KEYS_H
#define GW_VALIDATOR_KEYS_H

#include "gw_validator.h"
#include "gw_validator_text.h"

/* ------------------------------------------------------------------------------------------------ gw_names */

typedef struct gw_names {
    uint32_t count;
    uint64_t bloom[4];
    struct gw_name {
        const uint8_t *at;   /* in the body, or in `spare` if it was written with escapes */
        uint64_t head, tail; /* first eight bytes, last eight: all of it up to 16 bytes */
        uint32_t bytes;
    } name[GW_METRICS_MAX];
    uint8_t spare[GW_METRICS_MAX][GW_NAME_BYTES_MAX];
} gw_names;

static inline void gw_names_clear(gw_names *names)
{
    names->count = 0;
    memset(names->bloom, 0, sizeof names->bloom);
}

/* The first eight bytes of a text, zeros behind its end; never reads at or beyond `limit`. */
static inline uint64_t gw_head(const uint8_t *text, size_t bytes, const uint8_t *limit)
{
    if (bytes >= 8)
        return gw_load64(text);
    if (__builtin_expect(limit - text >= 8, 1))
        return gw_load64(text) & ((1ull << (8 * bytes)) - 1);
    uint64_t head = 0;
    for (size_t i = 0; i < bytes; i++)
        head |= (uint64_t)text[i] << (8 * i);
    return head;
}

/* Adds a name; 0 if it was there. The caller has checked the name's length and the number of names. `limit`: the first
 * byte behind the name's surroundings that must not be read. */
static inline int gw_names_add(gw_names *names, const uint8_t *at, size_t bytes, const uint8_t *limit)
{
    const uint64_t head = gw_head(at, bytes, limit);
    const uint64_t tail = bytes > 8 ? gw_load64(at + bytes - 8) : 0;
    const uint64_t mixed = (head ^ (tail << 7 | tail >> 57) ^ bytes) * 0x9E3779B97F4A7C15ull;
    uint64_t *word = &names->bloom[mixed >> 62];
    const uint64_t bit = 1ull << (mixed >> 56 & 63);
    if (__builtin_expect((*word & bit) != 0, 0))
        for (uint32_t i = 0; i < names->count; i++) {
            const struct gw_name *other = &names->name[i];
            if (other->head == head && other->tail == tail && other->bytes == bytes &&
                (bytes <= 16 || memcmp(other->at + 8, at + 8, bytes - 16) == 0))
                return 0;
        }
    *word |= bit;
    names->name[names->count++] = (struct gw_name){at, head, tail, (uint32_t)bytes};
    return 1;
}

/* ------------------------------------------------------------------------------------------------- gw_keys */

enum { GW_KEYS_LINEAR = 8, GW_KEYS_SLOTS = 2 * GW_MEMBERS_MAX };

/* A key as written, quotes excluded; its unescaped length is bytes - saved. */
typedef struct gw_key {
    uint32_t offset, bytes, saved;
} gw_key;

typedef struct gw_object {
    uint32_t identity;
    uint32_t count;
    uint64_t filter;               /* one bit for each key so far, by head and length: says "not there" nearly always */
    uint64_t hash_key[2];          /* of this object, made when it outgrows its linear part */
    uint64_t head[GW_KEYS_LINEAR]; /* first eight bytes, unescaped */
    gw_key key[GW_KEYS_LINEAR];
} gw_object;

typedef struct gw_keys {
    const uint8_t *body, *end;
    const uint64_t *hash_key;
    uint32_t objects;                           /* opened so far: the last one's identity */
    uint32_t entries;                           /* in the table; 0: its slots were never cleared */
    gw_object object[GW_PAYLOAD_DEPTH_MAX + 1]; /* by depth */
    struct gw_entry {
        uint64_t hash;
        gw_key key;
        uint32_t object;
    } entry[GW_MEMBERS_MAX];
    uint16_t slot[GW_KEYS_SLOTS]; /* 0: empty, else entry number + 1 */
} gw_keys;

static inline void gw_keys_begin(gw_keys *keys, const uint8_t *body, const uint8_t *end, const uint64_t *hash_key)
{
    keys->body = body, keys->end = end, keys->hash_key = hash_key;
    keys->objects = keys->entries = 0;
}

static inline gw_object *gw_keys_open_object(gw_keys *keys, uint32_t depth)
{
    gw_object *object = &keys->object[depth];
    object->identity = ++keys->objects;
    object->count = 0;
    object->filter = 0;
    return object;
}

/* The rest of gw_keys_add: the filter could not say no, or the object is wide. `head`: see gw_object. */
int gw_keys_add_slowly(gw_keys *keys, gw_object *object, const gw_key *key, uint64_t head, uint64_t bit);

uint64_t gw_head_escaped(const uint8_t *text, size_t bytes);

/* Adds a key to an open object; 0 if it was there. The caller keeps the document's member count. */
static inline int gw_keys_add(gw_keys *keys, gw_object *object, const uint8_t *at, size_t bytes, size_t saved)
{
    const uint64_t head = __builtin_expect(saved == 0, 1) ? gw_head(at, bytes, keys->end) : gw_head_escaped(at, bytes);
    const uint64_t bit = 1ull << (((head ^ (bytes - saved)) * 0x9E3779B97F4A7C15ull) >> 58);
    const gw_key key = {(uint32_t)(at - keys->body), (uint32_t)bytes, (uint32_t)saved};
    const uint32_t count = object->count;
    if (__builtin_expect(count >= GW_KEYS_LINEAR || (object->filter & bit) != 0, 0))
        return gw_keys_add_slowly(keys, object, &key, head, bit);
    object->filter |= bit;
    object->head[count] = head;
    object->key[count] = key;
    object->count = count + 1;
    return 1;
}

#endif
