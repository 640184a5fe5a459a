// The small networks between the readings, forward and backward: what models/small_cbam2.py and
// models/small_backward_cbam2.py do, without learned maps. They are loops: an operation of torch's takes longer to begin
// than most of these to end.

#pragma once

#include <ATen/ops/empty_like.h>

#include "rows.h"

namespace {

// What a BatchNorm made of numbers (B, n), and what its backward takes; `y` is the numbers themselves without one.
struct Normed {
  Tensor y, mean, invstd;
};

// Measures numbers (B, n) by the batch, and lets the running statistics follow.
template <typename A>
void measure(const Measure& by, const A* x, int64_t batch, int64_t n, A* mean, A* invstd) {
  std::vector<A> squares(n);
  std::fill(mean, mean + n, A(0));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < n; ++i) mean[i] += x[b * n + i];
  for (int64_t i = 0; i < n; ++i) mean[i] /= batch;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < n; ++i) squares[i] += (x[b * n + i] - mean[i]) * (x[b * n + i] - mean[i]);
  for (int64_t i = 0; i < n; ++i) invstd[i] = A(1) / std::sqrt(squares[i] / batch + static_cast<A>(by.eps));
  if (!by.mean || !by.variance) return;
  for (const Tensor& t : {*by.mean, *by.variance}) {
    check_count(t, n);
    TORCH_CHECK(t.is_contiguous(), "cbam2: statistics of a norm must be contiguous");
  }
  A *kept = by.mean->template data_ptr<A>(), *variance = by.variance->template data_ptr<A>();
  const A share = static_cast<A>(by.momentum);
  for (int64_t i = 0; i < n; ++i) {
    kept[i] = share * mean[i] + (A(1) - share) * kept[i];
    variance[i] = share * (squares[i] / (batch - 1)) + (A(1) - share) * variance[i];
  }
}

template <typename A>
Normed norm_of(const Weights& w, size_t at, const Measure& by, const Tensor& x) {
  if (!w.has(at)) return {x, Tensor(), Tensor()};
  const int64_t batch = x.size(0), n = x.size(1);
  const A *from = x.const_data_ptr<A>(), *weight = w.data<A>(at, n), *bias = w.data<A>(at + 1, n);
  Normed to{at::empty_like(x), at::empty({n}, x.options()), at::empty({n}, x.options())};
  A *y = to.y.data_ptr<A>(), *mean = to.mean.data_ptr<A>(), *invstd = to.invstd.data_ptr<A>();
  if (by.by_batch) {
    measure(by, from, batch, n, mean, invstd);
  } else {
    TORCH_CHECK(by.mean && by.variance, "cbam2: a norm has no statistics to measure by");
    const Weights measured(Optionals({by.mean, by.variance}), x.scalar_type());
    const A *kept = measured.data<A>(0, n), *variance = measured.data<A>(1, n);
    for (int64_t i = 0; i < n; ++i)
      mean[i] = kept[i], invstd[i] = A(1) / std::sqrt(variance[i] + static_cast<A>(by.eps));
  }
  std::vector<A> scale(n), shift(n);
  for (int64_t i = 0; i < n; ++i) scale[i] = invstd[i] * weight[i], shift[i] = bias[i] - mean[i] * scale[i];
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < n; ++i) y[b * n + i] = from[b * n + i] * scale[i] + shift[i];
  return to;
}

// The gradient of x from that of y.
template <typename A>
Tensor norm_backward(const Weights& w, size_t at, const Measure& by, const Tensor& x, const Normed& normed,
                     const Tensor& g, std::vector<Tensor>& grads) {
  if (!w.has(at)) return g;
  const int64_t batch = x.size(0), n = x.size(1);
  const A *from = x.const_data_ptr<A>(), *given = g.const_data_ptr<A>(), *weight = w.data<A>(at, n);
  const A *mean = normed.mean.const_data_ptr<A>(), *invstd = normed.invstd.const_data_ptr<A>();
  Tensor g_x = at::empty_like(x);
  grads[at] = at::zeros({n}, x.options()), grads[at + 1] = at::zeros({n}, x.options());
  A *to = g_x.data_ptr<A>(), *along = grads[at].template data_ptr<A>(), *total = grads[at + 1].template data_ptr<A>();
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < n; ++i)
      total[i] += given[b * n + i], along[i] += given[b * n + i] * (from[b * n + i] - mean[i]);
  std::vector<A> slope(n), offset(n);
  for (int64_t i = 0; i < n; ++i) {
    along[i] *= invstd[i];
    if (by.by_batch) slope[i] = along[i] * invstd[i] / batch, offset[i] = total[i] / batch;
  }
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < n; ++i)
      to[b * n + i] = (given[b * n + i] - offset[i] - (from[b * n + i] - mean[i]) * slope[i]) * invstd[i] * weight[i];
  return g_x;
}

