// How a stream of lines is fetched ahead of the one that is read.
#pragma once

#include <cstdint>

namespace {

// `bytes` ahead (0: not at all), every so manieth line, into the first cache or the second. A processor has a few places for
// lines on their way, which lines that are fetched take as well; where it reads ahead by itself, some of them are enough.
struct Ahead {
    int64_t bytes;
    int every;
    bool near;
};

}  // namespace
