// The Python face: whole numbers in (addresses and sizes), nothing out. Checks of types and shapes are the Python side's;
// the stable ABI keeps one build good for all Python versions from 3.11 on.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <algorithm>
#include <string>

#include "kernels.h"
#include "pool.h"

namespace {

using qwenlet::Kernels;

const Kernels* const kAll[] = {
#if defined(QWENLET_X86)
    &qwenlet::kAvx512Bf16, &qwenlet::kAvx512, &qwenlet::kAvx2,
#endif
    &qwenlet::kPortable,
};

const Kernels* by_name(const std::string& name) {
    for (const Kernels* kernels : kAll)
        if (name == kernels->name && kernels->supported()) return kernels;
    return nullptr;
}

// Names of the instruction sets this processor has kernels for, fastest first.
PyObject* available(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    for (const Kernels* kernels : kAll) {
        if (!kernels->supported()) continue;
        PyObject* name = PyUnicode_FromString(kernels->name);
        PyList_Append(names, name);
        Py_DECREF(name);
    }
    return names;
}

bool read_numbers(PyObject* const* args, Py_ssize_t from, Py_ssize_t count, int64_t* out) {
    for (Py_ssize_t i = 0; i < count; ++i) {
        out[i] = PyLong_AsLongLong(args[from + i]);
        if (out[i] == -1 && PyErr_Occurred()) return false;
    }
    return true;
}

// linear_bf16(isa, threads, x, rows, w, n, k, bias, y): see kernels.h; addresses as numbers, bias 0 for none.
PyObject* linear_bf16(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    if (nargs != 9) {
        PyErr_Format(PyExc_TypeError, "linear_bf16 takes 9 arguments, got %zd", nargs);
        return nullptr;
    }
    Py_ssize_t length = 0;
    const char* name = PyUnicode_AsUTF8AndSize(args[0], &length);
    if (name == nullptr) return nullptr;
    const Kernels* kernels = by_name(std::string(name, static_cast<size_t>(length)));
    if (kernels == nullptr) {
        PyErr_Format(PyExc_ValueError, "this processor has no %s kernels", name);
        return nullptr;
    }
    int64_t v[8];
    if (!read_numbers(args, 1, 8, v)) return nullptr;
    const int threads = static_cast<int>(v[0]), rows = static_cast<int>(v[2]);
    if (rows < 1 || rows > qwenlet::kMaxRows || v[4] < 0 || v[5] < 1) {
        PyErr_Format(PyExc_ValueError, "linear_bf16 takes 1 to %d rows and positive sizes", qwenlet::kMaxRows);
        return nullptr;
    }
    const auto* x = reinterpret_cast<const uint16_t*>(v[1]);
    const auto* w = reinterpret_cast<const uint16_t*>(v[3]);
    const auto* bias = reinterpret_cast<const uint16_t*>(v[6]);
    auto* y = reinterpret_cast<uint16_t*>(v[7]);
    const int64_t n = v[4], k = v[5];
    // some 64 KiB of weights a chunk: long enough to stream, short enough to share out evenly
    const int64_t chunk = std::max<int64_t>(8, 32768 / k);
    Py_BEGIN_ALLOW_THREADS
    qwenlet::parallel_for(threads, n, chunk, [&](int64_t begin, int64_t end) {
        kernels->linear_bf16(x, rows, w, begin, end, k, bias, y, n);
    });
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"available", available, METH_NOARGS, "Instruction sets with kernels that this processor runs, fastest first."},
    {"linear_bf16", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(linear_bf16)), METH_FASTCALL,
     "linear_bf16(isa, threads, x, rows, w, n, k, bias, y)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "qwenlet.ops.cpu._kernels", "Kernels for a CPU.", -1, kMethods,
                       nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() {
    PyObject* module = PyModule_Create(&kModule);
    if (module != nullptr) PyModule_AddIntConstant(module, "MAX_ROWS", qwenlet::kMaxRows);
    return module;
}
