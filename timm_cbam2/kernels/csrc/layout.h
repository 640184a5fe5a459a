// How a tensor lies in memory, and how its samples are divided among threads.
//
// A sample is a matrix of `outer` rows and `inner` columns, whatever the memory format: in channels_last a row is a
// position and a column a channel, in the contiguous format the other way round.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

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

template <typename T>
inline acc_t<T> rounded(acc_t<T> value) {
  if constexpr (std::is_same_v<T, acc_t<T>>) return value;
  T stored;
  store(&stored, value);
  return static_cast<acc_t<T>>(stored);
}

// scale·z + shift as torch's BatchNorm rounds it.
template <typename A>
inline A affine(A z, A scale, A shift) {
#ifdef __FMA__
  return std::fma(z, scale, shift);
#else
  return z * scale + shift;
#endif
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

constexpr int64_t lanes = 16;  // numbers side by side, a vector of floats or two: several sums, so that none waits for itself

// body(i, lane) for i below n. A loop with a maximum, or with several sums, that compilers vectorise: each lane has its own.
template <typename F>
inline void in_lanes(int64_t n, F body) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
#pragma omp simd
    for (int64_t l = 0; l < lanes; ++l) body(i + l, l);
  }
  for (; i < n; ++i) body(i, i % lanes);
}

// Several numbers of each channel, block by block of `lanes` channels: arrays one behind the other, a power of two apart,
// would all want the same few lines of the cache.
template <typename A, int64_t kinds>
class Blocks {
 public:
  explicit Blocks(int64_t n) : n_(n), all_((n + lanes - 1) / lanes * lanes * kinds) {}
  A* at(int64_t i, int64_t l) { return all_.data() + (i - l) * kinds + l; }  // as `in_lanes` gives them; [kind * lanes]
  template <typename F>
  void fill(int64_t kind, F value) {
    for (int64_t i = 0; i < n_; ++i) at(i, i % lanes)[kind * lanes] = value(i);
  }
  void copy_to(int64_t kind, A* to) {
    for (int64_t i = 0; i < n_; ++i) to[i] = at(i, i % lanes)[kind * lanes];
  }

 private:
  const int64_t n_;
  std::vector<A> all_;
};

template <typename F, size_t... each>
inline void unrolled(F body, std::index_sequence<each...>) {
  (body(each), ...);
}

// body(0), body(1) and so on, as if written out: inside a loop that is to be vectorised there must be no other.
template <size_t count, typename F>
inline void unrolled(F body) {
  unrolled(body, std::make_index_sequence<count>());
}

// What `join` makes of all lanes, in pairs: one after the other each would wait for the one before.
template <typename A, typename F>
inline A over_lanes(const A* values, F join) {
  A left[lanes / 2];
#pragma omp simd
  for (int64_t l = 0; l < lanes / 2; ++l) left[l] = join(values[l], values[l + lanes / 2]);
  for (int64_t n = lanes / 4; n; n /= 2)
#pragma omp simd
    for (int64_t l = 0; l < n; ++l) left[l] = join(left[l], left[l + n]);
  return left[0];
}

template <typename A>
inline A sum_of(const A* values) {
  return over_lanes(values, [](A one, A other) { return one + other; });
}

template <typename A>
inline A largest_of(const A* values) {
  return over_lanes(values, [](A one, A other) { return other > one ? other : one; });
}

template <typename F>
void for_parts(const Shape& s, F body) {  // body(sample, part)
  at::parallel_for(0, s.batch * s.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task / s.parts, task % s.parts);
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
  const acc_t<T>* read(const std::optional<Tensor>& t) { return t.has_value() ? read(*t) : nullptr; }
  acc_t<T>* make(Tensor& out, const Tensor& x, int64_t count) {
    out = at::empty({x.size(0), count}, x.options().dtype(type));
    return out.template data_ptr<acc_t<T>>();
  }

 private:
  static constexpr auto type = c10::CppTypeToScalarType<acc_t<T>>::value;
  std::deque<Tensor> kept_;  // alive as long as their pointers are used
};

#define DISPATCH(x, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "cbam2", [&] { __VA_ARGS__; })

}  // namespace
