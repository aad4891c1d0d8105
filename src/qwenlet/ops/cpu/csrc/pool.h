// One pool of threads for all kernels. Work is cut into chunks that threads take from a counter, so that a thread the
// system has put aside holds up one chunk and not its whole share.
#pragma once

#include <cstdint>
#include <functional>

namespace qwenlet {

// Calls body(begin, end) for chunks that cover [0, count), on up to `threads` threads, the caller among them; returns
// when all are done. Not re-entrant: calls from several threads take turns.
void parallel_for(int threads, int64_t count, int64_t chunk, const std::function<void(int64_t, int64_t)>& body);

}  // namespace qwenlet
