// The small networks between the readings, forward and backward: what models/small_cbam2.py and
// models/small_backward_cbam2.py do without norms and learned maps, in one call each.

#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>

#include "layout.h"

namespace {

using Optional = std::optional<Tensor>;
using Optionals = c10::List<Optional>;

enum class Gate : int64_t { sigmoid, unit_sigmoid, hard_sigmoid };

// How a mask is made of its logits.
struct Masking {
  Gate gate;
  bool center, learnable;
  double eps;  // of a learnable temperature
};

// Weights in the type of the squeezes; what a layer lacks has none.
class Weights {
 public:
  Weights(const Optionals& given, at::ScalarType type) {
    for (const Optional& t : given.vec()) all_.push_back(t ? t->to(type) : Tensor());
  }
  bool has(size_t at) const { return all_[at].defined(); }
  const Tensor& operator[](size_t at) const { return all_[at]; }
  Tensor matrix(size_t at) const { return all_[at].flatten(1); }

 private:
  std::vector<Tensor> all_;
};

// A layer whose weight is the `at`th and whose bias the next: (n, in) to (n, out).
Tensor dense(const Weights& w, size_t at, const Tensor& x) {
  const Tensor weight = w.matrix(at).t();
  return w.has(at + 1) ? at::addmm(w[at + 1], x, weight) : at::mm(x, weight);
}

// The gradient of x, and those of weight and bias.
Tensor dense_backward(const Weights& w, size_t at, const Tensor& x, const Tensor& g, std::vector<Tensor>& grads) {
  grads[at] = at::mm(g.t(), x).view(w[at].sizes());
  if (w.has(at + 1)) grads[at + 1] = g.sum(0);
  return at::mm(g, w.matrix(at));
}

template <typename A>
A temperature_of(const Weights& w, size_t at, const Masking& m) {
  const A raw = *w[at].template const_data_ptr<A>();
  if (!m.learnable) return raw;
  return (raw > A(20) ? raw : std::log1p(std::exp(raw))) + static_cast<A>(m.eps);
}

// The logits over their temperature, (B, n), of z, which is overwritten, and the mask.
std::pair<Tensor, Tensor> mask_of(Tensor z, const Weights& w, size_t temperature, const Masking& m) {
  if (m.center) z.sub_(z.mean(1, true));
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "cbam2", [&] { z.div_(temperature_of<scalar_t>(w, temperature, m)); });
  if (m.gate == Gate::hard_sigmoid) return {z, at::hardsigmoid(z)};
  Tensor mask = at::sigmoid(z);
  return {z, m.gate == Gate::unit_sigmoid ? mask.mul_(2) : mask};
}

// The gradient of z (B, n), contiguous, and Σ of that of the temperature, from that of the mask (B, n).
template <typename A>
void mask_backward(const Tensor& g, const Tensor& logits, const Tensor& mask, const Masking& m, A temperature,
                   Tensor& g_z, A& g_temperature) {
  const int64_t batch = g.size(0), n = g.size(1);
  const A *given = g.const_data_ptr<A>(), *u = logits.const_data_ptr<A>(), *v = mask.const_data_ptr<A>();
  A* to = g_z.data_ptr<A>();
  std::vector<A> along(batch);
  const A factor = A(1) / temperature, slope = m.gate == Gate::unit_sigmoid ? A(0.5) : A(1);
  at::parallel_for(0, batch, std::max<int64_t>(1, 16384 / n), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      A total = 0, product = 0;
#pragma omp simd reduction(+ : total, product)
      for (int64_t i = b * n; i < (b + 1) * n; ++i) {
        const A rise = m.gate == Gate::hard_sigmoid ? (u[i] > A(-3) && u[i] < A(3) ? A(1) / A(6) : A(0))
                                                    : v[i] * (A(1) - slope * v[i]);
        to[i] = given[i] * factor * rise;
        total += to[i], product += to[i] * u[i];
      }
      along[b] = product;
      if (m.center)
        for (int64_t i = b * n; i < (b + 1) * n; ++i) to[i] -= total / n;
    }
  });
  g_temperature = -std::accumulate(along.begin(), along.end(), A(0));
}

// The same, and the gradient of the stored temperature.
Tensor mask_backward(const Tensor& g, const Tensor& logits, const Tensor& mask, const Weights& w, size_t temperature,
                     const Masking& m, std::vector<Tensor>& grads) {
  Tensor g_z = at::empty(g.sizes(), g.options());
  const Tensor given = g.contiguous();
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "cbam2", [&] {
    scalar_t along;
    mask_backward<scalar_t>(given, logits, mask, m, temperature_of<scalar_t>(w, temperature, m),
                            g_z, along);
    if (!m.learnable) return;
    const scalar_t raw = *w[temperature].const_data_ptr<scalar_t>();
    grads[temperature] = at::empty({1}, g.options());
    *grads[temperature].data_ptr<scalar_t>() =
        along * (raw > scalar_t(20) ? scalar_t(1) : scalar_t(1) / (scalar_t(1) + std::exp(-raw)));
  });
  return g_z;
}

