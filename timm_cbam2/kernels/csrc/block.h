// A whole block in one call each way: what the passes and the small networks between them do, one after the other.

#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/addcmul.h>

#include "passes.h"
#include "spatial.h"

namespace {

// What both calls are told of the block beside its weights.
struct Block {
  Weights channel, spatial;
  Part of_channel, of_spatial;
  Branches branches;
  bool moments;

  Block(const Tensor& squeezes, const Optionals& weights_c, const Optionals& weights_s, const Optionals& running_c,
        const Optionals& running_s, at::IntArrayRef numbers, at::ArrayRef<double> reals, at::IntArrayRef shapes)
      : channel(weights_c, squeezes.scalar_type()), spatial(weights_s, squeezes.scalar_type()),
        of_channel(part_of(running_c, numbers, reals, 0)), of_spatial(part_of(running_s, numbers, reals, 1)),
        branches{shapes, numbers[2 * numbers_of_part]}, moments(numbers[2 * numbers_of_part + 1] != 0) {}
};

// Into out. Gives squeezes, ca, maps, sa, and what the backward takes of both parts.
std::vector<Tensor> block(const Tensor& z, const Optional& scale, const Optional& shift, const Optional& shortcut,
                          const Optional& gamma, const Optional& drop, bool relu, const Tensor& out,
                          const Optionals& weights_c, const Optionals& weights_s, const Optionals& running_c,
                          const Optionals& running_s, at::IntArrayRef numbers, at::ArrayRef<double> reals,
                          at::IntArrayRef shapes, at::TensorList windows) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor squeezes = squeeze(z, scale, shift);
  const Block by(squeezes, weights_c, weights_s, running_c, running_s, numbers, reals, shapes);
  ChannelPass channel;
  channel.forward(squeezes, by.channel, by.of_channel);
  SpatialPass spatial;
  spatial.forward(maps(z, scale, shift, channel.mask, std::nullopt, std::nullopt), by.spatial, by.of_spatial, by.branches,
                  windows, by.moments);
  Tensor sa = spatial.mask.view({z.size(0), z.size(2), z.size(3)});
  if (drop) sa = sa.mul(drop->to(sa.scalar_type()).view({-1, 1, 1}));
  finish_into(z, scale, shift, shortcut, gamma, channel.mask, sa, relu, out);
  std::vector<Tensor> found = {squeezes, channel.mask, spatial.maps, sa};
  keep(channel, found), keep(spatial, found);
  return found;
}

// norm: scale, shift, mean, bias and invstd of a BatchNorm in training, or nothing; small: what `block` gave.
// Gives g', the gradients of z (nothing, unless needed), gamma, weight and bias of the BatchNorm, then of each weight that
// there is: those that are not there have no elements.
std::vector<Tensor> block_backward(const Tensor& g, const Optional& out, const Tensor& z, const Optionals& norm,
                                   const Optional& gamma, const Optional& drop, at::TensorList small, bool needed,
                                   const Optionals& weights_c, const Optionals& weights_s, const Optionals& running_c,
                                   const Optionals& running_s, at::IntArrayRef numbers, at::ArrayRef<double> reals,
                                   at::IntArrayRef shapes, at::TensorList windows) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Block by(small[0], weights_c, weights_s, running_c, running_s, numbers, reals, shapes);
  const auto channel = kept<ChannelPass>(small.slice(4));
  const auto spatial = kept<SpatialPass>(small.slice(4 + ChannelPass().all().size()));
  const at::TensorList four = small.slice(0, 4);
  const Tensor none = at::empty({0}, small[0].options()), ca = small[1];
  const auto given = norm.vec();
  const bool normed = given[0].has_value();
  const Optionals affine({given[0], given[1], given[2]});
  std::vector<Tensor> grads_c(weights_c.size()), grads_s(weights_s.size());

  const auto first = products(g, out, z, affine, gamma, four);
  const Tensor &masked = first[0], &ties_p = first[2], &sums = first[3];
  Tensor g_sa = first[1];
  if (drop) g_sa.mul_(drop->to(g_sa.scalar_type()).view({-1, 1}));
  const Tensor g_maps =
      spatial.backward(g_sa, by.spatial, by.of_spatial, by.branches, windows, by.moments, grads_s).flatten(2);
  const Tensor g_avg = g_maps.select(1, 0) / z.size(1), g_max = g_maps.select(1, 1) / ties_p;
  const Tensor of_maps = spread(z, affine, four, g_avg, g_max);
  Tensor along = sums[0], from_maps = of_maps[0];  // of x
  if (normed) {                                    // which is scale·z̃ + bias
    along = at::addcmul(sums[plain] * *given[3], along, *given[0]);
    from_maps = at::addcmul(of_maps[1] * *given[3], from_maps, *given[0]);
  }
  const Tensor g_ca = gamma ? at::addcmul(from_maps, along, *gamma) : along + from_maps;
  const Tensor g_squeezes = channel.backward(g_ca, by.channel, by.of_channel, grads_c).view(small[0].sizes());

  std::vector<Tensor> found = {masked, none, gamma ? (ca * along).sum(0) : none, none, none};
  const int64_t places = z.size(2) * z.size(3), count = z.size(0) * places;
  const Tensor savg = g_squeezes.select(1, 0), smax = g_squeezes.select(1, 1);
  Optionals by_channel({Optional(savg / places), Optional(smax / sums[ties]), Optional(), Optional(), Optional()});
  if (normed) {
    const Tensor alone = gamma ? at::addcmul(of_maps[1], sums[plain], *gamma) : sums[plain] + of_maps[1];
    const Tensor away = gamma ? at::addcmul(of_maps[0], sums[product], *gamma) : sums[product] + of_maps[0];
    const Tensor total = (ca * alone).add_(savg).add_(smax).sum(0);
    const Tensor rest = *by_channel.get(0) * sums[centered] + *by_channel.get(1) * sums[at_ties];
    const Tensor g_weight = (ca * away).add_(rest).sum(0) * *given[4];
    by_channel.set(2, total / count), by_channel.set(3, g_weight * *given[4] / count), by_channel.set(4, given[0]);
    found[3] = g_weight, found[4] = total;
  }
  if (needed) found[1] = input_gradient(masked, z, affine, gamma, four, g_avg, g_max, by_channel, {}, {});
  for (const auto* part : {&grads_c, &grads_s})
    for (const Tensor& t : *part) found.push_back(t.defined() ? t : none);
  return found;
}

}  // namespace
