// Reads the arguments of a function that Python calls: whole numbers (addresses and sizes). Checks of types and shapes are
// the Python side's; the stable ABI keeps one build good for all Python versions from 3.11 on.
#pragma once

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <cstdint>

#include "kernels.h"

namespace qwenlet {

// The functions that record and run programs, for the module's table.
extern PyMethodDef kProgramMethods[];

// The kernels of an instruction set by its name; null, and an exception set, where this processor has none.
const Kernels* kernels_of(PyObject* isa);

inline bool read_numbers(PyObject* const* args, Py_ssize_t from, Py_ssize_t count, int64_t* out) {
    for (Py_ssize_t i = 0; i < count; ++i) {
        out[i] = PyLong_AsLongLong(args[from + i]);
        if (out[i] == -1 && PyErr_Occurred()) return false;
    }
    return true;
}

// All arguments from `from` on, which must be `count`.
inline bool read_all(const char* name, PyObject* const* args, Py_ssize_t nargs, Py_ssize_t from, Py_ssize_t count, int64_t* out) {
    if (nargs == from + count) return read_numbers(args, from, count, out);
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", name, from + count, nargs);
    return false;
}

template <class T>
T* address(int64_t number) {
    return reinterpret_cast<T*>(number);
}

// bits, group, n, k, weight, scales, zeros, minimums, bias
inline TileWeight weight_from(const int64_t* v) {
    return {static_cast<int>(v[0]),         v[1], v[2], v[3], address<const uint8_t>(v[4]), address<const uint16_t>(v[5]),
            address<const uint8_t>(v[6]), address<const uint16_t>(v[7]), address<const float>(v[8])};
}

template <class Function>
constexpr PyCFunction fast(Function function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

}  // namespace qwenlet
