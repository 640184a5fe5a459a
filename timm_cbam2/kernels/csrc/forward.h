// The passes of the forward over full-size tensors: squeezes, maps, everything else. The small networks between them are
// those of models/small_cbam2.py.

#pragma once

#include "layout.h"

namespace {

// x = scale·z + shift by channel, or z itself.
template <typename T>
struct Input {
  const T* z;
  const acc_t<T>*scale, *shift;
};

template <typename T, bool normed>
inline acc_t<T> value_of(T z, acc_t<T> scale, acc_t<T> shift) {
  if constexpr (normed) return rounded<T>(affine(static_cast<acc_t<T>>(z), scale, shift));
  return static_cast<acc_t<T>>(z);
}

// Learned maps of one sample: sums over channels of z weighted by `weights` (count, C), plus `offsets` (count).
template <typename A>
struct Learned {
  const A *weights = nullptr, *offsets = nullptr;
  int64_t count = 0;
};

// What one part of a sample is reduced to: sums, maxima and learned maps, `stride` apart.
template <typename A>
struct Reduced {
  A *sums, *largest, *learned;
  int64_t stride;
};

// `count` learned maps at one position, from p on, for the channels in `row`.
template <int64_t count, typename T>
inline void dot_products(const T* row, int64_t n, const Learned<acc_t<T>>& more, int64_t p, acc_t<T>* to, int64_t stride) {
  using A = acc_t<T>;
  const A* weights = more.weights + p * n;
  A sums[count][lanes] = {};
  in_lanes(n, [&](int64_t i, int64_t l) {
    const A v = static_cast<A>(row[i]);
    unrolled<count>([&](size_t k) { sums[k][l] += v * weights[k * n + i]; });
  });
  for (int64_t k = 0; k < count; ++k) to[k * stride] = sum_of(sums[k]) + more.offsets[p + k];
}

// By row, over columns.
template <typename T, bool channel_is_inner, bool normed, bool scaled>
void reduce_rows(const Shape& s, const Input<T>& x, const acc_t<T>* ca, const Learned<acc_t<T>>& more, int64_t b,
                 int64_t part, const Reduced<acc_t<T>>& to) {
  using A = acc_t<T>;
  const int64_t n = s.inner;
  for (int64_t o = s.first(part); o < s.first(part + 1); ++o) {
    const T* row = x.z + (b * s.outer + o) * n;
    const A scale = normed && !channel_is_inner ? x.scale[o] : A(1), shift = normed && !channel_is_inner ? x.shift[o] : A(0);
    const A mask = scaled && !channel_is_inner ? ca[o] : A(1);
    A totals[lanes] = {}, mosts[lanes];
    std::fill(mosts, mosts + lanes, -std::numeric_limits<A>::infinity());
    in_lanes(n, [&](int64_t i, int64_t l) {
      const A v = value_of<T, normed>(row[i], channel_is_inner && normed ? x.scale[i] : scale,
                                      channel_is_inner && normed ? x.shift[i] : shift) *
                  (channel_is_inner && scaled ? ca[i] : mask);
      totals[l] += v;
      mosts[l] = v > mosts[l] ? v : mosts[l];
    });
    to.sums[o] = sum_of(totals), to.largest[o] = largest_of(mosts);
    int64_t p = 0;
    for (; p + 4 <= more.count; p += 4) dot_products<4>(row, n, more, p, to.learned + p * to.stride + o, to.stride);
    for (; p < more.count; ++p) dot_products<1>(row, n, more, p, to.learned + p * to.stride + o, to.stride);
  }
}

constexpr int64_t rows_at_once = 4;  // sums by column are read and written once for so many

// By column, over the rows of the part.
template <typename T, bool channel_is_inner, bool normed, bool scaled>
void reduce_columns(const Shape& s, const Input<T>& x, const acc_t<T>* ca, const Learned<acc_t<T>>& more, int64_t b,
                    int64_t part, const Reduced<acc_t<T>>& to) {
  using A = acc_t<T>;
  const int64_t n = s.inner, last = s.first(part + 1);
  A *sums = to.sums, *largest = to.largest;
  std::fill(sums, sums + n, A(0));
  std::fill(largest, largest + n, -std::numeric_limits<A>::infinity());
  auto several = [&](int64_t first, auto count) {
    const T* rows = x.z + (b * s.outer + first) * n;
    A scale[rows_at_once], shift[rows_at_once], mask[rows_at_once];
    for (int64_t r = 0; r < count; ++r) {
      scale[r] = normed && !channel_is_inner ? x.scale[first + r] : A(1);
      shift[r] = normed && !channel_is_inner ? x.shift[first + r] : A(0);
      mask[r] = scaled && !channel_is_inner ? ca[first + r] : A(1);
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      A total = 0, most = largest[i];
      for (int64_t r = 0; r < count; ++r) {
        const A v = value_of<T, normed>(rows[r * n + i], channel_is_inner && normed ? x.scale[i] : scale[r],
                                        channel_is_inner && normed ? x.shift[i] : shift[r]) *
                    (channel_is_inner && scaled ? ca[i] : mask[r]);
        total += v;
        most = v > most ? v : most;
      }
      sums[i] += total;
      largest[i] = most;
    }
  };
  int64_t o = s.first(part);
  for (; o + rows_at_once <= last; o += rows_at_once) several(o, std::integral_constant<int64_t, rows_at_once>());
  for (; o < last; ++o) several(o, std::integral_constant<int64_t, 1>());
  for (int64_t p = 0; p < more.count; ++p) {
    A* mine = to.learned + p * to.stride;
    std::fill(mine, mine + n, A(0));
    for (o = s.first(part); o < last; ++o) {
      const T* row = x.z + (b * s.outer + o) * n;
      const A weight = more.weights[p * s.outer + o];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) mine[i] += static_cast<A>(row[i]) * weight;
    }
  }
}

