// The full-size passes of CBAM2 on a CPU, each reading its tensors once; see passes_cbam2.py for the formulas.
//
// A sample is a matrix of `outer` rows and `inner` columns, whatever the memory format: in channels_last a row is a
// position and a column a channel, in the contiguous format the other way round. So each pass is written once, for a
// weight by row and a weight by column, and gives sums by row and sums by column.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <vector>

#include "convolution.h"

namespace {

using at::Tensor;

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
inline void store(T* to, acc_t<T> value) {
  *to = static_cast<T>(value);
}

// As c10 rounds, to nearest even, but without a branch, so that compilers vectorise it.
inline void store(at::BFloat16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->x = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

struct Shape {
  int64_t batch, outer, inner, parts;  // parts: into how many the rows of a sample are divided among threads
  bool channel_is_inner;
  int64_t first(int64_t part) const { return outer * part / parts; }
};

Shape shape_of(const Tensor& x) {
  const bool last = x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
  TORCH_CHECK(last || x.is_contiguous(), "cbam2: x must be contiguous or channels_last");
  const int64_t places = x.size(2) * x.size(3), threads = at::get_num_threads();
  const int64_t outer = last ? places : x.size(1), inner = last ? x.size(1) : places;
  const int64_t parts = x.size(0) % threads == 0 ? 1 : std::max<int64_t>(1, std::min(threads, outer));
  return {x.size(0), outer, inner, parts, last};
}

template <typename F>
void for_rows(const Shape& s, F body) {  // body(sample, part, first row, end row)
  at::parallel_for(0, s.batch * s.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.parts, part = task % s.parts;
      body(b, part, s.first(part), s.first(part + 1));
    }
  });
}

// Sums by column that each part of a sample collects for itself, `kinds` of them side by side.
template <typename A>
class Partial {
 public:
  Partial(const Shape& s, int64_t kinds) : s_(s), kinds_(kinds), all_(kinds * s.batch * s.parts * s.inner) {}
  A* at(int64_t b, int64_t part) { return all_.data() + kinds_ * (b * s_.parts + part) * s_.inner; }
  void add_into(int64_t kind, A* sums) {
    combine(kind, sums, [](A one, A other) { return one + other; });
  }
  template <typename F>
  void combine(int64_t kind, A* results, F join) {
    for (int64_t b = 0; b < s_.batch; ++b)
      for (int64_t part = 0; part < s_.parts; ++part) {
        const A* from = at(b, part) + kind * s_.inner;
        A* to = results + b * s_.inner;
        for (int64_t i = 0; i < s_.inner; ++i) to[i] = part ? join(to[i], from[i]) : from[i];
      }
  }

 private:
  const Shape s_;
  const int64_t kinds_;
  std::vector<A> all_;
};

// Small tensors (B, n) in the type that sums are made in.
template <typename T>
class Small {
 public:
  const acc_t<T>* read(const Tensor& t) {
    kept_.push_back(t.to(type).contiguous());
    return kept_.back().template const_data_ptr<acc_t<T>>();
  }
  acc_t<T>* make(Tensor& out, const Tensor& x, int64_t count) {
    out = at::empty({x.size(0), count}, x.options().dtype(type));
    return out.template data_ptr<acc_t<T>>();
  }

 private:
  static constexpr auto type = c10::CppTypeToScalarType<acc_t<T>>::value;
  std::vector<Tensor> kept_;  // alive as long as their pointers are used
};

#define DISPATCH(x, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "cbam2", [&] { __VA_ARGS__; })

// The sum and the maximum of x·scale by row, or by column. The scale is by channel, null for none.
template <typename T, bool scaled, bool channel_is_inner>
void reduce_rows(const T* x, const acc_t<T>* scale, const Shape& s, acc_t<T>* sums, acc_t<T>* largest) {
  using A = acc_t<T>;
  const int64_t n = s.inner;
  for_rows(s, [&](int64_t b, int64_t, int64_t from, int64_t to) {
    for (int64_t o = from; o < to; ++o) {
      const T* row = x + (b * s.outer + o) * n;
      const A* w = scaled && channel_is_inner ? scale + b * n : nullptr;
      const A wo = scaled && !channel_is_inner ? scale[b * s.outer + o] : A(1);
      A total = 0, most = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(+ : total) reduction(max : most)
      for (int64_t i = 0; i < n; ++i) {
        const A v = static_cast<A>(row[i]) * (scaled && channel_is_inner ? w[i] : wo);
        total += v;
        most = v > most ? v : most;
      }
      sums[b * s.outer + o] = total;
      largest[b * s.outer + o] = most;
    }
  });
}

