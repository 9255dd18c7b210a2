// Where the values that are encoded come from, tile by tile: a worker's elements, as they are or rounded, the difference of two
// buffers, or the sum of the ranks' packets.
#pragma once

#include "cpu/lanes.h"
#include "cpu/store.h"
#include "formats/packet.h"

namespace smallreduce::SR_TARGET {

SR_FN int64_t blocks_of(int64_t elements) { return ceil_div(elements, kBlock); }

// fl(value + residual), limited to finite where the value is.
SR_FN float compensate(float value, float residual, bool limit) {
  float sum = value + residual;
  return limit && is_finite(value) ? limit_to_finite(sum) : sum;
}

SR_FN void subtract(const float* __restrict a, const float* __restrict b, int64_t count, float* __restrict difference) {
  for (int64_t i = 0; i < count; ++i) difference[i] = a[i] - b[i];
}

// From the transformed domain back, in place (docs/wire-formats.md, section 8).
SR_FN void inverse_hadamard(float* tile, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) hadamard_block(tile + b * kBlock, 0x1p-5f);
  for (int64_t i = 0; i < blocks * kBlock; ++i) tile[i] = limit_to_finite(tile[i] * 0x1p5f);
}

// Elements of a buffer, contiguous and within one segment.
template <typename Buffer>
struct WorkerSource {
  const typename Buffer::Storage* input;
  float* residual;  // null: no feedback
  int64_t length;
  bool hadamard;

  SR_MEMBER WorkerSource part(int64_t first, int64_t count) const {
    return {input + first, residual ? residual + first : nullptr, count, hadamard};
  }

  // The compensated values, before any transform, of elements [begin, begin + count), zeros up to a whole block.
  SR_MEMBER void load_original(int64_t begin, int64_t count, bool limit, float* __restrict tile) const {
    const auto* x = input + begin;
    if (residual) {
      const float* e = residual + begin;
      if (limit) {
        for (int64_t i = 0; i < count; ++i) tile[i] = compensate(Buffer::load(x[i]), e[i], true);
      } else {
        for (int64_t i = 0; i < count; ++i) tile[i] = Buffer::load(x[i]) + e[i];
      }
    } else {
      for (int64_t i = 0; i < count; ++i) tile[i] = Buffer::load(x[i]);
    }
    for (int64_t i = count; i < blocks_of(count) * kBlock; ++i) tile[i] = 0.0f;
  }

  SR_MEMBER void load(int64_t begin, int64_t count, bool limit, float* __restrict tile) const {
    load_original(begin, count, limit, tile);
    if (!hadamard) return;
    for (int64_t b = 0; b < blocks_of(count); ++b) hadamard_block(tile + b * kBlock, 0x1p-5f);
  }

  // load() without a copy where the buffer already holds what it would write.
  SR_MEMBER const float* view(int64_t begin, int64_t count, float* __restrict tile) const {
    if constexpr (sizeof(typename Buffer::Storage) == sizeof(float)) {
      if (!residual && !hadamard && count % kBlock == 0) return input + begin;
    }
    load(begin, count, false, tile);
    return tile;
  }

  // `loaded`: what load() gave; `decoded`: what a decoder sees before the inverse transform. Both are scratch afterwards.
  SR_MEMBER void keep_residual(int64_t begin, int64_t count, bool limit, float* __restrict loaded,
                               float* __restrict decoded) const {
    float* e = residual + begin;
    if (!hadamard) return subtract(loaded, decoded, count, e);
    inverse_hadamard(decoded, blocks_of(count));
    load_original(begin, count, limit, loaded);
    // One wrong coefficient moves an element by up to twice the largest: the difference of two finite values may overflow.
    for (int64_t i = 0; i < count; ++i) e[i] = limit_to_finite(loaded[i] - decoded[i]);
  }
};

// Writes `count` values from `begin` on, which starts a block, to a tile. What lies behind them in the last block is not defined.
using LoadTile = void (*)(const void* from, int64_t begin, int64_t count, float* tile);

// Values already in the domain that is quantised, brought by a function: one indirect call a tile, instead of one encoder for each
// kind of packet or type of element that they may come from. Their residual is a server's.
struct LoadedSource {
  LoadTile load_tile;
  const void* from;
  float* residual;  // null: no feedback
  int64_t length;
  int64_t start;  // what load_tile calls the first

  SR_MEMBER LoadedSource part(int64_t first, int64_t count) const {
    return {load_tile, from, residual ? residual + first : nullptr, count, start + first};
  }

  SR_MEMBER const float* view(int64_t begin, int64_t count, float* __restrict tile) const {
    load(begin, count, false, tile);
    return tile;
  }

  SR_MEMBER void load(int64_t begin, int64_t count, bool limit, float* __restrict tile) const {
    load_tile(from, start + begin, count, tile);
    for (int64_t i = count; i < blocks_of(count) * kBlock; ++i) tile[i] = 0.0f;
    if (!residual) return;
    const float* e = residual + begin;
    if (limit) {
      for (int64_t i = 0; i < count; ++i) tile[i] = compensate(tile[i], e[i], true);
    } else {
      for (int64_t i = 0; i < count; ++i) tile[i] += e[i];
    }
  }

  SR_MEMBER void keep_residual(int64_t begin, int64_t count, bool, float* __restrict loaded,
                               float* __restrict decoded) const {
    subtract(loaded, decoded, count, residual + begin);
  }
};

// How many of the `count` elements of a tile, which with Hadamard are those of whole blocks, the segment has.
SR_FN int64_t present_of(int64_t length, int64_t begin, int64_t count) {
  return length - begin < count ? length - begin : count;
}

// From these to the transformed domain, in place.
SR_FN void transform(int64_t present, int64_t count, float* __restrict tile) {
  for (int64_t i = present; i < count; ++i) tile[i] = 0.0f;
  for (int64_t b = 0; b < blocks_of(count); ++b) hadamard_block(tile + b * kBlock, 0x1p-5f);
}

// Elements of an fp32 buffer that are rounded, over one segment.
struct Rounded {
  const float* input;
  int64_t length;
  bool hadamard;
};

template <typename Buffer>
void load_rounded(const void* from, int64_t begin, int64_t count, float* __restrict tile) {
  const Rounded elements = *static_cast<const Rounded*>(from);
  const float* input = elements.input + begin;
  int64_t present = present_of(elements.length, begin, count);
  for (int64_t i = 0; i < present; ++i) tile[i] = Buffer::load(input[i]);
  if (elements.hadamard) transform(present, count, tile);
}

// What new values add to old ones, over one segment.
struct Difference {
  const float* minuend;
  const void* subtrahend;
  int64_t length;
  bool hadamard;
};

template <typename Buffer>
void load_difference(const void* from, int64_t begin, int64_t count, float* __restrict tile) {
  const Difference pair = *static_cast<const Difference*>(from);
  const float* minuend = pair.minuend + begin;
  const auto* subtrahend = static_cast<const typename Buffer::Storage*>(pair.subtrahend) + begin;
  int64_t present = present_of(pair.length, begin, count);
  for (int64_t i = 0; i < present; ++i) tile[i] = minuend[i] - Buffer::load(subtrahend[i]);
  if (pair.hadamard) transform(present, count, tile);
}

}  // namespace smallreduce::SR_TARGET