// The mask (B, n) of logits, which become what the gates saw.
template <typename A>
Tensor mask_of(const Tensor& z, const Weights& w, size_t temperature, const Masking& m) {
  const int64_t n = z.size(1);
  const A warmth = temperature_of<A>(w, temperature, m);
  A* rows = z.data_ptr<A>();
  at::parallel_for(0, z.size(0), std::max<int64_t>(1, few / n), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) gate_input(rows + b * n, n, warmth, m);
  });
  Tensor mask = z.clone();
  gate_values(mask, m);
  return mask;
}

// The gradient of the logits (B, n) and of the stored temperature, from that of the mask.
template <typename A>
Tensor mask_backward(const Tensor& g, const Tensor& seen, const Tensor& mask, const Weights& w, size_t temperature,
                     const Masking& m, std::vector<Tensor>& grads) {
  const int64_t batch = g.size(0), n = g.size(1);
  const Tensor held = g.contiguous();
  const A *given = held.const_data_ptr<A>(), *u = seen.const_data_ptr<A>(), *v = mask.const_data_ptr<A>();
  const A warmth = temperature_of<A>(w, temperature, m);
  Tensor g_z = at::empty({batch, n}, g.options());
  A* to = g_z.data_ptr<A>();
  std::vector<A> along(batch);
  at::parallel_for(0, batch, std::max<int64_t>(1, few / n), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      along[b] = gate_backward(given + b * n, u + b * n, v + b * n, n, warmth, m, to + b * n);
  });
  if (m.learnable) {
    const A raw = *w.data<A>(temperature, 1), total = std::accumulate(along.begin(), along.end(), A(0));
    grads[temperature] = at::empty({1}, g.options());
    *grads[temperature].template data_ptr<A>() = -total * (raw > A(20) ? A(1) : A(1) / (A(1) + std::exp(-raw)));
  }
  return g_z;
}

// What a router gives: weights (B, K), and for its backward hidden numbers, logits before the norm and what that measured.
struct Routed {
  Tensor mix, hidden, logits;
  Normed normed;
};

// A router whose layers are the `at`th and the one after, and whose norm, if any, is the `norm`th, of x (B, n).
template <typename A>
Routed route(const Weights& w, size_t at, size_t norm, const Measure& by, const Tensor& x) {
  Routed r;
  r.hidden = dense<A>(w, at, x);
  rectify(r.hidden.data_ptr<A>(), r.hidden.numel());
  r.logits = dense<A>(w, at + 2, r.hidden);
  r.normed = norm_of<A>(w, norm, by, r.logits);
  r.mix = r.normed.y.clone();
  r.normed.y = Tensor();
  const int64_t choices = r.mix.size(1);
  for (int64_t b = 0; b < r.mix.size(0); ++b) softmax(r.mix.data_ptr<A>() + b * choices, choices);
  return r;
}

// The gradient of x from that of the weights, which is overwritten.
template <typename A>
Tensor route_backward(const Weights& w, size_t at, size_t norm, const Measure& by, const Tensor& x, const Routed& r,
                      const Tensor& g, std::vector<Tensor>& grads) {
  const int64_t choices = g.size(1);
  for (int64_t b = 0; b < g.size(0); ++b)
    softmax_backward(g.data_ptr<A>() + b * choices, r.mix.const_data_ptr<A>() + b * choices, choices);
  const Tensor g_logits = norm_backward<A>(w, norm, by, r.logits, r.normed, g, grads);
  const Tensor g_hidden = dense_backward<A>(w, at + 2, r.hidden, g_logits, grads);
  rectify_backward(g_hidden.data_ptr<A>(), r.hidden.const_data_ptr<A>(), g_hidden.numel());
  return dense_backward<A>(w, at, x, g_hidden, grads);
}

// The channel part of one pass: squeezes (B, 2, C) to the mask (B, C).
struct ChannelPass {
  Tensor squeezes, mask;
  Normed seen;                   // (B, 2C)
  Tensor hidden, mixed, logits;  // (2B, R), (B, R), (B, C), the last as gates see them
  Routed routed;                 // its mix (B, 2) also without a router

  // What the backward takes beside squeezes and mask.
  std::vector<Tensor*> all() {
    return {&seen.y, &seen.mean, &seen.invstd, &hidden, &mixed, &logits, &routed.mix, &routed.hidden, &routed.logits,
            &routed.normed.mean, &routed.normed.invstd};
  }
  Tensor rows() const { return seen.y.view({2 * squeezes.size(0), squeezes.size(2)}); }
  Tensor flat() const { return squeezes.view({squeezes.size(0), 2 * squeezes.size(2)}); }
  static bool is_sum(const Weights& w) { return !w.has(fusion) && !w.has(logits_of_mix); }

