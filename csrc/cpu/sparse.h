// TopK on the CPU (docs/wire-formats.md, section 11), as two layers: kernels that are compiled once per instruction set and work on
// one run or a part of it, and the functions that spread them over threads.
//
// Selection is exact, and mostly one pass over the elements: a sample gives a threshold that about twice as many elements reach as
// are wanted; those are collected in order, and the k-th largest among them is found by radix (Deep Gradient Compression,
// arXiv:1712.01887, section 5: sampled threshold, exact selection among the survivors). Where the sample misled, and where so many
// are wanted that a sample would spare nothing, the k-th largest of all elements is found by radix, at the price of more passes.
#pragma once

#include "cpu/kernels.h"
#include "formats/packet.h"

namespace smallreduce::cpu {

// The elements of a run, before residual and selection: those of a worker's buffer, or the sum of the ranks' packets.
struct SparseSource {
  int64_t length;
  float* residual;    // null: no feedback
  const void* input;  // null: the sum
  ElementType type;   // of `input`
  // The sum: `kept` entries of each rank, in ascending order of their indices.
  const uint8_t* values;    // of rank 0; the next rank's are `stride` bytes on
  const uint32_t* indices;  // of rank 0; the next rank's are `index_stride` entries on
  int64_t kept, ranks, stride, index_stride;
  float factor;
};

struct Candidate {
  uint32_t index;  // in the run
  uint32_t bits;   // of its value
};

// The candidates of a contiguous part of a run. More than `capacity` of them: the collection was given up.
struct SparsePart {
  int64_t begin, end;
  Candidate* candidates;
  int64_t capacity;
  int64_t count;
};

// Where a run's values and words go.
struct SparseTarget {
  uint8_t* values;
  uint8_t* words;
  int64_t kept;
};

struct SparseKernels {
  // A threshold for the magnitudes, as integers, that at least `kept` elements reach if the sample is fair; without a sample one
  // that nothing but a NaN does.
  uint32_t (*estimate)(const SparseSource&, Kind, int64_t kept);
  // Collects the elements that reach the threshold; writes the compensated values into the residual.
  void (*collect)(const SparseSource&, Kind, uint32_t threshold, SparsePart&);
  // Selects among the candidates of all parts, or among all elements, and writes values, words and the residual of what is selected.
  void (*select)(const SparseSource&, Kind, uint32_t threshold, const SparsePart* parts, int64_t part_count,
                 const SparseTarget&);
  // Writes elements [begin, end) of the sum into a buffer of `type` that begins at the run's first element.
  void (*expand)(const SparseSource&, Kind, int64_t begin, int64_t end, bool stream, ElementType type, void* output);
};

// How a run is sampled, and how much room its candidates get.
constexpr int64_t kMostSamples = 1 << 14;
struct Sampling {
  int64_t samples;   // 0: there are no candidates, the selection is among all elements
  int64_t rank;      // the threshold is the rank-th largest of the samples
  int64_t capacity;  // candidates that a part may have
};
Sampling sampling_of(int64_t length, int64_t kept);

// Bytes of scratch memory, aligned to 16, that encode() and, with the number of ranks, the others need.
int64_t sparse_scratch_nbytes(const Layout& layout, int64_t ranks, int threads);

// As the functions of dispatch.h of these names; headers are written and checked there.
void sparse_encode(const SparseKernels& kernels, const EncodeArgs& args, int threads);
void sparse_decode(const SparseKernels& kernels, const DecodeArgs& args, int threads);
void sparse_reduce(const SparseKernels& kernels, const ReduceArgs& args, int threads);
void sparse_reduce_encode(const SparseKernels& kernels, const ReduceEncodeArgs& args, int threads);
void sparse_clear(const DecodeArgs& args, int threads);

}  // namespace smallreduce::cpu
