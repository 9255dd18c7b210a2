// What a plain loop does not express: the 32-point Hadamard transform across the lanes of registers, one bit per lane, and
// streaming stores. GCC vector types of the target's native width; intrinsics only where there is no such operation.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "formats/elements.h"
#include "formats/types.h"

namespace smallreduce::SR_TARGET {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVectors = int(kBlock) / kLanes;

typedef float FloatVector __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UIntVector __attribute__((vector_size(4 * kLanes)));
typedef uint8_t ByteVector __attribute__((vector_size(kLanes)));
typedef float UnalignedFloatVector __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint8_t UnalignedByteVector __attribute__((vector_size(kLanes), aligned(1)));

SR_FN FloatVector load_lanes(const float* from) { return *(const UnalignedFloatVector*)from; }
SR_FN void store_lanes(float* to, FloatVector lanes) { *(UnalignedFloatVector*)to = lanes; }

// One byte a lane. (GCC 12 widens bytes lane by lane.)
SR_FN IntVector load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return IntVector(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
  return IntVector(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  return __builtin_convertvector(*(const UnalignedByteVector*)from, IntVector);
#endif
}
// Lanes j to j + kLanes - 1 of 16 lanes that hold 8 bytes twice over.
SR_FN IntVector load_repeated_bytes(const uint8_t* from, int j) {
#if defined(__AVX512F__)
  (void)j;
  int64_t word;
  memcpy(&word, from, sizeof word);
  return IntVector(_mm512_cvtepu8_epi32(_mm_set1_epi64x(word)));
#else
  return load_bytes(from + j % 8);
#endif
}
SR_FN void store_bytes(IntVector lanes, uint8_t* to) {
  *(UnalignedByteVector*)to = __builtin_convertvector(lanes, ByteVector);
}

SR_FN UIntVector lane_numbers() {
  UIntVector numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = uint32_t(lane);
  return numbers;
}

// Lane j of the result is lane j ^ kDistance.
template <int kDistance, typename Vector>
SR_FN Vector exchange(Vector v) {
  IntVector partner;
  for (int lane = 0; lane < kLanes; ++lane) partner[lane] = lane ^ kDistance;
  return __builtin_shuffle(v, partner);
}

template <int kDistance>
SR_FN IntVector larger_of_partners(IntVector v) {
  if constexpr (kDistance >= kLanes) {
    return v;
  } else {
    IntVector other = exchange<kDistance>(v);
    return other > v ? other : v;
  }
}

SR_FN int32_t largest_lane(IntVector v) {
  return larger_of_partners<1>(larger_of_partners<2>(larger_of_partners<4>(larger_of_partners<8>(v))))[0];
}

template <int kDistance>
SR_FN FloatVector butterfly_in_register(FloatVector v) {
  IntVector sign;
  for (int lane = 0; lane < kLanes; ++lane) sign[lane] = lane & kDistance ? int32_t(kSignBit) : 0;
  return exchange<kDistance>(v) + FloatVector(IntVector(v) ^ sign);
}

template <int kDistance>
SR_FN void butterfly(FloatVector (&v)[kVectors]) {
  if constexpr (kDistance < kLanes) {
    for (int i = 0; i < kVectors; ++i) v[i] = butterfly_in_register<kDistance>(v[i]);
  } else {
    constexpr int step = kDistance / kLanes;
    for (int i = 0; i < kVectors; ++i) {
      if (i & step) continue;
      FloatVector a = v[i], b = v[i + step];
      v[i] = a + b;
      v[i + step] = a - b;
    }
  }
}

// T of docs/wire-formats.md, section 8, on `scale` times one block, in place.
SR_FN void hadamard_block(float* block, float scale) {
  FloatVector v[kVectors];
  for (int i = 0; i < kVectors; ++i) v[i] = load_lanes(block + i * kLanes) * scale;
  butterfly<1>(v);
  butterfly<2>(v);
  butterfly<4>(v);
  butterfly<8>(v);
  butterfly<16>(v);
  for (int i = 0; i < kVectors; ++i) store_lanes(block + i * kLanes, v[i]);
}

// Bit j is set unless block[j] < 0.
SR_FN uint32_t nonnegative_bits(const float* block) {
#if defined(__AVX512F__)
  uint32_t low = _mm512_cmp_ps_mask(_mm512_loadu_ps(block), _mm512_setzero_ps(), _CMP_NLT_UQ);
  uint32_t high = _mm512_cmp_ps_mask(_mm512_loadu_ps(block + 16), _mm512_setzero_ps(), _CMP_NLT_UQ);
  return low | high << 16;
#elif defined(__AVX__)
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    __m256 less = _mm256_cmp_ps(_mm256_loadu_ps(block + 8 * i), _mm256_setzero_ps(), _CMP_NLT_UQ);
    bits |= uint32_t(_mm256_movemask_ps(less)) << (8 * i);
  }
  return bits;
#else
  uint32_t bits = 0;
  for (int j = 0; j < kBlock; ++j) bits |= uint32_t(!(block[j] < 0.0f)) << j;
  return bits;
#endif
}

// Bit j is set if the magnitude of block[j], as an integer, is at least `threshold` (which is below 2^31).
SR_FN uint32_t at_least_bits(const float* block, uint32_t threshold) {
#if defined(__AVX512F__)
  __m512i limit = _mm512_set1_epi32(int32_t(threshold)), magnitude = _mm512_set1_epi32(int32_t(~kSignBit));
  __m512i low = _mm512_and_si512(_mm512_loadu_si512(block), magnitude);
  __m512i high = _mm512_and_si512(_mm512_loadu_si512(block + 16), magnitude);
  uint32_t bits = _mm512_cmpge_epi32_mask(low, limit);
  return bits | uint32_t(_mm512_cmpge_epi32_mask(high, limit)) << 16;
#elif defined(__AVX2__)
  __m256i limit = _mm256_set1_epi32(int32_t(threshold) - 1), magnitude = _mm256_set1_epi32(int32_t(~kSignBit));
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    __m256i lanes = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(block + 8 * i)), magnitude);
    __m256 above = _mm256_castsi256_ps(_mm256_cmpgt_epi32(lanes, limit));
    bits |= uint32_t(_mm256_movemask_ps(above)) << (8 * i);
  }
  return bits;
