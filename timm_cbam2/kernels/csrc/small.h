// The small networks of one sample, from its squeezes to its masks; the formulas are those of models/small_cbam2.py.

#pragma once

#include <cmath>
#include <vector>

#include "convolution.h"
#include "layout.h"

namespace {

enum Gate { sigmoid = 0, hard_sigmoid = 1, unit_sigmoid = 2 };

template <typename A>
inline A gated(A z, int64_t gate) {
  if (gate == hard_sigmoid) return std::min(std::max(z + A(3), A(0)), A(6)) / A(6);
  const A s = A(1) / (A(1) + std::exp(-z));
  return gate == unit_sigmoid ? A(2) * s : s;
}

// Gates z / temperature in place, after taking the mean off if it is asked for.
template <typename A>
void gate_all(A* z, int64_t n, A temperature, int64_t gate, bool center) {
  if (center) {
    A mean = 0;
    for (int64_t i = 0; i < n; ++i) mean += z[i];
    mean /= n;
    for (int64_t i = 0; i < n; ++i) z[i] -= mean;
  }
  for (int64_t i = 0; i < n; ++i) z[i] = gated(z[i] / temperature, gate);
}

template <typename A>
void softmax(A* z, int64_t n) {
  const A most = *std::max_element(z, z + n);
  A total = 0;
  for (int64_t i = 0; i < n; ++i) total += z[i] = std::exp(z[i] - most);
  for (int64_t i = 0; i < n; ++i) z[i] /= total;
}

// A matrix (out, in) and perhaps a bias.
template <typename A>
struct Dense {
  const A *weight = nullptr, *bias = nullptr;
  int64_t out = 0, in = 0;

  void operator()(const A* x, A* y) const {
    int64_t o = 0;
    for (; o + 4 <= out; o += 4) {  // four at a time: one alone would wait for its own sums
      const A *a = weight + o * in, *b = a + in, *c = b + in, *d = c + in;
      A s = 0, t = 0, u = 0, v = 0;
#pragma omp simd reduction(+ : s, t, u, v)
      for (int64_t i = 0; i < in; ++i) s += x[i] * a[i], t += x[i] * b[i], u += x[i] * c[i], v += x[i] * d[i];
      y[o] = s, y[o + 1] = t, y[o + 2] = u, y[o + 3] = v;
    }
    for (; o < out; ++o) {
      const A* a = weight + o * in;
      A s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t i = 0; i < in; ++i) s += x[i] * a[i];
      y[o] = s;
    }
    if (bias)
      for (int64_t i = 0; i < out; ++i) y[i] += bias[i];
  }
};

template <typename A>
struct Router {
  Dense<A> fc1, fc2;
  // The weights of the choices.
  void operator()(const A* x, A* weights) const {
    std::vector<A> hidden(fc1.out);
    fc1(x, hidden.data());
    for (A& h : hidden) h = std::max(h, A(0));
    fc2(hidden.data(), weights);
    softmax(weights, fc2.out);
  }
};

template <typename A>
struct ChannelNet {
  Dense<A> fc1, fc2;
  Router<A> router;       // of fusion="router"
  A mix[2] = {1, 1};      // of the others
  A bias_scale = 1;       // fusion="sum": both squeezes carry the bias of fc2
  bool routes = false, center = false;
  A temperature = 1;
  int64_t gate = sigmoid;

  // squeezes (2, C) to ca (C)
  void operator()(const A* squeezes, A* ca) const {
    const int64_t channels = fc1.in, n = fc1.out;
    std::vector<A> hidden(2 * n);
    A weights[2] = {mix[0], mix[1]};
    if (routes) router(squeezes, weights);
    for (int k = 0; k < 2; ++k) fc1(squeezes + k * channels, hidden.data() + k * n);
    for (int64_t i = 0; i < n; ++i)
      hidden[i] = weights[0] * std::max(hidden[i], A(0)) + weights[1] * std::max(hidden[n + i], A(0));
    fc2(hidden.data(), ca);
    if (fc2.bias && bias_scale != 1)
      for (int64_t c = 0; c < channels; ++c) ca[c] += fc2.bias[c];
    gate_all(ca, channels, temperature, gate, center);
  }
};

// Coordinates in [-1, 1] and ones, both with `margin` zeros around.
template <typename A>
struct Axis {
  std::vector<A> at, inside;
  Axis(int64_t count, int64_t margin) : at(count + 2 * margin), inside(count + 2 * margin) {
    for (int64_t i = 0; i < count; ++i) {
      at[margin + i] = A(2 * i - (count - 1)) / A(std::max<int64_t>(count - 1, 1));
      inside[margin + i] = 1;
    }
  }
};

template <typename A>
struct SpatialNet {
  Router<A> router;
  std::vector<A> kernels;  // (K, S, f, f)
  int64_t maps = 4, taps = 1, height, width;
  bool coords = true, moments = false, center = false;
  A temperature = 1;
  int64_t gate = sigmoid;
  Axis<A> across{0, 0}, down{0, 0};

  // the two maps (2, H, W) of a sample to sa (H, W)
  void operator()(const A* seen, A* sa) const {
    const int64_t places = height * width, size = maps * taps * taps, choices = router.fc2.out;
    std::vector<A> pooled(maps), weights(choices), kernel(size);
    pool(seen, pooled.data());
    router(pooled.data(), weights.data());
    for (int64_t k = 0; k < choices; ++k)
      for (int64_t i = 0; i < size; ++i) kernel[i] += weights[k] * kernels[k * size + i];
    std::fill(sa, sa + places, A(0));
    Padded<A> padded(height, width, taps);
    for (int64_t m = 0; m < 2; ++m)
      convolve_map(padded.fill(seen + m * places), padded.stride, kernel.data() + m * taps * taps, height, width, taps,
                   false, sa);
    if (coords) add_coordinates(kernel.data() + 2 * taps * taps, sa);
    gate_all(sa, places, temperature, gate, center);
  }

 private:
  void pool(const A* seen, A* pooled) const {
    const int64_t places = height * width, margin = taps / 2;
    for (int64_t m = 0; m < 2; ++m) {
      A total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < places; ++i) total += seen[m * places + i];
      pooled[m] = total / places;
    }
    if (!moments) return;
    A x = 0, y = 0;
    for (int64_t h = 0; h < height; ++h)
      for (int64_t w = 0; w < width; ++w) {
        x += seen[h * width + w] * across.at[margin + w];
        y += seen[h * width + w] * down.at[margin + h];
      }
    pooled[2] = x / places, pooled[3] = y / places;
  }

  // X and Y depend on one axis each: the kernels (2, f, f) are summed along the other, then convolved along it.
  void add_coordinates(const A* kernel, A* sa) const {
    std::vector<A> of_x(taps), of_y(taps);
    for (int64_t h = 0; h < height; ++h) {
      std::fill(of_x.begin(), of_x.end(), A(0)), std::fill(of_y.begin(), of_y.end(), A(0));
      for (int64_t i = 0; i < taps; ++i)
        for (int64_t j = 0; j < taps; ++j) {
          of_x[j] += down.inside[h + i] * kernel[i * taps + j];
          of_y[j] += down.at[h + i] * kernel[(taps + i) * taps + j];
        }
      for (int64_t j = 0; j < taps; ++j) {
        const A *x = across.at.data() + j, *one = across.inside.data() + j, kx = of_x[j], ky = of_y[j];
#pragma omp simd
        for (int64_t w = 0; w < width; ++w) sa[h * width + w] += kx * x[w] + ky * one[w];
      }
    }
  }
};

}  // namespace
