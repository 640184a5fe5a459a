// A convolution of the maps of each sample with that sample's own kernel, zeros around, summed over the maps:
// maps (B, M, H, W) and kernels (B, M, f, f) give (B, H, W). Sums stay in registers, those of several rows at a time.

#pragma once

#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "layout.h"

namespace {

constexpr int64_t taps_at_once = 7;
constexpr int64_t rows_together = 8;  // so that one tap waits for none of the others

// A map (H, W) with zeros around: f/2 above and on the left, as many as whole blocks need on the right and below.
template <typename A>
class Padded {
 public:
  Padded(int64_t height, int64_t width, int64_t taps)
      : height_(height), width_(width), margin_(taps / 2),
        stride((width + lanes - 1) / lanes * lanes + taps + taps_at_once), all_((height + taps + rows_together) * stride) {}
  const A* fill(const A* map) {
    for (int64_t h = 0; h < height_; ++h)
      std::copy(map + h * width_, map + (h + 1) * width_, all_.data() + (h + margin_) * stride + margin_);
    return all_.data();
  }

 private:
  const int64_t height_, width_, margin_;

 public:
  const int64_t stride;

 private:
  std::vector<A> all_;
};

template <typename A>
struct Vector {
  typedef A type __attribute__((vector_size(32), aligned(sizeof(A)), may_alias));
};

// Adds to out (H, W) the map, padded, convolved with kernel (f, f), read backwards for the gradient of a map.
template <typename A>
void convolve_map(const A* padded, int64_t stride, const A* kernel, int64_t height, int64_t width, int64_t taps,
                  bool backwards, A* out) {
  using V = typename Vector<A>::type;
  constexpr int64_t step = sizeof(V) / sizeof(A);
  for (int64_t h = 0; h < height; h += rows_together)
    for (int64_t w = 0; w < width; w += step) {
      V sums[rows_together] = {};
      for (int64_t i = 0; i < taps; ++i)
        for (int64_t j = 0; j < taps; ++j) {
          const A k = kernel[backwards ? taps * taps - 1 - i * taps - j : i * taps + j];
          const A* from = padded + (h + i) * stride + w + j;
          unrolled<rows_together>([&](size_t r) { sums[r] += k * *reinterpret_cast<const V*>(from + r * stride); });
        }
      A each[rows_together][step];
      unrolled<rows_together>([&](size_t r) { *reinterpret_cast<V*>(each[r]) = sums[r]; });  // until here in registers
      for (int64_t r = 0; r < std::min(rows_together, height - h); ++r)
        for (int64_t l = 0; l < std::min(step, width - w); ++l) out[(h + r) * width + w + l] += each[r][l];
    }
}

// The gradient of kernel (f, f) from that of z (H, W) and a map, both padded.
template <typename A>
void kernel_gradient(const A* g, const A* padded, int64_t stride, int64_t height, int64_t width, int64_t taps,
                     A* g_kernel) {
  using V = typename Vector<A>::type;
  constexpr int64_t step = sizeof(V) / sizeof(A);
  const A* centre = g + taps / 2 * (stride + 1);
  for (int64_t i = 0; i < taps; ++i)
    for (int64_t j = 0; j < taps; j += taps_at_once) {
      V sums[taps_at_once] = {};
      for (int64_t h = 0; h < height; ++h)
        for (int64_t w = 0; w < width; w += step) {
          const V gz = *reinterpret_cast<const V*>(centre + h * stride + w);
          const A* from = padded + (h + i) * stride + w + j;
#pragma GCC unroll 7
          for (int64_t t = 0; t < taps_at_once; ++t) sums[t] += gz * *reinterpret_cast<const V*>(from + t);
        }
      A each[taps_at_once][step];
#pragma GCC unroll 7
      for (int64_t t = 0; t < taps_at_once; ++t) *reinterpret_cast<V*>(each[t]) = sums[t];  // until here in registers
      for (int64_t t = 0; t < std::min(taps_at_once, taps - j); ++t)
        g_kernel[i * taps + j + t] = std::accumulate(each[t], each[t] + step, A(0));
    }
}

Tensor convolve(const Tensor& maps, const Tensor& kernels) {
  Tensor z = at::zeros({maps.size(0), maps.size(2), maps.size(3)}, maps.options());
  AT_DISPATCH_FLOATING_TYPES(maps.scalar_type(), "cbam2", [&] {
    auto *m = maps.const_data_ptr<scalar_t>(), *k = kernels.const_data_ptr<scalar_t>();
    auto* out = z.data_ptr<scalar_t>();
    const int64_t count = maps.size(1), height = maps.size(2), width = maps.size(3), taps = kernels.size(3);
    at::parallel_for(0, maps.size(0), 1, [&](int64_t begin, int64_t end) {
      Padded<scalar_t> padded(height, width, taps);
      for (int64_t n = count * begin; n < count * end; ++n)
        convolve_map(padded.fill(m + n * height * width), padded.stride, k + n * taps * taps, height, width, taps,
                     false, out + n / count * height * width);
    });
  });
  return z;
}

std::vector<Tensor> convolve_backward(const Tensor& g, const Tensor& maps, const Tensor& kernels) {
  Tensor g_maps = at::zeros_like(maps), g_kernels = at::empty_like(kernels);
  AT_DISPATCH_FLOATING_TYPES(maps.scalar_type(), "cbam2", [&] {
    auto *gz = g.const_data_ptr<scalar_t>(), *m = maps.const_data_ptr<scalar_t>(),
         *k = kernels.const_data_ptr<scalar_t>();
    auto *gm = g_maps.data_ptr<scalar_t>(), *gk = g_kernels.data_ptr<scalar_t>();
    const int64_t count = maps.size(1), height = maps.size(2), width = maps.size(3), taps = kernels.size(3);
    at::parallel_for(0, maps.size(0), 1, [&](int64_t begin, int64_t end) {
      Padded<scalar_t> padded(height, width, taps), padded_g(height, width, taps);
      for (int64_t n = count * begin; n < count * end; ++n) {
        const auto *g_of = padded_g.fill(gz + n / count * height * width), *map = padded.fill(m + n * height * width);
        convolve_map(g_of, padded.stride, k + n * taps * taps, height, width, taps, true, gm + n * height * width);
        kernel_gradient(g_of, map, padded.stride, height, width, taps, gk + n * taps * taps);
      }
    });
  });
  return {g_maps, g_kernels};
}

}  // namespace
