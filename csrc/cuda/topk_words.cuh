// The words of TopK packets, to indices and from them: launchers of the kernels in topk_words.cu.
#pragma once

#include "cuda/header.cuh"
#include "cuda/launch.cuh"
#include "cuda/topk_sum.cuh"

namespace smallreduce::SR_TARGET {

// Of each kernel: one for each range.
inline int sparse_warps() {
  int warps = 16 * processor_count();
  return warps < kMaxRanges ? warps : kMaxRanges;
}

struct SparseMemory {
  void* scratch;
  int64_t nbytes;
};

// Refuses packets, and of those that it does not refuse leaves `decoded` and `starts` in the scratch memory.
void read_words(const SparsePackets& packets, const PacketFormat& format, const Layout& layout,
                const SparseMemory& memory, int32_t* error, cudaStream_t stream);

// Writes headers, words and padding of packets whose values and indices (`selected`) are there. `ranks`: of the packets that were read
// for it, all of which must have been accepted; 0 if there were none.
void write_words(uint8_t* packets, int64_t stride, const PacketFormat& format, const Layout& layout,
                 const SparseMemory& memory, int64_t ranks, cudaStream_t stream);

}  // namespace smallreduce::SR_TARGET
