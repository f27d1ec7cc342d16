/* gw_log_slot.c - slot pages: what they promise, and how a run begins in one. Recovery and the committer write them. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "gw_crc32c.h"
#include "gw_log_shared.h"

static bool is_optional(const gw_slot_page *slot, unsigned sink)
{
    return slot->optional >> sink & 1;
}

uint64_t gw_slot_kept(const gw_slot_page *slot)
{
    uint64_t least = ~0ull;
    for (unsigned i = 0; i < slot->sinks; i++)
        if (!is_optional(slot, i) && slot->sink[i].cursor.lsn < least)
            least = slot->sink[i].cursor.lsn;
    return least == ~0ull ? slot->watermark : least;
}

/* Whether its positions are such as a gateway writes. The checksum is no secret: a page made by another hand must not
 * lead outside the map, nor to a hole longer than the ring. */
static bool slot_is_sane(const gw_slot_page *page, uint64_t capacity)
{
    if (page->epochs < 1 || page->epochs > GW_EPOCHS_MAX || page->sinks > GW_SINKS_MAX)
        return false;
    uint64_t c = gw_slot_kept(page), limit = c + capacity, bits = page->watermark | c;
    const gw_epoch_range *last = &page->range[page->epochs - 1];
    bool sane = c >= GW_FIRST_LSN && c <= UINT64_MAX / 2 && page->watermark >= GW_FIRST_LSN &&
                page->watermark <= limit && last->start <= limit && last->epoch == page->epoch;
    for (unsigned i = 0; i < page->sinks; i++) {
        bits |= page->sink[i].cursor.lsn;
        sane &= page->sink[i].cursor.lsn <= limit && page->sink[i].cursor.lsn >= GW_FIRST_LSN;
    }
    for (unsigned i = 0; i < page->epochs; i++) {
        const gw_epoch_range *range = &page->range[i];
        bits |= range->start;
        sane &= i == 0 || (range->start > range[-1].start && range->epoch > range[-1].epoch);
    }
    return sane && bits % 8 == 0;
}

bool gw_slot_read(const gw_log *log, unsigned which, gw_slot_page *page)
{
    memcpy(page, log->file + (1 + which) * GW_PAGE, sizeof *page);
    uint32_t crc = page->crc;
    page->crc = 0;
    return page->magic == GW_SLOT_MAGIC && page->version == GW_LOG_VERSION && crc == gw_crc32c(0, page, sizeof *page) &&
           slot_is_sane(page, log->mask + 1);
}

/* ---- the sinks of a run --------------------------------------------------------------------------------------- */

static int find_sink(const gw_slot_page *slot, const char *name)
{
    for (unsigned i = 0; i < slot->sinks; i++)
        if (strncmp(slot->sink[i].name, name, GW_SINK_NAME_BYTES) == 0)
            return (int)i;
    return -1;
}

/* A sink that is not of this run any more: its place becomes a nameless optional one, for the next new sink. */
static gw_status forget(gw_slot_page *slot, unsigned i, const gw_sinks *sinks, uint64_t start, uint64_t ordinal,
                        gw_error *error)
{
    gw_slot_cursor *old = &slot->sink[i];
    bool chosen = sinks->forget && strncmp(old->name, sinks->forget, GW_SINK_NAME_BYTES) == 0;
    if (old->name[0] && old->cursor.ordinal != ordinal && !chosen) {
        char text[sizeof error->text];
        snprintf(text, sizeof text, "the log holds %llu events for the sink \"%.16s\", which is not configured",
                 (unsigned long long)(ordinal - old->cursor.ordinal), old->name);
        return gw_fail(error, GW_ERRNO, EINVAL, old->cursor.lsn, text);
    }
    *old = (gw_slot_cursor){.cursor = {.lsn = start, .ordinal = ordinal, .base = ordinal}};
    slot->optional |= 1u << i;
    return GW_OK;
}

gw_status gw_slot_take_sinks(gw_slot_page *slot, const gw_sinks *sinks, uint64_t start, uint64_t ordinal,
                             gw_error *error)
{
    unsigned count = 0;
    while (sinks->names[count])
        count++;
    if (count > GW_SINKS_MAX || (count ? !(~sinks->optional & ((1u << count) - 1)) : slot->sinks))
        return gw_fail(error, GW_ERRNO, EINVAL, 0, "too many sinks, or none of them is required");
    for (unsigned i = 0; i < slot->sinks; i++) {
        bool wanted = false;
        for (unsigned k = 0; k < count; k++)
            wanted |= strncmp(slot->sink[i].name, sinks->names[k], GW_SINK_NAME_BYTES) == 0;
        gw_status status = wanted ? GW_OK : forget(slot, i, sinks, start, ordinal, error);
        if (status != GW_OK)
            return status;
    }
    while (slot->sinks && !slot->sink[slot->sinks - 1].name[0])
        slot->sink[--slot->sinks] = (gw_slot_cursor){0};
    for (unsigned k = 0; k < count; k++) {
        int i = find_sink(slot, sinks->names[k]);
        if (i < 0) {
            if ((i = find_sink(slot, "")) < 0)
                i = (int)slot->sinks++;
            if (i == GW_SINKS_MAX || strlen(sinks->names[k]) > GW_SINK_NAME_BYTES)
                return gw_fail(error, GW_ERRNO, EINVAL, 0, "too many sinks, or a sink's name is too long");
            gw_slot_cursor *fresh = &slot->sink[i];
            *fresh = (gw_slot_cursor){.cursor = {.lsn = start, .ordinal = ordinal, .base = ordinal}};
            memcpy(fresh->name, sinks->names[k], strlen(sinks->names[k]));
        }
        slot->optional = (slot->optional & ~(1u << i)) | (sinks->optional >> k & 1) << i;
    }
    slot->optional &= (1u << slot->sinks) - 1;
    return GW_OK;
}

/* ---- the epoch of a run --------------------------------------------------------------------------------------- */

void gw_slot_open_epoch(gw_slot_page *slot, unsigned unknown, uint64_t start)
{
    slot->epoch += 1 + unknown; /* an epoch that wrote records must not begin again: they would pass for new ones */
    while (slot->epochs && slot->range[slot->epochs - 1].start >= start)
        slot->epochs--; /* an empty range is replaced: a crash loop needs no room */
    if (slot->epochs == GW_EPOCHS_MAX) {
        memmove(slot->range, slot->range + 1, (GW_EPOCHS_MAX - 1) * sizeof slot->range[0]);
        memmove(slot->lost_from, slot->lost_from + 1, (GW_EPOCHS_MAX - 1) * sizeof slot->lost_from[0]);
        slot->epochs--;
    }
    slot->lost_from[slot->epochs] = 0;
    slot->range[slot->epochs++] = (gw_epoch_range){.start = start, .epoch = slot->epoch};
    for (unsigned i = slot->epochs; i < GW_EPOCHS_MAX; i++) {
        slot->range[i] = (gw_epoch_range){0};
        slot->lost_from[i] = 0;
    }
}
