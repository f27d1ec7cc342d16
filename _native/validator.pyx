# cython: language_level=3, boundscheck=False, wraparound=False
"""The compiled validator: converts, calls, returns. The rules are in gw_validator.h, the docstrings in the stub."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_SET_ITEM
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

import os
from typing import NamedTuple, Optional


cdef extern from *:
    """
    #include "gw_codes.h"
    #define GW_CODE_TEXT(name, text) text,
    static const char *const gw_code_texts[] = {"", GW_CODES(GW_CODE_TEXT)};
    #undef GW_CODE_TEXT
    """
    const char *const gw_code_texts[]


cdef extern from "gw_validator.h" nogil:
    enum:
        GW_CODE_COUNT
        GW_EVENT_HAS_TS, GW_EVENT_HAS_SEQ, GW_EVENT_HAS_BOOT
        GW_FIELD_UNKNOWN

    ctypedef struct gw_verdict:
        uint16_t code
        uint8_t field, flags
        uint32_t offset, field_offset, field_bytes, object_offset, ts_offset, ts_bytes
        uint64_t seq, boot

    int gw_validate(const uint8_t *body, size_t body_bytes, const uint64_t *hash_key, gw_verdict *verdict)
    int gw_device_id_ok(const uint8_t *id, size_t id_bytes)
    int gw_validator_select(const char *name)
    const char *gw_validator_path(unsigned index)


cdef extern from "Python.h":
    object PyType_GenericAlloc(type kind, Py_ssize_t items)


CODES = tuple([gw_code_texts[i].decode("ascii") for i in range(GW_CODE_COUNT)])


class Verdict(NamedTuple):
    code: str
    field: Optional[str]
    offset: int
    has_ts: bool
    seq: Optional[int]
    boot: Optional[int]
    ts: Optional[bytes]
    object_offset: int


cdef tuple _codes = CODES
cdef type _verdict_type = Verdict
# enum gw_field in its order; an unknown field has only its own name
cdef tuple _fields = (None, "metrics", "tags", "ts", "seq", "boot", "payload", None, "device_id")
cdef uint64_t _hash_key[2]
cdef bytes _secret = os.urandom(sizeof(_hash_key))
memcpy(_hash_key, <const char *>_secret, sizeof(_hash_key))


cdef object _field_name(const gw_verdict *verdict, const uint8_t *start):
    cdef object field = _fields[verdict.field]
    if verdict.field_offset == 0:
        return field
    cdef str key = (<const char *>start)[
        verdict.field_offset : verdict.field_offset + verdict.field_bytes
    ].decode("utf-8")
    return key if verdict.field == GW_FIELD_UNKNOWN else f"{field}.{key}"


cdef inline void _set(object verdict, Py_ssize_t index, object item):
    Py_INCREF(item)  # PyTuple_SET_ITEM steals a reference
    PyTuple_SET_ITEM(verdict, index, item)


cdef object _verdict_of(const uint8_t *body, Py_ssize_t body_bytes):
    cdef gw_verdict verdict
    gw_validate(body, <size_t>body_bytes, _hash_key, &verdict)
    # A named tuple filled in place: calling its class would cost more than the validation.
    cdef object result = PyType_GenericAlloc(_verdict_type, 8)
    _set(result, 0, _codes[verdict.code])
    _set(result, 1, _field_name(&verdict, body))
    _set(result, 2, verdict.offset)
    _set(result, 3, (verdict.flags & GW_EVENT_HAS_TS) != 0)
    _set(result, 4, verdict.seq if verdict.flags & GW_EVENT_HAS_SEQ else None)
    _set(result, 5, verdict.boot if verdict.flags & GW_EVENT_HAS_BOOT else None)
    _set(
        result,
        6,
        PyBytes_FromStringAndSize(<const char *>body + verdict.ts_offset, verdict.ts_bytes)
        if verdict.flags & GW_EVENT_HAS_TS
        else None,
    )
    _set(result, 7, verdict.object_offset)
    return result


def validate(body):
    cdef Py_buffer view
    if PyBytes_CheckExact(body):
        return _verdict_of(<const uint8_t *>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body))
    PyObject_GetBuffer(body, &view, PyBUF_SIMPLE)
    try:
        return _verdict_of(<const uint8_t *>view.buf, view.len)
    finally:
        PyBuffer_Release(&view)


def check(body):
    cdef Py_buffer view
    cdef gw_verdict verdict
    if PyBytes_CheckExact(body):
        return gw_validate(
            <const uint8_t *>PyBytes_AS_STRING(body), <size_t>PyBytes_GET_SIZE(body), _hash_key, &verdict
        )
    PyObject_GetBuffer(body, &view, PyBUF_SIMPLE)
    gw_validate(<const uint8_t *>view.buf, <size_t>view.len, _hash_key, &verdict)
    PyBuffer_Release(&view)
    return verdict.code


def device_id_ok(device_id):
    cdef Py_buffer view
    PyObject_GetBuffer(device_id, &view, PyBUF_SIMPLE)
    cdef bint ok = gw_device_id_ok(<const uint8_t *>view.buf, <size_t>view.len)
    PyBuffer_Release(&view)
    return ok


def scan_paths():
    names = []
    cdef const char *name = gw_validator_path(0)
    while name != NULL:
        names.append(name.decode("ascii"))
        name = gw_validator_path(<unsigned>len(names))
    return tuple(names)


def select_scan_path(name):
    if gw_validator_select(name.encode()) != 0:
        raise ValueError(f"scan path {name!r} cannot run here; these can: {', '.join(scan_paths())}")
