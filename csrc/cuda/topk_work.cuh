// The elements among which TopK selects: of one run, with the residual added. A side says what they are: a worker's own, or the sum of
// the ranks' packets.
#pragma once

#include "cuda/encode.cuh"
#include "cuda/topk_sum.cuh"

namespace smallreduce::SR_TARGET {

// The magnitude by which elements are compared.
SR_DEVICE uint32_t magnitude_key(float value) { return magnitude_bits(canonical_nan(value)); }

template <typename Buffer>
struct WorkerSide {
  using Args = cuda::EncodeArgs;
  static constexpr bool kReads = false;  // packets

  const typename Buffer::Storage* input;
  bool aligned;

  SR_DEVICE_MEMBER WorkerSide(const Args& args, const Scratch&, const Segment& segment)
      : input(static_cast<const typename Buffer::Storage*>(args.input) + segment.offset),
        aligned(has_aligned_quads<Buffer>(input)) {}

  SR_DEVICE_MEMBER void load(const SparseTile& tile, Tile& values) const {
    load_tile<Buffer>(input + tile.begin, aligned, Place(tile.elements), values);
  }
  SR_DEVICE_MEMBER float at(int64_t, int64_t element) const { return Buffer::load(input[element]); }

  SR_DEVICE int64_t ranks(const Args&) { return 1; }
  SR_DEVICE float* residual(const Args& args, const Segment& segment) {
    return args.residual ? args.residual + segment.origin * kBlock : nullptr;
  }
  SR_DEVICE uint8_t* packet(const Args& args, const Segment& segment) {
    return args.packets + segment.packet * args.stride;
  }
};

struct ServerSide {
  using Args = cuda::ReduceEncodeArgs;
  static constexpr bool kReads = true;

  SparseSum sum;

  SR_DEVICE_MEMBER ServerSide(const Args& args, const Scratch& scratch, const Segment& segment)
      : sum({args.packets, args.ranks, args.stride, args.factor, args.format.kind}, scratch, segment) {}

  SR_DEVICE_MEMBER void load(const SparseTile& tile, Tile& values) const { sum.load(tile, values); }
  SR_DEVICE_MEMBER float at(int64_t tile, int64_t element) const { return sum.at(tile, element); }

  SR_DEVICE int64_t ranks(const Args& args) { return args.ranks; }
  SR_DEVICE float* residual(const Args& args, const Segment& segment) {
    return args.residual ? args.residual + segment.block * kBlock : nullptr;
  }
  SR_DEVICE uint8_t* packet(const Args& args, const Segment&) { return args.packet; }
};

enum class Way {
  kCandidates,  // select among those
  kElements,    // select among all elements
  kZeros,       // all that are not zero are selected, and some that are
};

SR_DEVICE Way way_of(const Selection& selection, const Segment& segment) {
  if (!is_sampled(segment.length, segment.kept) || selection.given_up) return Way::kElements;
  if (selection.found >= uint64_t(segment.kept)) return Way::kCandidates;
  return selection.threshold == 1 ? Way::kZeros : Way::kElements;
}

// The histograms of a segment that lies in several ranges: of the samples' digits, then of the elements'.
SR_DEVICE uint32_t* bins_of(const Scratch& scratch, const Ranges& ranges, const Segment& segment) {
  int64_t number = scratch.bins_of_segments ? &segment - ranges.layout.segments : ranges.of(segment);
  return scratch.bins + number * kHistograms * kBins;
}

// One run, and the elements of its segment with the residual added.
template <typename Side>
struct Work {
  const Scratch& scratch;
  const Ranges& ranges;
  const Run& run;
  const Segment& segment;
  Selection& selection;
  Side side;
  float* residual;
  bool aligned;  // the residual, to quads

  SR_DEVICE_MEMBER Work(const typename Side::Args& args, const Scratch& scratch, const Ranges& ranges, const Run& run)
      : scratch(scratch),
        ranges(ranges),
        run(run),
        segment(*run.segment),
        selection(scratch.selections[run.segment - args.layout.segments]),
        side(args, scratch, segment),
        residual(Side::residual(args, segment)),
        aligned(has_aligned_quads<ResidualBuffer>(residual)) {}

  SR_DEVICE_MEMBER bool sampled() const { return is_sampled(segment.length, segment.kept); }

