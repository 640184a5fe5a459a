// Steps of the small networks as loops over rows of numbers, where an operation of torch's takes longer to begin than these
// take to end.

#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/hardsigmoid.h>
#include <ATen/ops/sigmoid.h>

#include "matrices.h"

namespace {

// The mean of x (n,), by sums of few numbers: what is small is not lost in what is large.
template <typename A>
A mean_of(const A* x, int64_t n) {
  double total = 0;
  for (int64_t first = 0; first < n; first += 1024) {
    A sums[lanes] = {};
    in_lanes(std::min<int64_t>(1024, n - first), [&](int64_t i, int64_t l) { sums[l] += x[first + i]; });
    total += sum_of(sums);
  }
  return static_cast<A>(total / n);
}

template <typename A>
void rectify(A* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] < 0 ? A(0) : x[i];
}

// To 0 where `x`, rectified, is.
template <typename A>
void rectify_backward(A* g, const A* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) g[i] = x[i] <= 0 ? A(0) : g[i];
}

template <typename A>
void softmax(A* x, int64_t n) {
  const A most = *std::max_element(x, x + n);
  A total = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i] = std::exp(x[i] - most);
  for (int64_t i = 0; i < n; ++i) x[i] /= total;
}

// The gradient of the logits of y (n,), in place.
template <typename A>
void softmax_backward(A* g, const A* y, int64_t n) {
  A along = 0;
  for (int64_t i = 0; i < n; ++i) along += g[i] * y[i];
  for (int64_t i = 0; i < n; ++i) g[i] = y[i] * (g[i] - along);
}

template <typename A>
A temperature_of(const Weights& w, size_t at, const Masking& m) {
  const A raw = *w.data<A>(at, 1);
  if (!m.learnable) return raw;
  return (raw > A(20) ? raw : std::log1p(std::exp(raw))) + static_cast<A>(m.eps);
}

// What a gate sees of logits (n,), in place.
template <typename A>
void gate_input(A* z, int64_t n, A temperature, const Masking& m) {
  const A mean = m.center ? mean_of(z, n) : A(0);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) z[i] = (z[i] - mean) / temperature;
}

// What gates make of that, in place.
void gate_values(Tensor u, const Masking& m) {
  if (m.gate == Gate::hard_sigmoid) at::hardsigmoid_(u);
  else at::sigmoid_(u);
  if (m.gate == Gate::unit_sigmoid) u.mul_(2);
}

// The gradient of z (n,) from that of its mask, into `to`; gives what that of the temperature is made of.
template <typename A>
A gate_backward(const A* given, const A* u, const A* mask, int64_t n, A temperature, const Masking& m, A* to) {
  const A factor = A(1) / temperature, slope = m.gate == Gate::unit_sigmoid ? A(0.5) : A(1);
  A total = 0, product = 0;
#pragma omp simd reduction(+ : total, product)
  for (int64_t i = 0; i < n; ++i) {
    const A rise = m.gate == Gate::hard_sigmoid ? (u[i] > A(-3) && u[i] < A(3) ? A(1) / A(6) : A(0))
                                                : mask[i] * (A(1) - slope * mask[i]);
    to[i] = given[i] * factor * rise;
    total += to[i], product += to[i] * u[i];
  }
  if (m.center)
    for (int64_t i = 0; i < n; ++i) to[i] -= total / n;
  return product;
}

// BatchNorm of rows of n numbers by running statistics; nothing without one.
template <typename A>
struct Scaling {
  std::vector<A> scale, shift;

  Scaling(const Weights& w, size_t at, const Measure& by, int64_t n) {
    if (!w.has(at)) return;
    TORCH_CHECK(by.mean && by.variance, "cbam2: a norm has no statistics to measure by");
    const Weights measured(Optionals({by.mean, by.variance}), w[at].scalar_type());
    const A *weight = w.data<A>(at, n), *bias = w.data<A>(at + 1, n);
    const A *mean = measured.data<A>(0, n), *variance = measured.data<A>(1, n);
    scale.resize(n), shift.resize(n);
    for (int64_t i = 0; i < n; ++i) {
      scale[i] = weight[i] / std::sqrt(variance[i] + static_cast<A>(by.eps));
      shift[i] = bias[i] - mean[i] * scale[i];
    }
  }
  void apply(A* x) const {
    for (size_t i = 0; i < scale.size(); ++i) x[i] = x[i] * scale[i] + shift[i];
  }
};

}  // namespace
