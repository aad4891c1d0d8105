// One pool of threads for all kernels. Work is cut into chunks that threads take from a counter, so that a thread the
// system has put aside holds up one chunk and not its whole share.
#pragma once

#include <cstdint>
#include <functional>

namespace qwenlet {

// Calls body(begin, end) for chunks that cover [0, count), on up to `threads` threads, the caller among them; returns
// when all are done. Not re-entrant: calls from several threads take turns.
void parallel_for(int threads, int64_t count, int64_t chunk, const std::function<void(int64_t, int64_t)>& body);

// Calls body(index, count) once on each of `count` <= threads threads that run at the same time, so that they may wait for
// each other. False, and nothing called, where no such team is to be had.
bool run_team(int threads, const std::function<void(int, int)>& body);

// What a thread does between looks at something another thread will change; `looks` so far.
void wait_a_little(int looks);

}  // namespace qwenlet
