// Writing a tile of fp32 values into a buffer of any element type.
#pragma once

#include "cpu/lanes.h"

namespace smallreduce::SR_TARGET {

constexpr int64_t kTile = 1024;  // elements that stay in the first-level cache between the passes over them

constexpr int64_t kStreamFromBytes = 1 << 20;  // outputs that would not stay in a cache anyway

// `stream`: past the caches; fp32 only, aligned to 64 bytes.
template <typename Buffer>
SR_FN void store(const float* __restrict tile, int64_t count, bool stream,
                 typename Buffer::Storage* __restrict output) {
  if constexpr (sizeof(typename Buffer::Storage) == sizeof(float)) {
    if (stream) {
      int64_t whole = count / kBlock;
      for (int64_t b = 0; b < whole; ++b) {
        float block[kBlock];
        for (int j = 0; j < kBlock; ++j) block[j] = Buffer::store(tile[b * kBlock + j]);
        stream_block(output + b * kBlock, block);
      }
      for (int64_t i = whole * kBlock; i < count; ++i) output[i] = Buffer::store(tile[i]);
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) output[i] = Buffer::store(tile[i]);
}

}  // namespace smallreduce::SR_TARGET
