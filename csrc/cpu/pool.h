// A small fork-safe thread pool. The library does not bring a second OpenMP runtime beside torch's.
#pragma once

#include <cstdint>
#include <functional>

namespace smallreduce::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, count), on at most `threads` threads, the caller's among them; ranges
// are no smaller than `grain`, but for the last. A caller that finds the pool busy works alone.
void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace smallreduce::cpu
