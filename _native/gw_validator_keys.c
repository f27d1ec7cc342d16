/* gw_validator_keys.c - duplicate keys inside `payload`. See gw_validator_keys.h. */
#include "gw_validator_keys.h"

#include "gw_hash.h"

static int keys_equal(const uint8_t *body, const gw_key *a, const gw_key *b)
{
    if (a->bytes - a->saved != b->bytes - b->saved)
        return 0;
    if (a->saved == 0 && b->saved == 0)
        return memcmp(body + a->offset, body + b->offset, a->bytes) == 0;
    gw_unescaper left = gw_unescaper_of(body + a->offset, a->bytes);
    gw_unescaper right = gw_unescaper_of(body + b->offset, b->bytes);
    int byte;
    do {
        byte = gw_unescaper_next(&left);
        if (byte != gw_unescaper_next(&right))
            return 0;
    } while (byte >= 0);
    return 1;
}

/* gw_siphash over the unescaped bytes, word by word as they come. */
static uint64_t hash_escaped(const uint64_t key[2], const uint8_t *text, size_t bytes)
{
    uint64_t v0 = 0x736f6d6570736575ull ^ key[0], v1 = 0x646f72616e646f6dull ^ key[1];
    uint64_t v2 = 0x6c7967656e657261ull ^ key[0], v3 = 0x7465646279746573ull ^ key[1];
    uint64_t word = 0, count = 0;
    gw_unescaper walk = gw_unescaper_of(text, bytes);
    for (int byte; (byte = gw_unescaper_next(&walk)) >= 0;) {
        word |= (uint64_t)byte << (8 * (count & 7));
        if ((++count & 7) == 0) {
            v3 ^= word;
            GW_SIPROUND(v0, v1, v2, v3);
            v0 ^= word;
            word = 0;
        }
    }
    word |= count << 56;
    v3 ^= word;
    GW_SIPROUND(v0, v1, v2, v3);
    v0 ^= word;
    v2 ^= 0xff;
    GW_SIPROUND(v0, v1, v2, v3);
    GW_SIPROUND(v0, v1, v2, v3);
    GW_SIPROUND(v0, v1, v2, v3);
    return v0 ^ v1 ^ v2 ^ v3;
}

/* Puts a key of `object` into the table; 0 if it was there. At most half of the slots are ever taken. */
static int table_add(gw_keys *keys, const gw_object *object, const gw_key *key)
{
    const uint8_t *text = keys->body + key->offset;
    const uint64_t hash =
        key->saved ? hash_escaped(object->hash_key, text, key->bytes) : gw_siphash(object->hash_key, text, key->bytes);
    uint32_t at = (uint32_t)hash & (GW_KEYS_SLOTS - 1);
    for (; keys->slot[at] != 0; at = (at + 1) & (GW_KEYS_SLOTS - 1)) {
        const struct gw_entry *entry = &keys->entry[keys->slot[at] - 1];
        if (entry->hash == hash && entry->object == object->identity && keys_equal(keys->body, &entry->key, key))
            return 0;
    }
    keys->entry[keys->entries] = (struct gw_entry){hash, *key, object->identity};
    keys->slot[at] = (uint16_t)++keys->entries;
    return 1;
}

/* The object outgrows its linear part: its keys so far are known to differ. */
static void move_to_table(gw_keys *keys, gw_object *object)
{
    if (keys->entries == 0)
        memset(keys->slot, 0, sizeof keys->slot);
    /* A key of its own for each object, so that the same names in many objects do not meet. */
    const uint64_t identity = object->identity;
    object->hash_key[0] = keys->hash_key[0];
    object->hash_key[1] = gw_siphash(keys->hash_key, &identity, sizeof identity);
    for (int i = 0; i < GW_KEYS_LINEAR; i++)
        table_add(keys, object, &object->key[i]);
}

uint64_t gw_head_escaped(const uint8_t *text, size_t bytes)
{
    uint64_t head = 0;
    gw_unescaper walk = gw_unescaper_of(text, bytes);
    for (int shift = 0, byte; shift < 64 && (byte = gw_unescaper_next(&walk)) >= 0; shift += 8)
        head |= (uint64_t)byte << shift;
    return head;
}

int gw_keys_add_slowly(gw_keys *keys, gw_object *object, const gw_key *key, uint64_t head, uint64_t bit)
{
    const uint32_t count = object->count++;
    if (count < GW_KEYS_LINEAR) {
        for (uint32_t i = 0; i < count; i++)
            if (object->head[i] == head && keys_equal(keys->body, &object->key[i], key))
                return 0;
        object->filter |= bit;
        object->head[count] = head;
        object->key[count] = *key;
        return 1;
    }
    if (count == GW_KEYS_LINEAR)
        move_to_table(keys, object);
    return table_add(keys, object, key);
}
