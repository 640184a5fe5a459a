// The small networks between the readings, forward and backward: what models/small_cbam2.py and
// models/small_backward_cbam2.py do without norms of squeezes and learned maps, in one call each.

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
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
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

// How a BatchNorm of a router's logits measures: by the batch, or by these statistics.
struct Measure {
  Optional mean, variance;
  bool by_batch;
  double momentum, eps;
};

Measure measure_of(const Optionals& running, bool by_batch, double momentum, double eps) {
  if (running.empty()) return {std::nullopt, std::nullopt, by_batch, momentum, eps};
  return {running.get(0), running.get(1), by_batch, momentum, eps};
}

// What a router gives: weights (B, K), hidden numbers and, with a norm, logits before it and what it measured.
struct Routed {
  Tensor mix, hidden, logits, mean, invstd;
  void append_to(std::vector<Tensor>& kept) const {
    kept.push_back(hidden);
    if (logits.defined()) kept.insert(kept.end(), {logits, mean, invstd});
  }
  static Routed of(const Tensor& mix, at::TensorList kept) {
    if (kept.size() == 1) return {mix, kept[0]};
    return {mix, kept[0], kept[1], kept[2], kept[3]};
  }
};

// A router whose layers are the `at`th and the one after, and whose norm, if any, is the `norm`th, of x (B, n).
Routed route(const Weights& w, size_t at, size_t norm, const Measure& by, const Tensor& x) {
  Routed r;
  r.hidden = dense(w, at, x).relu_();
  Tensor z = dense(w, at + 2, r.hidden);
  if (w.has(norm)) {
    r.logits = z;
    std::tie(z, r.mean, r.invstd) = at::native_batch_norm(z, w[norm], w[norm + 1], by.mean, by.variance, by.by_batch,
                                                          by.momentum, by.eps);
  }
  r.mix = at::_softmax(z, 1, false);
  return r;
}

// The gradient of x from that of the weights.
Tensor route_backward(const Weights& w, size_t at, size_t norm, const Measure& by, const Tensor& x, const Routed& r,
                      const Tensor& g, std::vector<Tensor>& grads) {
  Tensor g_logits = at::_softmax_backward_data(g, r.mix, 1, g.scalar_type());
  if (r.logits.defined())
    std::tie(g_logits, grads[norm], grads[norm + 1]) = at::native_batch_norm_backward(
        g_logits, r.logits, w[norm], by.mean, by.variance, r.mean, r.invstd, by.by_batch, by.eps, {true, true, true});
  const Tensor g_hidden = at::threshold_backward(dense_backward(w, at + 2, r.hidden, g_logits, grads), r.hidden, 0);
  return dense_backward(w, at, x, g_hidden, grads);
}

// What is there of `grads`, each in the type of its weight.
void append(std::vector<Tensor>& to, const std::vector<Tensor>& grads, const Optionals& weights) {
  for (size_t i = 0; i < grads.size(); ++i)
    if (grads[i].defined()) to.push_back(grads[i].to(weights.get(i)->scalar_type()));
}

// Weights of the channel part, in this order.
enum Channel { fc1 = 0, fc2 = 2, fusion = 4, fusion_norm = 8, logits_of_mix = 10, channel_temperature, channel_weights };

// squeezes (B, 2, C) to the mask (B, C), and what the backward takes: hidden numbers (2B, R), mix (B, 2), mixed ones
// (B, R), logits over temperature and what a router keeps. `running`: the statistics of its norm, or nothing.
std::vector<Tensor> channel(const Tensor& squeezes, const Optionals& weights, const Optionals& running, bool by_batch,
                            double momentum, double norm_eps, int64_t gate, bool center, bool learnable, double eps) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Masking m{static_cast<Gate>(gate), center, learnable, eps};
  const Weights w(weights, squeezes.scalar_type());
  const int64_t batch = squeezes.size(0), channels = squeezes.size(2);
  const Tensor hidden = dense(w, fc1, squeezes.view({2 * batch, channels})).relu_();
  const Measure by = measure_of(running, by_batch, momentum, norm_eps);
  Tensor mix;
  Routed routed;
  const bool is_sum = !w.has(fusion) && !w.has(logits_of_mix);
  if (w.has(fusion))
    routed = route(w, fusion, fusion_norm, by, squeezes.view({batch, 2 * channels})), mix = routed.mix;
  else if (is_sum) mix = at::ones({batch, 2}, squeezes.options());
  else mix = at::_softmax(w[logits_of_mix], 0, false).expand({batch, 2}).contiguous();
  const Tensor mixed = at::bmm(mix.unsqueeze(1), hidden.view({batch, 2, -1})).squeeze(1);
  Tensor z = dense(w, fc2, mixed);
  if (is_sum && w.has(fc2 + 1)) z.add_(w[fc2 + 1]);  // both squeezes carry it
  const auto [logits, mask] = mask_of(z, w, channel_temperature, m);
  std::vector<Tensor> found = {mask, hidden, mix, mixed, logits};
  if (routed.mix.defined()) routed.append_to(found);
  return found;
}

// The gradient of squeezes, and those of the weights that there are.
std::vector<Tensor> channel_backward(const Tensor& g, const Tensor& squeezes, const Optionals& weights,
                                     at::TensorList kept, const Optionals& running, bool by_batch, double norm_eps,
                                     int64_t gate, bool center, bool learnable, double eps) {
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
      g_squeezes.add_(route_backward(w, fusion, fusion_norm, measure_of(running, by_batch, 0, norm_eps),
                                     squeezes.view({batch, 2 * channels}), Routed::of(mix, kept.slice(5)), g_mix, grads)
                          .view(squeezes.sizes()));
    else grads[logits_of_mix] = at::_softmax_backward_data(g_mix.sum(0), mix[0], 0, g.scalar_type());
  }
  std::vector<Tensor> found = {g_squeezes};
  append(found, grads, weights);
  return found;
}

}  // namespace
