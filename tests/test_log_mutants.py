"""Each rule of the log is taken away once, and a named test must notice.

A mutant is a patch of _native (old text, which must stand there exactly once, and new text). ROWS
are those of the table "Why, rule by rule" in docs/log.md that are built so far; RULES are other
sentences of it, and every bug that its tests have found. The same tests pass on the code as it is
(test_native.py, and once more here).
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.native_build import NATIVE, TESTS, build, run

LOG, READ, FOLLOW = "gw_log.c", "gw_log_read.c", "gw_log_follow.c"
COMMIT, RECOVER = "gw_log_commit.c", "gw_log_recover.c"
INDEX, RECEIPT, WAIT = "gw_log_index.c", "gw_log_receipt.c", "gw_log_wait.c"
SINKS, SLOT, LINES = "gw_log_sinks.c", "gw_log_slot.c", "gw_lines.c"


@dataclass(frozen=True)
class Mutant:
    name: str
    source: str
    patches: tuple[tuple[str, str], ...]
    program: str
    test: str
    mode: str = "plain"


POWER = ("test_log_power", "every_image_of_a_power_cut_is_recovered")

ROWS = [
    Mutant(
        "the dead slot at the stuck position owns the hole",
        FOLLOW,
        (
            (
                "    if (living)\n        return false;",
                "    if (living == members)\n        return false;",
            ),
        ),
        "test_log_races",
        "dead_intent_at_the_claim_of_a_living_one_is_not_padded",
    ),
    Mutant(
        "free a slot at once on death",
        FOLLOW,
        (("if (pos == GW_POSITION_NONE || pos <", "if (true || pos <"),),
        "test_log_races",
        "dead_slot_is_not_reused_while_its_claim_is_a_hole",
    ),
    Mutant(
        "pad at the end of the ring",
        LOG,
        (
            (
                "        atomic_store_explicit(&intent->len, n, memory_order_relaxed);\n",
                """        uint64_t rest = shared->capacity - (t & producer->log->mask);
        if (rest < n) {
            if (atomic_compare_exchange_strong(&shared->tail, &t, t + rest)) {
                gw_pad_write(producer->log, t, t + rest, 0, shared->epoch, shared->mix);
                t += rest;
            }
            continue;
        }
        atomic_store_explicit(&intent->len, n, memory_order_relaxed);
