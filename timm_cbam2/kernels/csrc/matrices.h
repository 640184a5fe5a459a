// Layers of few rows of numbers, forward and backward: a loop reads each weight once for several of them, where a matrix
// product of torch's packs it first.

#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "given.h"

namespace {

constexpr int64_t few_rows = 64;  // beyond which torch's products serve
constexpr int64_t few = 16384;    // products that one thread does before another one has begun
constexpr size_t at_once = 8;     // so many sums stay in registers

// body(first, number of them as a constant) for all of n, `most` at a time while there are so many.
template <size_t most, typename F>
void in_groups(int64_t n, F body) {
  int64_t i = 0;
  for (; i + static_cast<int64_t>(most) <= n; i += most) body(i, std::integral_constant<size_t, most>());
  for (; i < n; ++i) body(i, std::integral_constant<size_t, 1>());
}

// to (rows, out) of x (rows, n) through weight (out, n), plus a bias if there is one.
template <typename A>
void through(const A* x, const A* weight, const A* bias, int64_t rows, int64_t n, int64_t out, A* to) {
  at::parallel_for(0, out, std::max<int64_t>(1, few / (rows * n)), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      in_groups<at_once>(rows, [&](int64_t r, auto group) {
        A sums[group][lanes] = {};
        in_lanes(n, [&](int64_t i, int64_t l) {
          const A one = weight[o * n + i];
          unrolled<group>([&](size_t k) { sums[k][l] += one * x[(r + k) * n + i]; });
        });
        for (size_t k = 0; k < group; ++k) to[(r + k) * out + o] = sum_of(sums[k]) + (bias ? bias[o] : A(0));
      });
  });
}

// to (count, n): its pth row is the sum of those of m (terms, n), the qth times c[p·over + q·along].
template <typename A>
void combine(const A* c, int64_t over, int64_t along, const A* m, int64_t count, int64_t terms, int64_t n, A* to) {
  const int64_t across = (n + lanes - 1) / lanes, down = (count + at_once - 1) / at_once;
  at::parallel_for(0, across * down, std::max<int64_t>(1, few / (terms * at_once * lanes)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / down * lanes, p = task % down * at_once;
      in_groups<lanes>(std::min(lanes, n - i), [&](int64_t column, auto width) {
        in_groups<at_once>(std::min<int64_t>(at_once, count - p), [&](int64_t row, auto group) {
          constexpr size_t wide = decltype(width)::value;
          A sums[group][wide] = {};
          for (int64_t q = 0; q < terms; ++q) {
            const A* from = m + q * n + i + column;
            unrolled<group>([&](size_t k) {
              const A share = c[(p + row + k) * over + q * along];
#pragma omp simd
              for (size_t l = 0; l < wide; ++l) sums[k][l] += share * from[l];
            });
          }
          for (size_t k = 0; k < group; ++k)
            std::copy(sums[k], sums[k] + wide, to + (p + row + k) * n + i + column);
        });
      });
    }
  });
}

// Rows (rows, n) through a layer, the `at`th, whose bias is the next.
template <typename A>
void layer(const Weights& w, size_t at, const A* x, int64_t rows, int64_t n, A* to) {
  const int64_t out = w[at].size(0);
  through(x, w.data<A>(at, out * n), w.has(at + 1) ? w.data<A>(at + 1, out) : nullptr, rows, n, out, to);
}

// The same, by torch where there are many of them.
template <typename A>
Tensor dense(const Weights& w, size_t at, const Tensor& x) {
  const int64_t rows = x.size(0), n = x.size(1), out = w[at].size(0);
  if (rows > few_rows && rows * n * out > few) {
    const Tensor turned = w.matrix(at).t();
    return w.has(at + 1) ? at::addmm(w[at + 1], x, turned) : at::mm(x, turned);
  }
  Tensor y = at::empty({rows, out}, x.options());
  layer(w, at, x.const_data_ptr<A>(), rows, n, y.data_ptr<A>());
  return y;
}

// The gradient of x, and those of weight and bias.
template <typename A>
Tensor dense_backward(const Weights& w, size_t at, const Tensor& x, const Tensor& g, std::vector<Tensor>& grads) {
  const int64_t rows = x.size(0), n = x.size(1), out = g.size(1);
  const A* given = g.const_data_ptr<A>();
  if (w.has(at + 1)) {
    grads[at + 1] = at::zeros({out}, g.options());
    A* bias = grads[at + 1].template data_ptr<A>();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t o = 0; o < out; ++o) bias[o] += given[r * out + o];
  }
  if (rows > few_rows && rows * n * out > few) {
    grads[at] = at::mm(g.t(), x).view(w[at].sizes());
    return at::mm(g, w.matrix(at));
  }
  Tensor g_x = at::empty({rows, n}, x.options());
  grads[at] = at::empty(w[at].sizes(), x.options());
  combine(given, out, 1, w.data<A>(at, out * n), rows, out, n, g_x.data_ptr<A>());
  combine(given, 1, out, x.const_data_ptr<A>(), out, rows, n, grads[at].template data_ptr<A>());
  return g_x;
}

}  // namespace
