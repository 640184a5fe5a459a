// CBAM2 on a CPU: each pass over full-size tensors reads them once; see models/passes_cbam2.py for the formulas.

#include <torch/library.h>

#include "backward.h"

namespace {

using Optional = std::optional<Tensor>;
using Optionals = c10::List<Optional>;

// Positions in `options`, as kernels/cpu_passes.py gives them.
enum Option { fusion, gate, center_channel, center_spatial, coords, moments, learnable_channel, learnable_spatial };
enum Fusion { by_router = 0, by_logits = 1, by_sum = 2 };

template <typename A>
Dense<A> dense(Small<A>& of, const Tensor& weight, const Optional& bias) {
  return {of.read(weight), of.read(bias), weight.size(0), weight.size(1)};
}

template <typename A>
A temperature(Small<A>& of, const Tensor& stored, bool learnable) {
  const double t = *of.read(stored);
  return static_cast<A>(learnable ? (t > 20 ? t : std::log1p(std::exp(t))) + 1e-6 : t);
}

// weights: fc1, its bias, fc2, its bias, the same of the router, fusion logits, temperature
template <typename A>
ChannelNet<A> channel_net(Small<A>& of, const Optionals& weights, at::IntArrayRef options) {
  ChannelNet<A> net;
  auto get = [&](int64_t i) -> Optional { return weights.get(i); };
  net.fc1 = dense(of, *get(0), get(1));
  net.fc2 = dense(of, *get(2), get(3));
  net.routes = options[fusion] == by_router;
  if (net.routes) net.router = {dense(of, *get(4), get(5)), dense(of, *get(6), get(7))};
  if (options[fusion] == by_logits) {
    const A* logits = of.read(*get(8));
    std::copy(logits, logits + 2, net.mix);
    softmax(net.mix, 2);
  }
  net.bias_scale = options[fusion] == by_sum ? 2 : 1;
  net.temperature = temperature(of, *get(9), options[learnable_channel]);
  net.gate = options[gate], net.center = options[center_channel];
  return net;
}

// weights: fc1 of the router, its bias, fc2, its bias, temperature, the branches in one (K, S, f, f) or none;
// branches: depthwise (S, 1, k, k) and pointwise (1, S, 1, 1) of each
template <typename A>
SpatialNet<A> spatial_net(Small<A>& of, const Optionals& weights, at::TensorList branches, at::IntArrayRef dilations,
                          at::IntArrayRef options, int64_t height, int64_t width) {
  SpatialNet<A> net;
  auto get = [&](int64_t i) -> Optional { return weights.get(i); };
  net.router = {dense(of, *get(0), get(1)), dense(of, *get(2), get(3))};
  net.temperature = temperature(of, *get(4), options[learnable_spatial]);
  net.gate = options[gate], net.center = options[center_spatial];
  net.coords = options[coords], net.moments = options[moments];
  net.maps = net.coords ? 4 : 2;
  net.height = height, net.width = width;
  const int64_t choices = net.router.fc2.out;
  if (const Optional merged = get(5)) {
    net.taps = merged->size(3);
    const A* from = of.read(*merged);
    net.kernels.assign(from, from + choices * net.maps * net.taps * net.taps);
  } else {
    for (int64_t k = 0; k < choices; ++k)
      net.taps = std::max(net.taps, dilations[k] * (branches[2 * k].size(3) - 1) + 1);
    net.kernels.assign(choices * net.maps * net.taps * net.taps, A(0));
    for (int64_t k = 0; k < choices; ++k) {
      const int64_t size = branches[2 * k].size(3), step = dilations[k];
      const int64_t margin = (net.taps - step * (size - 1) - 1) / 2;
      const A *depthwise = of.read(branches[2 * k]), *pointwise = of.read(branches[2 * k + 1]);
      for (int64_t m = 0; m < net.maps; ++m)
        for (int64_t i = 0; i < size; ++i)
          for (int64_t j = 0; j < size; ++j)
            net.kernels[((k * net.maps + m) * net.taps + margin + step * i) * net.taps + margin + step * j] =
                pointwise[m] * depthwise[(m * size + i) * size + j];
    }
  }
  net.across = Axis<A>(width, net.taps / 2), net.down = Axis<A>(height, net.taps / 2);
  return net;
}

#define BOTH_LAYOUTS(s, normed, ...)                                                                   \
  if ((s).channel_is_inner && (normed)) { constexpr bool inner = true, norm = true; __VA_ARGS__; }     \
  else if ((s).channel_is_inner) { constexpr bool inner = true, norm = false; __VA_ARGS__; }           \
  else if (normed) { constexpr bool inner = false, norm = true; __VA_ARGS__; }                         \
  else { constexpr bool inner = false, norm = false; __VA_ARGS__; }

std::vector<Tensor> forward(const Tensor& z, const Optional& scale, const Optional& shift, const Optional& shortcut,
                            const Optional& gamma, const Optional& drop, bool relu, const Optionals& channel,
                            const Optionals& spatial, at::TensorList branches, at::IntArrayRef dilations,
                            at::IntArrayRef options, const Tensor& out) {
  const Shape s = shape_of(z);
  const int64_t batch = z.size(0), channels = z.size(1), height = z.size(2), width = z.size(3);
  Tensor squeezes, ca, maps, sa;
  DISPATCH(z, {
    using A = acc_t<scalar_t>;
    Small<scalar_t> of;
    Small<A> net_of;
    const auto channel_of = channel_net<A>(net_of, channel, options);
    const auto spatial_of = spatial_net<A>(net_of, spatial, branches, dilations, options, height, width);
    Forward<scalar_t> f{s,
                        {z.const_data_ptr<scalar_t>(), of.read(scale), of.read(shift)},
                        shortcut ? shortcut->const_data_ptr<scalar_t>() : nullptr,
                        of.read(gamma),
                        of.read(drop),
                        relu,
                        &channel_of,
                        &spatial_of,
                        of.make(squeezes, z, 2 * channels),
                        of.make(ca, z, channels),
                        of.make(maps, z, 2 * height * width),
                        of.make(sa, z, height * width),
                        out.data_ptr<scalar_t>()};
    BOTH_LAYOUTS(s, scale.has_value(), (run_forward<scalar_t, inner, norm>(f)));
  });
  return {squeezes.view({batch, 2, channels}), ca, maps.view({batch, 2, height, width}),
          sa.view({batch, height, width})};
}

template <typename T>
Backward<T> backward_of(Small<T>& of, const Shape& s, const Tensor& g, const Optional& out, const Tensor& z,
                        at::ArrayRef<Optional> norm, const Optional& gamma, at::TensorList small) {
  return {s,
          {z.const_data_ptr<T>(), of.read(norm[0]), of.read(norm[1])},
          of.read(norm[2]),
          g.const_data_ptr<T>(),
          out ? out->const_data_ptr<T>() : nullptr,
          of.read(gamma),
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
    BOTH_LAYOUTS(s, normed, (products_of<scalar_t, inner, norm>(f, rows, equal, partial)));
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
                      at::TensorList small, const Tensor& g_avg, const Tensor& g_max, const Optionals& by_channel) {
  const Shape s = shape_of(z);
  Tensor g_x = at::empty_like(z);
  const auto affine = norm.vec(), given = by_channel.vec();
  DISPATCH(z, {
    Small<scalar_t> of;
    const auto f = backward_of<scalar_t>(of, s, g, std::nullopt, z, affine, gamma, small);
    const ByChannel<acc_t<scalar_t>> by{of.read(given[0]), of.read(given[1]), of.read(given[2]), of.read(given[3]),
                                        of.read(given[4])};
    auto *a = of.read(g_avg), *m = of.read(g_max);
    auto* to = g_x.data_ptr<scalar_t>();
    BOTH_LAYOUTS(s, affine[0].has_value(), (input_gradient_of<scalar_t, inner, norm>(f, a, m, by, to)));
  });
  return g_x;
}

}  // namespace

TORCH_LIBRARY(timm_cbam2_cpu, m) {
  m.def(
      "forward(Tensor z, Tensor? scale, Tensor? shift, Tensor? shortcut, Tensor? gamma, Tensor? drop, bool relu, "
      "Tensor?[] channel, Tensor?[] spatial, Tensor[] branches, int[] dilations, int[] options, Tensor(a!) out)"
      " -> Tensor[]",
      &forward);
  m.def("products(Tensor g, Tensor? out, Tensor z, Tensor?[] norm, Tensor? gamma, Tensor[] small) -> Tensor[]",
        &products);
  m.def("spread(Tensor z, Tensor?[] norm, Tensor[] small, Tensor g_avg, Tensor g_max) -> Tensor", &spread);
  m.def(
      "input_gradient(Tensor g, Tensor z, Tensor?[] norm, Tensor? gamma, Tensor[] small, Tensor g_avg, Tensor g_max, "
      "Tensor?[] by_channel) -> Tensor",
      &input_gradient);
  m.def("convolve(Tensor maps, Tensor kernels) -> Tensor", &convolve);
  m.def("convolve_backward(Tensor g, Tensor maps, Tensor kernels) -> Tensor[]", &convolve_backward);
}
