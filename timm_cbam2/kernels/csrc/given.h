// What the calls are told of a block: its weights, how its masks are made, how its norms of decisions measure.

#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>

#include "layout.h"

namespace {

using Optional = std::optional<Tensor>;
using Optionals = c10::List<Optional>;

void check_count(const Tensor& t, int64_t count) {
  TORCH_CHECK(t.is_cpu() && t.numel() == count, "cbam2: a layer of the block does not fit those around it");
}

// Weights in the type of the squeezes; what a layer lacks has none.
class Weights {
 public:
  Weights(const Optionals& given, at::ScalarType type) {
    for (const Optional& t : given.vec()) {
      TORCH_CHECK(!t || t->is_cpu(), "cbam2: the block's weights must lie where its input does, on the CPU");
      all_.push_back(t ? t->to(type).contiguous() : Tensor());
    }
  }
  bool has(size_t at) const { return all_[at].defined(); }
  const Tensor& operator[](size_t at) const { return all_[at]; }
  Tensor matrix(size_t at) const { return all_[at].flatten(1); }
  template <typename A>
  const A* data(size_t at, int64_t count) const {
    check_count(all_[at], count);
    return all_[at].template const_data_ptr<A>();
  }

 private:
  std::vector<Tensor> all_;
};

// Weights of the channel part, in this order: a layer's weight, then its bias.
enum Channel { fc1 = 0, fc2 = 2, fusion = 4, fusion_norm = 8, logits_of_mix = 10, channel_temperature, squeezes_norm };

// Those of the spatial part: the router and its norm, the temperature, then depthwise and pointwise weight of each branch,
// or one merged convolution.
enum Spatial { spatial_router = 0, spatial_norm = 4, spatial_temperature = 6, first_branch };

enum class Gate : int64_t { sigmoid, unit_sigmoid, hard_sigmoid };

// How a mask is made of its logits.
struct Masking {
  Gate gate;
  bool center, learnable;
  double eps;  // of a learnable temperature
};

// How a BatchNorm of decisions measures: by the batch, or by these statistics.
struct Measure {
  Optional mean, variance;
  bool by_batch;
  double momentum, eps;
};

// How a part of the block is computed, beside its weights.
struct Part {
  Masking masking;
  Measure router, squeezes;  // of the norms, where there are any
};

enum OfPart { gate, center, learnable, router_by_batch, squeezes_by_batch, numbers_of_part };
enum RealOfPart { temperature_eps, router_momentum, router_eps, squeezes_momentum, squeezes_eps, reals_of_part };

// `running`: mean and variance of the router's norm, then of the squeezes'. `which`: 0 for the channel part, 1 for the
// spatial one, whose numbers follow.
Part part_of(const Optionals& running, at::IntArrayRef numbers, at::ArrayRef<double> reals, int64_t which) {
  const auto n = numbers.slice(which * numbers_of_part, numbers_of_part);
  const auto r = reals.slice(which * reals_of_part, reals_of_part);
  return {{static_cast<Gate>(n[gate]), n[center] != 0, n[learnable] != 0, r[temperature_eps]},
          {running.get(0), running.get(1), n[router_by_batch] != 0, r[router_momentum], r[router_eps]},
          {running.get(2), running.get(3), n[squeezes_by_batch] != 0, r[squeezes_momentum], r[squeezes_eps]}};
}

// Kernel size and dilation of each branch.
struct Branches {
  at::IntArrayRef shapes;
  int64_t taps;  // of the largest footprint
  int64_t count() const { return shapes.size() / 2; }
  int64_t size(int64_t k) const { return shapes[2 * k]; }
  int64_t dilation(int64_t k) const { return shapes[2 * k + 1]; }
  template <typename F>
  void each_tap(int64_t k, F body) const {  // body(number in the branch's own kernel, number in the dense one)
    const int64_t n = size(k), d = dilation(k), margin = (taps - d * (n - 1) - 1) / 2;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) body(i * n + j, (margin + i * d) * taps + margin + j * d);
  }
};

struct Block {
  Weights channel, spatial;
  Part of_channel, of_spatial;
  Branches branches;
  at::TensorList windows;  // see `coordinate_windows` in models/dense_cbam2.py; none without coordinates
  bool moments;

  Block(at::ScalarType type, const Optionals& weights_c, const Optionals& weights_s, const Optionals& running_c,
        const Optionals& running_s, at::IntArrayRef numbers, at::ArrayRef<double> reals, at::IntArrayRef shapes,
        at::TensorList windows)
      : channel(weights_c, type), spatial(weights_s, type), of_channel(part_of(running_c, numbers, reals, 0)),
        of_spatial(part_of(running_s, numbers, reals, 1)), branches{shapes, numbers[2 * numbers_of_part]},
        windows(windows), moments(numbers[2 * numbers_of_part + 1] != 0) {}
  int64_t maps() const { return windows.empty() ? 2 : 4; }  // those of coordinates included
};

}  // namespace