template <typename T, bool scaled, bool channel_is_inner>
void reduce_columns(const T* x, const acc_t<T>* scale, const Shape& s, acc_t<T>* sums, acc_t<T>* largest) {
  using A = acc_t<T>;
  const int64_t n = s.inner;
  Partial<A> partial(s, 2);
  for_rows(s, [&](int64_t b, int64_t part, int64_t from, int64_t to) {
    A *sum = partial.at(b, part), *top = sum + n;
    std::fill(top, top + n, -std::numeric_limits<A>::infinity());
    const A* w = scaled && channel_is_inner ? scale + b * n : nullptr;
    for (int64_t o = from; o < to; ++o) {
      const T* row = x + (b * s.outer + o) * n;
      const A wo = scaled && !channel_is_inner ? scale[b * s.outer + o] : A(1);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const A v = static_cast<A>(row[i]) * (scaled && channel_is_inner ? w[i] : wo);
        sum[i] += v;
        top[i] = v > top[i] ? v : top[i];
      }
    }
  });
  partial.add_into(0, sums);
  partial.combine(1, largest, [](A one, A other) { return std::max(one, other); });
}

// Mean and maximum over positions, (B, C) each.
std::vector<Tensor> squeeze(const Tensor& x) {
  const Shape s = shape_of(x);
  Tensor mean, largest;
  DISPATCH(x, {
    Small<scalar_t> of;
    auto *sums = of.make(mean, x, x.size(1)), *top = of.make(largest, x, x.size(1));
    auto* in = x.const_data_ptr<scalar_t>();
    if (s.channel_is_inner) reduce_columns<scalar_t, false, true>(in, nullptr, s, sums, top);
    else reduce_rows<scalar_t, false, false>(in, nullptr, s, sums, top);
  });
  return {mean.div_(x.size(2) * x.size(3)), largest};
}

// Mean and maximum over channels of x·ca, (B, H·W) each.
std::vector<Tensor> maps(const Tensor& x, const Tensor& ca) {
  const Shape s = shape_of(x);
  Tensor mean, largest;
  DISPATCH(x, {
    Small<scalar_t> of;
    auto *sums = of.make(mean, x, x.size(2) * x.size(3)), *top = of.make(largest, x, x.size(2) * x.size(3));
    auto *in = x.const_data_ptr<scalar_t>();
    auto *w = of.read(ca);
    if (s.channel_is_inner) reduce_rows<scalar_t, true, true>(in, w, s, sums, top);
    else reduce_columns<scalar_t, true, false>(in, w, s, sums, top);
  });
  return {mean.div_(x.size(1)), largest};
}

// x·ca·sa
template <typename T>
void apply_to(const T* x, const acc_t<T>* by_row, const acc_t<T>* by_column, const Shape& s, T* out) {
  using A = acc_t<T>;
  for_rows(s, [&](int64_t b, int64_t, int64_t from, int64_t to) {
    const A* w = by_column + b * s.inner;
    for (int64_t o = from; o < to; ++o) {
      const T* row = x + (b * s.outer + o) * s.inner;
      T* to_row = out + (b * s.outer + o) * s.inner;
      const A wo = by_row[b * s.outer + o];
#pragma omp simd
      for (int64_t i = 0; i < s.inner; ++i) store(to_row + i, static_cast<A>(row[i]) * w[i] * wo);
    }
  });
}

Tensor apply(const Tensor& x, const Tensor& ca, const Tensor& sa) {
  const Shape s = shape_of(x);
  Tensor out = at::empty_like(x);
  DISPATCH(x, {
    Small<scalar_t> of;
    auto *c = of.read(ca), *p = of.read(sa);
    apply_to(x.const_data_ptr<scalar_t>(), s.channel_is_inner ? p : c, s.channel_is_inner ? c : p, s,
             out.data_ptr<scalar_t>());
  });
  return out;
}

