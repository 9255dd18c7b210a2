// The sum of sparse packets over a tile, in rank order (docs/wire-formats.md, section 11). Of one rank: decoding.
#pragma once

#include "cuda/memory.cuh"
#include "cuda/topk.cuh"

namespace smallreduce::SR_TARGET {

SR_DEVICE float load_value(Kind kind, const uint8_t* values, int64_t number, bool aligned) {
  if (kind == Kind::kTopKFloat32) {
    uint32_t word;
    load_words<1>(values + 4 * number, aligned, &word);
    return float_of(word);
  }
  uint16_t half = load_u16(values + 2 * number, aligned);
  return kind == Kind::kTopKBFloat16 ? float_from_bfloat16(half) : Float16::to_float(half);
}

// Writes a value and returns what a decoder reads.
SR_DEVICE float store_value(Kind kind, uint8_t* values, int64_t number, bool aligned, float value) {
  if (kind == Kind::kTopKFloat32) {
    uint32_t word = bits_of(canonical_nan(value));
    store_words<1>(values + 4 * number, aligned, &word);
    return float_of(word);
  }
  bool is_bfloat16 = kind == Kind::kTopKBFloat16;
  uint16_t half = is_bfloat16 ? bfloat16_from_float(value) : uint16_t(Float16::from_float(value));
  store_u16(values + 2 * number, aligned, half);
  return is_bfloat16 ? float_from_bfloat16(half) : Float16::to_float(half);
}

// The packets that are read: of the packets of a layout one (ranks is 1), or those of all ranks for the layout's only one.
struct SparsePackets {
  const uint8_t* packets;
  int64_t ranks, stride;
  float factor;
  Kind kind;
};

// Of a warp: a tile of fp32, and behind it whatever else a kernel needs.
extern __shared__ uint4 shared_memory[];
constexpr size_t kTileBytes = kTile * sizeof(float);
SR_DEVICE float* shared_tile() { return reinterpret_cast<float*>(shared_memory); }

SR_DEVICE void store_shared(const Place& place, const Tile& values, float* shared) {
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
      Quad<ResidualBuffer>::pack(values[u] + 4 * half, words);
      store_words<4>(reinterpret_cast<uint8_t*>(shared + place.first_element(u) + 16 * half), true, words);
    }
  }
}

SR_DEVICE void load_shared(const Place& place, const float* shared, Tile& values) {
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
      load_words<4>(reinterpret_cast<const uint8_t*>(shared + place.first_element(u) + 16 * half), true, words);
      Quad<ResidualBuffer>::unpack(words, values[u] + 4 * half);
    }
  }
}

// Over one segment.
struct SparseSum {
  SparsePackets from;
  const uint8_t* values;    // the segment's, of the first rank
  const uint32_t* indices;  // likewise
  const uint32_t* starts;
  int64_t indices_stride, starts_stride;  // from rank to rank
  bool aligned;                           // the values

  SR_DEVICE_MEMBER SparseSum(const SparsePackets& from, const Scratch& scratch, const Segment& segment)
      : from(from),
        values(from.packets + segment.packet * from.stride + kHeaderBytes + value_bytes(from.kind) * segment.value),
        indices(scratch.decoded + scratch.first_value[segment.packet] + segment.value),
        starts(scratch.starts),
        indices_stride(scratch.values),
        starts_stride(scratch.tiles),
        aligned(is_aligned(from.packets, 4) && from.stride % 4 == 0) {}

  SR_DEVICE_MEMBER float term(int64_t rank, uint32_t number) const {
    return load_value(from.kind, values + rank * from.stride, number, aligned) * from.factor;
  }

  // The sum over a tile, by way of the shared one.
  SR_DEVICE_MEMBER void load(const SparseTile& tile, Tile& sum) const {
    Place place(kTile);
    float* shared = shared_tile();
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
#pragma unroll
      for (int i = 0; i < kSlot; ++i) sum[u][i] = 0.0f;
    }
    bool empty = true;
    for (int64_t first = 0; first < from.ranks; first += kWarp) {
      int64_t rank = first + lane_index();
      uint32_t begin = 0, end = 0;
      if (rank < from.ranks) {
        const uint32_t* start = starts + rank * starts_stride + tile.number;
        begin = start[0], end = start[1];
      }
      if (!any_lane(begin != end)) continue;
      if (empty) store_shared(place, sum, shared);
      empty = false;
      __syncwarp();
      for_each_listed(begin, end - begin, [&](bool present, int list, uint32_t number) {
        float added = 0.0f;
        int64_t at = 0;
        if (present) {
          added = term(first + list, number);
          at = indices[(first + list) * indices_stride + number] - tile.begin;
        }
        int last = __shfl_sync(kAllLanes, list, __popc(__ballot_sync(kAllLanes, present)) - 1);
        for (int turn = __shfl_sync(kAllLanes, list, 0); turn <= last; ++turn) {
          if (present && turn == list) shared[at] += added;
          __syncwarp();
        }
      });
    }
    if (empty) return;
    load_shared(place, shared, sum);
    __syncwarp();
  }

  // The sum of one element, in the tile of that number.
  SR_DEVICE_MEMBER float at(int64_t tile, int64_t element) const {
    float sum = 0.0f;
    for (int64_t rank = 0; rank < from.ranks; ++rank) {
      const uint32_t* start = starts + rank * starts_stride + tile;
      const uint32_t* index = indices + rank * indices_stride;
      uint32_t low = start[0], end = start[1];
      for (uint32_t high = end; low < high;) {
        uint32_t middle = low + (high - low) / 2;
        if (index[middle] < element) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      if (low < end && index[low] == element) sum += term(rank, low);
    }
    return sum;
  }
};

}  // namespace smallreduce::SR_TARGET