  // Until the residual is replaced.
  SR_DEVICE_MEMBER float sample(int64_t number) const {
    // Four neighbours, which share a sector of memory, somewhere in each part of the segment.
    int64_t quads = segment.length / 4, samples = ceil_div(sample_count(segment.length, segment.kept), 4);
    int64_t quad = number / 4, begin = quads * quad / samples, end = quads * (quad + 1) / samples;
    uint32_t random = uint32_t(quad) * 0x9e3779b9u;
    int64_t element = 4 * (begin + int64_t(uint64_t(random) * uint64_t(end - begin) >> 32)) + number % 4;
    int64_t block = segment.first_group + element / kBlock;
    float value = side.at(tile_number(run.segment - ranges.layout.segments, block), element);
    return residual ? compensate(value, residual[element]) : value;
  }

  // Replaces the residual by the values; keeps it where they are not finite.
  SR_DEVICE_MEMBER void load_first(const SparseTile& tile, Tile& values) const {
    side.load(tile, values);
    if (!residual) return;
    Place place(tile.elements);
    Tile owed;
    load_tile<ResidualBuffer>(residual + tile.begin, aligned, place, owed);
    compensate(values, owed);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
#pragma unroll
      for (int i = 0; i < kSlot; ++i) owed[u][i] = is_finite(values[u][i]) ? values[u][i] : owed[u][i];
    }
    const bool all[kSteps] = {true, true, true, true};
    store_tile<ResidualBuffer>(residual + tile.begin, aligned, place, owed, all);
  }

  // The same values, once load_first() has replaced the residual.
  SR_DEVICE_MEMBER void load_again(const SparseTile& tile, Tile& values) const {
    side.load(tile, values);
    if (!residual) return;
    Tile kept;
    load_tile<ResidualBuffer>(residual + tile.begin, aligned, Place(tile.elements), kept);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
#pragma unroll
      for (int i = 0; i < kSlot; ++i) {
        values[u][i] = is_finite(values[u][i]) ? kept[u][i] : values[u][i] + kept[u][i];
      }
    }
  }

  // Calls `visit(present, candidate)` for the candidates of the run in order, 32 at a time.
  template <typename Visit>
  SR_DEVICE_MEMBER void for_each_candidate(Visit visit) const {
    int64_t number = run.segment - ranges.layout.segments, block = segment.first_group + run.begin / kBlock;
    int64_t first = tile_number(number, block), last = tile_number(number, block + (run.elements - 1) / kBlock);
    for (; first <= last; first += kWarp) {
      List list = {0, 0};
      if (first + lane_index() <= last) list = scratch.lists[first + lane_index()];
      for_each_listed(list.begin, list.count, [&](bool present, int, uint32_t position) {
        visit(present, present ? scratch.pool[position] : Candidate{0, 0});
      });
    }
  }

  // Calls `visit(key)`, each lane on its own, for the elements of the run among which the selection is made.
  template <typename Visit>
  SR_DEVICE_MEMBER void for_each_key(Way way, Visit visit) const {
    if (way == Way::kCandidates) {
      return for_each_candidate([&](bool present, const Candidate& candidate) {
        if (present) visit(magnitude_key(float_of(candidate.bits)));
      });
    }
    ranges.for_each_tile_of(run, [&](const SparseTile& tile) {
      Place place(tile.elements);
      Tile values;
      load_again(tile, values);
#pragma unroll
      for (int u = 0; u < kSteps; ++u) {
#pragma unroll
        for (int i = 0; i < kSlot; ++i) {
          if (slot_offset(i) < place.rest(u)) visit(magnitude_key(values[u][i]));
        }
      }
    });
  }

  template <typename Visit>
  SR_DEVICE_MEMBER void for_each_sample_key(Visit visit) const {
    int64_t samples = ceil_div(sample_count(segment.length, segment.kept), 4) * 4;
    int64_t begin = share(samples, run.begin, segment.length);
    int64_t end = share(samples, run.begin + run.elements, segment.length);
    for (int64_t number = begin + lane_index(); number < end; number += kWarp) visit(magnitude_key(sample(number)));
  }

  SR_DEVICE_MEMBER uint32_t* bins() const { return bins_of(scratch, ranges, segment); }
  SR_DEVICE_MEMBER Choice first_choice() const { return {0, uint32_t(segment.kept)}; }
};

template <typename Side>
SR_DEVICE Scratch scratch_of(const typename Side::Args& args) {
  return scratch_of(args.scratch, args.scratch_nbytes, args.layout, Side::ranks(args));
}

// Calls `visit` with this warp's runs, if the packets that were read are accepted.
template <typename Side, typename Visit>
SR_DEVICE void for_each_work(const typename Side::Args& args, const Scratch& scratch, const Ranges& ranges,
                             Visit visit) {
  if (Side::kReads && !is_accepted(scratch, Side::ranks(args), 0)) return;
  ranges.for_each_run_of(warp_index(), [&](const Run& run) { visit(Work<Side>(args, scratch, ranges, run)); });
}

}  // namespace smallreduce::SR_TARGET
