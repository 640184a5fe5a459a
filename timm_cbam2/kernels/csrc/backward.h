// The backward pass over full-size tensors, in three readings of x = scale·z + shift. Where a BatchNorm made x of z in
// training, its own backward is done in the last of them: all that it needs besides are sums by channel.

#pragma once

#include "forward.h"

namespace {

// With g' = g where the activation was not flat, z̃ = z − mean (z itself without a BatchNorm), and x·ca at its largest:
// by position Σ_c γ·g'·x·ca and the number of maxima over channels; by channel Σ g'·sa·z̃, the number of maxima over
// positions and, for a BatchNorm, Σ g'·sa, Σ z̃ at the maxima, Σ z̃.
enum Column { product = 0, ties = 1, plain = 2, at_ties = 3, centered = 4, columns_normed = 5, columns_alone = 2 };

template <typename T>
struct Backward {
  using A = acc_t<T>;
  Shape s;
  Input<T> x;
  const A* mean;        // (C,), of a BatchNorm
  const T *g, *out;     // out: null without activation
  const A *gamma, *ca, *sa, *top_c, *top_p;
  T* g_masked;          // g', written by the first reading where there is an activation
};

template <typename T, bool channel_is_inner, bool normed>
void products_of(const Backward<T>& f, acc_t<T>* rows, acc_t<T>* row_ties, Partial<acc_t<T>>& partial) {
  using A = acc_t<T>;
  const int64_t n = f.s.inner, channels = channel_is_inner ? n : f.s.outer, places = channel_is_inner ? f.s.outer : n;
  for_parts(f.s, [&](int64_t b, int64_t part) {
    A* mine = partial.at(b, part);
    const A *ca = f.ca + b * channels, *sa = f.sa + b * places, *top_c = f.top_c + b * channels,
            *top_p = f.top_p + b * places;
    for (int64_t o = f.s.first(part); o < f.s.first(part + 1); ++o) {
      const int64_t at = b * f.s.outer + o;
      const T *gr = f.g + at * n, *zr = f.x.z + at * n, *out = f.out ? f.out + at * n : nullptr;
      T* masked = f.g_masked + at * n;
      if (out) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) masked[i] = static_cast<A>(out[i]) <= A(0) ? T(0) : gr[i];
        gr = masked;
      }
      if constexpr (channel_is_inner) {
        const A mask = sa[o], top = top_p[o];
        A total = 0, equal = 0;
#pragma omp simd reduction(+ : total, equal)
        for (int64_t i = 0; i < n; ++i) {
          const A z = static_cast<A>(zr[i]), g = static_cast<A>(gr[i]);
          const A v = value_of<T, normed>(zr[i], normed ? f.x.scale[i] : A(1), normed ? f.x.shift[i] : A(0));
          const A y = v * ca[i], is_top = v == top_c[i] ? A(1) : A(0), gm = g * mask;
          const A away = normed ? z - f.mean[i] : v;
          total += g * y * (f.gamma ? f.gamma[i] : A(1));
          equal += y == top ? A(1) : A(0);
          mine[product * n + i] += gm * away;
          mine[ties * n + i] += is_top;
          if constexpr (normed) {
            mine[plain * n + i] += gm;
            mine[at_ties * n + i] += is_top * away;
            mine[centered * n + i] += away;
          }
        }
        rows[at] = total;
        row_ties[at] = equal;
      } else {
        const A mask = ca[o], gamma = f.gamma ? f.gamma[o] : A(1), top = top_c[o];
        const A scale = normed ? f.x.scale[o] : A(1), shift = normed ? f.x.shift[o] : A(0);
        const A mean = normed ? f.mean[o] : A(0);
        A sums[columns_normed] = {};
        A p = 0, t = 0, q = 0, r = 0, u = 0;
#pragma omp simd reduction(+ : p, t, q, r, u)
        for (int64_t i = 0; i < n; ++i) {
          const A z = static_cast<A>(zr[i]), g = static_cast<A>(gr[i]);
          const A v = value_of<T, normed>(zr[i], scale, shift), away = normed ? z - mean : v;
          const A y = v * mask, is_top = v == top ? A(1) : A(0), gm = g * sa[i];
          mine[i] += g * y * gamma;
          mine[n + i] += y == top_p[i] ? A(1) : A(0);
          p += gm * away, t += is_top, q += gm, r += is_top * away, u += away;
        }
        sums[product] = p, sums[ties] = t, sums[plain] = q, sums[at_ties] = r, sums[centered] = u;
        for (int64_t k = 0; k < (normed ? columns_normed : columns_alone); ++k) rows[k * f.s.batch * channels + at] = sums[k];
      }
    }
  });
}

