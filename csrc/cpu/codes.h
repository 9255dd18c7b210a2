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

// kBits 8, 4 or 2. A byte holds element j and those kStride further on, so that packing needs no shuffle.
template <int kBits>
struct IntCodes {
  static constexpr int kStride = 4 * kBits;  // bytes of a block
  static constexpr int kPerByte = 8 / kBits;
  static constexpr int kZero = IntLevels<kBits>::kZero;

  template <bool kStochastic>
  SR_FN void encode(const float* __restrict values, float inverse, RandomKey key, uint32_t origin, uint8_t* __restrict codes) {
    uint8_t flat[kBlock];
    uint8_t* target = kPerByte == 1 ? codes : flat;
    if constexpr (kPerByte == 2) {
      for (int j = 0; j < 16; ++j) {
        uint32_t random = kStochastic ? random_pair(key, origin, uint32_t(j)) : 0;
        float low_offset = kStochastic ? rounding_offset<kBits>(random & 0xffffu) : kZero + 0.5f;
        float high_offset = kStochastic ? rounding_offset<kBits>(random >> 16) : kZero + 0.5f;
        int32_t low = int_code<kBits>(values[j], inverse, low_offset);
        int32_t high = int_code<kBits>(values[j + 16], inverse, high_offset);
        codes[j] = uint8_t(low | high << 4);
      }
      return;
    }
    for (int j = 0; j < 16; ++j) {
      uint32_t random = kStochastic ? random_pair(key, origin, uint32_t(j)) : 0;
      float low_offset = kStochastic ? rounding_offset<kBits>(random & 0xffffu) : kZero + 0.5f;
      float high_offset = kStochastic ? rounding_offset<kBits>(random >> 16) : kZero + 0.5f;
      target[j] = uint8_t(int_code<kBits>(values[j], inverse, low_offset));
      target[j + 16] = uint8_t(int_code<kBits>(values[j + 16], inverse, high_offset));
    }
    if constexpr (kPerByte == 4) {
      for (int j = 0; j < 8; ++j) codes[j] = uint8_t(flat[j] | flat[j + 8] << 2 | flat[j + 16] << 4 | flat[j + 24] << 6);
    }
  }

  SR_FN void decode(const uint8_t* __restrict codes, float scale, float* __restrict values) {
    constexpr uint32_t mask = (1u << kBits) - 1;
    for (int part = 0; part < kPerByte; ++part) {
      for (int j = 0; j < kStride; ++j) {
        int32_t code = int32_t(uint32_t(codes[j]) >> (part * kBits) & mask);
        values[part * kStride + j] = float(code - kZero) * scale;
      }
    }
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
