// The cuda_* functions of csrc/bindings/README.md.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/arguments.h"
#include "cuda/kernels.h"
#include "formats/packet.h"

namespace py = pybind11;

namespace smallreduce {
namespace {

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// The tables are on the device, so whether it is large enough cannot be told here.
void* scratch(uintptr_t address, int kind, int64_t group) {
  if (!SR_TARGET::is_sparse(Kind(kind))) return nullptr;
  if (address == 0) throw std::invalid_argument("top-k needs scratch memory, given none");
  if (group != kBlock) throw std::invalid_argument("top-k has groups of 32 elements, given " + std::to_string(group));
  return pointer<void>(address);
}

int64_t cuda_scratch_nbytes(uintptr_t segments, int64_t segment_count, uintptr_t packets, int64_t packet_count,
                            int64_t ranks) {
  return cuda::scratch_nbytes(layout(segments, segment_count, packets, packet_count), rank_count(ranks));
}

void cuda_encode(uintptr_t input, int element_type, uintptr_t residual, uintptr_t segments, int64_t segment_count,
                 uintptr_t packets, int64_t packet_count, int kind, int64_t group, bool hadamard, bool stochastic,
                 uint64_t seed, uintptr_t step, uintptr_t out, int64_t stride, uintptr_t scratch_address,
                 int64_t scratch_nbytes, uintptr_t stream) {
  cuda::encode({pointer<const void>(input), type(element_type), pointer<float>(residual),
                layout(segments, segment_count, packets, packet_count), format(kind, group, hadamard, stochastic), seed,
                pointer<const int64_t>(step), pointer<uint8_t>(out), stride, scratch(scratch_address, kind, group),
                scratch_nbytes},
               stream_of(stream));
}

void check_dense(int kind, const char* what) {
  if (SR_TARGET::is_sparse(Kind(kind))) throw std::invalid_argument(std::string("packets of top-k cannot ") + what);
}

void cuda_encode_rounded(uintptr_t input, int element_type, uintptr_t segments, int64_t segment_count,
                         uintptr_t packets, int64_t packet_count, int kind, int64_t group, bool hadamard,
                         bool stochastic, uint64_t seed, uintptr_t step, uintptr_t out, int64_t stride,
                         uintptr_t stream) {
  check_dense(kind, "be made of rounded elements");
  cuda::encode_rounded(
      {pointer<const void>(input), type(element_type), nullptr, layout(segments, segment_count, packets, packet_count),
       format(kind, group, hadamard, stochastic), seed, pointer<const int64_t>(step), pointer<uint8_t>(out), stride,
       nullptr, 0},
      stream_of(stream));
}

void cuda_encode_difference(uintptr_t minuend, uintptr_t subtrahend, int element_type, uintptr_t segments,
                            int64_t segment_count, uintptr_t packets, int64_t packet_count, int kind, int64_t group,
                            bool hadamard, bool stochastic, uint64_t seed, uintptr_t step, uintptr_t out,
                            int64_t stride, uintptr_t stream) {
  check_dense(kind, "encode the difference of two buffers");
  cuda::encode_difference(
      {pointer<const float>(minuend), pointer<const void>(subtrahend), type(element_type),
       layout(segments, segment_count, packets, packet_count), format(kind, group, hadamard, stochastic), seed,
       pointer<const int64_t>(step), pointer<uint8_t>(out), stride},
      stream_of(stream));
}

void cuda_decode(uintptr_t input, int64_t stride, uintptr_t segments, int64_t segment_count, uintptr_t packets,
                 int64_t packet_count, int kind, int64_t group, bool hadamard, uintptr_t output, int element_type,
                 uintptr_t scratch_address, int64_t scratch_nbytes, uintptr_t error, uintptr_t stream) {
  cuda::decode({pointer<const uint8_t>(input), 1, stride, 1.0f, layout(segments, segment_count, packets, packet_count),
                format(kind, group, hadamard, false), pointer<void>(output), type(element_type),
                scratch(scratch_address, kind, group), scratch_nbytes, pointer<int32_t>(error)},
               stream_of(stream));
}

void cuda_decode_add(uintptr_t input, int64_t stride, uintptr_t segments, int64_t segment_count, uintptr_t packets,
                     int64_t packet_count, int kind, int64_t group, bool hadamard, uintptr_t output, int element_type,
                     uintptr_t error, uintptr_t stream) {
  check_dense(kind, "be added to a buffer");
  cuda::decode_add({pointer<const uint8_t>(input), 1, stride, 1.0f,
                    layout(segments, segment_count, packets, packet_count), format(kind, group, hadamard, false),
                    pointer<void>(output), type(element_type), nullptr, 0, pointer<int32_t>(error)},
                   stream_of(stream));
}

void cuda_clear(uintptr_t input, int64_t stride, uintptr_t segments, int64_t segment_count, uintptr_t packets,
                int64_t packet_count, int kind, int64_t group, bool hadamard, int packet_type, uintptr_t output,
                int element_type, uintptr_t scratch_address, int64_t scratch_nbytes, uintptr_t error,
                uintptr_t stream) {
  if (!SR_TARGET::is_sparse(Kind(kind))) throw std::invalid_argument("only packets of top-k name elements to clear");
  cuda::clear({pointer<const uint8_t>(input), stride, layout(segments, segment_count, packets, packet_count),
               format(kind, group, hadamard, false), type(packet_type), pointer<void>(output), type(element_type),
               scratch(scratch_address, kind, group), scratch_nbytes, pointer<int32_t>(error)},
              stream_of(stream));
}

void cuda_reduce(uintptr_t input, int64_t stride, int64_t ranks, float factor, uintptr_t segments,
                 int64_t segment_count, uintptr_t packets, int64_t packet_count, int kind, int64_t group, bool hadamard,
                 uintptr_t output, int element_type, uintptr_t scratch_address, int64_t scratch_nbytes, uintptr_t error,
                 uintptr_t stream) {
  cuda::decode({pointer<const uint8_t>(input), rank_count(ranks), stride, factor,
                single_packet_layout(segments, segment_count, packets, packet_count),
                format(kind, group, hadamard, false), pointer<void>(output), type(element_type),
                scratch(scratch_address, kind, group), scratch_nbytes, pointer<int32_t>(error)},
               stream_of(stream));
}

void cuda_reduce_encode(uintptr_t input, int64_t stride, int64_t ranks, float factor, uintptr_t segments,
                        int64_t segment_count, uintptr_t packets, int64_t packet_count, int kind, int64_t group,
                        bool hadamard, uintptr_t into_segments, int64_t into_segment_count, uintptr_t into_packets,
                        int64_t into_packet_count, int into_kind, int64_t into_group, bool into_hadamard,
                        bool stochastic, uintptr_t residual, uint64_t seed, uintptr_t step, uintptr_t out, int64_t,
                        int element_type, uintptr_t scratch_address, int64_t scratch_nbytes, uintptr_t error,
                        uintptr_t stream) {
  Format from = format(kind, group, hadamard, false);
  Format into = format(into_kind, into_group, into_hadamard, stochastic);
  check_formats(from, into);
  cuda::reduce_encode(
      {pointer<const uint8_t>(input), rank_count(ranks), stride, factor,
       single_packet_layout(segments, segment_count, packets, packet_count), from,
       single_packet_layout(into_segments, into_segment_count, into_packets, into_packet_count), into,
       pointer<float>(residual), seed, pointer<const int64_t>(step), pointer<uint8_t>(out), type(element_type),
       scratch(scratch_address, kind, group), scratch_nbytes, pointer<int32_t>(error)},
      stream_of(stream));
}

}  // namespace

void register_cuda(py::module_& module) {
  using release_gil = py::call_guard<py::gil_scoped_release>;
  module.def("cuda_runtime_version", &cuda::runtime_version);
  module.def("cuda_scratch_nbytes", &cuda_scratch_nbytes);
  module.def("cuda_encode", &cuda_encode, release_gil());
  module.def("cuda_encode_rounded", &cuda_encode_rounded, release_gil());
  module.def("cuda_encode_difference", &cuda_encode_difference, release_gil());
  module.def("cuda_decode", &cuda_decode, release_gil());
  module.def("cuda_decode_add", &cuda_decode_add, release_gil());
  module.def("cuda_clear", &cuda_clear, release_gil());
  module.def("cuda_reduce", &cuda_reduce, release_gil());
  module.def("cuda_reduce_encode", &cuda_reduce_encode, release_gil());
}

}  // namespace smallreduce
