// Launches: a grid that fills the device, once, or one of a given number of warps; and the errors of the runtime.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda/warp.cuh"

namespace smallreduce::SR_TARGET {

inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forgotten here, lest the next caller that asks be told of it too
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(status));
}
#define SR_CHECK(call) ::smallreduce::SR_TARGET::check(call, #call)

inline int processor_count() {
  int device = 0, processors = 0;
  SR_CHECK(cudaGetDevice(&device));
  SR_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  return processors;
}

// Blocks of this kernel that the current device holds at once. Asked for once per device: the answer does not change.
template <auto kKernel>
int resident_blocks() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, per_processor = 0;
  SR_CHECK(cudaGetDevice(&device));
  if (device < kDevices && known[device] != 0) return known[device];
  SR_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kKernel, kWarp, 0));
  int blocks = processor_count() * per_processor;
  if (device < kDevices) known[device] = blocks;
  return blocks;
}

// `shared`: bytes of shared memory of each warp.
template <auto kKernel, typename... Args>
void launch_warps(cudaStream_t stream, int warps, size_t shared, const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(warps));
  config.blockDim = dim3(kWarp);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  SR_CHECK(cudaLaunchKernelEx(&config, kKernel, args...));
}

template <auto kKernel, typename... Args>
void launch(cudaStream_t stream, const Args&... args) {
  launch_warps<kKernel>(stream, resident_blocks<kKernel>(), 0, args...);
}

// One per source file, so that they compile side by side.
void encode_int(const cuda::EncodeArgs& args, cudaStream_t stream);
void encode_cast(const cuda::EncodeArgs& args, cudaStream_t stream);
void encode_sign(const cuda::EncodeArgs& args, cudaStream_t stream);
void encode_rounded_sign(const cuda::EncodeArgs& args, cudaStream_t stream);
void encode_difference_sign(const cuda::EncodeDifferenceArgs& args, cudaStream_t stream);
void decode_int(const cuda::DecodeArgs& args, cudaStream_t stream);
void decode_cast(const cuda::DecodeArgs& args, cudaStream_t stream);
void reduce_encode_int(const cuda::ReduceEncodeArgs& args, cudaStream_t stream);
void reduce_encode_cast(const cuda::ReduceEncodeArgs& args, cudaStream_t stream);
void reduce_encode_sign(const cuda::ReduceEncodeArgs& args, cudaStream_t stream);
void reduce_encode_mixed(const cuda::ReduceEncodeArgs& args, cudaStream_t stream);
void reduce_encode_mixed_sign(const cuda::ReduceEncodeArgs& args, cudaStream_t stream);
void encode_topk(const cuda::EncodeArgs& args, cudaStream_t stream);
void decode_topk(const cuda::DecodeArgs& args, cudaStream_t stream);
void clear_topk(const cuda::ClearArgs& args, cudaStream_t stream);
void reduce_encode_topk(const cuda::ReduceEncodeArgs& args, cudaStream_t stream);

}  // namespace smallreduce::SR_TARGET
