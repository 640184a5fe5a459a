// The small networks between the readings, forward and backward: what models/small_cbam2.py and
// models/small_backward_cbam2.py do, without learned maps.

#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/threshold_backward.h>

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
    for (const Optional& t : given.vec()) {
      TORCH_CHECK(!t || t->is_cpu(), "cbam2: the block's weights must lie where its input does, on the CPU");
      all_.push_back(t ? t->to(type).contiguous() : Tensor());
    }
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

// How a BatchNorm of decisions measures: by the batch, or by these statistics.
struct Measure {
  Optional mean, variance;
  bool by_batch;
  double momentum, eps;
};

// How a part of the block is computed, beside its weights.
struct Part {
  Masking masking;
  Measure router, squeezes;  // of the norms, where there are any
};

enum OfPart { gate, center, learnable, router_by_batch, squeezes_by_batch, numbers_of_part };
enum RealOfPart { temperature_eps, router_momentum, router_eps, squeezes_momentum, squeezes_eps, reals_of_part };

// `running`: mean and variance of the router's norm, then of the squeezes'. `which`: 0 for the channel part, 1 for the
// spatial one, whose numbers follow.
Part part_of(const Optionals& running, at::IntArrayRef numbers, at::ArrayRef<double> reals, int64_t which) {
  const auto n = numbers.slice(which * numbers_of_part, numbers_of_part);
  const auto r = reals.slice(which * reals_of_part, reals_of_part);
  return {{static_cast<Gate>(n[gate]), n[center] != 0, n[learnable] != 0, r[temperature_eps]},
          {running.get(0), running.get(1), n[router_by_batch] != 0, r[router_momentum], r[router_eps]},
          {running.get(2), running.get(3), n[squeezes_by_batch] != 0, r[squeezes_momentum], r[squeezes_eps]}};
}

// What a BatchNorm made of numbers (B, n), and what its backward takes; `x` itself without one.
struct Normed {
  Tensor y, mean, invstd;
};

Normed norm_of(const Weights& w, size_t at, const Measure& by, const Tensor& x) {
  if (!w.has(at)) return {x, Tensor(), Tensor()};
  auto [y, mean, invstd] =
      at::native_batch_norm(x, w[at], w[at + 1], by.mean, by.variance, by.by_batch, by.momentum, by.eps);
  return {y, mean, invstd};
}

// The gradient of x from that of y.
Tensor norm_backward(const Weights& w, size_t at, const Measure& by, const Tensor& x, const Tensor& mean,
                     const Tensor& invstd, const Tensor& g, std::vector<Tensor>& grads) {
  if (!w.has(at)) return g;
  Tensor g_x;
  std::tie(g_x, grads[at], grads[at + 1]) = at::native_batch_norm_backward(
      g.contiguous(), x, w[at], by.mean, by.variance, mean, invstd, by.by_batch, by.eps, {true, true, true});
  return g_x;
}

// What a router gives: weights (B, K), and for its backward hidden numbers, logits before the norm and what that measured.
struct Routed {
  Tensor mix, hidden, logits, mean, invstd;
};

// A router whose layers are the `at`th and the one after, and whose norm, if any, is the `norm`th, of x (B, n).
Routed route(const Weights& w, size_t at, size_t norm, const Measure& by, const Tensor& x) {
  Routed r;
  r.hidden = dense(w, at, x).relu_();
  r.logits = dense(w, at + 2, r.hidden);
  const Normed normed = norm_of(w, norm, by, r.logits);
  r.mean = normed.mean, r.invstd = normed.invstd;
  r.mix = at::_softmax(normed.y, 1, false);
  return r;
}

// The gradient of x from that of the weights.
Tensor route_backward(const Weights& w, size_t at, size_t norm, const Measure& by, const Tensor& x, const Routed& r,
                      const Tensor& g, std::vector<Tensor>& grads) {
  const Tensor g_normed = at::_softmax_backward_data(g, r.mix, 1, g.scalar_type());
  const Tensor g_logits = norm_backward(w, norm, by, r.logits, r.mean, r.invstd, g_normed, grads);
  const Tensor g_hidden = at::threshold_backward(dense_backward(w, at + 2, r.hidden, g_logits, grads), r.hidden, 0);
  return dense_backward(w, at, x, g_hidden, grads);
}

