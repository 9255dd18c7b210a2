// Words of 32 bits in memory of any alignment, and the slots of a buffer of elements.
#pragma once

#include "cuda/tile.cuh"

namespace smallreduce::SR_TARGET {

SR_DEVICE bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// `aligned`: the address is a multiple of 4 · kWords bytes, at most 16.
template <int kWords>
SR_DEVICE void load_words(const uint8_t* from, bool aligned, uint32_t* words) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "no such access");
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint8_t* b = from + 4 * i;
      words[i] = uint32_t(b[0]) | uint32_t(b[1]) << 8 | uint32_t(b[2]) << 16 | uint32_t(b[3]) << 24;
    }
  } else if constexpr (kWords == 4) {
    uint4 loaded = *reinterpret_cast<const uint4*>(from);
    words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
  } else if constexpr (kWords == 2) {
    uint2 loaded = *reinterpret_cast<const uint2*>(from);
    words[0] = loaded.x, words[1] = loaded.y;
  } else {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  }
}

template <int kWords>
SR_DEVICE void store_words(uint8_t* to, bool aligned, const uint32_t* words) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4, "no such access");
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < 4 * kWords; ++i) to[i] = uint8_t(words[i / 4] >> (i % 4 * 8));
  } else if constexpr (kWords == 4) {
    *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(to) = uint2{words[0], words[1]};
  } else {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  }
}

SR_DEVICE uint16_t load_u16(const uint8_t* from, bool aligned) {
  return aligned ? *reinterpret_cast<const uint16_t*>(from) : uint16_t(from[0] | from[1] << 8);
}

SR_DEVICE void store_u16(uint8_t* to, bool aligned, uint16_t value) {
  if (aligned) {
    *reinterpret_cast<uint16_t*>(to) = value;
  } else {
    to[0] = uint8_t(value), to[1] = uint8_t(value >> 8);
  }
}

// Four elements as words and back.
template <typename Buffer>
struct Quad {
  static constexpr int kWords = int(sizeof(typename Buffer::Storage));
  SR_DEVICE void unpack(const uint32_t* words, float* values) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kWords == 4) {
        values[i] = Buffer::load(float_of(words[i]));
      } else {
        values[i] = Buffer::load(uint16_t(words[i / 2] >> (i % 2 * 16)));
      }
    }
  }
  SR_DEVICE void pack(const float* values, uint32_t* words) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kWords == 4) {
        words[i] = bits_of(Buffer::store(values[i]));
      } else {
        words[i] = uint32_t(Buffer::store(values[2 * i])) | uint32_t(Buffer::store(values[2 * i + 1])) << 16;
      }
    }
  }
};

template <typename Buffer>
SR_DEVICE bool has_aligned_quads(const typename Buffer::Storage* elements) {
  return is_aligned(elements, 4 * sizeof(typename Buffer::Storage));
}

// An error-feedback residual: fp32, never NaN.
struct ResidualBuffer {
  using Storage = float;
  SR_FN float load(float stored) { return stored; }
  SR_FN float store(float value) { return value; }
};

// A slot of step `step` of the tile that begins at `elements`; zeros past its end.
template <typename Buffer>
SR_DEVICE void load_slot(const typename Buffer::Storage* elements, const Place& place, int step, bool whole,
                         Slot& values) {
  constexpr int kWords = Quad<Buffer>::kWords;
  const auto* from = elements + place.first_element(0) + step * kStepElements;
  if (whole) {
    uint32_t words[2][kWords] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto* quad = reinterpret_cast<const uint8_t*>(from + 16 * half);
      if (place.exists(step)) load_words<kWords>(quad, true, words[half]);
    }
    Quad<Buffer>::unpack(words[0], values);
    Quad<Buffer>::unpack(words[1], values + 4);
  } else {
#pragma unroll
    for (int i = 0; i < kSlot; ++i) {
      values[i] = slot_offset(i) < place.rest(step) ? Buffer::load(from[slot_offset(i)]) : 0.0f;
    }
  }
}

// All slots of the tile. `aligned`: so are its quads.
template <typename Buffer>
SR_DEVICE void load_tile(const typename Buffer::Storage* elements, bool aligned, const Place& place, Tile& values) {
  if (aligned && place.is_whole()) {
#pragma unroll
    for (int u = 0; u < kSteps; ++u) load_slot<Buffer>(elements, place, u, true, values[u]);
  } else {
#pragma unroll
    for (int u = 0; u < kSteps; ++u) load_slot<Buffer>(elements, place, u, false, values[u]);
  }
}

// Writes the elements of a tile, of the slots whose `keep` is set.
template <typename Buffer>
SR_DEVICE void store_tile(typename Buffer::Storage* elements, bool aligned, const Place& place, const Tile& values,
                          const bool (&keep)[kSteps]) {
  constexpr int kWords = Quad<Buffer>::kWords;
  auto* to = elements + place.first_element(0);
  if (aligned && place.is_whole()) {
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[kWords];
        Quad<Buffer>::pack(values[u] + 4 * half, words);
        auto* quad = to + u * kStepElements + 16 * half;
        if (place.exists(u) && keep[u]) store_words<kWords>(reinterpret_cast<uint8_t*>(quad), true, words);
      }
    }
  } else {
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
#pragma unroll
      for (int i = 0; i < kSlot; ++i) {
        bool present = keep[u] && slot_offset(i) < place.rest(u);
        if (present) to[u * kStepElements + slot_offset(i)] = Buffer::store(values[u][i]);
      }
    }
  }
}

}  // namespace smallreduce::SR_TARGET