""",
            ),
        ),
        "test_log",
        "record_runs_over_the_ring_end_at_every_alignment",
    ),
    Mutant(
        "stop at the first damaged record on recovery",
        RECOVER,
        (
            (
                "        while (x <= last && !whole(&s, x, &data))\n            x += 8;\n",
                "        x = last + 1;\n",
            ),
        ),
        "test_log_recovery",
        "records_behind_a_half_written_claim_are_recovered",
    ),
    Mutant(
        "reuse up to the live cursor",
        LOG,
        (
            (
                "uint64_t reclaim = atomic_load_explicit(&shared->reclaim, "
                "memory_order_acquire); /* R */",
                """uint64_t reclaim = ~0ull;
        for (unsigned i = 0; i < shared->sinks; i++)
            if (gw_cursor_load(producer->log, i).lsn < reclaim)
                reclaim = gw_cursor_load(producer->log, i).lsn;""",
            ),
        ),
        *POWER,
    ),
    Mutant(
        "rewrite slots freely",
        COMMIT,
        (
            (
                "    gw_slot_write(log, &page, sequence);\n",
                "    gw_slot_write(log, &page, sequence);\n    gw_slot_write(log, "
                "&page, sequence + 1);\n",
            ),
        ),
        "test_log_races",
        "one_slot_is_whole_after_a_committer_died_at_any_point",
    ),
    Mutant(
        "one salt for ever",
        LOG,
        (
            (
                "    return gw_siphash(secret, &epoch,",
                "    epoch = 0;\n    return gw_siphash(secret, &epoch,",
            ),
        ),
        "test_log_recovery",
        "marker_that_survived_a_cut_commits_nothing_in_the_next_run",
    ),
    Mutant(
        "PAD over everything up to S",
        RECOVER,
        (
            (
                "to = next_cut(slot, from, found->list[i].to);",
                "(void)next_cut, to = found->list[i].to;",
            ),
        ),
        "test_log_recovery",
        "pads_are_cut_at_every_persisted_position",
    ),
    Mutant(
        "fdatasync error known only to the committer that saw it: nothing dirty again",
        COMMIT,
        (("    gw_dirty(log, gw_log_durable(log), gw_log_tail(log));\n", ""),),
        "test_log_races",
        "everything_that_may_be_unsynced_is_dirty_again_at_takeover",
    ),
    Mutant(
        "fdatasync error known only to the committer that saw it: slots clean",
        COMMIT,
        (("    gw_dirty_slots(log);\n", ""),),
        "test_log_races",
        "everything_that_may_be_unsynced_is_dirty_again_at_takeover",
    ),
    Mutant(
        "fdatasync error known only to the committer that saw it: no witness",
        COMMIT,
        (("    if (fdatasync(log->fd_lock))", "    if (0)"),),
        "test_log_races",
        "error_that_a_dead_committer_did_not_report_is_found_at_takeover",
    ),
    Mutant(
        "the lock is the supervisor's",
        RECOVER,
        (
            (
                "        close(log->fd_lock); /* after the map is gone */",
                "        flock(log->fd_lock, LOCK_UN), close(log->fd_lock);",
            ),
        ),
        "test_log",
        "lock_lives_as_long_as_anyone_who_maps_the_log",
    ),
    Mutant(
        "control words in a file",
        RECOVER,
        (('memfd_create("gateway-log", MFD_CLOEXEC);', 'open(".", O_TMPFILE | O_RDWR, 0600);'),),
        "test_log_races",
        "shared_words_are_not_in_the_log_file",
    ),
]

INDEX_RULES = [
    Mutant(
        "read a record found by the index without the tail check",
        INDEX,
        (("    return tail > lsn + log->mask + 1;", "    return tail == 0;"),),
        "test_log_index",
        "body_that_is_written_over_gives_no_conflict",
    ),
    Mutant(
        "a lost race for the head is tried again without a look at the new part",
        INDEX,
        (("        if (found != GW_FOUND_NOTHING)\n            return found;\n", ""),),
        "test_log_index",
        "two_claims_of_one_key_leave_one_event",
    ),
    Mutant(
        "chains in any order",
        INDEX,
        (("        if (gw_link_lsn(seen) > lsn)\n            return GW_FOUND_OPEN;\n", ""),),
        "test_log_index",
        "chain_stays_in_order_of_positions",
    ),
    Mutant(
        "answer a repeat from an original that is not committed",
        INDEX,
        (("return kind < 0 ? GW_FOUND_OPEN : body", "return body"),),
        "test_log_index",
        "repeat_of_an_unfinished_event_is_busy",
    ),
    Mutant(
        "bodies are compared by their length",
        INDEX,
        (
            (
                "    uint64_t word;\n    for (uint32_t i = 8;",
                "    uint64_t word;\n    if (at)\n        return true;\n    for (uint32_t i = 8;",
            ),
        ),
        "test_log_index",
        "repeat_is_a_duplicate_and_another_body_a_conflict",
    ),
    Mutant(
        "a PAD cuts the chain",
        FOLLOW,
        (
            (
                "    atomic_store_explicit(word, (from | GW_PAD) ^ mix",
                "    log->prevs[(from & log->mask) / 64] = 0;\n"
                "    atomic_store_explicit(word, (from | GW_PAD) ^ mix",
            ),
        ),
        "test_log_index",
        "pad_does_not_cut_a_chain",
    ),
    Mutant(
        "the index is not rebuilt below the cursor",
        INDEX,
        (("    while (p < least) {", "    while (p < least && false) {"),),
        "test_log_index",
        "window_survives_a_restart",
    ),
    Mutant(
        "full comes before the look for a repeat",
        LOG,
        (
            (
                "    for (;;) {\n        if (keyed) {\n            gw_found",
                "    if (gw_log_used(log) + n > shared->capacity)\n        return GW_FULL;\n"
                "    for (;;) {\n        if (keyed) {\n            gw_found",
            ),
        ),
        "test_log_index",
        "repeat_is_answered_when_the_log_is_full_or_closed",
    ),
    Mutant(
        "receipt without epoch",
        RECEIPT,
        (
            (
                "uint64_t mix = gw_mix(shared->secret, epoch), pad",
                "epoch = written;\n    uint64_t mix = gw_mix(shared->secret, epoch), pad",
            ),
            (
                "    if (!gw_epoch_ok(shared->range, shared->epochs, lsn, epoch))\n"
                "        return GW_RECEIPT_LOST;\n",
                "",
            ),
        ),
        "test_log_index",
        "receipt_of_what_a_power_cut_took_is_lost",
    ),
    Mutant(
        "what was lost in a hole is finished once it is written over",
        RECOVER,
        (("    note_lost(&slot, &found);\n", "    (void)note_lost;\n"),),
        "test_log_index",
        "receipt_of_what_a_power_cut_took_is_lost",
    ),
    Mutant(
        "sink = the cursor has passed",
        RECEIPT,
        (
            (
                "    if (gw_dead_sinks(dead) & ~shared->optional)\n"
                "        return GW_RECEIPT_DEAD_LETTERED;\n",
                "",
            ),
        ),
        "test_log_index",
        "receipt_tells_what_became_of_an_event",
    ),
    Mutant(
        "a receipt's MAC is not looked at",
        RECEIPT,
        (
            (
                "    for (size_t i = 0; i < bytes; i++)\n        different",
                "    for (size_t i = 0; i < 16; i++)\n        different",
            ),
        ),
        "test_log_index",
        "receipt_of_something_else_is_unknown",
    ),
    Mutant(
        "a mark is written where a producer may write",
        RECEIPT,
        (
            (
                "    if (lsn < gw_log_reclaim(log) &&",
                "    if (false && lsn < gw_log_reclaim(log) &&",
            ),
        ),
        "test_log_index",
        "receipt_tells_what_became_of_an_event",
    ),
    Mutant(
        "a receipt trusts a marker that the disk kept without its body",
        RECEIPT,
        (("    if (lsn >= log->shared->start_lsn)\n", "    if (lsn)\n"),),
        *POWER,
    ),
    Mutant(
        "what is torn is lost, also below the cursors",
        RECEIPT,
        (("    if (!whole && least > lsn &&", "    if (false && !whole && least > lsn &&"),),
        *POWER,
    ),
    Mutant(
        "durable beyond the contiguous prefix",
        COMMIT,
        (
            (
                "    uint64_t committed = gw_log_committed(log);\n    if (!shared->sinks)",
                "    uint64_t committed = gw_log_tail(log);\n    if (!shared->sinks)",
            ),
        ),
        *POWER,
    ),
    Mutant(
        "an event that does not fit closes the log for all",
        LOG,
        (("used + (n < usual ? n : usual) > mark", "used + n > mark"),),
        "test_log_index",
        "one_large_event_that_does_not_fit_refuses_nobody_else",
    ),
    Mutant(
        "one water mark",
        LOG,
        (("shedding ? &shared->low_water : &shared->high_water", "&shared->high_water"),),
        "test_log_index",
        "full_comes_and_goes_with_hysteresis",
    ),
    Mutant(
        "the committer keeps its interval whoever waits",
        COMMIT,
        (("(wanted && gw_log_committed(log) > durable) ||", "false ||"),),
        "test_log_index",
        "who_waits_for_durable_is_not_kept_for_the_interval",
    ),
    Mutant(
        "the committer waits for the follower's walk",
        COMMIT,
        (
            (
                "        if (wanted)\n            gw_walk(log);",
                "        if (0)\n            gw_walk(log);",
            ),
        ),
        "test_log_index",
        "who_waits_for_durable_is_not_kept_for_the_interval",
    ),
    Mutant(
        "the follower rests whoever waits",
        WAIT,
        (
            (
                "        atomic_load_explicit(&shared->follower_flag, memory_order_relaxed) ==",
                "        0 && atomic_load_explicit(&shared->follower_flag,"
                " memory_order_relaxed) ==",
            ),
        ),
        "test_log_index",
        "who_waits_for_durable_is_not_kept_for_the_interval",
    ),
    Mutant(
        "a cursor wakes nobody",
        SINKS,
        (("    if (required)\n        gw_wake_waiters(log, GW_WAITS_SINKS);\n", ""),),
        "test_log_index",
        "each_position_wakes_who_waits_for_it",
    ),
]

RULES = [
    Mutant(
        "claims before the intent is stated",
        LOG,
        (
            (
                "        atomic_store_explicit(&intent->len, n, memory_order_relaxed);\n"
                "        atomic_store_explicit(&intent->pos, t, memory_order_release); /* I */\n",
                "",
            ),
            (
                "        GW_FAILPOINT(after_claim);\n",
                "        GW_FAILPOINT(after_claim);\n"
                "        producer->intent->len = n, producer->intent->pos = t;\n",
            ),
        ),
        "test_log_death",
        "every_death_leaves_exactly_its_hole",
    ),
    Mutant(
        "the shortest dead intent is the hole, proven or not",
        FOLLOW,
        (("    if (!one_length) {", "    if (!one_length && !p) {"),),
        "test_log_races",
        "hole_is_as_long_as_the_claim_not_as_another_intent_at_its_place",
    ),
    Mutant(
        "full leaves the intent where it was",
        LOG,
        (
            (
                "            atomic_store_explicit(&intent->pos, GW_POSITION_NONE, "
                "memory_order_release);\n"
                "            return refused;",
                "            return refused;",
            ),
        ),
        "test_log_races",
        "full_verdict_takes_the_intent_back",
    ),
    Mutant(
        "a stopped producer's claim is taken while it may go on",
        FOLLOW,
        (
            (
                "    if (living)\n        return false;",
                "    if (living && !stopped)\n        return false;",
            ),
        ),
        "test_log_death",
        "stopped_producer_is_killed_and_only_then_padded",
    ),
    Mutant(
        "ticks are time-outs, which a busy log never sees",
        FOLLOW,
        (
            (
                "            if (!progress && timed_out)\n",
                "            if (!timed_out)\n                log->ticked_at_ns = gw_now_ns();\n"
                "            if (!progress && timed_out)\n",
            ),
        ),
        "test_log_death",
        "stopped_producer_is_killed_under_traffic",
    ),
    Mutant(
        "the tail is read before the death when a slot is freed",
        FOLLOW,
        (
            (
                "static void free_dead_slots(gw_log *log)\n{\n",
                "static void free_dead_slots(gw_log *log)\n{\n    uint64_t tail = "
                "gw_log_tail(log);\n",
            ),
            ("|| pos >= gw_log_tail(log)) {", "|| pos >= tail) {"),
        ),
        "test_log_races",
        "slot_of_a_claim_made_while_slots_are_freed_is_kept",
    ),
    Mutant(
        "the state is not read again after the marker",
        LOG,
        (
            (
                "    return atomic_load_explicit(&shared->state, memory_order_acquire) "
                "== GW_STATE_FAILED ? "
                "GW_FAILED : GW_OK; /* S */",
                "    return GW_OK;",
            ),
        ),
        "test_log_races",
        "state_that_failed_during_the_copy_gives_no_ok",
    ),
    Mutant(
        "the marker is stored relaxed",
        LOG,
        (
            (
                "(t | kind) ^ shared->mix, memory_order_release); /* M */",
                "(t | kind) ^ shared->mix, memory_order_relaxed);",
            ),
        ),
        "test_log_races",
        "producers_follower_committer_and_reader_agree_over_many_laps",
        "tsan",
    ),
    Mutant(
        "reclaim is read relaxed",
        LOG,
        (
            (
                "uint64_t reclaim = atomic_load_explicit(&shared->reclaim, "
                "memory_order_acquire); /* R */",
                "uint64_t reclaim = atomic_load_explicit(&shared->reclaim, memory_order_relaxed);",
            ),
        ),
        "test_log_races",
        "producers_follower_committer_and_reader_agree_over_many_laps",
        "tsan",
    ),
    Mutant(
        "a commit wakes nobody",
        LOG,
        (
            (
                "    if (atomic_load_explicit(&shared->follower_flag, memory_order_relaxed) == "
                "GW_SLEEPS)\n",
                "    if (0)\n",
            ),
        ),
        "test_log_races",
        "sleeping_follower_is_woken",
    ),
    Mutant(
        "read trusts the marker without the CRC",
        READ,
        (
            (
                "    if (header->crc != gw_record_crc(header, rest, lsn))\n        "
                "return GW_CORRUPT;\n",
                "",
            ),
        ),
        "test_log",
        "read_notices_any_flipped_byte",
    ),
    Mutant(
        "recovery trusts the marker without the CRC",
        RECOVER,
        (
            (
                "    if (header->crc != gw_record_crc(header, (const uint8_t *)(header + 1), p))\n"
                "        return 0;\n",
                "",
            ),
        ),
        *POWER,
    ),
    Mutant(
        "an epoch may stand anywhere",
        RECOVER,
        (("|| !gw_epoch_ok(s->slot->range, s->slot->epochs, p, header->epoch))", ")"),),
        "test_log_recovery",
        "record_of_another_epoch_is_not_accepted",
    ),
    Mutant(
        "the watermark is written with the data that it covers",
        COMMIT,
        ((".watermark = gw_log_durable(log),", ".watermark = gw_log_committed(log),"),),
        *POWER,
    ),
    Mutant(
        "writing goes on at the recovered end only",
        RECOVER,
        (("    report->start = start;\n", "    report->start = start = p;\n"),),
        *POWER,
    ),
    Mutant(
        "recovery does not sync what it found before it writes",
        RECOVER,
        (
            (
                "    if (fdatasync(log->fd))\n"
                '        return gw_fail(error, GW_ERRNO, errno, 0, "fdatasync of the log '
                'before recovery");\n',
                "",
            ),
        ),
        *POWER,
    ),
    Mutant(
        "what recovery found is not made dirty again",
        RECOVER,
        (("    gw_dirty(log, durable, report->start);\n", "    (void)durable;\n"),),
        "test_log_races",
        "everything_above_the_watermark_is_dirty_again_at_recovery",
    ),
    Mutant(
        "damage below the watermark is dropped in silence",
        RECOVER,
        (("    if (report->corrupt_count && !accept_corruption) {", "    if (0) {"),),
        "test_log_recovery",
        "hole_below_the_watermark_is_corruption",
    ),
    Mutant(
        "the slot's number moves before the slot is written",
        COMMIT,
        (
            (
                "    gw_slot_write(log, &page, sequence);\n",
                "    atomic_store(&shared->slot_sequence, sequence);\n    "
                "gw_slot_write(log, &page, sequence);\n",
            ),
        ),
        "test_log_races",
        "one_slot_is_whole_after_a_committer_died_at_any_point",
    ),
    Mutant(
        "a failed sync may be tried again",
        COMMIT,
        (
            (
                "    gw_log_set_state(log, GW_STATE_FAILED);\n    return "
                "gw_fail(error, GW_FAILED, why",
                "    return gw_fail(error, GW_FAILED, why",
            ),
        ),
        "test_log_races",
        "failed_sync_is_final",
    ),
    Mutant(
        "durable is what is committed when the sync returns",
        COMMIT,
        (
            (
                "&shared->durable, committed, memory",
                "&shared->durable, gw_log_committed(log), memory",
            ),
        ),
        "test_log",
        "durable_covers_only_what_was_committed_before_the_sync",
    ),
    Mutant(
        "reclaim is the cursor when the sync returns",
        COMMIT,
        (
            (
                "&shared->reclaim, least, memory",
                "&shared->reclaim, gw_cursor_load(log, 0).lsn, memory",
            ),
        ),
        "test_log",
        "reclaim_is_the_cursor_in_the_slot_not_the_one_that_moved_meanwhile",
    ),
    Mutant(
        "without a sink everything committed is given back",
        COMMIT,
        (("least = page.watermark;", "least = committed;"),),
        "test_log",
        "log_without_sinks_reclaims_no_further_than_the_persisted_watermark",
    ),
    Mutant(
        "a sink that stood further on keeps counting what was lost",
        RECOVER,
        (
            (
                "        slot->sink[i].cursor.ordinal -= lost;\n        "
                "slot->sink[i].cursor.base -= lost;\n",
                "        (void)lost;\n",
            ),
        ),
        *POWER,
    ),
]

MOVES = "optional_cursor_that_was_written_over_moves_at_the_start"
WAKES = "durable_wakes_the_sink_that_waits_for_it"


def sink_rule(name: str, source: str, old: str, new: str, test: str) -> Mutant:
    return Mutant(name, source, ((old, new),), "test_lines", test)


SINK_RULES = [
    sink_rule(
        "reclaim waits for optional sinks as well",
        COMMIT,
        "if (!(page.optional >> i & 1) && page.sink[i]",
        "if (page.sink[i]",
        "reclaim_waits_for_required_sinks_only",
    ),
    sink_rule(
        "a dead letter of an optional sink is told to the device",
        RECEIPT,
        "gw_dead_sinks(dead) & ~shared->optional",
        "gw_dead_sinks(dead)",
        "reclaim_waits_for_required_sinks_only",
    ),
    sink_rule(
        "what an optional sink copied is not looked at again",
        LINES,
        "    if (is_lapped(lines, lines->lsn))\n        return GW_LAPPED;\n    if (status",
        "    if (status",
        "run_that_was_written_over_while_it_was_copied_does_not_leave",
    ),
    sink_rule(
        "what was skipped is not counted",
        SINKS,
        "    cursor.skipped += missed;\n",
        "",
        "lapped_sink_skips_to_the_least_required_cursor",
    ),
    sink_rule(
        "lines above durable",
        LINES,
        "lines->durable ? gw_log_durable(lines->log)",
        "!lines ? gw_log_durable(lines->log)",
        "lines_stop_at_durable",
    ),
    sink_rule(
        "the cursor moves as lines are filled",
        LINES,
        "    lines->events = events;\n    *bytes",
        "    lines->events = events, gw_lines_confirm(lines);\n    *bytes",
        "only_what_was_confirmed_moves_the_cursor",
    ),
    sink_rule(
        "recovery begins at the least cursor of all",
        SLOT,
        "if (!is_optional(slot, i) && slot->sink",
        "if (!(false && is_optional(slot, i)) && slot->sink",
        MOVES,
    ),
    sink_rule(
        "an optional cursor stays where it was persisted",
        RECOVER,
        "    move_lapped(log, &slot, identity->secret, report, ordinal);\n",
        "",
        MOVES,
    ),
    sink_rule(
        "an optional cursor in the ring stays, whatever became of its records",
        RECOVER,
        "&& leads_to(log, slot, secret, cursor->lsn, c)",
        "&& (leads_to(log, slot, secret, cursor->lsn, c) || true)",
        "optional_cursor_moves_when_one_record_on_its_way_is_torn",
    ),
    sink_rule(
        "every optional cursor below the start moves",
        RECOVER,
        "&& leads_to(log, slot, secret, cursor->lsn, c)",
        "&& !leads_to(log, slot, secret, cursor->lsn, c)",
        "optional_cursor_below_the_start_stays_while_its_records_stand",
    ),
    sink_rule(
        "a sink is forgotten with the events that wait for it",
        SLOT,
        "old->cursor.ordinal != ordinal && !chosen",
        "old->cursor.ordinal != ordinal && !chosen && !start",
        "sink_with_nothing_waiting_is_forgotten",
    ),
    sink_rule(
        "nobody hurries the committer for a sink that reads below durable",
        WAIT,
        "!sink || gw_log_sinks_want_durable(log)",
        "!sink",
        "who_waits_for_sinks_hurries_the_committer_when_they_read_below_durable",
    ),
    sink_rule("durable wakes workers only", WAIT, "i < GW_WAITERS", "i < GW_WAITER_SINK", WAKES),
    sink_rule(
        "a wake-up before the sleep is lost",
        WAIT,
        "gw_log_wait(log, GW_WAITER_SINK, log->nudged,",
        "gw_log_wait(log, GW_WAITER_SINK, log->shared->waiter[GW_WAITER_SINK].nudges,",
        WAKES,
    ),
    sink_rule(
        "a failed log ends every sleep",
        WAIT,
        "log->failure_seen ? UINT64_MAX : seen",
        "seen",
        WAKES,
    ),
]

ALL = ROWS + INDEX_RULES + RULES + SINK_RULES
MUTANTS = [pytest.param(m, id=m.name.replace(" ", "-")) for m in ALL]


def text_of(mutant: Mutant) -> str:
    text = (NATIVE / mutant.source).read_text()
    for old, new in mutant.patches:
        assert text.count(old) == 1, f"{mutant.source}: {text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def ran(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[CompletedProcess[str]]]]:
    """The chosen mutants are built and run two at a time, begun before the first test of them."""
    environment = {
        "TMPDIR": str(tmp_path_factory.mktemp("mutants")),
        "GW_POWER_RUNS": "200",  # until one fails
    }

    def build_and_run(m: Mutant) -> CompletedProcess[str]:
        program = build(TESTS / f"{m.program}.c", m.mode, {m.source: text_of(m)})
        return run(program, m.mode, m.test, seconds=20, environment=environment)

    wanted = [
        call.params["mutant"]
        for item in request.session.items
        if item.path == request.node.path
        if (call := getattr(item, "callspec", None)) and "mutant" in call.params
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {m.name: pool.submit(build_and_run, m) for m in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_test_notices(ran: dict[str, Future[CompletedProcess[str]]], mutant: Mutant) -> None:
    done = ran[mutant.name].result()
    assert done.returncode not in (0, 2), f"{mutant.name}: {mutant.test} passes\n{done.stdout}"


@pytest.mark.parametrize(("program", "mode"), sorted({(m.program, m.mode) for m in ALL}))
def test_the_same_tests_pass_on_the_code_as_it_is(program: str, mode: str, tmp_path: Path) -> None:
    names = sorted({m.test for m in ALL if (m.program, m.mode) == (program, mode)})
    environment = {"TMPDIR": str(tmp_path), "GW_POWER_RUNS": "5"}
    done = run(build(TESTS / f"{program}.c", mode), mode, *names, environment=environment)
    assert done.returncode == 0, done.stdout
