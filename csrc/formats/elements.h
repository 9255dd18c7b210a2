// Conversions between fp32 and the narrow floating-point types, to the bit (docs/wire-formats.md, section 4).
// Branch-free integer arithmetic, so that a plain loop over them vectorises and every backend gives the same bits.
#pragma once

#include "formats/target.h"

namespace smallreduce::SR_TARGET {

constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kInfBits = 0x7f800000u;
constexpr uint32_t kMaxFiniteBits = 0x7f7fffffu;
constexpr uint32_t kNanBits = 0x7fc00000u;

SR_FN uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SR_FN float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SR_FN uint32_t magnitude_bits(float value) { return bits_of(value) & ~kSignBit; }

SR_FN bool is_finite(float value) { return magnitude_bits(value) < kInfBits; }

SR_FN float canonical_nan(float value) { return magnitude_bits(value) > kInfBits ? float_of(kNanBits) : value; }

// Limits finite and infinite values to the largest finite magnitude; NaN stays.
SR_FN float limit_to_finite(float value) {
  uint32_t bits = bits_of(value);
  uint32_t limited = (bits & kSignBit) | kMaxFiniteBits;
  return (bits & ~kSignBit) == kInfBits ? float_of(limited) : value;
}

SR_FN float float_from_bfloat16(uint16_t half) { return float_of(uint32_t(half) << 16); }

SR_FN uint16_t bfloat16_from_float(float value) {
  uint32_t bits = bits_of(value), sign = (bits & kSignBit) >> 16, magnitude = bits & ~kSignBit;
  uint32_t finite = magnitude < 0x7f7f0000u ? magnitude : 0x7f7f0000u;
  uint32_t rounded = (finite + 0x7fffu + ((finite >> 16) & 1u)) >> 16;
  uint32_t result = magnitude == kInfBits ? 0x7f80u : rounded;
  return uint16_t(magnitude > kInfBits ? 0x7fc0u : (sign | result));
}

// An IEEE-like type of 1 sign, kExponent and kMantissa bits. kLargest, kInf and kNan are its bit patterns without sign.
template <int kExponent, int kMantissa, uint32_t kLargest, uint32_t kInf, uint32_t kNan>
struct SmallFloat {
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr int kShift = 23 - kMantissa;
  static constexpr uint32_t kSign = 1u << (kExponent + kMantissa);
  static constexpr uint32_t kRebias = uint32_t(127 - kBias);

  SR_FN uint32_t from_float(float value) {
    constexpr uint32_t largest = (kLargest << kShift) + (kRebias << 23);
    constexpr uint32_t smallest_normal = (kRebias + 1) << 23;
    // Adding it leaves a denormal of the target in the low mantissa bits, rounded by the addition.
    constexpr uint32_t denormal_magic = uint32_t(127 + 1 - kBias + kShift) << 23;
    uint32_t bits = bits_of(value), magnitude = bits & ~kSignBit;
    uint32_t finite = magnitude < largest ? magnitude : largest;
    uint32_t normal = (finite + ((1u << (kShift - 1)) - 1) + ((finite >> kShift) & 1u)) >> kShift;
    normal -= kRebias << kMantissa;
    uint32_t small = finite < smallest_normal ? finite : 0u;
    uint32_t denormal = bits_of(float_of(small) + float_of(denormal_magic)) - denormal_magic;
    uint32_t result = finite < smallest_normal ? denormal : normal;
    result = magnitude == kInfBits ? kInf : result;
    result |= (bits >> 31) * kSign;
    return magnitude > kInfBits || (magnitude == kInfBits && kInf == kNan) ? kNan : result;
  }

  // The nearest value of a type that has an Inf, which is nearest from half a step beyond the largest on.
  SR_FN float nearest(float value) {
    static_assert(kInf != kNan, "beyond the largest value there is nothing");
    constexpr uint32_t smallest_normal = (kRebias + 1) << 23, infinite = (kInf << kShift) + (kRebias << 23);
    float magnitude = float_of(bits_of(value) & ~kSignBit);
    float normal = magnitude > float_of(smallest_normal) ? magnitude : float_of(smallest_normal);
    // A sum with this power of two is rounded to the target's step at the value. Where it overflows, so does the target.
    float magic = float_of((bits_of(normal) & kInfBits) + (uint32_t(kShift) << 23));
    float rounded = magnitude + magic - magic;
    float finite = float_of((bits_of(value) & kSignBit) | bits_of(rounded));
    return rounded < float_of(infinite) ? finite : value * float_of(kInfBits);  // Inf, or the NaN that it is
  }

  SR_FN float to_float(uint32_t small) {
    constexpr uint32_t top = ((1u << kExponent) - 1) << kMantissa;
    uint32_t magnitude = small & (kSign - 1), sign = (small & kSign) << (31 - kExponent - kMantissa);
    float finite = float_of(magnitude << kShift) * float_of((127u + kRebias) << 23);
    bool is_nan = kInf == kNan ? magnitude == kNan : magnitude > top;
    bool is_inf = kInf != kNan && magnitude == top;
    uint32_t bits = is_inf ? kInfBits : bits_of(finite);
    return float_of(is_nan ? kNanBits : (bits | sign));
  }
};

using Float16 = SmallFloat<5, 10, 0x7bff, 0x7c00, 0x7e00>;
using Float8E4M3 = SmallFloat<4, 3, 0x7e, 0x7f, 0x7f>;
using Float8E5M2 = SmallFloat<5, 2, 0x7b, 0x7c, 0x7e>;

// Reads and writes one element of a buffer; writing rounds, saturates and makes NaN canonical.
struct Float32Buffer {
  using Storage = float;
  SR_FN float load(Storage stored) { return stored; }
  SR_FN Storage store(float value) { return canonical_nan(value); }
};
struct BFloat16Buffer {
  using Storage = uint16_t;
  SR_FN float load(Storage stored) { return float_from_bfloat16(stored); }
  SR_FN Storage store(float value) { return bfloat16_from_float(value); }
};
struct Float16Buffer {
  using Storage = uint16_t;
  SR_FN float load(Storage stored) { return Float16::to_float(stored); }
  SR_FN Storage store(float value) { return uint16_t(Float16::from_float(value)); }
};

// Reads an element of an fp32 buffer as torch casts it to a narrower type: where storing saturates, this gives Inf.
struct RoundedToBFloat16 {
  using Storage = float;
  SR_FN float load(Storage stored) {
    uint32_t bits = bits_of(stored);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return stored != stored ? stored : float_of(rounded);
  }
};
struct RoundedToFloat16 {
  using Storage = float;
  SR_FN float load(Storage stored) { return Float16::nearest(stored); }
};

}  // namespace smallreduce::SR_TARGET
