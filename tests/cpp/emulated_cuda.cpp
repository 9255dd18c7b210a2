// The module of the emulated kernels: the bindings of csrc/bindings/cuda.cpp over host memory, the seed and size of the emulated
// device, and a kernel at fault that the emulation must find out.
#include <pybind11/pybind11.h>

#include "cuda/launch.cuh"

namespace smallreduce {
void register_cuda(pybind11::module_& module);

namespace cuda {
// Half the lanes skip a shuffle.
static __global__ void diverging_kernel(int lanes) {
  if (lane_index() < lanes) __shfl_xor_sync(kAllLanes, 0u, 1);
}
}  // namespace cuda
}  // namespace smallreduce

PYBIND11_MODULE(emulated_cuda, module) {
  smallreduce::register_cuda(module);
  module.def("configure", [](int processors, uint64_t seed) { emulation::settings = {processors, seed}; });
  module.def("run_diverging_kernel",
             [](int lanes) { smallreduce::cuda::launch<smallreduce::cuda::diverging_kernel>(nullptr, lanes); });
}
