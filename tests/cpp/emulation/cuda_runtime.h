// Stands in front of the CUDA toolkit's header of this name, so that the kernels and launchers of csrc/cuda compile as plain C++
// and run on the CPU: each lane of a warp is a fiber, and an operation across lanes is where fibers wait for one another.
//
// It offers what those kernels use and no more. A block is one warp and there is no barrier of several, so warps are independent:
// they run one after the other, in an order shuffled by a seed, as do the lanes between two operations.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };

// What the running lane sees. The scheduler sets them before it resumes a lane.
extern dim3 threadIdx, blockIdx, gridDim;

namespace emulation {

enum class Operation { kNone, kShuffle, kShuffleXor, kBallot, kMax, kSum, kBarrier };

// Waits until all 32 lanes of the warp have come to the same operation with the same argument; returns what each brought.
const uint32_t* exchange(Operation operation, unsigned mask, int argument, uint32_t value);
int lane();

struct Settings {
  int processors = 2;  // each holds four blocks
  uint64_t seed = 0;   // of the order of blocks, warps and lanes
};
extern Settings settings;

// The memory that kernels know as shared. A launch may use as much of it as it asks for.
void set_shared_memory(void* memory, size_t bytes);

// Runs the kernel; throws std::logic_error if the lanes of a warp part ways at an operation.
void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);

inline uint32_t bits(float value) {
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  return word;
}
inline float from_bits(uint32_t word) {
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}
template <typename T>
uint32_t to_word(T value) {
  if constexpr (sizeof(T) == 4 && T(0.5f) == T(0)) {
    return uint32_t(value);
  } else {
    return bits(value);
  }
}
template <typename T>
T from_word(uint32_t word) {
  if constexpr (sizeof(T) == 4 && T(0.5f) == T(0)) {
    return T(word);
  } else {
    return from_bits(word);
  }
}

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::from_word<T>(
      emulation::exchange(emulation::Operation::kShuffle, mask, -1, emulation::to_word(value))[source]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return emulation::from_word<T>(emulation::exchange(emulation::Operation::kShuffleXor, mask, distance,
                                                     emulation::to_word(value))[emulation::lane() ^ distance]);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint32_t* values = emulation::exchange(emulation::Operation::kBallot, mask, 0, predicate != 0);
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= values[i] << i;
  return ballot;
}

inline uint32_t __reduce_max_sync(unsigned mask, uint32_t value) {
  const uint32_t* values = emulation::exchange(emulation::Operation::kMax, mask, 0, value);
  uint32_t largest = 0;
  for (int i = 0; i < 32; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
}

inline uint32_t __reduce_add_sync(unsigned mask, uint32_t value) {
  const uint32_t* values = emulation::exchange(emulation::Operation::kSum, mask, 0, value);
  uint32_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += values[i];
  return sum;
}

inline void __syncwarp() { emulation::exchange(emulation::Operation::kBarrier, 0xffffffffu, 0, 0); }

inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __ffs(int word) { return __builtin_ffs(word); }

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  return result;
}

// Of two floats whose exact sum is not negative and fits a double.
inline float __fadd_rz(float a, float b) {
  double sum = double(a) + double(b);
  float nearest = float(sum);
  return double(nearest) > sum ? nextafterf(nearest, 0.0f) : nearest;
}

inline int32_t atomicCAS(int32_t* address, int32_t expected, int32_t desired) {
  int32_t before = *address;
  if (before == expected) *address = desired;
  return before;
}

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  uint32_t before = *address;
  *address = before + value;
  return before;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::settings.processors;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 4;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  std::tuple<Parameters...> copied(arguments...);
  emulation::run_grid(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                      [&] { std::apply(kernel, copied); });
  return cudaSuccess;
}
