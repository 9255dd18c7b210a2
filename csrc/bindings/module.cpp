#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "cpu/dispatch.h"
#include "cpu/sparse.h"
#include "formats/describe.h"
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
                          int64_t group, bool hadamard, int64_t numerator, int64_t denominator, int element_type) {
  LayoutTables tables = build_layout(offsets, lengths, packet_of, packet_count, format(kind, group, hadamard, false),
                                     {numerator, denominator}, type(element_type));
  return py::make_tuple(as_bytes(tables.segments), as_bytes(tables.packets));
}

int64_t cpu_scratch_nbytes(uintptr_t segments, int64_t segment_count, uintptr_t packets, int64_t packet_count,
                           int64_t ranks, int threads) {
  return cpu::sparse_scratch_nbytes(layout(segments, segment_count, packets, packet_count), rank_count(ranks), threads);
}

void* scratch(uintptr_t address, int64_t nbytes, const Layout& layout, int kind, int64_t ranks, int threads) {
  if (!SR_TARGET::is_sparse(Kind(kind))) return nullptr;
  int64_t needed = cpu::sparse_scratch_nbytes(layout, ranks, threads);
  if (nbytes < needed || address % 16 != 0) {
    throw std::invalid_argument("the scratch memory has " + std::to_string(nbytes) + " bytes, expected " +
                                std::to_string(needed) + " aligned to 16");
  }
  return pointer<void>(address);
}

void cpu_encode(uintptr_t input, int element_type, uintptr_t residual, uintptr_t segments, int64_t segment_count,
                uintptr_t packets, int64_t packet_count, int kind, int64_t group, bool hadamard, bool stochastic,
                uint64_t seed, uint64_t step, uintptr_t out, int64_t stride, uintptr_t scratch_address,
                int64_t scratch_nbytes, int threads) {
  Layout into = layout(segments, segment_count, packets, packet_count);
  cpu::encode({pointer<const void>(input), type(element_type), pointer<float>(residual), into,
               format(kind, group, hadamard, stochastic), seed, step, pointer<uint8_t>(out), stride,
               scratch(scratch_address, scratch_nbytes, into, kind, 1, threads)},
              threads);
}

void cpu_encode_rounded(uintptr_t input, int element_type, uintptr_t segments, int64_t segment_count, uintptr_t packets,
                        int64_t packet_count, int kind, int64_t group, bool hadamard, bool stochastic, uint64_t seed,
                        uint64_t step, uintptr_t out, int64_t stride, int threads) {
  cpu::encode_rounded(
      {pointer<const void>(input), type(element_type), nullptr, layout(segments, segment_count, packets, packet_count),
       format(kind, group, hadamard, stochastic), seed, step, pointer<uint8_t>(out), stride, nullptr},
      threads);
}

void cpu_encode_difference(uintptr_t minuend, uintptr_t subtrahend, int element_type, uintptr_t segments,
                           int64_t segment_count, uintptr_t packets, int64_t packet_count, int kind, int64_t group,
                           bool hadamard, bool stochastic, uint64_t seed, uint64_t step, uintptr_t out, int64_t stride,
                           int threads) {
  cpu::encode_difference({pointer<const float>(minuend), pointer<const void>(subtrahend), type(element_type),
                          layout(segments, segment_count, packets, packet_count),
                          format(kind, group, hadamard, stochastic), seed, step, pointer<uint8_t>(out), stride},
                         threads);
}

void cpu_decode(uintptr_t input, int64_t stride, uintptr_t segments, int64_t segment_count, uintptr_t packets,
                int64_t packet_count, int kind, int64_t group, bool hadamard, uintptr_t output, int element_type,
                uintptr_t scratch_address, int64_t scratch_nbytes, int threads) {
  Layout from = layout(segments, segment_count, packets, packet_count);
  cpu::decode({pointer<const uint8_t>(input), stride, from, format(kind, group, hadamard, false), pointer<void>(output),
               type(element_type), scratch(scratch_address, scratch_nbytes, from, kind, 1, threads)},
              threads);
}

void cpu_decode_add(uintptr_t input, int64_t stride, uintptr_t segments, int64_t segment_count, uintptr_t packets,
                    int64_t packet_count, int kind, int64_t group, bool hadamard, uintptr_t output, int element_type,
                    int threads) {
  cpu::decode({pointer<const uint8_t>(input), stride, layout(segments, segment_count, packets, packet_count),
               format(kind, group, hadamard, false), pointer<void>(output), type(element_type), nullptr, true},
              threads);
}

