// The whole block while nothing is trained: the small networks as loops, and for each sample its maps, its mask and its
// output one after the other, while the sample lies in the cache. Values are those of `block` to rounding.

#pragma once

#include <ATen/ops/from_blob.h>

#include "block.h"

namespace {

void check_count(const Tensor& t, int64_t count) {
  TORCH_CHECK(t.is_cpu() && t.numel() == count, "cbam2: a layer of the block does not fit those around it");
}

// The mean of x (n,), by sums of few numbers: what is small is not lost in what is large.
template <typename A>
A mean_of(const A* x, int64_t n) {
  double total = 0;
  for (int64_t first = 0; first < n; first += 1024) {
    A sums[lanes] = {};
    in_lanes(std::min<int64_t>(1024, n - first), [&](int64_t i, int64_t l) { sums[l] += x[first + i]; });
    total += sum_of(sums);
  }
  return static_cast<A>(total / n);
}

// What a BatchNorm of n numbers by running statistics multiplies by and adds; nothing without one.
template <typename A>
struct Scaling {
  std::vector<A> scale, shift;

  Scaling(const Weights& w, size_t at, const Measure& by, int64_t n) {
    if (!w.has(at)) return;
    TORCH_CHECK(by.mean && by.variance, "cbam2: a norm has no statistics to measure by");
    const auto type = w[at].scalar_type();
    const Tensor mean = by.mean->to(type).contiguous(), variance = by.variance->to(type).contiguous();
    for (const Tensor& t : {w[at], w[at + 1], mean, variance}) check_count(t, n);
    const A *weight = w[at].template const_data_ptr<A>(), *bias = w[at + 1].template const_data_ptr<A>();
    const A *m = mean.template const_data_ptr<A>(), *v = variance.template const_data_ptr<A>();
    scale.resize(n), shift.resize(n);
    for (int64_t i = 0; i < n; ++i) {
      scale[i] = weight[i] / std::sqrt(v[i] + static_cast<A>(by.eps));
      shift[i] = bias[i] - m[i] * scale[i];
    }
  }
  void apply(A* x) const {
    for (size_t i = 0; i < scale.size(); ++i) x[i] = x[i] * scale[i] + shift[i];
  }
};

// Numbers (n,) through a layer, the `at`th, whose bias is the next.
template <typename A>
void dense_row(const Weights& w, size_t at, const A* x, int64_t n, std::vector<A>& to) {
  const int64_t out = w[at].size(0);
  const A* weight = w[at].template const_data_ptr<A>();
  for (int64_t o = 0; o < out; ++o) {
    A total = w.has(at + 1) ? w[at + 1].template const_data_ptr<A>()[o] : A(0);
    for (int64_t i = 0; i < n; ++i) total += weight[o * n + i] * x[i];
    to[o] = total;
  }
}

// Numbers of a router's layers: what it sees, hidden ones, choices.
int64_t hidden_of(const Weights& w, size_t at, int64_t seen, int64_t choices) {
  const int64_t hidden = w[at].size(0);
  check_count(w[at], hidden * seen), check_count(w[at + 2], choices * hidden);
  if (w.has(at + 1)) check_count(w[at + 1], hidden);
  if (w.has(at + 3)) check_count(w[at + 3], choices);
  return hidden;
}

template <typename A>
void softmax(std::vector<A>& x) {
  const A most = *std::max_element(x.begin(), x.end());
  A total = 0;
  for (A& v : x) total += v = std::exp(v - most);
  for (A& v : x) v /= total;
}

// A router's second layer, its norm and the softmax, from its hidden numbers before they are rectified.
template <typename A>
void choose(const Weights& w, size_t at, const Scaling<A>& norm, A* hidden, int64_t n, std::vector<A>& mix) {
  for (int64_t i = 0; i < n; ++i) hidden[i] = hidden[i] < 0 ? A(0) : hidden[i];
  dense_row(w, at + 2, hidden, n, mix);
  norm.apply(mix.data());
  softmax(mix);
}

// Logits (n,) to the mask, in place.
template <typename A>
void gate_row(A* z, int64_t n, A temperature, const Masking& m) {
  const A mean = m.center ? mean_of(z, n) : A(0);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) z[i] = (z[i] - mean) / temperature;
  Tensor row = at::from_blob(z, {n}, at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value));
  if (m.gate == Gate::hard_sigmoid) at::hardsigmoid_(row);
  else at::sigmoid_(row);
  if (m.gate == Gate::unit_sigmoid)
    for (int64_t i = 0; i < n; ++i) z[i] *= 2;
}

