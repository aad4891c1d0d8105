// The Python face: whole numbers in (addresses and sizes), nothing out. Here the kernels by themselves; programs of them in
// module_program.cpp.
#include "arguments.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "pool.h"
#include "program.h"
#include "sample.h"

namespace {

using qwenlet::address;
using qwenlet::Batch;
using qwenlet::fast;
using qwenlet::Kernels;
using qwenlet::kernels_of;
using qwenlet::Program;
using qwenlet::read_all;
using qwenlet::read_numbers;
using qwenlet::Step;
using qwenlet::TileWeight;
using qwenlet::weight_from;

const Kernels* const kAll[] = {
#if defined(QWENLET_AMX)
    &qwenlet::kAmx,
#endif
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

// linear_bf16(isa, threads, x, rows, w, n, k, bias, y): see kernels.h; addresses as numbers, bias 0 for none.
PyObject* linear_bf16(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    if (nargs != 9) {
        PyErr_Format(PyExc_TypeError, "linear_bf16 takes 9 arguments, got %zd", nargs);
        return nullptr;
    }
    const Kernels* kernels = kernels_of(args[0]);
    if (kernels == nullptr) return nullptr;
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

// linear_tiles(isa, threads, x, rows, y, order, <weight>): y = x W^T + b; x [rows, k] and y [rows, n] float32
PyObject* linear_tiles(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[14];
    if (!read_all("linear_tiles", args, nargs, 1, 14, v)) return nullptr;
    const Kernels* kernels = kernels_of(args[0]);
    if (kernels == nullptr) return nullptr;
    const TileWeight w = weight_from(v + 5);
    const int64_t rows = v[2], groups = w.group ? w.k / w.group : 0;
    if (rows < 1 || rows > qwenlet::kMaxBatch) {
        PyErr_Format(PyExc_ValueError, "linear_tiles takes 1 to %lld rows", static_cast<long long>(qwenlet::kMaxBatch));
        return nullptr;
    }
    Py_BEGIN_ALLOW_THREADS
    std::vector<int8_t> codes(w.group ? rows * w.k * (w.bits == 8 ? 2 : 1) : 0);
    std::vector<float> scales(rows * groups);
    std::vector<int32_t> sums(rows * groups);
    std::vector<uint16_t> bf16(w.bits == 16 ? rows * w.k : 0);
    Program program;
    program.weights = {w};
    // float32 is read where it lies
    program.inputs = {{w.bits, w.k, w.group, codes.data(), scales.data(), sums.data(), bf16.data(), address<float>(v[1]),
                       address<const int32_t>(v[4])}};
    Step round{Step::kRound}, linear{Step::kLinear};
    round.a = address<const float>(v[1]);
    round.stride = round.count = w.k;
    round.to = {0};
    linear.y = address<float>(v[3]);
    linear.stride = w.n;
    if (w.bits != 32) program.steps.push_back(round);
    program.steps.push_back(linear);
    Batch batch{};
    batch.tokens = rows;
    program.run(*kernels, static_cast<int>(v[0]), batch, nullptr);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

// tiles_columns(isa, threads, begin, end, bits, out, <weight>): columns [begin, end) as rows of out [end - begin, n]
PyObject* tiles_columns(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[14];
    if (!read_all("tiles_columns", args, nargs, 1, 14, v)) return nullptr;
    const Kernels* kernels = kernels_of(args[0]);
    if (kernels == nullptr) return nullptr;
    const TileWeight w = weight_from(v + 5);
    const int64_t tiles = (w.n + qwenlet::kTile - 1) / qwenlet::kTile;
    constexpr int64_t kTiles = 8;  // a thread's share, at least: rows of `out` are written in pieces of 256 bytes
    Py_BEGIN_ALLOW_THREADS
    qwenlet::parallel_for(static_cast<int>(v[0]), tiles, kTiles, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile)
            kernels->columns(w, tile, v[1], v[2], v[1], static_cast<int>(v[3]), address<void>(v[4]));
    });
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

// linear_back(isa, threads, g, rows, bits, out, <weight>): out = g W, see kernels.h; g [rows, n] bfloat16
PyObject* linear_back(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[14];
    if (!read_all("linear_back", args, nargs, 1, 14, v)) return nullptr;
    const Kernels* kernels = kernels_of(args[0]);
    if (kernels == nullptr) return nullptr;
    if (kernels->back == nullptr) return PyErr_Format(PyExc_ValueError, "%s has no linear_back", kernels->name);
    const TileWeight w = weight_from(v + 5);
    const int threads = static_cast<int>(v[0]), bits = static_cast<int>(v[3]);
    const int64_t pairs = w.n / 2, together = kernels->back_rows;
    std::vector<uint32_t> packed;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t first = 0; first < v[2]; first += qwenlet::kBackMostRows) {
        const int64_t rows = std::min(qwenlet::kBackMostRows, v[2] - first), blocks = (rows + together - 1) / together;
        // words, so that a copy keeps both bfloat16 of a pair in their order
        const uint32_t* g = address<const uint32_t>(v[1]) + first * pairs;
        auto* out = address<char>(v[4]) + first * w.k * bits / 8;
        if (together > 1) {
            packed.assign(blocks * pairs * together, 0);
            qwenlet::parallel_for(threads, blocks, 4, [&](int64_t begin, int64_t end) {
                for (int64_t b = begin; b < end; ++b)
                    for (int64_t r = 0; r < together && b * together + r < rows; ++r) {
                        const uint32_t* from = g + (b * together + r) * pairs;
                        uint32_t* to = packed.data() + b * pairs * together + r;
                        for (int64_t p = 0; p < pairs; ++p) to[p * together] = from[p];
                    }
            });
            g = packed.data();
        }
        // wide pieces, as a row of them is read at a time, but four for every thread
        int64_t wide = qwenlet::kBackColumns;
        while (wide > 64 && w.k < wide * 4 * threads) wide /= 2;
        qwenlet::parallel_for(threads, (w.k + wide - 1) / wide, 1, [&](int64_t begin, int64_t end) {
            const std::unique_ptr<char[]> room(new char[static_cast<size_t>(qwenlet::back_scratch(rows)) + 64]);
            char* scratch = room.get() + (64 - reinterpret_cast<uintptr_t>(room.get()) % 64);
            for (int64_t piece = begin; piece < end; ++piece)
                kernels->back(w, g, rows, piece * wide, std::min(w.k, (piece + 1) * wide), bits, out, scratch);
        });
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

// drop(isa, threads, x, bits, count, seed, least, out, add): see drop.h
PyObject* drop(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[8];
    if (!read_all("drop", args, nargs, 1, 8, v)) return nullptr;
    const Kernels* kernels = kernels_of(args[0]);
    if (kernels == nullptr) return nullptr;
    constexpr int64_t kShare = 1 << 15;  // entries that a thread takes at least
    Py_BEGIN_ALLOW_THREADS
    qwenlet::parallel_for(static_cast<int>(v[0]), v[3], kShare, [&](int64_t begin, int64_t end) {
        kernels->drop(address<const void>(v[1]), static_cast<int>(v[2]), begin, end, static_cast<uint64_t>(v[4]),
                      static_cast<uint32_t>(v[5]), address<void>(v[6]), v[7] != 0);
    });
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

// train_attention(isa, threads, back, rows, spans, bits, tokens, heads, kv_heads, dim, q_stride, k_stride, v_stride, q, k, v,
//                 out, sums, grad, of_q, of_k, of_v): spans [rows, 2] int64 are first token and length; see kernels.h
PyObject* train_attention(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[21];
    if (!read_all("train_attention", args, nargs, 1, 21, v)) return nullptr;
    const Kernels* kernels = kernels_of(args[0]);
    if (kernels == nullptr) return nullptr;
    const bool back = v[1] != 0;
    const auto* spans = address<const int64_t>(v[3]);
    const qwenlet::TrainAttention p{static_cast<int>(v[4]), v[5], v[6], v[7], v[8], v[9], v[10], v[11],
                                    address<const void>(v[12]), address<const void>(v[13]), address<const void>(v[14]),
                                    address<void>(v[15]), address<float>(v[16]), address<const void>(v[17]),
                                    address<void>(v[18]), address<void>(v[19]), address<void>(v[20])};
    const int64_t rows = v[2], units = rows * p.kv_heads;
    Py_BEGIN_ALLOW_THREADS
    int64_t longest = 0;
    for (int64_t r = 0; r < rows; ++r) longest = std::max(longest, spans[2 * r + 1]);
    const auto room = static_cast<size_t>(qwenlet::train_scratch(longest, p.dim, back));
    std::atomic<int64_t> next{0};
    // a thread takes one row and head after the other, on scratch that it got once
    qwenlet::parallel_for(static_cast<int>(v[0]), std::min<int64_t>(v[0], units), 1, [&](int64_t, int64_t) {
        const std::unique_ptr<float[]> scratch(new float[room + 16]);
        float* lines = scratch.get() + (64 - reinterpret_cast<uintptr_t>(scratch.get()) % 64) / 4;
        for (int64_t unit = next++; unit < units; unit = next++) {
            const int64_t* span = spans + unit / p.kv_heads * 2;
            (back ? kernels->train_backward : kernels->train_forward)(p, span[0], span[1], unit % p.kv_heads, lines);
        }
    });
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

// whether an instruction set has linear_back
PyObject* has_back(PyObject*, PyObject* isa) {
    const Kernels* kernels = kernels_of(isa);
    return kernels == nullptr ? nullptr : PyBool_FromLong(kernels->back != nullptr);
}

// words_to_lines(threads, words, count, columns, lines): words [count, columns] to lines [tiles, count, 16], zeros beyond
PyObject* words_to_lines(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[5];
    if (!read_all("words_to_lines", args, nargs, 0, 5, v)) return nullptr;
    constexpr int64_t kTile = qwenlet::kTile, kSide = 8;
    const auto* words = address<const int32_t>(v[1]);
    const int64_t count = v[2], columns = v[3], tiles = (columns + kTile - 1) / kTile;
    auto* lines = address<int32_t>(v[4]);
    Py_BEGIN_ALLOW_THREADS
    // some tiles at a time, so that what is read of a row is longer than a line
    qwenlet::parallel_for(static_cast<int>(v[0]), tiles, kSide, [&](int64_t begin, int64_t end) {
        for (int64_t row = 0; row < count; ++row)
            for (int64_t tile = begin; tile < end; ++tile) {
                int32_t* to = lines + (tile * count + row) * kTile;
                const int32_t* from = words + row * columns + tile * kTile;
                const int64_t here = std::min(kTile, columns - tile * kTile);
                if (here == kTile) {
                    std::memcpy(to, from, 64);
                } else {
                    std::memset(to, 0, 64);
                    std::memcpy(to, from, static_cast<size_t>(here) * 4);
                }
            }
    });
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

// draw(isa, threads, rows, numbers, settings, tokens): of each row of numbers [rows, 9] int64 (logits, count, ids, replied,
// seen, top_k, seed, choice, position) and settings [rows, 6] float64 (repetition, presence, frequency, temperature, top_p,
// min_p) a token; see sample.h
PyObject* draw(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
    int64_t v[5];
    if (!read_all("draw", args, nargs, 1, 5, v)) return nullptr;
    const Kernels* kernels = kernels_of(args[0]);
    if (kernels == nullptr) return nullptr;
    const int64_t* numbers = address<const int64_t>(v[2]);
    const double* settings = address<const double>(v[3]);
    int64_t* tokens = address<int64_t>(v[4]);
    Py_BEGIN_ALLOW_THREADS
    qwenlet::parallel_for(static_cast<int>(v[0]), v[1], 1, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t* n = numbers + r * 9;
            const double* s = settings + r * 6;
            const qwenlet::Draw row{address<float>(n[0]), n[1], address<const int64_t>(n[2]), address<const float>(n[3]),
                                    n[4], n[5], static_cast<float>(s[0]), static_cast<float>(s[1]), static_cast<float>(s[2]),
                                    static_cast<float>(s[3]), s[4], s[5], static_cast<uint64_t>(n[6]), static_cast<uint64_t>(n[7]),
                                    static_cast<uint64_t>(n[8])};
            tokens[r] = qwenlet::draw(*kernels, row);
        }
    });
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyMethodDef kMethods[] = {
    {"available", available, METH_NOARGS, "Instruction sets with kernels that this processor runs, fastest first."},
    {"linear_bf16", fast(linear_bf16), METH_FASTCALL, "linear_bf16(isa, threads, x, rows, w, n, k, bias, y)"},
    {"linear_tiles", fast(linear_tiles), METH_FASTCALL, "linear_tiles(isa, threads, x, rows, y, order, <weight>)"},
    {"tiles_columns", fast(tiles_columns), METH_FASTCALL, "tiles_columns(isa, threads, begin, end, bits, out, <weight>)"},
    {"linear_back", fast(linear_back), METH_FASTCALL, "linear_back(isa, threads, g, rows, bits, out, <weight>)"},
    {"drop", fast(drop), METH_FASTCALL, "drop(isa, threads, x, bits, count, seed, least, out, add)"},
    {"train_attention", fast(train_attention), METH_FASTCALL, "train_attention(isa, threads, back, rows, spans, ...)"},
    {"has_back", has_back, METH_O, "has_back(isa)"},
    {"words_to_lines", fast(words_to_lines), METH_FASTCALL, "words_to_lines(threads, words, count, columns, lines)"},
    {"draw", fast(draw), METH_FASTCALL, "draw(isa, threads, rows, numbers, settings, tokens)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "qwenlet.ops.cpu._kernels", "Kernels for a CPU.", -1, kMethods,
                       nullptr, nullptr, nullptr, nullptr};

}  // namespace

namespace qwenlet {

const Kernels* kernels_of(PyObject* isa) {
    Py_ssize_t length = 0;
    const char* name = PyUnicode_AsUTF8AndSize(isa, &length);
    if (name == nullptr) return nullptr;
    const Kernels* kernels = by_name(std::string(name, static_cast<size_t>(length)));
    if (kernels == nullptr) PyErr_Format(PyExc_ValueError, "this processor has no %s kernels", name);
    return kernels;
}

}  // namespace qwenlet

PyMODINIT_FUNC PyInit__kernels() {
    PyObject* module = PyModule_Create(&kModule);
    if (module != nullptr) {
        PyModule_AddFunctions(module, qwenlet::kProgramMethods);
        PyModule_AddIntConstant(module, "MAX_ROWS", qwenlet::kMaxRows);
        PyModule_AddIntConstant(module, "MAX_BATCH", qwenlet::kMaxBatch);
    }
    return module;
}
