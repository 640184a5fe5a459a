// The spatial part: maps (B, 2, H, W) to the mask (B, H·W).

#pragma once

#include <ATen/ops/mm.h>

#include "convolution.h"
#include "networks.h"

namespace {

// All branches as dense kernels (K, S, f, f).
template <typename A>
Tensor dense_kernels(const Weights& w, const Branches& branches, int64_t maps) {
  const int64_t area = branches.taps * branches.taps;
  if (!branches.count()) {
    check_count(w[first_branch], w[first_branch].size(0) * maps * area);
    return w[first_branch];
  }
  Tensor kernels = at::zeros({branches.count(), maps, branches.taps, branches.taps}, w[first_branch].options());
  for (int64_t k = 0; k < branches.count(); ++k) {
    const int64_t own = branches.size(k) * branches.size(k);
    const A *dw = w.data<A>(first_branch + 2 * k, maps * own), *pw = w.data<A>(first_branch + 2 * k + 1, maps);
    for (int64_t s = 0; s < maps; ++s) {
      A* to = kernels.data_ptr<A>() + (k * maps + s) * area;
      branches.each_tap(k, [&](int64_t one, int64_t dense) { to[dense] = dw[s * own + one] * pw[s]; });
    }
  }
  return kernels;
}

template <typename A>
void dense_kernels_backward(const Weights& w, const Branches& branches, const Tensor& g, std::vector<Tensor>& grads) {
  const int64_t maps = g.size(1), area = g.size(2) * g.size(3);
  if (!branches.count()) {
    grads[first_branch] = g.view(w[first_branch].sizes());
    return;
  }
  for (int64_t k = 0; k < branches.count(); ++k) {
    const size_t at = first_branch + 2 * k;
    const int64_t own = branches.size(k) * branches.size(k);
    const A *dw = w.data<A>(at, maps * own), *pw = w.data<A>(at + 1, maps);
    grads[at] = at::empty(w[at].sizes(), g.options()), grads[at + 1] = at::zeros(w[at + 1].sizes(), g.options());
    A *g_dw = grads[at].template data_ptr<A>(), *g_pw = grads[at + 1].template data_ptr<A>();
    for (int64_t s = 0; s < maps; ++s) {
      const A* given = g.const_data_ptr<A>() + (k * maps + s) * area;
      branches.each_tap(k, [&](int64_t one, int64_t dense) {
        g_dw[s * own + one] = given[dense] * pw[s];
        g_pw[s] += given[dense] * dw[s * own + one];
      });
    }
  }
}

// What is done to the maps of one sample after the other, for maps of one size.
template <typename A>
class SpatialNetwork {
 public:
  SpatialNetwork(const Block& by, int64_t height, int64_t width)
      : by_(by), height_(height), width_(width), places_(height * width), taps_(by.branches.taps), maps_(by.maps()),
        kernels_(dense_kernels<A>(by.spatial, by.branches, maps_)) {
    if (maps_ == 2) return;
    ones_ = by.windows[0].template const_data_ptr<A>(), down_ = by.windows[1].template const_data_ptr<A>();
    columns_ = by.windows[2].t().contiguous();  // (2f, W)
    across_ = columns_.template const_data_ptr<A>() + taps_ / 2 * width_;
    place_.resize(choices() * places_);
    const int64_t area = taps_ * taps_;
    for (int64_t k = 0; k < choices(); ++k)
      add_coordinates(kernels_.template const_data_ptr<A>() + (4 * k + 2) * area, place_.data() + k * places_);
  }

  const Tensor& kernels() const { return kernels_; }  // (K, S, f, f)
  int64_t choices() const { return kernels_.size(0); }
  int64_t kernel_size() const { return 2 * taps_ * taps_; }  // without those of coordinates
  Padded<A> room() const { return Padded<A>(height_, width_, taps_); }

  // Maps (2, H, W) as the router sees them, (S,).
  void pool(const A* maps, A* to) const {
    to[0] = mean_of(maps, places_), to[1] = mean_of(maps + places_, places_);
    if (maps_ == 2) return;
    to[2] = to[3] = 0;  // the mean of a symmetric coordinate
    if (!by_.moments) return;
    double along_x = 0, along_y = 0;
    for (int64_t h = 0; h < height_; ++h) {
      A x = 0, total = 0;
      for (int64_t w = 0; w < width_; ++w) x += maps[h * width_ + w] * across_[w], total += maps[h * width_ + w];
      along_x += x, along_y += total * down(h);
    }
    to[2] = along_x / places_, to[3] = along_y / places_;
  }

