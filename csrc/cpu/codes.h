// Codes of whole blocks: values to codes and back, one struct per kind (docs/wire-formats.md, sections 6 and 7).
// Plain loops over the elements of a block; the compiler vectorises them for the target.
#pragma once

#include "cpu/lanes.h"
#include "formats/quantize.h"

namespace smallreduce::SR_TARGET {

typedef uint16_t UnalignedU16 __attribute__((aligned(1), may_alias));
typedef uint32_t UnalignedU32 __attribute__((aligned(1), may_alias));

SR_FN float read_scale(const uint8_t* scale) {
  uint16_t bits = *(const UnalignedU16*)scale;
  return bits > kMaxScale ? float_of(kNanBits) : float_from_bfloat16(bits);
}

// kBits 8, 4 or 2. A byte holds elements a whole number of registers apart, so that packing needs no shuffle.
template <int kBits>
struct IntCodes {
  static constexpr int kStride = 4 * kBits;  // bytes of a block
  static constexpr int kZero = IntLevels<kBits>::kZero;

  // One register of codes, as int_code() gives them one by one.
  SR_FN IntVector codes_of(FloatVector values, float inverse, FloatVector offset) {
    IntVector codes = __builtin_convertvector(values * inverse + offset, IntVector);
    codes = codes > 1 ? codes : IntVector{} + 1;
    return codes > 2 * kZero - 1 ? IntVector{} + (2 * kZero - 1) : codes;
  }

  SR_FN FloatVector offset_of(UIntVector random) { return FloatVector(rounding_offset_bits<kBits>(random)); }

  template <bool kStochastic>
  SR_FN void encode(const float* __restrict values, float inverse, RandomKey key, uint32_t origin,
                    uint8_t* __restrict codes) {
    uint8_t halves[16];
    for (int j = 0; j < 16; j += kLanes) {
      FloatVector low_offset = FloatVector{} + (kZero + 0.5f), high_offset = low_offset;
      if constexpr (kStochastic) {
        UIntVector random = random_pair(key, origin, lane_numbers() + uint32_t(j));
        low_offset = offset_of(random & 0xffffu);
        high_offset = offset_of(random >> 16);
      }
      IntVector low = codes_of(load_lanes(values + j), inverse, low_offset);
      IntVector high = codes_of(load_lanes(values + j + 16), inverse, high_offset);
      if constexpr (kBits == 8) {
        store_bytes(low, codes + j);
        store_bytes(high, codes + j + 16);
      } else {
        store_bytes(low | high << 4, kBits == 4 ? codes + j : halves + j);
      }
    }
    if constexpr (kBits == 2) {
      uint64_t pairs[2];
      memcpy(pairs, halves, sizeof pairs);
      uint64_t packed = pairs[0] | pairs[1] << 2;
      memcpy(codes, &packed, sizeof packed);
    }
  }

  SR_FN void decode(const uint8_t* __restrict codes, float scale, float* __restrict values) {
    if constexpr (kBits == 8) {
      for (int j = 0; j < kBlock; j += kLanes) decode_lanes(load_bytes(codes + j), scale, values + j);
    } else if constexpr (kBits == 4) {
      for (int j = 0; j < 16; j += kLanes) {
        IntVector bytes = load_bytes(codes + j);
        decode_lanes(bytes & 15, scale, values + j);
        decode_lanes(bytes >> 4, scale, values + j + 16);
      }
    } else {
      for (int j = 0; j < 16; j += kLanes) {
        IntVector shift = (IntVector(lane_numbers()) + j) >> 3 << 1;
        IntVector bytes = load_repeated_bytes(codes, j) >> shift;
        decode_lanes(bytes & 3, scale, values + j);
        decode_lanes(bytes >> 4 & 3, scale, values + j + 16);
      }
    }
  }

  SR_FN void decode_lanes(IntVector codes, float scale, float* values) {
    store_lanes(values, __builtin_convertvector(codes - kZero, FloatVector) * scale);
  }
};

struct SignCodes {
  SR_FN void decode(const uint8_t* codes, float scale, float* values) {
    signed_block(*(const UnalignedU32*)codes, scale, values);
  }
};

// `scale` is the factor of a reduction.
struct CastFloat32Codes {
  SR_FN void encode(const float* __restrict values, uint8_t* __restrict codes) {
    for (int j = 0; j < kBlock; ++j) ((UnalignedU32*)codes)[j] = bits_of(canonical_nan(values[j]));
  }
  SR_FN void decode(const uint8_t* __restrict codes, float scale, float* __restrict values) {
    for (int j = 0; j < kBlock; ++j) values[j] = float_of(((const UnalignedU32*)codes)[j]) * scale;
  }
};

struct CastBFloat16Codes {
  SR_FN void encode(const float* __restrict values, uint8_t* __restrict codes) {
    for (int j = 0; j < kBlock; ++j) ((UnalignedU16*)codes)[j] = bfloat16_from_float(values[j]);
  }
  SR_FN void decode(const uint8_t* __restrict codes, float scale, float* __restrict values) {
    for (int j = 0; j < kBlock; ++j) values[j] = float_from_bfloat16(((const UnalignedU16*)codes)[j]) * scale;
  }
};

struct CastFloat16Codes {
  SR_FN void encode(const float* __restrict values, uint8_t* __restrict codes) {
    for (int j = 0; j < kBlock; ++j) ((UnalignedU16*)codes)[j] = uint16_t(Float16::from_float(values[j]));
  }
  SR_FN void decode(const uint8_t* __restrict codes, float scale, float* __restrict values) {
    for (int j = 0; j < kBlock; ++j) values[j] = Float16::to_float(((const UnalignedU16*)codes)[j]) * scale;
  }
};

template <typename Float8>
struct CastFloat8Codes {
  SR_FN void encode(const float* __restrict values, uint8_t* __restrict codes) {
    for (int j = 0; j < kBlock; ++j) codes[j] = uint8_t(Float8::from_float(values[j]));
  }
  SR_FN void decode(const uint8_t* __restrict codes, float scale, float* __restrict values) {
    for (int j = 0; j < kBlock; ++j) values[j] = Float8::to_float(codes[j]) * scale;
  }
};

template <Kind>
struct CodesOf;
template <> struct CodesOf<Kind::kInt8> { using Type = IntCodes<8>; };
template <> struct CodesOf<Kind::kInt4> { using Type = IntCodes<4>; };
template <> struct CodesOf<Kind::kInt2> { using Type = IntCodes<2>; };
template <> struct CodesOf<Kind::kSign> { using Type = SignCodes; };
template <> struct CodesOf<Kind::kCastFloat32> { using Type = CastFloat32Codes; };
template <> struct CodesOf<Kind::kCastBFloat16> { using Type = CastBFloat16Codes; };
template <> struct CodesOf<Kind::kCastFloat16> { using Type = CastFloat16Codes; };
template <> struct CodesOf<Kind::kCastE4M3> { using Type = CastFloat8Codes<Float8E4M3>; };
template <> struct CodesOf<Kind::kCastE5M2> { using Type = CastFloat8Codes<Float8E5M2>; };
template <Kind kKind>
using Codes = typename CodesOf<kKind>::Type;

}  // namespace smallreduce::SR_TARGET
