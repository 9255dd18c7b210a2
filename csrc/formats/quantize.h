// Per-group and per-element arithmetic of IntQuant, and its random bits (docs/wire-formats.md, sections 5 and 6).
#pragma once

#include "formats/elements.h"
#include "formats/packet.h"

namespace smallreduce::SR_TARGET {

constexpr uint16_t kNanScale = 0x7fc0;
constexpr uint16_t kMaxScale = 0x7f7f;  // a larger pattern is not a scale of a finite group

template <int kBits>
struct IntLevels {
  static constexpr int kLevels = (1 << (kBits - 1)) - 1;
  static constexpr int kZero = 1 << (kBits - 1);  // the code of zero
  static constexpr uint32_t kLargestScale = kBits == 2 ? 0x7f7f0000u : kBits == 4 ? 0x7e120000u : 0x7c010000u;
};

// absmax given as bits, finite. Returns the scale as bf16 bits.
template <int kBits>
SR_FN uint16_t int_scale(uint32_t absmax_bits) {
  float exact = float_of(absmax_bits) / float(IntLevels<kBits>::kLevels);
  uint32_t bits = (bits_of(exact) + 0xffffu) & 0xffff0000u;
  bits = bits < 0x00800000u ? 0x00800000u : bits;
  bits = bits > IntLevels<kBits>::kLargestScale ? IntLevels<kBits>::kLargestScale : bits;
  return absmax_bits == 0 ? uint16_t(0) : uint16_t(bits >> 16);
}

SR_FN float inverse_scale(uint16_t scale) { return scale == 0 ? 0.0f : 1.0f / float_from_bfloat16(scale); }

// random: 16 bits in the low half of a word (or of each word of a vector). The bits of c + u for stochastic rounding, exact in fp32: a
// float in [c, 2c) with the random bits where its mantissa counts in units of 2^-16.
template <int kBits, typename Word>
SR_FN Word rounding_offset_bits(Word random) {
  constexpr uint32_t base = uint32_t(127 + kBits - 1) << 23;
  constexpr int shift = 23 - (kBits - 1) - 16;
  return ((random | 1u) << shift) | base;
}

template <int kBits>
SR_FN float rounding_offset(uint32_t random) {
  return float_of(rounding_offset_bits<kBits>(random));
}

template <int kBits>
SR_FN int32_t int_code(float value, float inverse, float offset) {
  float t = value * inverse + offset;
  int32_t code = int32_t(t);
  constexpr int32_t largest = 2 * IntLevels<kBits>::kZero - 1;
  code = code < 1 ? 1 : code;
  return code > largest ? largest : code;
}

struct RandomKey { uint32_t low, high; };

SR_FN RandomKey random_key(uint64_t seed, uint64_t step) {
  uint64_t key = mix64(seed ^ mix64(step));
  return {uint32_t(key), uint32_t(key >> 32)};
}

// The random bits of elements j (low half) and j + 16 (high half) of the block with this origin. Word: uint32_t, or a vector of it.
template <typename Word>
SR_FN Word random_pair(RandomKey key, uint32_t origin, Word j) {
  Word x = j + (16u * origin + key.low);
  x ^= x >> 16;
  x *= 0x7feb352du;
  x = (x ^ (x >> 15)) + key.high;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

}  // namespace smallreduce::SR_TARGET