// By channel Σ m·z̃ and Σ m, with m = g_avg + g_max where x·ca is at its largest, both by position.
template <typename T, bool channel_is_inner, bool normed>
void spread_of(const Backward<T>& f, const acc_t<T>* g_avg, const acc_t<T>* g_max, acc_t<T>* rows,
               Partial<acc_t<T>>& partial) {
  using A = acc_t<T>;
  const int64_t n = f.s.inner, channels = channel_is_inner ? n : f.s.outer, places = channel_is_inner ? f.s.outer : n;
  for_parts(f.s, [&](int64_t b, int64_t part) {
    A* mine = partial.at(b, part);
    const A *ca = f.ca + b * channels, *top_p = f.top_p + b * places, *avg = g_avg + b * places, *most = g_max + b * places;
    for (int64_t o = f.s.first(part); o < f.s.first(part + 1); ++o) {
      const int64_t at = b * f.s.outer + o;
      const T* zr = f.x.z + at * n;
      if constexpr (channel_is_inner) {
        const A top = top_p[o], a = avg[o], most_here = most[o];
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const A v = value_of<T, normed>(zr[i], normed ? f.x.scale[i] : A(1), normed ? f.x.shift[i] : A(0));
          const A m = a + (v * ca[i] == top ? most_here : A(0));
          mine[i] += m * (normed ? static_cast<A>(zr[i]) - f.mean[i] : v);
          if constexpr (normed) mine[n + i] += m;
        }
      } else {
        const A scale = normed ? f.x.scale[o] : A(1), shift = normed ? f.x.shift[o] : A(0);
        const A mask = ca[o], mean = normed ? f.mean[o] : A(0);
        A total = 0, alone = 0;
#pragma omp simd reduction(+ : total, alone)
        for (int64_t i = 0; i < n; ++i) {
          const A v = value_of<T, normed>(zr[i], scale, shift);
          const A m = avg[i] + (v * mask == top_p[i] ? most[i] : A(0));
          total += m * (normed ? static_cast<A>(zr[i]) - mean : v);
          alone += m;
        }
        rows[at] = total;
        if (normed) rows[f.s.batch * channels + at] = alone;
      }
    }
  });
}

// The gradients by channel that the last reading takes, (B, C) and, of a BatchNorm, (C,).
template <typename A>
struct ByChannel {
  const A *g_avg, *g_max;             // of the two squeezes, shared among their positions
  const A *offset, *slope, *factor;   // g_z = (g_x − offset − z̃·slope)·factor
};

// The gradients by position, (B, H·W), and of learned maps (B, P, H·W) with their weights (P, C).
template <typename A>
struct OfMaps {
  const A *avg, *most, *learned, *weights;
  int64_t count;
};

// One row of Wᵀ·g_learned.
template <bool channel_is_inner, typename A>
void spread_learned(const OfMaps<A>& maps, int64_t b, int64_t o, int64_t n, int64_t outer, A* row) {
  std::fill(row, row + n, A(0));
  const int64_t places = channel_is_inner ? outer : n, channels = channel_is_inner ? n : outer;
  for (int64_t p = 0; p < maps.count; ++p) {
    const A *g = maps.learned + (b * maps.count + p) * places, *weights = maps.weights + p * channels;
    const A *along = channel_is_inner ? weights : g, one = channel_is_inner ? g[o] : weights[o];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) row[i] += one * along[i];
  }
}

// g_x = (γ·g'·sa + m + Wᵀ·g_learned)·ca + g_savg + g_smax where x is at its largest over positions; then through the
// BatchNorm.
template <typename T, bool channel_is_inner, bool normed>
void input_gradient_of(const Backward<T>& f, const OfMaps<acc_t<T>>& maps, const ByChannel<acc_t<T>>& of, T* g_x) {
  using A = acc_t<T>;
  const int64_t n = f.s.inner, channels = channel_is_inner ? n : f.s.outer, places = channel_is_inner ? f.s.outer : n;
  for_parts(f.s, [&](int64_t b, int64_t part) {
    const A *ca = f.ca + b * channels, *sa = f.sa + b * places, *top_c = f.top_c + b * channels,
            *top_p = f.top_p + b * places, *avg = maps.avg + b * places, *most = maps.most + b * places,
            *s_avg = of.g_avg + b * channels, *s_max = of.g_max + b * channels;
    std::vector<A> spread(maps.count ? n : 0);
    for (int64_t o = f.s.first(part); o < f.s.first(part + 1); ++o) {
      const int64_t at = (b * f.s.outer + o) * n;
      const T *gr = (f.out ? f.g_masked : f.g) + at, *zr = f.x.z + at;
      T* to = g_x + at;
      if (maps.count) spread_learned<channel_is_inner>(maps, b, o, n, f.s.outer, spread.data());
      const A* more = maps.count ? spread.data() : nullptr;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const int64_t c = channel_is_inner ? i : o, p = channel_is_inner ? o : i;
        const A v = value_of<T, normed>(zr[i], normed ? f.x.scale[c] : A(1), normed ? f.x.shift[c] : A(0));
        const A g = static_cast<A>(gr[i]) * (f.gamma ? f.gamma[c] : A(1));
        const A g_y = g * sa[p] + avg[p] + (v * ca[c] == top_p[p] ? most[p] : A(0)) + (more ? more[i] : A(0));
        A result = g_y * ca[c] + s_avg[c] + (v == top_c[c] ? s_max[c] : A(0));
        if constexpr (normed)
          result = (result - of.offset[c] - (static_cast<A>(zr[i]) - f.mean[c]) * of.slope[c]) * of.factor[c];
        store(to + i, result);
      }
    }
  });
}

}  // namespace
