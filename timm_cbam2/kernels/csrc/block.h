// A whole block in one call each way: what the passes and the small networks between them do, one after the other.

#pragma once

#include <ATen/TensorOperators.h>

#include "passes.h"
#include "spatial.h"

namespace {

// Into out. Gives squeezes, ca, maps, sa, and what the backward takes of both parts.
std::vector<Tensor> block(const Tensor& z, const Optional& scale, const Optional& shift, const Optional& shortcut,
                          const Optional& gamma, const Optional& drop, bool relu, const Tensor& out,
                          const Optionals& weights_c, const Optionals& weights_s, const Optionals& running_c,
                          const Optionals& running_s, at::IntArrayRef numbers, at::ArrayRef<double> reals,
                          at::IntArrayRef shapes, at::TensorList windows) {
  at::AutoDispatchBelowADInplaceOrView guard;
  ChannelPass channel;
  SpatialPass spatial;
  channel.squeezes = squeeze(z, scale, shift);
  const auto type = channel.squeezes.scalar_type();
  const Block by(type, weights_c, weights_s, running_c, running_s, numbers, reals, shapes, windows);
  AT_DISPATCH_FLOATING_TYPES(type, "cbam2", [&] {
    channel.forward<scalar_t>(by.channel, by.of_channel);
    spatial.maps = maps(z, scale, shift, channel.mask, std::nullopt, std::nullopt);
    spatial.forward<scalar_t>(by);
  });
  Tensor sa = spatial.mask.view({z.size(0), z.size(2), z.size(3)});
  if (drop) sa = sa.mul(drop->to(type).view({-1, 1, 1}));
  finish_into(z, scale, shift, shortcut, gamma, channel.mask, sa, relu, out);
  std::vector<Tensor> found = {channel.squeezes, channel.mask, spatial.maps, sa};
  keep(channel, found), keep(spatial, found);
  return found;
}

// What the readings of the backward found by channel, of one block: `sums` (columns, B, C) of `products` and `of_maps`
// (columns, B, C) of `spread`. `affine`: scale, bias and invstd (C,) of a BatchNorm in training, or null.
template <typename A>
struct Sums {
  const A *sums, *of_maps, *ca, *gamma, *scale, *bias, *invstd;
  int64_t batch, channels, places;

  A of(Column kind, int64_t b, int64_t c) const { return sums[(kind * batch + b) * channels + c]; }
  A of(bool alone, int64_t b, int64_t c) const { return of_maps[(alone * batch + b) * channels + c]; }
  A layer_scale(int64_t c) const { return gamma ? gamma[c] : A(1); }
  // Σ g'·sa·x, and Σ m·x, x being scale·z̃ + bias behind a BatchNorm.
  A along(int64_t b, int64_t c) const {
    const A sum = of(product, b, c);
    return scale ? sum * scale[c] + of(plain, b, c) * bias[c] : sum;
  }
  A from_maps(int64_t b, int64_t c) const {
    const A sum = of(false, b, c);
    return scale ? sum * scale[c] + of(true, b, c) * bias[c] : sum;
  }

  // The gradients of the mask (B, C) and, where asked for, of layer-scale (C,).
  void of_mask(A* g_ca, A* g_gamma) const {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t c = 0; c < channels; ++c) {
        const A one = along(b, c);
        g_ca[b * channels + c] = layer_scale(c) * one + from_maps(b, c);
        if (g_gamma) g_gamma[c] += ca[b * channels + c] * one;
      }
  }

  // From the gradients of the squeezes (B, 2, C): those of the two shared among positions, and of a BatchNorm those of
  // weight and bias, and what its backward takes off: offset and slope.
  void of_input(const A* g, A* savg, A* smax, A* g_weight, A* g_bias, A* offset, A* slope) const {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = b * channels + c;
        const A avg = g[2 * b * channels + c], most = g[(2 * b + 1) * channels + c];
        savg[at] = avg / places, smax[at] = most / of(ties, b, c);
        if (!scale) continue;
        const A factor = layer_scale(c);
        g_bias[c] += ca[at] * (factor * of(plain, b, c) + of(true, b, c)) + avg + most;
        g_weight[c] += ca[at] * (factor * of(product, b, c) + of(false, b, c)) + savg[at] * of(centered, b, c) +
                       smax[at] * of(at_ties, b, c);
      }
    for (int64_t c = 0; scale && c < channels; ++c) {
      g_weight[c] *= invstd[c];
      offset[c] = g_bias[c] / (batch * places), slope[c] = g_weight[c] * invstd[c] / (batch * places);
    }
  }
};