// The mask (B, C) of squeezes (B, 2, C), which are overwritten.
template <typename A>
Tensor channel_mask(const Tensor& squeezes, const Weights& w, const Part& by) {
  const int64_t batch = squeezes.size(0), channels = squeezes.size(2);
  const Scaling<A> norm(w, squeezes_norm, by.squeezes, 2 * channels), router_norm(w, fusion_norm, by.router, 2);
  A* seen = squeezes.data_ptr<A>();
  for (int64_t b = 0; b < batch; ++b) norm.apply(seen + b * 2 * channels);
  const Tensor hidden = dense(w, fc1, squeezes.view({2 * batch, channels}));  // (2B, R)
  const bool routed = w.has(fusion), sum = ChannelPass::is_sum(w);
  const Tensor of_router = routed ? dense(w, fusion, squeezes.view({batch, 2 * channels})) : Tensor();
  const int64_t reduced = hidden.size(1), n = routed ? hidden_of(w, fusion, 2 * channels, 2) : 0;
  Tensor mixed = at::empty({batch, reduced}, hidden.options());
  std::vector<A> mix(2, A(1));
  if (!routed && !sum) {
    check_count(w[logits_of_mix], 2);
    const A* logits = w[logits_of_mix].template const_data_ptr<A>();
    mix.assign(logits, logits + 2);
    softmax(mix);
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (routed) choose(w, fusion, router_norm, of_router.data_ptr<A>() + b * n, n, mix);
    const A *avg = hidden.const_data_ptr<A>() + 2 * b * reduced, *max = avg + reduced;
    A* to = mixed.data_ptr<A>() + b * reduced;
    for (int64_t i = 0; i < reduced; ++i)
      to[i] = mix[0] * (avg[i] < 0 ? A(0) : avg[i]) + mix[1] * (max[i] < 0 ? A(0) : max[i]);
  }
  Tensor z = dense(w, fc2, mixed);
  check_count(z, batch * channels);
  if (sum && w.has(fc2 + 1)) z.add_(w[fc2 + 1]);
  const A temperature = temperature_of<A>(w, channel_temperature, by.masking);
  for (int64_t b = 0; b < batch; ++b) gate_row(z.data_ptr<A>() + b * channels, channels, temperature, by.masking);
  return z;
}

// The spatial part for maps of one size.
template <typename A>
class SpatialNetwork {
 public:
  SpatialNetwork(const Block& by, at::TensorList windows, int64_t height, int64_t width)
      : by_(by), height_(height), width_(width), places_(height * width), taps_(by.branches.taps),
        maps_(windows.empty() ? 2 : 4), kernels_(dense_kernels(by.spatial, by.branches, maps_)),
        count_(kernels_.size(0)), norm_(by.spatial, spatial_norm, by.of_spatial.router, count_),
        hidden_(hidden_of(by.spatial, spatial_router, maps_, count_)),
        temperature_(temperature_of<A>(by.spatial, spatial_temperature, by.of_spatial.masking)) {
    if (windows.empty()) return;
    ones_ = windows[0].const_data_ptr<A>(), down_ = windows[1].const_data_ptr<A>();
    columns_ = windows[2].t().contiguous();  // (2f, W)
  }

  // maps (2, H, W) to the mask (H, W); `padded` is room to work in.
  void mask(const A* maps, Padded<A>& padded, A* to) const {
    const int64_t area = taps_ * taps_, all = maps_ * area;
    const std::vector<A> mix = choice(maps);
    std::vector<A> own(all);
    const A* kernel = kernels_.template const_data_ptr<A>();
    for (int64_t k = 0; k < count_; ++k, kernel += all)
      for (int64_t i = 0; i < all; ++i) own[i] += mix[k] * kernel[i];
    std::fill(to, to + places_, A(0));
    if (maps_ == 4) add_coordinates(own.data() + 2 * area, to);
    for (int64_t m = 0; m < 2; ++m)
      convolve_map(padded.fill(maps + m * places_), padded.stride, own.data() + m * area, height_, width_, taps_, false,
                   to);
    gate_row(to, places_, temperature_, by_.of_spatial.masking);
  }

  Padded<A> room() const { return Padded<A>(height_, width_, taps_); }

 private:
  // How the branches are mixed.
  std::vector<A> choice(const A* maps) const {
    A pooled[4] = {mean_of(maps, places_), mean_of(maps + places_, places_)};
    if (maps_ == 4 && by_.moments) {
      const A* across = columns_.template const_data_ptr<A>() + taps_ / 2 * width_;
      double along_x = 0, along_y = 0;
      for (int64_t h = 0; h < height_; ++h) {
        A x = 0, total = 0;
        for (int64_t w = 0; w < width_; ++w) x += maps[h * width_ + w] * across[w], total += maps[h * width_ + w];
        along_x += x, along_y += total * down_[h * taps_ + taps_ / 2];
      }
      pooled[2] = along_x / places_, pooled[3] = along_y / places_;
    }
    std::vector<A> hidden(hidden_), mix(count_);
    dense_row(by_.spatial, spatial_router, pooled, maps_, hidden);
    choose(by_.spatial, spatial_router, norm_, hidden.data(), hidden_, mix);
    return mix;
  }