// With p = g·x: Σ_c p·ca by position and Σ_hw p·sa by channel; and how many values equal the maximum over channels
// (of x·ca) and over positions (of x). Each (B, H·W) or (B, C): [g_sa, ties over channels, Σ p·sa, ties over positions].
template <typename T, bool channel_is_inner>
void products_of(const T* g, const T* x, const acc_t<T>* ca, const acc_t<T>* sa, const acc_t<T>* top_p,
                 const acc_t<T>* top_c, const Shape& s, acc_t<T>* rows, acc_t<T>* row_ties, acc_t<T>* columns,
                 acc_t<T>* column_ties) {
  using A = acc_t<T>;
  const int64_t n = s.inner;
  Partial<A> partial(s, 2);
  for_rows(s, [&](int64_t b, int64_t part, int64_t from, int64_t to) {
    A *sum = partial.at(b, part), *ties = sum + n;
    const A *wi = (channel_is_inner ? ca : sa) + b * n, *ti = (channel_is_inner ? top_c : top_p) + b * n;
    for (int64_t o = from; o < to; ++o) {
      const int64_t at = b * s.outer + o;
      const T *gr = g + at * n, *xr = x + at * n;
      const A wo = channel_is_inner ? sa[at] : ca[at], top = channel_is_inner ? top_p[at] : top_c[at];
      A total = 0, equal = 0;
#pragma omp simd reduction(+ : total, equal)
      for (int64_t i = 0; i < n; ++i) {
        const A v = static_cast<A>(xr[i]), p = static_cast<A>(gr[i]) * v;
        const A y = v * (channel_is_inner ? wi[i] : wo);
        total += p * wi[i];
        sum[i] += p * wo;
        equal += (channel_is_inner ? y : v) == top ? A(1) : A(0);
        ties[i] += (channel_is_inner ? v : y) == ti[i] ? A(1) : A(0);
      }
      rows[at] = total;
      row_ties[at] = equal;
    }
  });
  partial.add_into(0, columns);
  partial.add_into(1, column_ties);
}

std::vector<Tensor> products(const Tensor& g, const Tensor& x, const Tensor& ca, const Tensor& sa,
                             const Tensor& top_p, const Tensor& top_c) {
  const Shape s = shape_of(x);
  const int64_t places = x.size(2) * x.size(3), channels = x.size(1);
  std::vector<Tensor> out(4);
  DISPATCH(x, {
    Small<scalar_t> of;
    auto *c = of.read(ca), *p = of.read(sa), *tp = of.read(top_p), *tc = of.read(top_c);
    auto *at_p = of.make(out[0], x, places), *ties_p = of.make(out[1], x, places);
    auto *at_c = of.make(out[2], x, channels), *ties_c = of.make(out[3], x, channels);
    auto *gp = g.const_data_ptr<scalar_t>(), *xp = x.const_data_ptr<scalar_t>();
    if (s.channel_is_inner) products_of<scalar_t, true>(gp, xp, c, p, tp, tc, s, at_p, ties_p, at_c, ties_c);
    else products_of<scalar_t, false>(gp, xp, c, p, tp, tc, s, at_c, ties_c, at_p, ties_p);
  });
  return out;
}

// Σ_hw x·(g_avg + g_max at the maximum over channels), (B, C).
template <typename T>
void spread_rows(const T* x, const acc_t<T>* ca, const acc_t<T>* top, const acc_t<T>* g_avg, const acc_t<T>* g_max,
                 const Shape& s, acc_t<T>* sums) {  // a row is a channel
  using A = acc_t<T>;
  const int64_t n = s.inner;
  for_rows(s, [&](int64_t b, int64_t, int64_t from, int64_t to) {
    const A *t = top + b * n, *a = g_avg + b * n, *m = g_max + b * n;
    for (int64_t o = from; o < to; ++o) {
      const T* row = x + (b * s.outer + o) * n;
      const A w = ca[b * s.outer + o];
      A total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < n; ++i) {
        const A v = static_cast<A>(row[i]);
        total += v * (a[i] + (v * w == t[i] ? m[i] : A(0)));
      }
      sums[b * s.outer + o] = total;
    }
  });
}

