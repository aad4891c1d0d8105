// A forward pass as a flat list of steps with bound addresses, run by one call on one team of threads. It knows shapes and
// bits, nothing of any model; Python records it once (see program.py) and keeps what the addresses point to alive.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace qwenlet {

struct Step {
    enum Kind { kNorm, kSwiglu, kRound, kLinear, kStore, kAttend } kind;
    bool last_rows = false;  // on the rows asked for at the end, instead of all
    bool wait = true;        // whether the next step needs this one's result
    int slot = -1;           // adapters: on the rows that have one, with what it has in this place; it adds nothing else

    // rows: out = norm(a) or swiglu(a, b), rounded into `to`; kRound rounds `a` itself
    const float *a = nullptr, *b = nullptr;
    float* out = nullptr;
    const float* weight = nullptr;
    float eps = 0.0f;
    int64_t count = 0, stride = 0;
    std::vector<int> to = {};
    std::vector<int> to_adapted = {};  // the same, of rows with an adapter alone

    // linear: y (null: the run's output) = weights[linear] inputs[from]
    int linear = 0, from = 0;
    float* y = nullptr;
    bool add = false;

    // store and attend: qkv in `out` with `stride`, answer in `y`
    int pages = 0;
    int8_t* codes = nullptr;
    float* code_scales = nullptr;
};

// What an adapter has in a slot: a weight, and where that weight's inputs are (-1: where the step says); weight -1: nothing.
struct Side {
    int weight = -1, from = -1;
};

// Rows of a run that go with one adapter.
struct Group {
    int64_t adapter, first, rows;
    int64_t first_output, outputs;  // of them, among the outputs
};

// One run's sequences: tokens lie one sequence after the other.
struct Batch {
    int64_t tokens, sequences;
    const int64_t* lengths;         // new tokens of each
    const int64_t* starts;          // position of each one's first
    const int32_t* tables;          // page numbers of all, one after the other
    const int64_t* table_offsets;   // where each one's begin
    const float *cos, *sin;         // [tokens, dim / 2]
    const float* query_scale;       // [tokens] or null
    int64_t outputs;
    const int64_t* output_rows;     // tokens whose result is asked for
    float* output;                  // [outputs, output_stride]
    int64_t output_stride;
    int64_t groups = 0;             // rows with an adapter come last, those of one adapter together
    const int64_t* adapted = nullptr;  // [groups, 2]: an adapter, and how many rows go with it
};

class Program {
  public:
    std::vector<Inputs> inputs;
    std::vector<TileWeight> weights;
    std::vector<Pages> pages;
    std::vector<Step> steps;
    std::vector<std::vector<Side>> adapters;  // by slot

    // `seconds` [steps] or null: how long each took, as the first thread saw it.
    void run(const Kernels& kernels, int threads, const Batch& batch, double* seconds) const;
};

}  // namespace qwenlet
