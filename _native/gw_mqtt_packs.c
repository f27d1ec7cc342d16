/* gw_mqtt_packs.c - the open packs of a connection: a bounded table by device, and a list by age.
 *
 *   bucket[hash] -> pack -> pack      aging: oldest <-> ... <-> newest (of those, the oldest is closed when the table
 *                                     is full, or when it has lingered)       ready: closed ones, in their order
 *
 * Records are added in the log's order, and ready packs leave in the order in which they were closed. Of one topic
 * there is one open pack at most, so no two packs of it change places (M6). */
#include <stdlib.h>
#include <string.h>

#include "gw_hash.h"
#include "gw_mqtt_window.h"

static void list_add(connection *c, pack_list *list, uint16_t i)
{
    c->packs[i].older = list->newest;
    c->packs[i].newer = NONE;
    if (list->newest == NONE)
        list->oldest = i;
    else
        c->packs[list->newest].newer = i;
    list->newest = i;
}

static void list_remove(connection *c, pack_list *list, uint16_t i)
{
    const pack *p = &c->packs[i];
    if (p->older == NONE)
        list->oldest = p->newer;
    else
        c->packs[p->older].newer = p->newer;
    if (p->newer == NONE)
        list->newest = p->older;
    else
        c->packs[p->newer].older = p->older;
}

bool gw_mqtt_packs_new(gw_window *w, connection *c)
{
    c->packs = calloc(w->packs + PACKS_SPARE, sizeof *c->packs);
    c->bucket = malloc(BUCKETS * sizeof *c->bucket);
    return c->packs && c->bucket;
}

void gw_mqtt_packs_clear(gw_window *w, connection *c)
{
    if (!c->packs)
        return;
    c->free = c->aging = c->ready = (pack_list){NONE, NONE};
    c->open_packs = 0;
    for (uint16_t i = 0; i < w->packs + PACKS_SPARE; i++)
        list_add(c, &c->free, i);
    memset(c->bucket, 0xff, BUCKETS * sizeof *c->bucket); /* NONE */
}

static void close_pack(connection *c, uint16_t i)
{
    uint16_t *link = &c->bucket[c->packs[i].hash % BUCKETS];
    while (*link != i)
        link = &c->packs[*link].below;
    *link = c->packs[i].below;
    list_remove(c, &c->aging, i);
    c->open_packs--;
    list_add(c, &c->ready, i);
}

void gw_mqtt_packs_close_oldest(connection *c)
{
    close_pack(c, c->aging.oldest);
}

void gw_mqtt_packs_pop(connection *c)
{
    uint16_t i = c->ready.oldest;
    list_remove(c, &c->ready, i);
    list_add(c, &c->free, i);
}

static uint16_t find(const gw_window *w, const connection *c, uint64_t hash, const gw_record *r)
{
    uint16_t i = c->bucket[hash % BUCKETS];
    for (; i != NONE; i = c->packs[i].below) {
        const pack *p = &c->packs[i];
        if (w->topic_is_fixed || (p->hash == hash && p->device_id_bytes == r->device_id_bytes &&
                                  memcmp(p->device_id, r->device_id, r->device_id_bytes) == 0))
            break;
    }
    return i;
}

/* The table never runs out: a fill adds only while nothing is ready, and one record makes at most three packs ready
 * (the one it does not fit into, the oldest, its own). */
void gw_mqtt_packs_add(gw_window *w, connection *c, uint32_t index, const gw_record *r, uint64_t now_ns)
{
    record *slot = &w->record[index];
    const uint32_t bytes = gw_mqtt_event_bytes(slot, r), around = gw_mqtt_around(w, r);
    uint32_t most = c->packet_bytes_max > around ? c->packet_bytes_max - around : 0;
    if (most > w->pack.bytes_max)
        most = w->pack.bytes_max;
    const bool alone = slot->alone || !bytes;
    const uint64_t hash = w->topic_is_fixed ? 0 : gw_siphash(w->bucket_key, r->device_id, r->device_id_bytes);
    uint16_t i = find(w, c, hash, r);
    if (i != NONE && (alone || c->packs[i].bytes + bytes > most)) {
        close_pack(c, i);
        i = NONE;
    }
    if (i == NONE) {
        if (c->open_packs == w->packs)
            close_pack(c, c->aging.oldest);
        i = c->free.newest; /* the one that is most likely cached */
        list_remove(c, &c->free, i);
        pack *p = &c->packs[i];
        *p = (pack){.hash = hash,
                    .opened_ns = now_ns,
                    .bytes = w->pack.array, /* its brackets are one more than its commas */
                    .device_id = r->device_id,
                    .device_id_bytes = r->device_id_bytes,
                    .below = c->bucket[hash % BUCKETS]};
        c->bucket[hash % BUCKETS] = i;
        list_add(c, &c->aging, i);
        c->open_packs++;
    }
    pack *p = &c->packs[i];
    chain_add(w, &p->records, index);
    p->bytes += bytes;
    if (alone || p->bytes >= most)
        close_pack(c, i);
}
