// The spatial part: maps (B, 2, H, W) to the mask (B, H, W).

#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>

#include "convolution.h"
#include "networks.h"

namespace {

// Weights of the spatial part: the router and its norm, the temperature, then depthwise and pointwise weight of each
// branch, or one merged convolution.
enum Spatial { spatial_router = 0, spatial_norm = 4, spatial_temperature = 6, first_branch };

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

// All branches as dense kernels (K, S, f, f).
Tensor dense_kernels(const Weights& w, const Branches& branches, int64_t maps) {
  if (!branches.count()) return w[first_branch];
  const int64_t area = branches.taps * branches.taps;
  Tensor kernels = at::zeros({branches.count(), maps, branches.taps, branches.taps}, w[first_branch].options());
  AT_DISPATCH_FLOATING_TYPES(kernels.scalar_type(), "cbam2", [&] {
    for (int64_t k = 0; k < branches.count(); ++k) {
      const Tensor &dw = w[first_branch + 2 * k], &pw = w[first_branch + 2 * k + 1];
      const int64_t own = branches.size(k) * branches.size(k);
      for (int64_t s = 0; s < maps; ++s) {
        auto* to = kernels.data_ptr<scalar_t>() + (k * maps + s) * area;
        const auto* from = dw.const_data_ptr<scalar_t>() + s * own;
        const scalar_t scale = pw.const_data_ptr<scalar_t>()[s];
        branches.each_tap(k, [&](int64_t one, int64_t dense) { to[dense] = from[one] * scale; });
      }
    }
  });
  return kernels;
}

void dense_kernels_backward(const Weights& w, const Branches& branches, const Tensor& g, std::vector<Tensor>& grads) {
  const int64_t maps = g.size(1), area = g.size(2) * g.size(3);
  if (!branches.count()) {
    grads[first_branch] = g;
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "cbam2", [&] {
    for (int64_t k = 0; k < branches.count(); ++k) {
      const size_t at = first_branch + 2 * k;
      const Tensor &dw = w[at], &pw = w[at + 1];
      grads[at] = at::empty(dw.sizes(), dw.options()), grads[at + 1] = at::empty(pw.sizes(), pw.options());
      const int64_t own = branches.size(k) * branches.size(k);
      for (int64_t s = 0; s < maps; ++s) {
        const auto* given = g.const_data_ptr<scalar_t>() + (k * maps + s) * area;
        const auto* weight = dw.const_data_ptr<scalar_t>() + s * own;
        auto* to = grads[at].template data_ptr<scalar_t>() + s * own;
        const scalar_t scale = pw.const_data_ptr<scalar_t>()[s];
        scalar_t total = 0;
        branches.each_tap(k, [&](int64_t one, int64_t dense) {
          to[one] = given[dense] * scale;
          total += given[dense] * weight[one];
        });
        grads[at + 1].template data_ptr<scalar_t>()[s] = total;
      }
    }
  });
}

// What the coordinates add (K, H·W); see `coordinate_windows` in models/dense_cbam2.py.
Tensor place_of(const Tensor& kernels, at::TensorList windows) {
  const int64_t count = kernels.size(0), taps = kernels.size(2);
  const Tensor x = at::matmul(windows[0], kernels.select(1, 2)), y = at::matmul(windows[1], kernels.select(1, 3));
  const Tensor rows = at::cat({x, y}, 2).view({-1, 2 * taps});  // (K·H, 2f)
  return at::mm(rows, windows[2].t()).view({count, -1});
}

// Into g (K, S, f, f), from the gradient of `place_of`.
void place_backward(const Tensor& g_place, at::TensorList windows, const Tensor& g) {
  const int64_t count = g.size(0), taps = g.size(2), height = windows[0].size(0);
  const Tensor rows = at::mm(g_place.view({count * height, -1}), windows[2]).view({count, height, 2 * taps});
  for (int64_t axis = 0; axis < 2; ++axis)
    g.select(1, 2 + axis).copy_(at::matmul(windows[axis].t(), rows.narrow(2, axis * taps, taps)));
}

// The coordinates X (W,) and Y (H,), with a trailing axis of 1.
std::pair<Tensor, Tensor> coordinates(at::TensorList windows) {
  const int64_t taps = windows[1].size(1);
  return {windows[2].narrow(1, taps / 2, 1), windows[1].narrow(1, taps / 2, 1)};
}

// The maps as the router sees them, (B, S).
Tensor pooled_of(const Tensor& maps, at::TensorList windows, bool moments) {
  const Tensor means = maps.mean({2, 3});
  if (windows.empty()) return means;
  const int64_t batch = maps.size(0), height = maps.size(2), width = maps.size(3);
  Tensor pooled = at::zeros({batch, 4}, maps.options());  // the mean of a symmetric coordinate is 0
  pooled.narrow(1, 0, 2).copy_(means);
  if (moments) {
    const auto [x, y] = coordinates(windows);
    pooled.narrow(1, 2, 1).copy_(at::mm(maps.select(1, 0).mean(1), x).div_(width));
    pooled.narrow(1, 3, 1).copy_(at::mm(maps.select(1, 0).mean(2), y).div_(height));
  }
  return pooled;
}

// Adds to g_maps (B, 2, H, W) what comes by way of the router.
void pooled_backward(const Tensor& g, at::TensorList windows, bool moments, const Tensor& g_maps) {
  const Tensor shares = at::div(g, g_maps.size(2) * g_maps.size(3)).unsqueeze(2).unsqueeze(3);
  g_maps.add_(shares.narrow(1, 0, 2));
  if (!moments) return;
  const auto [x, y] = coordinates(windows);
  g_maps.select(1, 0).add_(shares.select(1, 2).mul(x.view({-1}))).add_(shares.select(1, 3).mul(y));
}

// The spatial part of one pass: maps (B, 2, H, W) to the mask (B, H, W).
struct SpatialPass {
  Tensor maps, pooled, kernels, own;  // (B, S), (K, S, f, f), those mixed for each sample (B, 2, f, f)
  Tensor place, logits, mask;         // what coordinates add (K, H·W), (B, H·W) twice
  Routed routed;

