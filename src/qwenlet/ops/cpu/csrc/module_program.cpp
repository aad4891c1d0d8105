// The Python face of programs: recorded step by step, then run.
#include "arguments.h"

#include <vector>

#include "program.h"

namespace qwenlet {
namespace {

constexpr char kProgram[] = "qwenlet.program";

Program* program_of(PyObject* capsule) { return static_cast<Program*>(PyCapsule_GetPointer(capsule, kProgram)); }

PyObject* program_new(PyObject*, PyObject*) {
    return PyCapsule_New(new Program, kProgram, [](PyObject* capsule) { delete program_of(capsule); });
}

template <class T>
PyObject* add_to(std::vector<T>& list, const T& item) {
    list.push_back(item);
    return PyLong_FromSsize_t(static_cast<Py_ssize_t>(list.size()) - 1);
}

// program_inputs(program, bits, k, group, codes, scales, sums, bf16, fp32, order) -> its number
PyObject* program_inputs(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[9];
    if (!read_all("program_inputs", args, nargs, 1, 9, v)) return nullptr;
    Program* program = program_of(args[0]);
    if (program == nullptr) return nullptr;
    return add_to(program->inputs, Inputs{static_cast<int>(v[0]), v[1], v[2], address<int8_t>(v[3]), address<float>(v[4]),
                                          address<int32_t>(v[5]), address<uint16_t>(v[6]), address<float>(v[7]),
                                          address<const int32_t>(v[8])});
}

// program_weight(program, bits, group, n, k, weight, scales, zeros, minimums, bias) -> its number
PyObject* program_weight(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[9];
    if (!read_all("program_weight", args, nargs, 1, 9, v)) return nullptr;
    Program* program = program_of(args[0]);
    return program == nullptr ? nullptr : add_to(program->weights, weight_from(v));
}

// program_pages(program, kind, heads, kv_heads, dim, group, run, run_stride, group_stride, memory) -> its number
PyObject* program_pages(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[9];
    if (!read_all("program_pages", args, nargs, 1, 9, v)) return nullptr;
    Program* program = program_of(args[0]);
    if (program == nullptr) return nullptr;
    return add_to(program->pages,
                  Pages{static_cast<Cache>(v[0]), v[1], v[2], v[3], v[4], v[5], v[6], v[7], address<uint8_t>(v[8])});
}

PyObject* add_step(PyObject* capsule, const Step& step) {
    Program* program = program_of(capsule);
    return program == nullptr ? nullptr : add_to(program->steps, step);
}

// program_rows(program, eps, kind, a, b, weight, out, count, stride, last_rows, slot, inputs...): a norm, a gate or a
// rounding; of the inputs those below zero are -1 - n, for rows with an adapter alone
PyObject* program_rows(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[9];
    if (nargs < 11) return PyErr_Format(PyExc_TypeError, "program_rows takes 11 arguments or more, got %zd", nargs);
    if (!read_numbers(args, 2, 9, v)) return nullptr;
    Step step{static_cast<Step::Kind>(v[0])};
    step.eps = static_cast<float>(PyFloat_AsDouble(args[1]));
    step.a = address<const float>(v[1]);
    step.b = address<const float>(v[2]);
    step.weight = address<const float>(v[3]);
    step.out = address<float>(v[4]);
    step.count = v[5];
    step.stride = v[6];
    step.last_rows = v[7] != 0;
    step.slot = static_cast<int>(v[8]);
    for (Py_ssize_t i = 11; i < nargs; ++i) {
        int64_t input;
        if (!read_numbers(args, i, 1, &input)) return nullptr;
        (input < 0 ? step.to_adapted : step.to).push_back(static_cast<int>(input < 0 ? -1 - input : input));
    }
    return add_step(args[0], step);
}

// program_adapter(program, weight and inputs of each slot) -> its number
PyObject* program_adapter(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    Program* program = program_of(args[0]);
    if (program == nullptr) return nullptr;
    std::vector<Side> sides;
    for (Py_ssize_t i = 1; i + 1 < nargs; i += 2) {
        int64_t v[2];
        if (!read_numbers(args, i, 2, v)) return nullptr;
        sides.push_back({static_cast<int>(v[0]), static_cast<int>(v[1])});
    }
    return add_to(program->adapters, sides);
}

// program_linear(program, weight, inputs, y, stride, add, last_rows, wait, slot)
PyObject* program_linear(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[8];
    if (!read_all("program_linear", args, nargs, 1, 8, v)) return nullptr;
    Step step{Step::kLinear};
    step.linear = static_cast<int>(v[0]);
    step.from = static_cast<int>(v[1]);
    step.y = address<float>(v[2]);
    step.stride = v[3];
    step.add = v[4] != 0;
    step.last_rows = v[5] != 0;
    step.wait = v[6] != 0;
    step.slot = static_cast<int>(v[7]);
    return add_step(args[0], step);
}

// program_attention(program, kind, pages, qkv, stride, codes, code_scales, out)
PyObject* program_attention(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[7];
    if (!read_all("program_attention", args, nargs, 1, 7, v)) return nullptr;
    Step step{static_cast<Step::Kind>(v[0])};
    step.pages = static_cast<int>(v[1]);
    step.out = address<float>(v[2]);
    step.stride = v[3];
    step.codes = address<int8_t>(v[4]);
    step.code_scales = address<float>(v[5]);
    step.y = address<float>(v[6]);
    return add_step(args[0], step);
}

// program_run(program, isa, threads, seconds, tokens, sequences, lengths, starts, tables, table_offsets, cos, sin,
//             query_scale, outputs, output_rows, output, output_stride, groups, adapted)
PyObject* program_run(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[17];
    if (!read_all("program_run", args, nargs, 2, 17, v)) return nullptr;
    const Program* program = program_of(args[0]);
    const Kernels* kernels = kernels_of(args[1]);
    if (program == nullptr || kernels == nullptr) return nullptr;
    const Batch batch{v[2], v[3], address<const int64_t>(v[4]), address<const int64_t>(v[5]), address<const int32_t>(v[6]),
                      address<const int64_t>(v[7]), address<const float>(v[8]), address<const float>(v[9]),
                      address<const float>(v[10]), v[11], address<const int64_t>(v[12]), address<float>(v[13]), v[14],
                      v[15], address<const int64_t>(v[16])};
    if (batch.tokens > kMaxBatch || batch.outputs > kMaxBatch)
        return PyErr_Format(PyExc_ValueError, "a program takes at most %lld rows", static_cast<long long>(kMaxBatch));
    Py_BEGIN_ALLOW_THREADS
    program->run(*kernels, static_cast<int>(v[0]), batch, address<double>(v[1]));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

}  // namespace

PyMethodDef kProgramMethods[] = {
    {"program_new", program_new, METH_NOARGS, "An empty program."},
    {"program_inputs", fast(program_inputs), METH_FASTCALL, "See module_program.cpp, as for the others."},
    {"program_weight", fast(program_weight), METH_FASTCALL, nullptr},
    {"program_pages", fast(program_pages), METH_FASTCALL, nullptr},
    {"program_rows", fast(program_rows), METH_FASTCALL, nullptr},
    {"program_adapter", fast(program_adapter), METH_FASTCALL, nullptr},
    {"program_linear", fast(program_linear), METH_FASTCALL, nullptr},
    {"program_attention", fast(program_attention), METH_FASTCALL, nullptr},
    {"program_run", fast(program_run), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace qwenlet
