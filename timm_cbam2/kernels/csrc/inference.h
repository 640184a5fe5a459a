// The whole block while nothing is trained: for a few samples their maps, masks and outputs one after the other, while
// they lie in the cache. Values are those of `block` to rounding.

#pragma once

#include "block.h"

namespace {

// The spatial network with its router, by running statistics.
template <typename A>
class SpatialInference : public SpatialNetwork<A> {
 public:
  SpatialInference(const Block& by, int64_t height, int64_t width)
      : SpatialNetwork<A>(by, height, width), by_(by), places_(height * width),
        norm_(by.spatial, spatial_norm, by.of_spatial.router, this->choices()),
        temperature_(temperature_of<A>(by.spatial, spatial_temperature, by.of_spatial.masking)) {}

  // maps (2, H, W) to what the gate sees (H, W); `padded` is room to work in.
  void gate_input_of(const A* maps, Padded<A>& padded, A* to) const {
    const Weights& w = by_.spatial;
    std::vector<A> hidden(w[spatial_router].size(0)), mix(this->choices()), own(this->kernel_size());
    check_count(w[spatial_router + 2], mix.size() * hidden.size());
    A pooled[4];
    this->pool(maps, pooled);
    layer(w, spatial_router, pooled, 1, by_.maps(), hidden.data());
    rectify(hidden.data(), hidden.size());
    layer(w, spatial_router + 2, hidden.data(), 1, hidden.size(), mix.data());
    norm_.apply(mix.data());
    softmax(mix.data(), mix.size());
    this->logits(maps, mix.data(), padded, own.data(), to);
    gate_input(to, places_, temperature_, by_.of_spatial.masking);
  }

  // That of several samples to their masks, in place.
  void gate(A* masks, int64_t samples) const {
    gate_values(at::from_blob(masks, {samples * places_}, this->kernels().options()), by_.of_spatial.masking);
  }

 private:
  const Block& by_;
  const int64_t places_;
  const Scaling<A> norm_;
  const A temperature_;
};

constexpr int64_t cached = 1 << 18;  // bytes, of samples that are worked on together

// For a few samples at a time their maps, masks and outputs.
template <typename T, bool inner, bool normed, bool has_gamma, bool has_shortcut>
void finish_samples(const Finish<T>& f, const SpatialInference<acc_t<T>>& network, acc_t<T>* maps, acc_t<T>* sa) {
  using A = acc_t<T>;
  const int64_t places = inner ? f.s.outer : f.s.inner, channels = inner ? f.s.inner : f.s.outer;
  const bool together = f.s.parts == 1;  // threads work on samples of their own
  if (!together) reduce<T, inner, normed, true>(f.s, f.x, f.ca, {}, maps);
  at::parallel_for(0, f.s.batch, 1, [&](int64_t begin, int64_t end) {
    Padded<A> padded = network.room();
    const int64_t size = places * channels * sizeof(T), few_samples = std::max<int64_t>(1, cached / size);
    for (int64_t first = begin; first < end; first += few_samples) {
      const int64_t last = std::min(end, first + few_samples);
      for (int64_t b = first; b < last; ++b) {
        A* of = maps + 2 * b * places;
        if (together) reduce_sample<T, inner, normed>(f.s, f.x, f.ca + b * channels, b, of);
        network.gate_input_of(of, padded, sa + b * places);
      }
      network.gate(sa + first * places, last - first);
      for (int64_t b = first; together && b < last; ++b) finish_part<T, inner, normed, has_gamma, has_shortcut>(f, b, 0);
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
  ChannelPass channel;
  channel.squeezes = squeeze(z, scale, shift);
  const auto type = channel.squeezes.scalar_type();
  const Block by(type, weights_c, weights_s, running_c, running_s, numbers, reals, shapes, windows);
  const int64_t height = z.size(2), width = z.size(3);
  const Shape s = shape_of(z);
  DISPATCH(z, {
    using A = acc_t<scalar_t>;
    channel.forward<A>(by.channel, by.of_channel);
    const SpatialInference<A> network(by, height, width);
    Small<scalar_t> of;
    Tensor maps, sa;
    A *at_maps = of.make(maps, z, 2 * height * width), *at_sa = of.make(sa, z, height * width);
    const Finish<scalar_t> f{s,
                             {z.const_data_ptr<scalar_t>(), of.read(scale), of.read(shift)},
                             shortcut ? shortcut->const_data_ptr<scalar_t>() : nullptr,
                             of.read(gamma),
                             of.read(channel.mask),
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
