// The sum of the ranks' packets, in rank order and in the codec's domain (docs/wire-formats.md, section 9). Of one rank: decoding.
#pragma once

#include "cpu/codes.h"
#include "cpu/groups.h"

namespace smallreduce::SR_TARGET {

// Over one segment.
struct Sum {
  const uint8_t* scales;  // of the segment's first group in rank 0's packet
  const uint8_t* codes;
  int64_t ranks, stride;
  float factor;
  int64_t group_size;
};

// Writes elements [begin, begin + count) of the segment to the tile; `begin` starts a block, and all codes of the last one count.
template <Kind kKind>
void load_sum(const void* from, int64_t begin, int64_t count, float* __restrict tile) {
  const Sum sum = *static_cast<const Sum*>(from);
  int64_t blocks = ceil_div(count, kBlock);
  for (int64_t rank = 0; rank < sum.ranks; ++rank) {
    const uint8_t* codes = sum.codes + rank * sum.stride + begin / kBlock * block_bytes(kKind);
    for (int64_t done = 0; done < blocks;) {
      int64_t group = (begin + done * kBlock) / sum.group_size;
      int64_t group_end = ((group + 1) * sum.group_size - begin) / kBlock;
      int64_t stop = group_end < blocks ? group_end : blocks;
      float scale = is_cast(kKind) ? sum.factor : read_scale(sum.scales + rank * sum.stride + 2 * group) * sum.factor;
      for (; done < stop; ++done, codes += block_bytes(kKind)) {
        float* target = tile + done * kBlock;
        if (rank == 0) {
          Codes<kKind>::decode(codes, scale, target);
        } else {
          float decoded[kBlock];
          Codes<kKind>::decode(codes, scale, decoded);
          for (int j = 0; j < kBlock; j += kLanes) {
            store_lanes(target + j, load_lanes(target + j) + load_lanes(decoded + j));
          }
        }
      }
    }
  }
}

}  // namespace smallreduce::SR_TARGET