template <typename T>
void spread_columns(const T* x, const acc_t<T>* ca, const acc_t<T>* top, const acc_t<T>* g_avg,
                    const acc_t<T>* g_max, const Shape& s, acc_t<T>* sums) {  // a column is a channel
  using A = acc_t<T>;
  const int64_t n = s.inner;
  Partial<A> partial(s, 1);
  for_rows(s, [&](int64_t b, int64_t part, int64_t from, int64_t to) {
    A* sum = partial.at(b, part);
    const A* w = ca + b * n;
    for (int64_t o = from; o < to; ++o) {
      const int64_t at = b * s.outer + o;
      const T* row = x + at * n;
      const A t = top[at], a = g_avg[at], m = g_max[at];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const A v = static_cast<A>(row[i]);
        sum[i] += v * (a + (v * w[i] == t ? m : A(0)));
      }
    }
  });
  partial.add_into(0, sums);
}

Tensor spread(const Tensor& x, const Tensor& ca, const Tensor& top_p, const Tensor& g_avg, const Tensor& g_max) {
  const Shape s = shape_of(x);
  Tensor out;
  DISPATCH(x, {
    Small<scalar_t> of;
    auto *c = of.read(ca), *top = of.read(top_p), *a = of.read(g_avg), *m = of.read(g_max);
    auto* sums = of.make(out, x, x.size(1));
    auto* in = x.const_data_ptr<scalar_t>();
    if (s.channel_is_inner) spread_columns(in, c, top, a, m, s, sums);
    else spread_rows(in, c, top, a, m, s, sums);
  });
  return out;
}

// (g·sa + g_avg + g_max at the maximum over channels)·ca + g_savg + g_smax at the maximum over positions.
template <typename T, bool channel_is_inner>
void input_gradient_of(const T* g, const T* x, const acc_t<T>* const* by_place, const acc_t<T>* const* by_channel,
                       const Shape& s, T* out) {
  using A = acc_t<T>;
  const int64_t n = s.inner;
  const A* const* inner = channel_is_inner ? by_channel : by_place;
  const A* const* outer = channel_is_inner ? by_place : by_channel;
  for_rows(s, [&](int64_t b, int64_t, int64_t from, int64_t to) {
    const A *mask = inner[0] + b * n, *top = inner[1] + b * n, *avg = inner[2] + b * n, *most = inner[3] + b * n;
    for (int64_t o = from; o < to; ++o) {
      const int64_t at = b * s.outer + o;
      const T *gr = g + at * n, *xr = x + at * n;
      T* to_row = out + at * n;
      const A row_mask = outer[0][at], row_top = outer[1][at], row_avg = outer[2][at], row_most = outer[3][at];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const A v = static_cast<A>(xr[i]), gi = static_cast<A>(gr[i]);
        A result;
        if constexpr (channel_is_inner) {
          const A gy = gi * row_mask + row_avg + (v * mask[i] == row_top ? row_most : A(0));
          result = gy * mask[i] + avg[i] + (v == top[i] ? most[i] : A(0));
        } else {
          const A gy = gi * mask[i] + avg[i] + (v * row_mask == top[i] ? most[i] : A(0));
          result = gy * row_mask + row_avg + (v == row_top ? row_most : A(0));
        }
        store(to_row + i, result);
      }
    }
  });
}

Tensor input_gradient(const Tensor& g, const Tensor& x, at::TensorList by_place, at::TensorList by_channel) {
  const Shape s = shape_of(x);
  Tensor out = at::empty_like(x);
  DISPATCH(x, {
    Small<scalar_t> of;
    const acc_t<scalar_t>*place[4], *channel[4];
    for (int k = 0; k < 4; ++k) place[k] = of.read(by_place[k]), channel[k] = of.read(by_channel[k]);
    const auto *gp = g.const_data_ptr<scalar_t>(), *xp = x.const_data_ptr<scalar_t>();
    if (s.channel_is_inner) input_gradient_of<scalar_t, true>(gp, xp, place, channel, s, out.data_ptr<scalar_t>());
    else input_gradient_of<scalar_t, false>(gp, xp, place, channel, s, out.data_ptr<scalar_t>());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(timm_cbam2_cpu, m) {
  m.def("squeeze", &squeeze);
  m.def("maps", &maps);
  m.def("apply", &apply);
  m.def("products", &products);
  m.def("spread", &spread);
  m.def("input_gradient", &input_gradient);
  m.def("convolve", &convolve);
  m.def("convolve_backward", &convolve_backward);
}
