/* empty_call.c - what a call from Python into C costs, and nothing else: event(device_id, body,
 * started_ns) -> 0, with the arguments of gateway._log.Ingest.event taken as C values. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyObject *event(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t device_id_bytes;
    if (count != 3 || !PyBytes_CheckExact(arguments[1]) ||
        !PyUnicode_AsUTF8AndSize(arguments[0], &device_id_bytes)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "event(device_id: str, body: bytes, started_ns: int)");
        return NULL;
    }
    unsigned long long started_ns = PyLong_AsUnsignedLongLong(arguments[2]);
    if (started_ns == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromLong(0);
}

static PyMethodDef methods[] = {{"event", (PyCFunction)(void (*)(void))event, METH_FASTCALL, NULL},
                                {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "empty_call", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_empty_call(void)
{
    return PyModule_Create(&definition);
}