  std::vector<Tensor*> all() {
    return {&maps, &pooled, &kernels, &own, &place, &logits, &mask,
            &routed.mix, &routed.hidden, &routed.logits, &routed.mean, &routed.invstd};
  }

  void forward(const Tensor& given, const Weights& w, const Part& by, const Branches& branches, at::TensorList windows,
               bool moments) {
    maps = given;
    const int64_t batch = maps.size(0), taps = branches.taps;
    pooled = pooled_of(maps, windows, moments);
    routed = route(w, spatial_router, spatial_norm, by.router, pooled);
    kernels = dense_kernels(w, branches, pooled.size(1));
    own = at::mm(routed.mix, kernels.narrow(1, 0, 2).flatten(1)).view({batch, 2, taps, taps});
    Tensor z = convolve(maps, own).view({batch, -1});
    if (!windows.empty()) place = place_of(kernels, windows), z.addmm_(routed.mix, place);
    std::tie(logits, mask) = mask_of(z, w, spatial_temperature, by.masking);
  }

  // The gradient of maps, and those of the weights, from that of the mask (B, H·W).
  Tensor backward(const Tensor& g, const Weights& w, const Part& by, const Branches& branches, at::TensorList windows,
                  bool moments, std::vector<Tensor>& grads) const {
    const int64_t batch = maps.size(0), count = kernels.size(0);
    const Tensor flat = mask_backward(g, logits, mask, w, spatial_temperature, by.masking, grads);
    const auto of_maps = convolve_backward(flat.view({batch, maps.size(2), maps.size(3)}), maps, own);
    const Tensor g_own = of_maps[1].flatten(1);
    Tensor g_mix = at::mm(g_own, kernels.narrow(1, 0, 2).flatten(1).t());
    Tensor g_kernels = at::empty(kernels.sizes(), kernels.options());
    g_kernels.narrow(1, 0, 2).copy_(at::mm(routed.mix.t(), g_own).view({count, 2, branches.taps, branches.taps}));
    if (!windows.empty()) {
      g_mix.addmm_(flat, place.t());
      place_backward(at::mm(routed.mix.t(), flat), windows, g_kernels);
    }
    dense_kernels_backward(w, branches, g_kernels, grads);
    pooled_backward(route_backward(w, spatial_router, spatial_norm, by.router, pooled, routed, g_mix, grads), windows,
                    moments, of_maps[0]);
    return of_maps[0];
  }
};

}  // namespace
