// The rules of an event (docs/http.md) as far as a parsed body still shows them: Node-RED's own parser has taken duplicate
// keys together and rounded integers beyond 2^53. So it does less than what it is compared with.
"use strict";
const KEY = /^[a-z][a-z0-9_]{0,31}$/;
const DEVICE = /^[A-Za-z0-9_-]{1,64}$/;
const TS = /^\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)$/;
const MEMBERS = new Set(["metrics", "tags", "ts", "seq", "boot", "payload"]);

function isObject(value) {
    return typeof value === "object" && value !== null && !Array.isArray(value);
}

function depth(value) {
    if (typeof value !== "object" || value === null) return 0;
    let most = 0;
    for (const inner of Object.values(value)) most = Math.max(most, depth(inner));
    return most + 1;
}

function count(value) {
    return value === undefined || (Number.isInteger(value) && value >= 0 && value <= 2 ** 63);
}

// The code of what is wrong; undefined: nothing.
module.exports = function refusal(device, event) {
    if (!DEVICE.test(device)) return "bad_device_id";
    if (!isObject(event)) return "not_an_object";
    for (const name in event) if (!MEMBERS.has(name)) return "unknown_field";
    if (!isObject(event.metrics)) return "missing_metrics";
    let entries = Object.entries(event.metrics);
    if (entries.length > 32) return "too_many_metrics";
    for (const [key, value] of entries) {
        if (!KEY.test(key)) return "bad_metric_key";
        if (typeof value !== "number" || !Number.isFinite(value)) return "bad_metric_value";
    }
    if (event.tags !== undefined) {
        if (!isObject(event.tags)) return "bad_tag_value";
        entries = Object.entries(event.tags);
        if (entries.length > 16) return "too_many_tags";
        for (const [key, value] of entries) {
            if (!KEY.test(key)) return "bad_tag_key";
            if (typeof value !== "string" || Buffer.byteLength(value) > 128) return "bad_tag_value";
        }
    }
    if (event.ts !== undefined) {
        if (typeof event.ts !== "string" || !TS.test(event.ts) || isNaN(Date.parse(event.ts))) return "bad_ts";
    }
    if (!count(event.seq)) return "bad_seq";
    if (!count(event.boot)) return "bad_boot";
    if (event.payload !== undefined && depth(event.payload) > 32) return "payload_too_deep";
    return undefined;
};