  // What kernels (2, f, f) make of the coordinates, added to (H, W); see `place_of`.
  void add_coordinates(const A* kernels, A* to) const {
    const A* columns = columns_.template const_data_ptr<A>();
    std::vector<A> row(2 * taps_);
    for (int64_t h = 0; h < height_; ++h) {
      std::fill(row.begin(), row.end(), A(0));
      for (int64_t i = 0; i < taps_; ++i)
        for (int64_t j = 0; j < taps_; ++j) {
          row[j] += ones_[h * taps_ + i] * kernels[i * taps_ + j];
          row[taps_ + j] += down_[h * taps_ + i] * kernels[(taps_ + i) * taps_ + j];
        }
      for (int64_t j = 0; j < 2 * taps_; ++j)
        for (int64_t w = 0; w < width_; ++w) to[h * width_ + w] += row[j] * columns[j * width_ + w];
    }
  }

  const Block& by_;
  const int64_t height_, width_, places_, taps_, maps_;
  const Tensor kernels_;  // (K, S, f, f)
  const int64_t count_;
  const Scaling<A> norm_;
  const int64_t hidden_;
  const A temperature_;
  const A *ones_ = nullptr, *down_ = nullptr;
  Tensor columns_;
};

// For each sample its maps, its mask and its output.
template <typename T, bool inner, bool normed, bool has_gamma, bool has_shortcut>
void finish_samples(const Finish<T>& f, const SpatialNetwork<acc_t<T>>& network, acc_t<T>* maps, acc_t<T>* sa) {
  using A = acc_t<T>;
  const int64_t places = inner ? f.s.outer : f.s.inner, channels = inner ? f.s.inner : f.s.outer;
  const bool together = f.s.parts == 1;  // threads work on samples of their own
  if (!together) reduce<T, inner, normed, true>(f.s, f.x, f.ca, {}, maps);
  at::parallel_for(0, f.s.batch, 1, [&](int64_t begin, int64_t end) {
    Padded<A> padded = network.room();
    for (int64_t b = begin; b < end; ++b) {
      A* of = maps + 2 * b * places;
      if (together) reduce_sample<T, inner, normed>(f.s, f.x, f.ca + b * channels, b, of);
      network.mask(of, padded, sa + b * places);
      if (together) finish_part<T, inner, normed, has_gamma, has_shortcut>(f, b, 0);
    }
  });
  if (!together) finish<T, inner, normed, has_gamma, has_shortcut>(f);
}

// As `block`, into out, with norms of decisions by their running statistics and no dropped path.
void infer(const Tensor& z, const Optional& scale, const Optional& shift, const Optional& shortcut,
           const Optional& gamma, bool relu, const Tensor& out, const Optionals& weights_c, const Optionals& weights_s,
           const Optionals& running_c, const Optionals& running_s, at::IntArrayRef numbers, at::ArrayRef<double> reals,
           at::IntArrayRef shapes, at::TensorList windows) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor squeezes = squeeze(z, scale, shift);
  const Block by(squeezes, weights_c, weights_s, running_c, running_s, numbers, reals, shapes);
  const int64_t height = z.size(2), width = z.size(3);
  const Shape s = shape_of(z);
  DISPATCH(z, {
    using A = acc_t<scalar_t>;
    const Tensor ca = channel_mask<A>(squeezes, by.channel, by.of_channel);
    const SpatialNetwork<A> network(by, windows, height, width);
    Small<scalar_t> of;
    Tensor maps, sa;
    A *at_maps = of.make(maps, z, 2 * height * width), *at_sa = of.make(sa, z, height * width);
    const Finish<scalar_t> f{s,
                             {z.const_data_ptr<scalar_t>(), of.read(scale), of.read(shift)},
                             shortcut ? shortcut->const_data_ptr<scalar_t>() : nullptr,
                             of.read(gamma),
                             of.read(ca),
                             at_sa,
                             relu,
                             out.data_ptr<scalar_t>()};
    BOTH_LAYOUTS(s, scale.has_value(), {
      if (!f.shortcut) finish_samples<scalar_t, inner, norm, false, false>(f, network, at_maps, at_sa);
      else if (f.gamma) finish_samples<scalar_t, inner, norm, true, true>(f, network, at_maps, at_sa);
      else finish_samples<scalar_t, inner, norm, false, true>(f, network, at_maps, at_sa);
    });
  });
}

}  // namespace
