// The n-th largest magnitude of a segment, digit by digit, from histograms (a radix selection).
#pragma once

#include "cuda/topk_work.cuh"

namespace smallreduce::SR_TARGET {

// A histogram behind the tile.
constexpr size_t kSharedBytes = kTileBytes + kBins * sizeof(uint32_t);
SR_DEVICE uint32_t* shared_bins() { return reinterpret_cast<uint32_t*>(shared_memory + kTileBytes / sizeof(uint4)); }

SR_DEVICE int digit_shift(int digit) { return digit < 3 ? 23 - 8 * digit : 0; }
SR_DEVICE int digit_bits(int digit) { return digit < 3 ? 8 : 7; }

// Finds one more digit of the wanted key, given how many of the keys that share its known digits have each.
SR_DEVICE Choice refine(const Choice& choice, int digit, const uint32_t* bins) {
  constexpr int kEach = kBins / kWarp;  // bins of a lane, from the top down
  int top = kBins - 1 - lane_index() * kEach;
  uint32_t counts[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += counts[i] = bins[top - i];
  uint32_t end = running_sum(sum);
  bool is_mine = end >= choice.wanted && end - sum < choice.wanted;
  uint32_t wanted = choice.wanted - (end - sum);
  int bin = top;
#pragma unroll
  for (int i = 0; i < kEach - 1; ++i) {
    if (bin == top - i && wanted > counts[i]) wanted -= counts[i], bin -= 1;
  }
  int lane = __ffs(int(__ballot_sync(kAllLanes, is_mine))) - 1;
  bin = __shfl_sync(kAllLanes, bin, lane);
  return {choice.prefix | uint32_t(bin) << digit_shift(digit), __shfl_sync(kAllLanes, wanted, lane)};
}

// Finds the first digits, given the histograms of all.
SR_DEVICE Choice find_digits(Choice choice, int digits, const uint32_t* bins) {
  for (int digit = 0; digit < digits; ++digit) choice = refine(choice, digit, bins + digit * kBins);
  return choice;
}

// The magnitude of the last selected element, and how many of it are.
template <typename Side>
SR_DEVICE Choice final_choice(const Work<Side>& work, Way way) {
  if (way == Way::kZeros) return {0, uint32_t(work.segment.kept) - work.selection.found};
  if (is_whole(work.run)) return work.selection.choice;
  return find_digits(work.first_choice(), kDigits, work.bins() + kSampleDigits * kBins);
}

// Adds to the histogram of one digit, of the samples or of what is selected among. A segment that one range holds gets all its
// digits at the first.
template <typename Side, bool kSamples>
__global__ void __launch_bounds__(kWarp, 16) histogram_kernel(typename Side::Args args, int digit) {
  Scratch scratch = scratch_of<Side>(args);
  Ranges ranges(args.layout, warp_count());
  for_each_work<Side>(args, scratch, ranges, [&](const Work<Side>& work) {
    Way way = kSamples ? Way::kElements : way_of(work.selection, work.segment);
    if (kSamples ? !work.sampled() : way == Way::kZeros) return;
    bool whole = is_whole(work.run);
    if (whole && digit > 0) return;
    uint32_t* bins = work.bins() + (kSamples ? 0 : kSampleDigits * kBins);
    uint32_t* own = shared_bins();
    Choice choice = kSamples ? Choice{0, uint32_t(kSampleRank)} : work.first_choice();
    if (!whole) choice = find_digits(choice, digit, bins);
    int end = !whole ? digit + 1 : kSamples ? kSampleDigits : kDigits;
    for (int at = digit; at < end; ++at) {
      int shift = digit_shift(at), bits = digit_bits(at);
      for (int i = lane_index(); i < kBins; i += kWarp) own[i] = 0;
      __syncwarp();
      auto count = [&](uint32_t key) {
        if ((key ^ choice.prefix) >> (shift + bits) == 0) atomicAdd(&own[key >> shift & ((1u << bits) - 1)], 1u);
      };
      if constexpr (kSamples) {
        work.for_each_sample_key(count);
      } else {
        work.for_each_key(way, count);
      }
      __syncwarp();
      if (whole) {
        choice = refine(choice, at, own);
      } else {
        for (int i = lane_index(); i < kBins; i += kWarp) {
          if (own[i] != 0) atomicAdd(&bins[at * kBins + i], own[i]);
        }
      }
      __syncwarp();
    }
    if (!whole || lane_index() != 0) return;
    if (kSamples) {
      work.selection.threshold = choice.prefix;
    } else {
      work.selection.choice = choice;
    }
  });
}

}  // namespace smallreduce::SR_TARGET
