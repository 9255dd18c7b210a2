// The module of the emulated kernels: the bindings of csrc/bindings/cuda.cpp over host memory, the seed and size of the emulated
// device, and kernels by which the emulation itself is tested.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch.cuh"
#include "cuda/topk_sum.cuh"

namespace smallreduce {
void register_cuda(pybind11::module_& module);

namespace cuda {
uint4 shared_memory[3072];  // 48 KiB, as much as a block gets without asking for more

// Half the lanes skip a shuffle.
static __global__ void diverging_kernel(int lanes) {
  if (lane_index() < lanes) __shfl_xor_sync(kAllLanes, 0u, 1);
}

// Gives what each lane finds in shared memory, and leaves something else there.
static __global__ void peeking_kernel(uint32_t* found) {
  float* own = shared_tile() + lane_index();
  found[warp_index() * kWarp + lane_index()] = bits_of(*own);
  *own = 1.0f;
}
}  // namespace cuda
}  // namespace smallreduce

PYBIND11_MODULE(emulated_cuda, module) {
  smallreduce::register_cuda(module);
  emulation::set_shared_memory(smallreduce::cuda::shared_memory, sizeof smallreduce::cuda::shared_memory);
  module.def("configure", [](int processors, uint64_t seed) { emulation::settings = {processors, seed}; });
  module.def("run_diverging_kernel",
             [](int lanes) { smallreduce::cuda::launch<smallreduce::cuda::diverging_kernel>(nullptr, lanes); });
  module.def("peek_shared_memory", [](int warps, size_t bytes) {
    using namespace smallreduce::cuda;
    std::vector<uint32_t> found(size_t(warps * kWarp));
    launch_warps<peeking_kernel>(nullptr, warps, bytes, found.data());
    return found;
  });
}