// The average and the maximum of x over positions, or (scaled) those of x·ca over channels and its learned maps, one
// `Learned` for each sample: out (B, 2 + learned, what is left).
template <typename T, bool channel_is_inner, bool normed, bool scaled>
void reduce(const Shape& s, const Input<T>& x, const acc_t<T>* ca, const std::vector<Learned<acc_t<T>>>& learned,
            acc_t<T>* out) {
  using A = acc_t<T>;
  constexpr bool by_column = channel_is_inner != scaled;
  const int64_t more = learned.empty() ? 0 : learned[0].count, kinds = 2 + more;
  const int64_t left = by_column ? s.inner : s.outer, over = by_column ? s.outer : s.inner;
  const int64_t channels = channel_is_inner ? s.inner : s.outer;
  Partial<A> partial(s, by_column ? kinds : 0);
  for_parts(s, [&](int64_t b, int64_t part) {
    A* to = by_column ? partial.at(b, part) : out + b * kinds * left;
    const Reduced<A> reduced{to, to + left, to + 2 * left, left};
    const A* mask = scaled ? ca + b * channels : nullptr;
    const Learned<A> of = more ? learned[b] : Learned<A>();
    if constexpr (by_column) reduce_columns<T, channel_is_inner, normed, scaled>(s, x, mask, of, b, part, reduced);
    else reduce_rows<T, channel_is_inner, normed, scaled>(s, x, mask, of, b, part, reduced);
  });
  for (int64_t b = 0; b < s.batch; ++b) {
    A* to = out + b * kinds * left;
    for (int64_t part = 0; by_column && part < s.parts; ++part) {
      const A* from = partial.at(b, part);
      for (int64_t k = 0; k < kinds; ++k)
        for (int64_t i = k * left; i < (k + 1) * left; ++i)
          to[i] = part == 0 ? from[i] : k == 1 ? std::max(to[i], from[i]) : to[i] + from[i];
    }
    for (int64_t i = 0; i < left; ++i) to[i] /= over;
    for (int64_t p = 0; by_column && p < more; ++p)
      for (int64_t i = 0; i < left; ++i) to[(2 + p) * left + i] += learned[b].offsets[p];
  }
}

// The average and the maximum over channels of x·ca of one sample, all of it by one thread: out (2, H·W).
template <typename T, bool channel_is_inner, bool normed>
void reduce_sample(const Shape& s, const Input<T>& x, const acc_t<T>* ca, int64_t b, acc_t<T>* out) {
  const int64_t places = channel_is_inner ? s.outer : s.inner, channels = channel_is_inner ? s.inner : s.outer;
  const Reduced<acc_t<T>> to{out, out + places, nullptr, 0};
  if constexpr (channel_is_inner) reduce_rows<T, channel_is_inner, normed, true>(s, x, ca, {}, b, 0, to);
  else reduce_columns<T, channel_is_inner, normed, true>(s, x, ca, {}, b, 0, to);
  for (int64_t i = 0; i < places; ++i) out[i] /= channels;
}

// What one call of `finish` reads and writes.
template <typename T>
struct Finish {
  using A = acc_t<T>;
  Shape s;
  Input<T> x;
  const T* shortcut;
  const A *gamma, *ca, *sa;
  bool relu;
  T* out;
};

// act(shortcut + γ·x·ca·sa), each product rounded as a step of its own, of one part of a sample.
template <typename T, bool channel_is_inner, bool normed, bool has_gamma, bool has_shortcut>
void finish_part(const Finish<T>& f, int64_t b, int64_t part) {
  using A = acc_t<T>;
  const int64_t n = f.s.inner, channels = channel_is_inner ? n : f.s.outer, places = channel_is_inner ? f.s.outer : n;
  const A lowest = f.relu ? A(0) : -std::numeric_limits<A>::infinity();
  const A *ca = f.ca + b * channels, *sa = f.sa + b * places;
  for (int64_t o = f.s.first(part); o < f.s.first(part + 1); ++o) {
    const int64_t at = (b * f.s.outer + o) * n;
    const T *row = f.x.z + at, *added = has_shortcut ? f.shortcut + at : nullptr;
    T* to = f.out + at;
    const A scale = normed && !channel_is_inner ? f.x.scale[o] : A(1);
    const A shift = normed && !channel_is_inner ? f.x.shift[o] : A(0);
    const A gamma = has_gamma && !channel_is_inner ? f.gamma[o] : A(1);
    const A mask = channel_is_inner ? sa[o] : ca[o];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      A v = value_of<T, normed>(row[i], channel_is_inner && normed ? f.x.scale[i] : scale,
                                channel_is_inner && normed ? f.x.shift[i] : shift);
      v *= channel_is_inner ? ca[i] : mask;
      if (has_gamma) v = rounded<T>(v * (channel_is_inner ? f.gamma[i] : gamma));
      v *= channel_is_inner ? mask : sa[i];
      if (has_shortcut) v = rounded<T>(v) + static_cast<A>(added[i]);
      store(to + i, v < lowest ? lowest : v);
    }
  }
}

template <typename T, bool channel_is_inner, bool normed, bool has_gamma, bool has_shortcut>
void finish(const Finish<T>& f) {
  for_parts(f.s, [&](int64_t b, int64_t part) {
    finish_part<T, channel_is_inner, normed, has_gamma, has_shortcut>(f, b, part);
  });
}

}  // namespace