// What a pass through a part keeps for its backward, as a list of tensors, those that are not there without elements.
template <typename Pass>
void keep(Pass& pass, std::vector<Tensor>& to) {
  for (Tensor* t : pass.all()) to.push_back(t->defined() ? *t : at::empty({0}, pass.mask.options()));
}

template <typename Pass>
Pass kept(at::TensorList from) {
  Pass pass;
  const auto all = pass.all();
  for (size_t i = 0; i < all.size(); ++i)
    if (from[i].numel()) *all[i] = from[i];
  return pass;
}

// Weights of the channel part, in this order.
enum Channel { fc1 = 0, fc2 = 2, fusion = 4, fusion_norm = 8, logits_of_mix = 10, channel_temperature, squeezes_norm };

// The channel part of one pass: squeezes (B, 2, C) to the mask (B, C).
struct ChannelPass {
  Tensor squeezes;
  Normed seen;                          // (B, 2C)
  Tensor hidden, mixed, logits, mask;   // (2B, R), (B, R), (B, C)
  Routed routed;                        // its mix (B, 2) also without a router

  std::vector<Tensor*> all() {
    return {&squeezes, &seen.y, &seen.mean, &seen.invstd, &hidden, &mixed, &logits, &mask,
            &routed.mix, &routed.hidden, &routed.logits, &routed.mean, &routed.invstd};
  }
  Tensor rows() const { return seen.y.view({2 * squeezes.size(0), squeezes.size(2)}); }
  static bool is_sum(const Weights& w) { return !w.has(fusion) && !w.has(logits_of_mix); }

  void forward(const Tensor& given, const Weights& w, const Part& by) {
    squeezes = given;
    const int64_t batch = squeezes.size(0);
    seen = norm_of(w, squeezes_norm, by.squeezes, squeezes.flatten(1));
    hidden = dense(w, fc1, rows()).relu_();
    if (w.has(fusion)) routed = route(w, fusion, fusion_norm, by.router, seen.y);
    else if (is_sum(w)) routed.mix = at::ones({batch, 2}, squeezes.options());
    else routed.mix = at::_softmax(w[logits_of_mix], 0, false).expand({batch, 2}).contiguous();
    mixed = at::bmm(routed.mix.unsqueeze(1), hidden.view({batch, 2, -1})).squeeze(1);
    Tensor z = dense(w, fc2, mixed);
    if (is_sum(w) && w.has(fc2 + 1)) z.add_(w[fc2 + 1]);  // both squeezes carry it
    std::tie(logits, mask) = mask_of(z, w, channel_temperature, by.masking);
  }

  // The gradient of squeezes, and those of the weights, from that of the mask.
  Tensor backward(const Tensor& g, const Weights& w, const Part& by, std::vector<Tensor>& grads) const {
    const int64_t batch = squeezes.size(0);
    const Tensor g_z = mask_backward(g, logits, mask, w, channel_temperature, by.masking, grads);
    const Tensor g_mixed = dense_backward(w, fc2, mixed, g_z, grads);
    if (is_sum(w) && w.has(fc2 + 1)) grads[fc2 + 1].mul_(2);
    const Tensor g_both = at::bmm(routed.mix.unsqueeze(2), g_mixed.unsqueeze(1)).view(hidden.sizes());
    const Tensor g_hidden = at::threshold_backward(g_both, hidden, 0);
    Tensor g_seen = dense_backward(w, fc1, rows(), g_hidden, grads).view(seen.y.sizes());
    if (!is_sum(w)) {
      const Tensor g_mix = at::bmm(hidden.view({batch, 2, -1}), g_mixed.unsqueeze(2)).squeeze(2);
      if (w.has(fusion)) g_seen.add_(route_backward(w, fusion, fusion_norm, by.router, seen.y, routed, g_mix, grads));
      else grads[logits_of_mix] = at::_softmax_backward_data(g_mix.sum(0), routed.mix[0], 0, g.scalar_type());
    }
    return norm_backward(w, squeezes_norm, by.squeezes, squeezes.flatten(1), seen.mean, seen.invstd, g_seen, grads);
  }
};

}  // namespace
