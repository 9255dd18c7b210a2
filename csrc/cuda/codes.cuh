// Codes of one slot: from words of a packet to values and back (docs/wire-formats.md, section 7). Every lane of a warp calls
// each function, since lanes that share a byte trade codes.
#pragma once

#include "cuda/memory.cuh"
#include "formats/quantize.h"

namespace smallreduce::SR_TARGET {

// 2^23 as a float's bits: a small integer added to them is that float plus the integer.
constexpr uint32_t kIntegerBits = 0x4b000000u;

// The lowest bytes of four words.
SR_DEVICE uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

SR_DEVICE float byte_as_float(uint32_t word, int byte, int zero) {
  return float_of(__byte_perm(word, kIntegerBits, 0x7440 + uint32_t(byte))) - float(0x800000 + zero);
}

// A code plus kIntegerBits. The same code as formats/quantize.h's int_code, without its conversion to an integer, which runs at
// a quarter of the rate: a limit that is an integer may come before the truncation, and adding 2^23 toward zero truncates.
template <int kBits>
SR_DEVICE uint32_t biased_int_code(float value, float inverse, float offset) {
  float t = value * inverse + offset;
  t = fminf(fmaxf(t, 1.0f), float(2 * IntLevels<kBits>::kZero - 1));
  return bits_of(__fadd_rz(t, 8388608.0f));
}

template <int kBits>
SR_DEVICE float biased_code_value(uint32_t code) {
  return float_of(code) - float(0x800000 + IntLevels<kBits>::kZero);
}

// Where a lane's words lie in the codes of a block, and what they mean. The values are those of the codes, not yet scaled.
template <Kind kKind>
struct Codes;

template <>
struct Codes<Kind::kInt8> {
  static constexpr int kWords = 2;
  static constexpr uint32_t kZeros = 0x80808080u;
  SR_DEVICE void load(const uint8_t* block, int quarter, bool aligned, uint32_t* words) {
    load_words<1>(block + 4 * quarter, aligned, words);
    load_words<1>(block + 4 * quarter + 16, aligned, words + 1);
  }
  SR_DEVICE void store(uint8_t* block, int quarter, bool aligned, const uint32_t* words) {
    store_words<1>(block + 4 * quarter, aligned, words);
    store_words<1>(block + 4 * quarter + 16, aligned, words + 1);
  }
  SR_DEVICE void pack(const uint32_t (&codes)[kSlot], int, uint32_t* words) {
    words[0] = low_bytes(codes[0], codes[1], codes[2], codes[3]);
    words[1] = low_bytes(codes[4], codes[5], codes[6], codes[7]);
  }
  SR_DEVICE void unpack(const uint32_t* words, int, Slot& values) {
#pragma unroll
    for (int i = 0; i < kSlot; ++i) values[i] = byte_as_float(words[i / 4], i % 4, IntLevels<8>::kZero);
  }
};

template <>
struct Codes<Kind::kInt4> {
  static constexpr int kWords = 1;
  static constexpr uint32_t kZeros = 0x88888888u;
  SR_DEVICE void load(const uint8_t* block, int quarter, bool aligned, uint32_t* words) {
    load_words<1>(block + 4 * quarter, aligned, words);
  }
  SR_DEVICE void store(uint8_t* block, int quarter, bool aligned, const uint32_t* words) {
    store_words<1>(block + 4 * quarter, aligned, words);
  }
  SR_DEVICE void pack(const uint32_t (&codes)[kSlot], int, uint32_t* words) {
    words[0] = low_bytes(codes[0] + 16 * codes[4], codes[1] + 16 * codes[5], codes[2] + 16 * codes[6],
                         codes[3] + 16 * codes[7]);
  }
  SR_DEVICE void unpack(const uint32_t* words, int, Slot& values) {
    uint32_t low = words[0] & 0x0f0f0f0fu, high = words[0] >> 4 & 0x0f0f0f0fu;
#pragma unroll
    for (int i = 0; i < kSlot; ++i) values[i] = byte_as_float(i < 4 ? low : high, i % 4, IntLevels<4>::kZero);
  }
};

// Bytes 0-3 hold elements of the quarters 0 and 2, bytes 4-7 those of 1 and 3.
template <>
struct Codes<Kind::kInt2> {
  static constexpr int kWords = 1;
  static constexpr uint32_t kZeros = 0xaaaaaaaau;
  SR_DEVICE void load(const uint8_t* block, int quarter, bool aligned, uint32_t* words) {
    load_words<1>(block + 4 * (quarter % 2), aligned, words);
  }
  SR_DEVICE void store(uint8_t* block, int quarter, bool aligned, const uint32_t* words) {
    if (quarter < 2) store_words<1>(block + 4 * quarter, aligned, words);
  }
  SR_DEVICE void pack(const uint32_t (&codes)[kSlot], int, uint32_t* words) {
    uint32_t mine = low_bytes(codes[0] + 16 * codes[4], codes[1] + 16 * codes[5], codes[2] + 16 * codes[6],
                              codes[3] + 16 * codes[7]);
    words[0] = mine | __shfl_xor_sync(kAllLanes, mine, 2) << 2;
  }
  SR_DEVICE void unpack(const uint32_t* words, int quarter, Slot& values) {
    uint32_t mine = words[0] >> (quarter & 2);
    uint32_t low = mine & 0x03030303u, high = mine >> 4 & 0x03030303u;
#pragma unroll
    for (int i = 0; i < kSlot; ++i) values[i] = byte_as_float(i < 4 ? low : high, i % 4, IntLevels<2>::kZero);
  }
};

// Decoding only: sign.cuh encodes.
template <>
struct Codes<Kind::kSign> {
  static constexpr int kWords = 1;
  static constexpr uint32_t kZeros = 0;  // there is none
  SR_DEVICE void load(const uint8_t* block, int, bool aligned, uint32_t* words) {
    load_words<1>(block, aligned, words);
  }
  SR_DEVICE void unpack(const uint32_t* words, int quarter, Slot& values) {
    uint32_t negative = ~words[0] >> 4 * quarter;
#pragma unroll
    for (int i = 0; i < kSlot; ++i) {
      int bit = i < 4 ? i : i + 12;
      values[i] = float_of((negative << (31 - bit) & kSignBit) | 0x3f800000u);
    }
  }
};

// Casts to the types of buffers: Quad's own accesses.
template <typename Buffer>
struct CastToBuffer {
  static constexpr int kQuad = Quad<Buffer>::kWords;
  static constexpr int kWords = 2 * kQuad;
  static constexpr uint32_t kZeros = 0;
  SR_DEVICE void load(const uint8_t* block, int quarter, bool aligned, uint32_t* words) {
    load_words<kQuad>(block + 4 * kQuad * quarter, aligned, words);
    load_words<kQuad>(block + 4 * kQuad * (quarter + 4), aligned, words + kQuad);
  }
  SR_DEVICE void store(uint8_t* block, int quarter, bool aligned, const uint32_t* words) {
    store_words<kQuad>(block + 4 * kQuad * quarter, aligned, words);
    store_words<kQuad>(block + 4 * kQuad * (quarter + 4), aligned, words + kQuad);
  }
  SR_DEVICE void cast(const Slot& values, uint32_t* words) {
    Quad<Buffer>::pack(values, words);
    Quad<Buffer>::pack(values + 4, words + kQuad);
  }
  SR_DEVICE void unpack(const uint32_t* words, int, Slot& values) {
    Quad<Buffer>::unpack(words, values);
    Quad<Buffer>::unpack(words + kQuad, values + 4);
  }
};

template <typename Float8>
struct CastToFloat8 {
  static constexpr int kWords = 2;
  static constexpr uint32_t kZeros = 0;
  SR_DEVICE void load(const uint8_t* block, int quarter, bool aligned, uint32_t* words) {
    Codes<Kind::kInt8>::load(block, quarter, aligned, words);
  }
  SR_DEVICE void store(uint8_t* block, int quarter, bool aligned, const uint32_t* words) {
    Codes<Kind::kInt8>::store(block, quarter, aligned, words);
  }
  SR_DEVICE void cast(const Slot& values, uint32_t* words) {
    uint32_t codes[kSlot];
#pragma unroll
    for (int i = 0; i < kSlot; ++i) codes[i] = Float8::from_float(values[i]);
    Codes<Kind::kInt8>::pack(codes, 0, words);
  }
  SR_DEVICE void unpack(const uint32_t* words, int, Slot& values) {
#pragma unroll
    for (int i = 0; i < kSlot; ++i) values[i] = Float8::to_float(words[i / 4] >> (i % 4 * 8) & 0xffu);
  }
};

template <> struct Codes<Kind::kCastFloat32> : CastToBuffer<Float32Buffer> {};
template <> struct Codes<Kind::kCastBFloat16> : CastToBuffer<BFloat16Buffer> {};
template <> struct Codes<Kind::kCastFloat16> : CastToBuffer<Float16Buffer> {};
template <> struct Codes<Kind::kCastE4M3> : CastToFloat8<Float8E4M3> {};
template <> struct Codes<Kind::kCastE5M2> : CastToFloat8<Float8E5M2> {};

}  // namespace smallreduce::SR_TARGET
