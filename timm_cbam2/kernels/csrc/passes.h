// The passes over full-size tensors as operations; see models/passes_cbam2.py for the formulas.

#pragma once

#include <ATen/ops/ones.h>

#include "backward.h"
#include "given.h"

namespace {

#define BOTH_LAYOUTS(s, normed, ...)                                                                   \
  if ((s).channel_is_inner && (normed)) { constexpr bool inner = true, norm = true; __VA_ARGS__; }     \
  else if ((s).channel_is_inner) { constexpr bool inner = true, norm = false; __VA_ARGS__; }           \
  else if (normed) { constexpr bool inner = false, norm = true; __VA_ARGS__; }                         \
  else { constexpr bool inner = false, norm = false; __VA_ARGS__; }

// The average and the maximum of x = scale·z + shift over positions: (B, 2, C).
Tensor squeeze(const Tensor& z, const Optional& scale, const Optional& shift) {
  const Shape s = shape_of(z);
  Tensor out;
  DISPATCH(z, {
    Small<scalar_t> of;
    const Input<scalar_t> x{z.const_data_ptr<scalar_t>(), of.read(scale), of.read(shift)};
    auto* to = of.make(out, z, 2 * z.size(1));
    BOTH_LAYOUTS(s, scale.has_value(), (reduce<scalar_t, inner, norm, false>(s, x, nullptr, {}, to)));
  });
  return out.view({z.size(0), 2, z.size(1)});
}

// The average and the maximum of x·ca over channels, and sums of z over channels weighted by weights (B, P, C), plus
// offsets (B, P): (B, 2 + P, H, W).
Tensor maps(const Tensor& z, const Optional& scale, const Optional& shift, const Tensor& ca, const Optional& weights,
            const Optional& offsets) {
  const Shape s = shape_of(z);
  const int64_t batch = z.size(0), more = weights ? weights->size(1) : 0, channels = z.size(1);
  Tensor out;
  DISPATCH(z, {
    using A = acc_t<scalar_t>;
    Small<scalar_t> of;
    const Input<scalar_t> x{z.const_data_ptr<scalar_t>(), of.read(scale), of.read(shift)};
    std::vector<Learned<A>> learned;
    if (weights) {
      const A *w = of.read(weights), *o = of.read(offsets);
      for (int64_t b = 0; b < batch; ++b) learned.push_back({w + b * more * channels, o + b * more, more});
    }
    const A* mask = of.read(ca);
    auto* to = of.make(out, z, (2 + more) * z.size(2) * z.size(3));
    BOTH_LAYOUTS(s, scale.has_value(), (reduce<scalar_t, inner, norm, true>(s, x, mask, learned, to)));
  });
  return out.view({batch, 2 + more, z.size(2), z.size(3)});
}

void finish_into(const Tensor& z, const Optional& scale, const Optional& shift, const Optional& shortcut,
                 const Optional& gamma, const Tensor& ca, const Tensor& sa, bool relu, const Tensor& out) {
  const Shape s = shape_of(z);
  DISPATCH(z, {
    Small<scalar_t> of;
    const Finish<scalar_t> f{s,
                             {z.const_data_ptr<scalar_t>(), of.read(scale), of.read(shift)},
                             shortcut ? shortcut->const_data_ptr<scalar_t>() : nullptr,
                             of.read(gamma),
                             of.read(ca),
                             of.read(sa),
                             relu,
                             out.data_ptr<scalar_t>()};
    BOTH_LAYOUTS(s, scale.has_value(), {
      if (!f.shortcut) finish<scalar_t, inner, norm, false, false>(f);
      else if (f.gamma) finish<scalar_t, inner, norm, true, true>(f);
      else finish<scalar_t, inner, norm, false, true>(f);
    });
  });
}

template <typename T>
Backward<T> backward_of(Small<T>& of, const Shape& s, const Tensor& g, const Optional& out, const Tensor& z,
                        at::ArrayRef<Optional> norm, const Optional& gamma, at::TensorList small) {
  return {s,
          {z.const_data_ptr<T>(), of.read(norm[0]), of.read(norm[1])},
          of.read(norm[2]),
          g.const_data_ptr<T>(),
          out ? out->const_data_ptr<T>() : nullptr,
          of.read(gamma ? *gamma : at::ones({z.size(1)}, small[1].options())),
          of.read(small[1]),
          of.read(small[3]),
          of.read(small[0].select(1, 1)),
          of.read(small[2].select(1, 1)),
          nullptr};
}

// norm: scale, shift and mean of a BatchNorm, or none of them; small: squeezes, ca, maps, sa.
// Gives g', the gradient of sa, the number of maxima over channels, and the sums by channel (columns, B, C).
std::vector<Tensor> products(const Tensor& g, const Optional& out, const Tensor& z, const Optionals& norm,
                             const Optional& gamma, at::TensorList small) {
  const Shape s = shape_of(z);
  const int64_t batch = z.size(0), channels = z.size(1), places = z.size(2) * z.size(3);
  const auto affine = norm.vec();
  const bool normed = affine[0].has_value();
  const int64_t columns = normed ? columns_normed : columns_alone;
  Tensor masked = out ? at::empty_like(z) : g, g_sa, ties_p, sums;
  DISPATCH(z, {
    Small<scalar_t> of;
    auto f = backward_of<scalar_t>(of, s, g, out, z, affine, gamma, small);
    if (out) f.g_masked = masked.data_ptr<scalar_t>();
    auto *at_place = of.make(g_sa, z, places), *equal = of.make(ties_p, z, places);
    auto* by_channel = of.make(sums, z, columns * channels);
    Partial<acc_t<scalar_t>> partial(s, s.channel_is_inner ? columns : 2);
    auto* rows = s.channel_is_inner ? at_place : by_channel;
    BOTH_LAYOUTS(s, normed, {
      if (out) products_of<scalar_t, inner, norm, true>(f, rows, equal, partial);
      else products_of<scalar_t, inner, norm, false>(f, rows, equal, partial);
    });
    if (s.channel_is_inner)
      for (int64_t k = 0; k < columns; ++k) partial.add_into(k, by_channel + k * batch * channels);
    else partial.add_into(0, at_place), partial.add_into(1, equal);
  });
  return {masked, g_sa, ties_p, sums.view({columns, batch, channels})};
}

Tensor spread(const Tensor& z, const Optionals& norm, at::TensorList small, const Tensor& g_avg, const Tensor& g_max) {
  const Shape s = shape_of(z);
  const auto affine = norm.vec();
  const int64_t columns = affine[0] ? 2 : 1;
  Tensor sums;
  DISPATCH(z, {
    Small<scalar_t> of;
    const auto f = backward_of<scalar_t>(of, s, z, std::nullopt, z, affine, std::nullopt, small);
    auto *a = of.read(g_avg), *m = of.read(g_max);
    auto* out = of.make(sums, z, columns * z.size(1));
    Partial<acc_t<scalar_t>> partial(s, columns);
    BOTH_LAYOUTS(s, affine[0].has_value(), (spread_of<scalar_t, inner, norm>(f, a, m, out, partial)));
    if (s.channel_is_inner)
      for (int64_t k = 0; k < columns; ++k) partial.add_into(k, out + k * z.size(0) * z.size(1));
  });
  return sums.view({columns, z.size(0), z.size(1)});
}

// by_channel: gradients of the two squeezes shared among positions, then, of a BatchNorm, offset, slope and factor.
Tensor input_gradient(const Tensor& g, const Tensor& z, const Optionals& norm, const Optional& gamma,
                      at::TensorList small, const Tensor& g_avg, const Tensor& g_max, const Optionals& by_channel,
                      const Optional& g_learned, const Optional& learned) {
  const Shape s = shape_of(z);
  Tensor g_x = at::empty_like(z);
  const auto affine = norm.vec(), given = by_channel.vec();
  DISPATCH(z, {
    Small<scalar_t> of;
    const auto f = backward_of<scalar_t>(of, s, g, std::nullopt, z, affine, gamma, small);
    const ByChannel<acc_t<scalar_t>> by{of.read(given[0]), of.read(given[1]), of.read(given[2]), of.read(given[3]),
                                        of.read(given[4])};
    const OfMaps<acc_t<scalar_t>> maps{of.read(g_avg), of.read(g_max), of.read(g_learned), of.read(learned),
                                       learned ? learned->size(0) : 0};
    auto* to = g_x.data_ptr<scalar_t>();
    BOTH_LAYOUTS(s, affine[0].has_value(), (input_gradient_of<scalar_t, inner, norm>(f, maps, by, to)));
  });
  return g_x;
}

}  // namespace