  // Adds to g_maps (2, H, W) what comes by way of the router, from the gradient of the above.
  void pool_backward(const A* g, A* g_maps) const {
    for (int64_t m = 0; m < 2; ++m) {
      const A share = g[m] / places_;
      for (int64_t i = 0; i < places_; ++i) g_maps[m * places_ + i] += share;
    }
    if (!by_.moments || maps_ == 2) return;
    for (int64_t h = 0; h < height_; ++h) {
      const A share = g[2] / places_, row = g[3] / places_ * down(h);
      for (int64_t w = 0; w < width_; ++w) g_maps[h * width_ + w] += share * across_[w] + row;
    }
  }

  // Maps (2, H, W) to logits (H, W) by branches mixed so (K,), their kernels into `own` (2, f, f). `padded` is room.
  void logits(const A* maps, const A* mix, Padded<A>& padded, A* own, A* to) const {
    const int64_t area = taps_ * taps_;
    std::fill(own, own + kernel_size(), A(0)), std::fill(to, to + places_, A(0));
    for (int64_t k = 0; k < choices(); ++k) {
      const A *kernel = kernels_.template const_data_ptr<A>() + k * maps_ * area, share = mix[k];
      for (int64_t i = 0; i < kernel_size(); ++i) own[i] += share * kernel[i];
      if (maps_ == 2) continue;
      const A* place = place_.data() + k * places_;
#pragma omp simd
      for (int64_t i = 0; i < places_; ++i) to[i] += share * place[i];
    }
    for (int64_t m = 0; m < 2; ++m)
      convolve_map(padded.fill(maps + m * places_), padded.stride, own + m * area, height_, width_, taps_, false, to);
  }

  // From the gradient of logits those of maps (2, H, W), of the sample's kernels (2, f, f) and of the mix (K,).
  void logits_backward(const A* g, const A* maps, const A* own, Padded<A>& padded, Padded<A>& padded_g, A* g_maps,
                       A* g_own, A* g_mix) const {
    const int64_t area = taps_ * taps_;
    const A* g_of = padded_g.fill(g);
    std::fill(g_maps, g_maps + 2 * places_, A(0));
    for (int64_t m = 0; m < 2; ++m) {
      convolve_map(g_of, padded.stride, own + m * area, height_, width_, taps_, true, g_maps + m * places_);
      kernel_gradient(g_of, padded.fill(maps + m * places_), padded.stride, height_, width_, taps_, g_own + m * area);
    }
    for (int64_t k = 0; k < choices(); ++k) {
      g_mix[k] = dot(g_own, kernels_.template const_data_ptr<A>() + k * maps_ * area, kernel_size());
      if (maps_ == 4) g_mix[k] += dot(g, place_.data() + k * places_, places_);
    }
  }

  // From the gradient (H, W) of what a kernel (2, f, f) makes of the coordinates that of the kernel.
  void coordinates_backward(const A* g, A* g_kernel) const {
    const A* columns = columns_.template const_data_ptr<A>();
    std::fill(g_kernel, g_kernel + 2 * taps_ * taps_, A(0));
    std::vector<A> row(2 * taps_);
    for (int64_t h = 0; h < height_; ++h) {
      for (int64_t j = 0; j < 2 * taps_; ++j) row[j] = dot(g + h * width_, columns + j * width_, width_);
      for (int64_t i = 0; i < taps_; ++i)
        for (int64_t j = 0; j < taps_; ++j) {
          g_kernel[i * taps_ + j] += ones_[h * taps_ + i] * row[j];
          g_kernel[(taps_ + i) * taps_ + j] += down_[h * taps_ + i] * row[taps_ + j];
        }
    }
  }

 private:
  A down(int64_t h) const { return down_[h * taps_ + taps_ / 2]; }

  // What kernels (2, f, f) make of the coordinates, added to (H, W).
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

  static A dot(const A* x, const A* y, int64_t n) {
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) total += x[i] * y[i];
    return total;
  }

  const Block& by_;
  const int64_t height_, width_, places_, taps_, maps_;
  const Tensor kernels_;
  const A *ones_ = nullptr, *down_ = nullptr, *across_ = nullptr;
  Tensor columns_;
  std::vector<A> place_;  // (K, H, W), what each kernel makes of the coordinates
};

// The spatial part of one pass in training.
struct SpatialPass {
  Tensor maps, pooled, own, logits, mask;  // (B, S), kernels mixed for each sample (B, 2·f·f), (B, H·W) twice
  Routed routed;

