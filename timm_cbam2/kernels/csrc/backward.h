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
  const A *gamma, *ca, *sa, *top_c, *top_p;  // gamma: ones where there is none
  T* g_masked;          // g', written by the first reading where there is an activation
};

// g', where an activation followed; where none did, g itself is read.
template <typename T, bool masks>
inline acc_t<T> masked(const Backward<T>& f, int64_t at) {
  if constexpr (!masks) return static_cast<acc_t<T>>(f.g[at]);
  const T given = f.g[at];
  const T g = static_cast<acc_t<T>>(f.out[at]) <= acc_t<T>(0) ? T(0) : given;
  f.g_masked[at] = g;
  return static_cast<acc_t<T>>(g);
}

// What one position after the other takes of each channel, behind the sums that it adds to.
enum OfChannel { mask = columns_normed, top, factor, scale, shift, mean, kinds_of_channel };

// One position, whose channels lie side by side. Several at once would read and write the sums less often, and were
// slower nevertheless.
template <typename T, bool normed, bool masks>
void products_of_place(const Backward<T>& f, int64_t b, int64_t o, Blocks<acc_t<T>, kinds_of_channel>& blocks,
                       acc_t<T>* rows, acc_t<T>* row_ties) {
  using A = acc_t<T>;
  const int64_t n = f.s.inner, place = b * f.s.outer + o;
  const A sa = f.sa[place], top_p = f.top_p[place];
  A totals[lanes] = {}, equals[lanes] = {};
  in_lanes(n, [&](int64_t i, int64_t l) {
    A* of = blocks.at(i, l);
    const T z = f.x.z[place * n + i];
    const A v = value_of<T, normed>(z, normed ? of[scale * lanes] : A(1), normed ? of[shift * lanes] : A(0));
    const A g = masked<T, masks>(f, place * n + i), y = v * of[mask * lanes], gm = g * sa;
    const A is_top = v == of[top * lanes] ? A(1) : A(0), away = normed ? static_cast<A>(z) - of[mean * lanes] : v;
    totals[l] += g * y * of[factor * lanes];
    equals[l] += y == top_p ? A(1) : A(0);
    of[product * lanes] += gm * away, of[ties * lanes] += is_top;
    if constexpr (normed) of[plain * lanes] += gm, of[at_ties * lanes] += is_top * away, of[centered * lanes] += away;
  });
  rows[place] = sum_of(totals), row_ties[place] = sum_of(equals);
}

// One channel, whose positions lie side by side.
template <typename T, bool normed, bool masks>
void products_of_channel(const Backward<T>& f, int64_t b, int64_t o, acc_t<T>* mine, acc_t<T>* rows) {
  using A = acc_t<T>;
  const int64_t n = f.s.inner, first = b * f.s.outer + o;
  const A *sa = f.sa + b * n, *top_p = f.top_p + b * n, ca = f.ca[first], gamma = f.gamma[o], top_c = f.top_c[first];
  const A slope = normed ? f.x.scale[o] : A(1), offset = normed ? f.x.shift[o] : A(0), middle = normed ? f.mean[o] : A(0);
  A sums[columns_normed][lanes] = {};
  in_lanes(n, [&](int64_t i, int64_t l) {
    const T z = f.x.z[first * n + i];
    const A v = value_of<T, normed>(z, slope, offset), away = normed ? static_cast<A>(z) - middle : v;
    const A g = masked<T, masks>(f, first * n + i), y = v * ca, is_top = v == top_c ? A(1) : A(0), gm = g * sa[i];
    mine[i] += g * y * gamma;
    mine[n + i] += y == top_p[i] ? A(1) : A(0);
    sums[product][l] += gm * away, sums[ties][l] += is_top;
    if constexpr (normed) sums[plain][l] += gm, sums[at_ties][l] += is_top * away, sums[centered][l] += away;
  });
  for (int64_t k = 0; k < (normed ? columns_normed : columns_alone); ++k)
    rows[k * f.s.batch * f.s.outer + first] = sum_of(sums[k]);
}