void cpu_clear(uintptr_t input, int64_t stride, uintptr_t segments, int64_t segment_count, uintptr_t packets,
               int64_t packet_count, int kind, int64_t group, bool hadamard, int packet_type, uintptr_t output,
               int element_type, uintptr_t scratch_address, int64_t scratch_nbytes, int threads) {
  Layout from = layout(segments, segment_count, packets, packet_count);
  if (!SR_TARGET::is_sparse(Kind(kind))) throw std::invalid_argument("only packets of TopK name elements");
  cpu::clear({pointer<const uint8_t>(input), stride, from, format(kind, group, hadamard, false), pointer<void>(output),
              type(element_type), scratch(scratch_address, scratch_nbytes, from, kind, 1, threads)},
             type(packet_type), threads);
}

void cpu_reduce(uintptr_t input, int64_t stride, int64_t ranks, float factor, uintptr_t segments, int64_t segment_count,
                uintptr_t packets, int64_t packet_count, int kind, int64_t group, bool hadamard, uintptr_t output,
                int element_type, uintptr_t scratch_address, int64_t scratch_nbytes, int threads) {
  Layout from = single_packet_layout(segments, segment_count, packets, packet_count);
  cpu::reduce(
      {pointer<const uint8_t>(input), rank_count(ranks), stride, factor, from, format(kind, group, hadamard, false),
       pointer<void>(output), type(element_type), scratch(scratch_address, scratch_nbytes, from, kind, ranks, threads)},
      threads);
}

void cpu_reduce_encode(uintptr_t input, int64_t stride, int64_t ranks, float factor, uintptr_t segments,
                       int64_t segment_count, uintptr_t packets, int64_t packet_count, int kind, int64_t group,
                       bool hadamard, uintptr_t into_segments, int64_t into_segment_count, uintptr_t into_packets,
                       int64_t into_packet_count, int into_kind, int64_t into_group, bool into_hadamard,
                       bool stochastic, uintptr_t residual, uint64_t seed, uint64_t step, uintptr_t out, int64_t nbytes,
                       int element_type, uintptr_t scratch_address, int64_t scratch_nbytes, int threads) {
  Layout from = single_packet_layout(segments, segment_count, packets, packet_count);
  Layout into = single_packet_layout(into_segments, into_segment_count, into_packets, into_packet_count);
  Format from_format = format(kind, group, hadamard, false);
  Format into_format = format(into_kind, into_group, into_hadamard, stochastic);
  check_formats(from_format, into_format);
  cpu::reduce_encode({pointer<const uint8_t>(input), rank_count(ranks), stride, factor, from, from_format, into,
                      into_format, pointer<float>(residual), seed, step, pointer<uint8_t>(out), nbytes,
                      scratch(scratch_address, scratch_nbytes, from, kind, ranks, threads)},
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
  module.def("describe_format", [](int kind, int64_t group, bool hadamard, int element_type) {
    Format checked = format(kind, group, hadamard, false);
    return describe_tag(packet_tag(checked.kind, checked.group, checked.hadamard, type(element_type)));
  });
  module.def("mix64", [](uint64_t z) { return mix64(z); });

  cpu::current_isa();  // a forced instruction set that is not supported is an error at import
  module.def("cpu_isas", &cpu::supported_isas);
  module.def("cpu_isa", &cpu::current_isa);
  module.def("set_cpu_isa", &cpu::set_isa);

  using release_gil = py::call_guard<py::gil_scoped_release>;
  module.def("cpu_scratch_nbytes", &cpu_scratch_nbytes);
  module.def("cpu_encode", &cpu_encode, release_gil());
  module.def("cpu_encode_rounded", &cpu_encode_rounded, release_gil());
  module.def("cpu_encode_difference", &cpu_encode_difference, release_gil());
  module.def("cpu_decode", &cpu_decode, release_gil());
  module.def("cpu_decode_add", &cpu_decode_add, release_gil());
  module.def("cpu_clear", &cpu_clear, release_gil());
  module.def("cpu_reduce", &cpu_reduce, release_gil());
  module.def("cpu_reduce_encode", &cpu_reduce_encode, release_gil());

#if defined(SMALLREDUCE_WITH_CUDA)
  register_cuda(module);
#else
  module.def("cuda_runtime_version", [] { return 0; });
#endif
}