  // What the backward takes beside the maps.
  std::vector<Tensor*> all() {
    return {&pooled, &own, &logits, &mask, &routed.mix, &routed.hidden, &routed.logits, &routed.normed.mean,
            &routed.normed.invstd};
  }

  template <typename A>
  void forward(const Block& by) {
    const int64_t batch = maps.size(0), places = maps.size(2) * maps.size(3);
    const SpatialNetwork<A> network(by, maps.size(2), maps.size(3));
    const int64_t size = network.kernel_size(), seen = by.maps(), choices = network.choices();
    pooled = at::empty({batch, seen}, maps.options()), own = at::empty({batch, size}, maps.options());
    logits = at::empty({batch, places}, maps.options());
    const A* from = maps.const_data_ptr<A>();
    A *pool = pooled.data_ptr<A>(), *kernels = own.data_ptr<A>(), *to = logits.data_ptr<A>();
    for_samples(batch, places, [&](int64_t b) { network.pool(from + 2 * b * places, pool + b * seen); });
    routed = route<A>(by.spatial, spatial_router, spatial_norm, by.of_spatial.router, pooled);
    check_count(routed.mix, batch * choices);
    const A* mix = routed.mix.const_data_ptr<A>();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      Padded<A> padded = network.room();
      for (int64_t b = begin; b < end; ++b)
        network.logits(from + 2 * b * places, mix + b * choices, padded, kernels + b * size, to + b * places);
    });
    mask = mask_of<A>(logits, by.spatial, spatial_temperature, by.of_spatial.masking);
  }

  // The gradient of maps, and those of the weights, from that of the mask.
  template <typename A>
  Tensor backward(const Tensor& g, const Block& by, std::vector<Tensor>& grads) const {
    const int64_t batch = maps.size(0), places = maps.size(2) * maps.size(3);
    const SpatialNetwork<A> network(by, maps.size(2), maps.size(3));
    const int64_t size = network.kernel_size(), choices = network.choices();
    const Tensor g_z = mask_backward<A>(g, logits, mask, by.spatial, spatial_temperature, by.of_spatial.masking, grads);
    Tensor g_maps = at::empty_like(maps), g_own = at::empty_like(own), g_mix = at::empty_like(routed.mix);
    const A *given = g_z.const_data_ptr<A>(), *from = maps.const_data_ptr<A>(), *kernels = own.const_data_ptr<A>();
    A *to = g_maps.data_ptr<A>(), *of_kernels = g_own.data_ptr<A>(), *of_mix = g_mix.data_ptr<A>();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      Padded<A> padded = network.room(), padded_g = network.room();
      for (int64_t b = begin; b < end; ++b)
        network.logits_backward(given + b * places, from + 2 * b * places, kernels + b * size, padded, padded_g,
                                to + 2 * b * places, of_kernels + b * size, of_mix + b * choices);
    });
    Tensor g_dense = at::zeros(network.kernels().sizes(), g.options());
    A* dense = g_dense.data_ptr<A>();
    const A* mix = routed.mix.const_data_ptr<A>();
    for (int64_t k = 0; k < choices; ++k)
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < size; ++i)
          dense[k * by.maps() / 2 * size + i] += mix[b * choices + k] * of_kernels[b * size + i];
    if (!by.windows.empty()) {
      const Tensor g_place = at::mm(routed.mix.t(), g_z);  // (K, H·W)
      const A* placed = g_place.const_data_ptr<A>();
      at::parallel_for(0, choices, std::max<int64_t>(1, few / (16 * places)), [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k)
          network.coordinates_backward(placed + k * places, dense + (2 * k + 1) * size);
      });
    }
    dense_kernels_backward<A>(by.spatial, by.branches, g_dense, grads);
    const Tensor g_pooled =
        route_backward<A>(by.spatial, spatial_router, spatial_norm, by.of_spatial.router, pooled, routed, g_mix, grads);
    const A* of_pooled = g_pooled.const_data_ptr<A>();
    for_samples(batch, places, [&](int64_t b) {
      network.pool_backward(of_pooled + b * by.maps(), to + 2 * b * places);
    });
    return g_maps;
  }

 private:
  template <typename F>
  static void for_samples(int64_t batch, int64_t places, F body) {
    at::parallel_for(0, batch, std::max<int64_t>(1, few / places), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) body(b);
    });
  }
};

}  // namespace