template <typename T, bool channel_is_inner, bool normed, bool masks>
void products_of(const Backward<T>& f, acc_t<T>* rows, acc_t<T>* row_ties, Partial<acc_t<T>>& partial) {
  using A = acc_t<T>;
  for_parts(f.s, [&](int64_t b, int64_t part) {
    A* mine = partial.at(b, part);
    int64_t o = f.s.first(part);
    const int64_t n = f.s.inner, last = f.s.first(part + 1);
    if constexpr (channel_is_inner) {
      Blocks<A, kinds_of_channel> blocks(n);
      blocks.fill(mask, [&](int64_t c) { return f.ca[b * n + c]; });
      blocks.fill(top, [&](int64_t c) { return f.top_c[b * n + c]; });
      blocks.fill(factor, [&](int64_t c) { return f.gamma[c]; });
      if (normed) {
        blocks.fill(scale, [&](int64_t c) { return f.x.scale[c]; });
        blocks.fill(shift, [&](int64_t c) { return f.x.shift[c]; });
        blocks.fill(mean, [&](int64_t c) { return f.mean[c]; });
      }
      for (; o < last; ++o) products_of_place<T, normed, masks>(f, b, o, blocks, rows, row_ties);
      for (int64_t k = 0; k < (normed ? columns_normed : columns_alone); ++k) blocks.copy_to(k, mine + k * n);
    } else {
      for (; o < last; ++o) products_of_channel<T, normed, masks>(f, b, o, mine, rows);
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
        A totals[lanes] = {}, alone[lanes] = {};
        in_lanes(n, [&](int64_t i, int64_t l) {
          const A v = value_of<T, normed>(zr[i], scale, shift), most_here = most[i];
          const A m = avg[i] + (v * mask == top_p[i] ? most_here : A(0));
          totals[l] += m * (normed ? static_cast<A>(zr[i]) - mean : v);
          alone[l] += m;
        });
        rows[at] = sum_of(totals);
        if (normed) rows[f.s.batch * channels + at] = sum_of(alone);
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

// One row of g_avg + Wᵀ·g_learned.
template <bool channel_is_inner, typename A>
void spread_maps(const OfMaps<A>& maps, int64_t b, int64_t o, int64_t n, int64_t outer, A* row) {
  const int64_t places = channel_is_inner ? outer : n, channels = channel_is_inner ? n : outer;
  if (channel_is_inner) std::fill(row, row + n, maps.avg[b * places + o]);
  else std::copy(maps.avg + b * places, maps.avg + (b + 1) * places, row);
  for (int64_t p = 0; p < maps.count; ++p) {
    const A *g = maps.learned + (b * maps.count + p) * places, *weights = maps.weights + p * channels;
    const A *along = channel_is_inner ? weights : g, one = channel_is_inner ? g[o] : weights[o];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) row[i] += one * along[i];
  }
}

// What the last reading takes of each channel: g_x = g'·sa·of_g + m·of_map + (z − mean)·of_z + rest, and at_top more
// where x is at its largest over positions.
enum OfInput { of_g, of_map, of_z, rest, at_top, in_mask, in_top, in_scale, in_shift, in_mean, kinds_of_input };

template <typename T, bool normed>
inline acc_t<T> input_gradient_at(const acc_t<T>* of, int64_t step, T given, T z, acc_t<T> sa, acc_t<T> map,
                                  acc_t<T> most, acc_t<T> top_p) {
  using A = acc_t<T>;
  const A v = value_of<T, normed>(z, normed ? of[in_scale * step] : A(1), normed ? of[in_shift * step] : A(0));
  const A m = map + (v * of[in_mask * step] == top_p ? most : A(0)), more = of[at_top * step];
  const A g = static_cast<A>(given) * sa * of[of_g * step] + m * of[of_map * step] + of[rest * step];
  const A result = g + (v == of[in_top * step] ? more : A(0));
  return normed ? result + (static_cast<A>(z) - of[in_mean * step]) * of[of_z * step] : result;
}

// g_x = (γ·g'·sa + m + Wᵀ·g_learned)·ca + g_savg + g_smax where x is at its largest over positions; then through the
// BatchNorm.
template <typename T, bool channel_is_inner, bool normed>
void input_gradient_of(const Backward<T>& f, const OfMaps<acc_t<T>>& maps, const ByChannel<acc_t<T>>& by, T* g_x) {
  using A = acc_t<T>;
  const int64_t n = f.s.inner, channels = channel_is_inner ? n : f.s.outer, places = channel_is_inner ? f.s.outer : n;
  for_parts(f.s, [&](int64_t b, int64_t part) {
    const A *sa = f.sa + b * places, *top_p = f.top_p + b * places, *most = maps.most + b * places;
    Blocks<A, kinds_of_input> blocks(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = b * channels + c;
      const A ca = f.ca[at], factor = normed ? by.factor[c] : A(1);
      A* of = blocks.at(c, c % lanes);
      auto set = [&](int64_t kind, A value) { of[kind * lanes] = value; };
      set(of_g, f.gamma[c] * ca * factor), set(of_map, ca * factor), set(at_top, by.g_max[at] * factor);
      set(rest, (by.g_avg[at] - (normed ? by.offset[c] : A(0))) * factor), set(in_mask, ca), set(in_top, f.top_c[at]);
      if (normed) {
        set(of_z, -by.slope[c] * factor), set(in_mean, f.mean[c]);
        set(in_scale, f.x.scale[c]), set(in_shift, f.x.shift[c]);
      }
    }
    std::vector<A> given(n);
    for (int64_t o = f.s.first(part); o < f.s.first(part + 1); ++o) {
      const int64_t at = (b * f.s.outer + o) * n;
      const T *gr = (f.out ? f.g_masked : f.g) + at, *zr = f.x.z + at;
      T* to = g_x + at;
      spread_maps<channel_is_inner>(maps, b, o, n, f.s.outer, given.data());
      const A* map = given.data();
      if constexpr (channel_is_inner) {
        const A mask = sa[o], top = top_p[o], more = most[o];
        in_lanes(n, [&](int64_t i, int64_t l) {
          store(to + i, input_gradient_at<T, normed>(blocks.at(i, l), lanes, gr[i], zr[i], mask, map[i], more, top));
        });
      } else {
        const A* of = blocks.at(o, o % lanes);
        in_lanes(n, [&](int64_t i, int64_t) {
          store(to + i, input_gradient_at<T, normed>(of, lanes, gr[i], zr[i], sa[i], map[i], most[i], top_p[i]));
        });
      }
    }
  });
}

}  // namespace