// norm: scale, shift, mean, bias and invstd of a BatchNorm in training, or nothing; small: what `block` gave.
// Gives g', the gradients of z (nothing, unless needed), gamma, weight and bias of the BatchNorm, then of each weight that
// there is: those that are not there have no elements.
std::vector<Tensor> block_backward(const Tensor& g, const Optional& out, const Tensor& z, const Optionals& norm,
                                   const Optional& gamma, const Optional& drop, at::TensorList small, bool needed,
                                   const Optionals& weights_c, const Optionals& weights_s, const Optionals& running_c,
                                   const Optionals& running_s, at::IntArrayRef numbers, at::ArrayRef<double> reals,
                                   at::IntArrayRef shapes, at::TensorList windows) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto type = small[0].scalar_type();
  const Block by(type, weights_c, weights_s, running_c, running_s, numbers, reals, shapes, windows);
  ChannelPass channel;
  SpatialPass spatial;
  channel.squeezes = small[0], channel.mask = small[1], spatial.maps = small[2];
  take(channel, small.slice(4)), take(spatial, small.slice(4 + channel.all().size()));
  const at::TensorList four = small.slice(0, 4);
  const auto options = small[0].options();
  const Tensor none = at::empty({0}, options);
  const auto given = norm.vec();
  const bool normed = given[0].has_value();
  const Optionals affine({given[0], given[1], given[2]});
  const int64_t batch = z.size(0), channels = z.size(1), places = z.size(2) * z.size(3);
  std::vector<Tensor> grads_c(weights_c.size()), grads_s(weights_s.size());

  const auto first = products(g, out, z, affine, gamma, four);
  const Tensor &masked = first[0], &ties_p = first[2];
  Tensor g_sa = first[1];
  if (drop) g_sa.mul_(drop->to(type).view({-1, 1}));
  std::vector<Tensor> found = {masked, none, none, none, none};
  AT_DISPATCH_FLOATING_TYPES(type, "cbam2", [&] {
    using A = scalar_t;
    const Tensor g_maps = spatial.backward<A>(g_sa, by, grads_s).flatten(2);
    const Tensor g_avg = g_maps.select(1, 0) / channels, g_max = g_maps.select(1, 1) / ties_p;
    const Tensor of_maps = spread(z, affine, four, g_avg, g_max);
    Small<A> of;
    auto zeros = [&](bool wanted) { return wanted ? at::zeros({channels}, options) : Tensor(); };
    auto data = [](const Tensor& t) { return t.defined() ? t.data_ptr<A>() : nullptr; };
    const Sums<A> sums{of.read(first[3]), of.read(of_maps), of.read(small[1]), of.read(gamma), of.read(given[0]),
                       of.read(given[3]), of.read(given[4]), batch, channels, places};
    Tensor g_ca = at::empty({batch, channels}, options), g_gamma = zeros(gamma.has_value());
    sums.of_mask(data(g_ca), data(g_gamma));
    const Tensor g_squeezes = channel.backward<A>(g_ca, by.channel, by.of_channel, grads_c);
    const Tensor savg = at::empty_like(g_ca), smax = at::empty_like(g_ca), g_weight = zeros(normed);
    const Tensor g_bias = zeros(normed), offset = zeros(normed), slope = zeros(normed);
    sums.of_input(data(g_squeezes), data(savg), data(smax), data(g_weight), data(g_bias), data(offset), data(slope));
    if (gamma) found[2] = g_gamma;
    if (normed) found[3] = g_weight, found[4] = g_bias;
    const auto of_norm = [&](const Tensor& t) { return normed ? Optional(t) : Optional(); };
    const Optionals by_channel({savg, smax, of_norm(offset), of_norm(slope), given[0]});
    if (needed) found[1] = input_gradient(masked, z, affine, gamma, four, g_avg, g_max, by_channel, {}, {});
  });
  for (const auto* part : {&grads_c, &grads_s})
    for (const Tensor& t : *part) found.push_back(t.defined() ? t : none);
  return found;
}

}  // namespace