// A router whose layers are the `at`th and the one after: (B, n) to its hidden numbers and its weights.
std::pair<Tensor, Tensor> route(const Weights& w, size_t at, const Tensor& x) {
  Tensor hidden = dense(w, at, x).relu_();
  return {hidden, at::_softmax(dense(w, at + 2, hidden), 1, false)};
}

Tensor route_backward(const Weights& w, size_t at, const Tensor& x, const Tensor& hidden, const Tensor& mix,
                      const Tensor& g, std::vector<Tensor>& grads) {
  const Tensor g_logits = at::_softmax_backward_data(g, mix, 1, g.scalar_type());
  const Tensor g_hidden = at::threshold_backward(dense_backward(w, at + 2, hidden, g_logits, grads), hidden, 0);
  return dense_backward(w, at, x, g_hidden, grads);
}

// What is there of `grads`, each in the type of its weight.
void append(std::vector<Tensor>& to, const std::vector<Tensor>& grads, const Optionals& weights) {
  for (size_t i = 0; i < grads.size(); ++i)
    if (grads[i].defined()) to.push_back(grads[i].to(weights.get(i)->scalar_type()));
}

// Weights of the channel part, in this order.
enum Channel { fc1 = 0, fc2 = 2, fusion = 4, logits_of_mix = 8, channel_temperature = 9, channel_weights };

// squeezes (B, 2, C) to the mask (B, C), and what the backward takes: hidden numbers (2B, R), mix (B, 2), mixed ones
// (B, R), logits over temperature and, of a router, its hidden numbers.
std::vector<Tensor> channel(const Tensor& squeezes, const Optionals& weights, int64_t gate, bool center, bool learnable,
                            double eps) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Masking m{static_cast<Gate>(gate), center, learnable, eps};
  const Weights w(weights, squeezes.scalar_type());
  const int64_t batch = squeezes.size(0), channels = squeezes.size(2);
  const Tensor hidden = dense(w, fc1, squeezes.view({2 * batch, channels})).relu_();
  Tensor mix, of_router;
  const bool is_sum = !w.has(fusion) && !w.has(logits_of_mix);
  if (w.has(fusion)) std::tie(of_router, mix) = route(w, fusion, squeezes.view({batch, 2 * channels}));
  else if (is_sum) mix = at::ones({batch, 2}, squeezes.options());
  else mix = at::_softmax(w[logits_of_mix], 0, false).expand({batch, 2}).contiguous();
  const Tensor mixed = at::bmm(mix.unsqueeze(1), hidden.view({batch, 2, -1})).squeeze(1);
  Tensor z = dense(w, fc2, mixed);
  if (is_sum && w.has(fc2 + 1)) z.add_(w[fc2 + 1]);  // both squeezes carry it
  const auto [logits, mask] = mask_of(z, w, channel_temperature, m);
  std::vector<Tensor> found = {mask, hidden, mix, mixed, logits};
  if (of_router.defined()) found.push_back(of_router);
  return found;
}

// The gradient of squeezes, and those of the weights that there are.
std::vector<Tensor> channel_backward(const Tensor& g, const Tensor& squeezes, const Optionals& weights,
                                     at::TensorList kept, int64_t gate, bool center, bool learnable, double eps) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Masking m{static_cast<Gate>(gate), center, learnable, eps};
  const Weights w(weights, squeezes.scalar_type());
  const int64_t batch = squeezes.size(0), channels = squeezes.size(2);
  const Tensor &mask = kept[0], &hidden = kept[1], &mix = kept[2], &mixed = kept[3], &logits = kept[4];
  std::vector<Tensor> grads(channel_weights);
  const Tensor g_z = mask_backward(g, logits, mask, w, channel_temperature, m, grads);
  const Tensor g_mixed = dense_backward(w, fc2, mixed, g_z, grads);
  const bool is_sum = !w.has(fusion) && !w.has(logits_of_mix);
  if (is_sum && w.has(fc2 + 1)) grads[fc2 + 1].mul_(2);
  const Tensor g_both = at::bmm(mix.unsqueeze(2), g_mixed.unsqueeze(1)).view(hidden.sizes());
  const Tensor g_hidden = at::threshold_backward(g_both, hidden, 0);
  Tensor g_squeezes = dense_backward(w, fc1, squeezes.view({2 * batch, channels}), g_hidden, grads).view(squeezes.sizes());
  if (!is_sum) {
    const Tensor g_mix = at::bmm(hidden.view({batch, 2, -1}), g_mixed.unsqueeze(2)).squeeze(2);
    if (w.has(fusion))
      g_squeezes.add_(route_backward(w, fusion, squeezes.view({batch, 2 * channels}), kept[5], mix, g_mix, grads)
                          .view(squeezes.sizes()));
    else grads[logits_of_mix] = at::_softmax_backward_data(g_mix.sum(0), mix[0], 0, g.scalar_type());
  }
  std::vector<Tensor> found = {g_squeezes};
  append(found, grads, weights);
  return found;
}

}  // namespace
