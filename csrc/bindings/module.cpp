#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "cpu/dispatch.h"
#include "formats/layout.h"
#include "formats/packet.h"

namespace py = pybind11;

namespace smallreduce {

#if defined(SMALLREDUCE_WITH_CUDA)
void register_cuda(py::module_& module);
#endif

namespace {

template <typename Row>
py::bytes as_bytes(const std::vector<Row>& rows) {
  return py::bytes(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(Row));
}

py::tuple py_build_layout(const std::vector<int64_t>& offsets, const std::vector<int64_t>& lengths,
                          const std::optional<std::vector<int64_t>>& packet_of, int64_t packet_count, int kind,
                          int64_t group, bool hadamard, int element_type) {
  LayoutTables tables =
      build_layout(offsets, lengths, packet_of, packet_count, format(kind, group, hadamard, false), type(element_type));
  return py::make_tuple(as_bytes(tables.segments), as_bytes(tables.packets));
}

void cpu_encode(uintptr_t input, int element_type, uintptr_t residual, uintptr_t segments, int64_t segment_count,
                uintptr_t packets, int64_t packet_count, int kind, int64_t group, bool hadamard, bool stochastic,
                uint64_t seed, uint64_t step, uintptr_t out, int64_t stride, int threads) {
  cpu::encode({pointer<const void>(input), type(element_type), pointer<float>(residual),
               layout(segments, segment_count, packets, packet_count), format(kind, group, hadamard, stochastic), seed,
               step, pointer<uint8_t>(out), stride},
              threads);
}

void cpu_decode(uintptr_t input, int64_t stride, uintptr_t segments, int64_t segment_count, uintptr_t packets,
                int64_t packet_count, int kind, int64_t group, bool hadamard, uintptr_t output, int element_type,
                int threads) {
  cpu::decode({pointer<const uint8_t>(input), stride, layout(segments, segment_count, packets, packet_count),
               format(kind, group, hadamard, false), pointer<void>(output), type(element_type)},
              threads);
}

void cpu_reduce(uintptr_t input, int64_t stride, int64_t ranks, float factor, uintptr_t segments, int64_t segment_count,
                uintptr_t packets, int64_t packet_count, int kind, int64_t group, bool hadamard, uintptr_t output,
                int element_type, int threads) {
  cpu::reduce({pointer<const uint8_t>(input), rank_count(ranks), stride, factor,
               single_packet_layout(segments, segment_count, packets, packet_count),
               format(kind, group, hadamard, false), pointer<void>(output), type(element_type)},
              threads);
}

void cpu_reduce_encode(uintptr_t input, int64_t stride, int64_t ranks, float factor, uintptr_t segments,
                       int64_t segment_count, uintptr_t packets, int64_t packet_count, int kind, int64_t group,
                       bool hadamard, bool stochastic, uintptr_t residual, uint64_t seed, uint64_t step, uintptr_t out,
                       int element_type, int threads) {
  cpu::reduce_encode(
      {pointer<const uint8_t>(input), rank_count(ranks), stride, factor,
       single_packet_layout(segments, segment_count, packets, packet_count), format(kind, group, hadamard, stochastic),
       pointer<float>(residual), seed, step, pointer<uint8_t>(out)},
      type(element_type), threads);
}

}  // namespace
}  // namespace smallreduce

PYBIND11_MODULE(_C, module) {
  using namespace smallreduce;
  using namespace smallreduce::SR_TARGET;
  module.doc() = "The native kernels of smallreduce over raw pointers; see csrc/bindings/README.md.";

  module.def("build_layout", &py_build_layout);
  module.def("packet_tag", [](int kind, int64_t group, bool hadamard, int element_type) {
    Format checked = format(kind, group, hadamard, false);
    return packet_tag(checked.kind, checked.group, checked.hadamard, type(element_type));
  });
  module.def("mix64", [](uint64_t z) { return mix64(z); });

  cpu::current_isa();  // a forced instruction set that is not supported is an error at import
  module.def("cpu_isas", &cpu::supported_isas);
  module.def("cpu_isa", &cpu::current_isa);
  module.def("set_cpu_isa", &cpu::set_isa);

  using release_gil = py::call_guard<py::gil_scoped_release>;
  module.def("cpu_encode", &cpu_encode, release_gil());
  module.def("cpu_decode", &cpu_decode, release_gil());
  module.def("cpu_reduce", &cpu_reduce, release_gil());
  module.def("cpu_reduce_encode", &cpu_reduce_encode, release_gil());

#if defined(SMALLREDUCE_WITH_CUDA)
  register_cuda(module);
#else
  module.def("cuda_runtime_version", [] { return 0; });
#endif
}