  template <typename A>
  void forward(const Weights& w, const Part& by) {
    const int64_t batch = squeezes.size(0);
    seen = norm_of<A>(w, squeezes_norm, by.squeezes, flat());
    hidden = dense<A>(w, fc1, rows());
    rectify(hidden.data_ptr<A>(), hidden.numel());
    if (w.has(fusion)) routed = route<A>(w, fusion, fusion_norm, by.router, seen.y);
    else routed.mix = constant_mix<A>(w, batch);
    mixed = mix_rows<A>(hidden, routed.mix);
    logits = dense<A>(w, fc2, mixed);
    check_count(logits, mask_count());
    if (is_sum(w) && w.has(fc2 + 1)) logits.add_(w[fc2 + 1]);  // both squeezes carry it
    mask = mask_of<A>(logits, w, channel_temperature, by.masking);
  }

  // The gradient of squeezes, and those of the weights, from that of the mask.
  template <typename A>
  Tensor backward(const Tensor& g, const Weights& w, const Part& by, std::vector<Tensor>& grads) const {
    const int64_t batch = squeezes.size(0), reduced = mixed.size(1);
    const Tensor g_z = mask_backward<A>(g, logits, mask, w, channel_temperature, by.masking, grads);
    const Tensor g_mixed = dense_backward<A>(w, fc2, mixed, g_z, grads);
    if (is_sum(w) && w.has(fc2 + 1)) grads[fc2 + 1].mul_(2);
    Tensor g_hidden = at::empty_like(hidden), g_mix = at::zeros({batch, 2}, g.options());
    const A *given = g_mixed.const_data_ptr<A>(), *mix = routed.mix.const_data_ptr<A>();
    const A* h = hidden.const_data_ptr<A>();
    A *to = g_hidden.data_ptr<A>(), *of_mix = g_mix.data_ptr<A>();
    for (int64_t r = 0; r < 2 * batch; ++r)
      for (int64_t i = 0; i < reduced; ++i) {
        const A one = given[r / 2 * reduced + i], value = h[r * reduced + i];
        to[r * reduced + i] = value <= 0 ? A(0) : one * mix[r];
        of_mix[r] += one * value;
      }
    Tensor g_seen = dense_backward<A>(w, fc1, rows(), g_hidden, grads).view(seen.y.sizes());
    if (w.has(fusion))
      g_seen.add_(route_backward<A>(w, fusion, fusion_norm, by.router, seen.y, routed, g_mix, grads));
    else if (!is_sum(w)) {
      grads[logits_of_mix] = g_mix.sum(0);
      softmax_backward(grads[logits_of_mix].template data_ptr<A>(), mix, 2);
    }
    return norm_backward<A>(w, squeezes_norm, by.squeezes, flat(), seen, g_seen, grads);
  }

 private:
  int64_t mask_count() const { return squeezes.numel() / 2; }

  template <typename A>
  static Tensor constant_mix(const Weights& w, int64_t batch) {
    A mix[2] = {1, 1};
    if (!is_sum(w)) std::copy_n(w.data<A>(logits_of_mix, 2), 2, mix), softmax(mix, 2);
    Tensor all = at::empty({batch, 2}, w[fc1].options());
    for (int64_t b = 0; b < batch; ++b) std::copy_n(mix, 2, all.data_ptr<A>() + 2 * b);
    return all;
  }

  // Both rows (2B, R) of each sample, mixed: (B, R).
  template <typename A>
  static Tensor mix_rows(const Tensor& hidden, const Tensor& mix) {
    const int64_t batch = mix.size(0), n = hidden.size(1);
    Tensor mixed = at::empty({batch, n}, hidden.options());
    const A *from = hidden.const_data_ptr<A>(), *by = mix.const_data_ptr<A>();
    A* to = mixed.data_ptr<A>();
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < n; ++i)
        to[b * n + i] = by[2 * b] * from[2 * b * n + i] + by[2 * b + 1] * from[(2 * b + 1) * n + i];
    return mixed;
  }
};

// What a pass through a part keeps for its backward, as a list of tensors, those that are not there without elements.
template <typename Pass>
void keep(Pass& pass, std::vector<Tensor>& to) {
  for (Tensor* t : pass.all()) to.push_back(t->defined() ? *t : at::empty({0}, pass.mask.options()));
}

template <typename Pass>
void take(Pass& pass, at::TensorList from) {
  const auto all = pass.all();
  for (size_t i = 0; i < all.size(); ++i)
    if (from[i].numel()) *all[i] = from[i];
}

}  // namespace