#else
  IntVector limit = IntVector{} + int32_t(threshold), any = {};
  for (int i = 0; i < kBlock; i += kLanes) any |= (IntVector(load_lanes(block + i)) & int32_t(~kSignBit)) >= limit;
  if (largest_lane(any & 1) == 0) return 0;
  uint32_t bits = 0;
  for (int j = 0; j < kBlock; ++j) bits |= uint32_t(magnitude_bits(block[j]) >= threshold) << j;
  return bits;
#endif
}

// block[j] = +scale where bit j is set, -scale elsewhere.
SR_FN void signed_block(uint32_t bits, float scale, float* __restrict block) {
#if defined(__AVX512F__)
  __m512 plus = _mm512_set1_ps(scale), minus = _mm512_set1_ps(float_of(bits_of(scale) ^ kSignBit));
  _mm512_storeu_ps(block, _mm512_mask_blend_ps(__mmask16(bits), minus, plus));
  _mm512_storeu_ps(block + 16, _mm512_mask_blend_ps(__mmask16(bits >> 16), minus, plus));
#else
  uint32_t negative = ~bits, magnitude = bits_of(scale);
  for (int j = 0; j < kBlock; ++j) block[j] = float_of(magnitude ^ ((negative >> j & 1u) << 31));
#endif
}

// Copies one block to 64-byte aligned memory past the caches: a plain store would first read the line that it overwrites.
SR_FN void stream_block(float* destination, const float* block) {
#if defined(__AVX512F__)
  _mm512_stream_ps(destination, _mm512_loadu_ps(block));
  _mm512_stream_ps(destination + 16, _mm512_loadu_ps(block + 16));
#elif defined(__AVX__)
  for (int i = 0; i < 4; ++i) _mm256_stream_ps(destination + 8 * i, _mm256_loadu_ps(block + 8 * i));
#elif defined(__SSE2__)
  for (int i = 0; i < 8; ++i) _mm_stream_ps(destination + 4 * i, _mm_loadu_ps(block + 4 * i));
#else
  memcpy(destination, block, kBlock * sizeof(float));
#endif
}

// Streaming stores are weakly ordered: other threads see them only after this.
SR_FN void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace smallreduce::SR_TARGET
