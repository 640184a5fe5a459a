// The forward pass: squeeze, channel mask, maps, spatial mask, everything else. A sample is read three times, and where
// there are as many samples as threads each stays in the cache of its thread meanwhile.

#pragma once

#include "small.h"

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

// What one call reads and writes.
template <typename T>
struct Forward {
  using A = acc_t<T>;
  Shape s;
  Input<T> x;
  const T* shortcut;
  const A *gamma, *drop;
  bool relu;
  const ChannelNet<A>* channel;
  const SpatialNet<A>* spatial;
  A *squeezes, *ca, *maps, *sa;  // (B, 2, C), (B, C), (B, 2, H·W), (B, H·W)
  T* out;
};

// The sum and the maximum of x·ca (or of x) by row and by column of one part of a sample. Which of them is wanted
// depends on the layout: channels are columns or rows.
template <typename T, bool channel_is_inner, bool normed, bool scaled, bool by_column>
void reduce(const Forward<T>& f, int64_t b, int64_t part, acc_t<T>* sums, acc_t<T>* largest) {
  using A = acc_t<T>;
  const int64_t n = f.s.inner;
  const A* ca = f.ca + b * (channel_is_inner ? n : f.s.outer);
  if (by_column) {
    std::fill(sums, sums + n, A(0));
    std::fill(largest, largest + n, -std::numeric_limits<A>::infinity());
  }
  for (int64_t o = f.s.first(part); o < f.s.first(part + 1); ++o) {
    const T* row = f.x.z + (b * f.s.outer + o) * n;
    const A scale = normed && !channel_is_inner ? f.x.scale[o] : A(1);
    const A shift = normed && !channel_is_inner ? f.x.shift[o] : A(0);
    const A mask = scaled && !channel_is_inner ? ca[o] : A(1);
    A total = 0, most = -std::numeric_limits<A>::infinity();
#define CBAM2_VALUE                                                                                 \
  const A v = value_of<T, normed>(row[i], channel_is_inner && normed ? f.x.scale[i] : scale,        \
                                  channel_is_inner && normed ? f.x.shift[i] : shift) *             \
              (channel_is_inner && scaled ? ca[i] : mask)
    if constexpr (by_column) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        CBAM2_VALUE;
        sums[i] += v;
        largest[i] = v > largest[i] ? v : largest[i];
      }
    } else {
#pragma omp simd reduction(+ : total) reduction(max : most)
      for (int64_t i = 0; i < n; ++i) {
        CBAM2_VALUE;
        total += v;
        most = v > most ? v : most;
      }
      sums[o] = total;
      largest[o] = most;
    }
#undef CBAM2_VALUE
  }
}

// act(shortcut + γ·x·ca·sa) of one part of a sample, each product rounded as a step of its own.
template <typename T, bool channel_is_inner, bool normed, bool has_gamma, bool has_shortcut>
void finish(const Forward<T>& f, int64_t b, int64_t part) {
  using A = acc_t<T>;
  const int64_t n = f.s.inner, channels = channel_is_inner ? n : f.s.outer, places = channel_is_inner ? f.s.outer : n;
  const A *ca = f.ca + b * channels, *sa = f.sa + b * places, lowest = f.relu ? A(0) : -std::numeric_limits<A>::infinity();
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

template <typename T, bool channel_is_inner, bool normed>
void run_forward(const Forward<T>& f) {
  using A = acc_t<T>;
  const int64_t n = f.s.inner, channels = channel_is_inner ? n : f.s.outer, places = channel_is_inner ? f.s.outer : n;
  Partial<A> partial(f.s, 2);
  auto joined = [&](int64_t b, A* sums, A* largest) {
    for (int64_t part = 0; part < f.s.parts; ++part) {
      const A *from = partial.at(b, part), *top = from + n;
      for (int64_t i = 0; i < n; ++i) {
        sums[i] = part ? sums[i] + from[i] : from[i];
        largest[i] = part ? std::max(largest[i], top[i]) : top[i];
      }
    }
  };
  auto squeeze = [&](int64_t b, int64_t part) {
    A *sums = f.squeezes + 2 * b * channels, *own = partial.at(b, part);
    if (channel_is_inner) reduce<T, channel_is_inner, normed, false, true>(f, b, part, own, own + n);
    else reduce<T, channel_is_inner, normed, false, false>(f, b, part, sums, sums + channels);
  };
  auto channel_mask = [&](int64_t b) {
    A* sums = f.squeezes + 2 * b * channels;
    if (channel_is_inner) joined(b, sums, sums + channels);
    for (int64_t c = 0; c < channels; ++c) sums[c] /= places;
    (*f.channel)(sums, f.ca + b * channels);
  };
  auto maps = [&](int64_t b, int64_t part) {
    A *sums = f.maps + 2 * b * places, *own = partial.at(b, part);
    if (channel_is_inner) reduce<T, channel_is_inner, normed, true, false>(f, b, part, sums, sums + places);
    else reduce<T, channel_is_inner, normed, true, true>(f, b, part, own, own + n);
  };
  auto spatial_mask = [&](int64_t b) {
    A *sums = f.maps + 2 * b * places, *sa = f.sa + b * places;
    if (!channel_is_inner) joined(b, sums, sums + places);
    for (int64_t p = 0; p < places; ++p) sums[p] /= channels;
    (*f.spatial)(sums, sa);
    if (f.drop)
      for (int64_t p = 0; p < places; ++p) sa[p] *= f.drop[b];
  };
  auto end = [&](int64_t b, int64_t part) {
    if (!f.shortcut) finish<T, channel_is_inner, normed, false, false>(f, b, part);
    else if (f.gamma) finish<T, channel_is_inner, normed, true, true>(f, b, part);
    else finish<T, channel_is_inner, normed, false, true>(f, b, part);
  };
  if (f.s.parts == 1) {
    at::parallel_for(0, f.s.batch, 1, [&](int64_t begin, int64_t stop) {
      for (int64_t b = begin; b < stop; ++b) squeeze(b, 0), channel_mask(b), maps(b, 0), spatial_mask(b), end(b, 0);
    });
    return;
  }
  auto each = [&](auto step) {
    at::parallel_for(0, f.s.batch, 1, [&](int64_t begin, int64_t stop) {
      for (int64_t b = begin; b < stop; ++b) step(b);
    });
  };
  for_parts(f.s, squeeze), each(channel_mask), for_parts(f.s, maps), each(spatial_mask), for_parts(f.s, end);
}

}  // namespace
