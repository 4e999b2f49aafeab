// Messages: A[p, m3] = sum over pairs, m1, m2 of CG[m1, m2, m3] R_p(r) H[m1] Y[m2], and its adjoint.
//
// Outer products R_p H[m1] Y[m2] are summed per atom and coupled once per atom. Channels are treated in blocks: a block's
// part of the radial table and of the features stays in a core's cache while all atoms pass.
#pragma once
#include <algorithm>
#include <vector>

#include "radial.h"

namespace MDPLUG_ISA {

struct Paths {
  int n_paths, n_outer, n_out, n_sent, n_harmonics;
  std::vector<int> l1, l2, outer;        // outer: first outer component of each path
  std::vector<int64_t> base, stride;     // of each output component (path, m3): see `layout`
  std::vector<int> starts;               // of the coupling terms of each output component
  std::vector<int> by_outer, by_outer_start;  // the same terms, by outer component
  const MdplugConvolution& shape;

  explicit Paths(const MdplugConvolution& s) : shape(s) {
    n_paths = int(s.n_paths);
    n_sent = int((s.l_in + 1) * (s.l_in + 1));
    n_harmonics = int((s.l_max + 1) * (s.l_max + 1));
    n_outer = n_out = 0;
    for (int p = 0; p < n_paths; ++p) {
      const int32_t* l = s.paths + 3 * p;
      l1.push_back(l[0]);
      l2.push_back(l[1]);
      outer.push_back(n_outer);
      n_outer += (2 * l[0] + 1) * (2 * l[1] + 1);
      n_out += 2 * l[2] + 1;
    }
    starts.assign(n_out + 1, 0);
    by_outer_start.assign(n_outer + 1, 0);
    for (int64_t t = 0; t < s.n_coupling; ++t) {
      ++starts[s.coupling[2 * t + 1] + 1];
      ++by_outer_start[s.coupling[2 * t] + 1];
    }
    for (int o = 0; o < n_out; ++o) starts[o + 1] += starts[o];
    for (int q = 0; q < n_outer; ++q) by_outer_start[q + 1] += by_outer_start[q];
    by_outer.resize(s.n_coupling);
    std::vector<int> at(by_outer_start.begin(), by_outer_start.end() - 1);
    for (int64_t t = 0; t < s.n_coupling; ++t) by_outer[at[s.coupling[2 * t]]++] = int(t);
  }

  // Output of n atoms: for each l3 a matrix (2 l3 + 1, n, paths to l3, k), one after another.
  void layout(int64_t n) {
    base.clear();
    stride.clear();
    int64_t offset = 0;
    for (int p = 0; p < n_paths;) {
      int to = p;
      const int l3 = shape.paths[3 * p + 2];
      while (to < n_paths && shape.paths[3 * to + 2] == l3) ++to;
      const int64_t row = (to - p) * shape.k;
      for (int q = p; q < to; ++q)
        for (int m = 0; m < 2 * l3 + 1; ++m) {
          base.push_back(offset + m * n * row + (q - p) * shape.k);
          stride.push_back(row);
        }
      offset += (2 * l3 + 1) * n * row;
      p = to;
    }
  }
};

// Features of one block of channels, atom by atom: (n, components, C).
template <class T, int C>
void pack(const T* features, int64_t n, int components, int64_t k, int64_t channel, int count, T* out,
          MdplugParallel parallel) {
  auto body = [&](int64_t chunk) {
    const int64_t end = std::min(n, (chunk + 1) * 64);
    for (int64_t i = chunk * 64; i < end; ++i)
      for (int m = 0; m < components; ++m)
        Block<T, C>::load(features + (m * n + i) * k + channel, count).store(out + (i * components + m) * C);
  };
  run(parallel, (n + 63) / 64, body);
}

template <class T, int C, int G, int M>
MDPLUG_INLINE void outer_sum(const Block<T, C>* left, const T* const* y, int first, T* sum) {
  for (int m = 0; m < M; ++m) {
    Block<T, C> s = Block<T, C>::load(sum + m * C);
    for (int g = 0; g < G; ++g) s.fma(y[g][first + m], left[g]);
    s.store(sum + m * C);
  }
}

// Adds G pairs of one receiver to its outer sums.
template <class T, int C, int G>
MDPLUG_INLINE void add_pairs(const Paths& paths, const MdplugRadial& radial, const T* table, int64_t row_stride,
                             const Knot<T>* knots, int64_t first_pair, int64_t first_value, int64_t channel, int count,
                             const T* const* h, const T* const* y, T* sums) {
  using B = Block<T, C>;
  const int64_t k = paths.shape.k;
  for (int p = 0; p < paths.n_paths; ++p) {
    B r[G];
    for (int g = 0; g < G; ++g) {
      if (table) {
        const Knot<T>& at = knots[g];
        r[g] = interpolate<T, C>(table + at.row * row_stride + p * 2 * C, row_stride, at.value);
      } else {
        const T* values = static_cast<const T*>(radial.values);
        r[g] = B::load(values + ((first_pair + g - first_value) * paths.n_paths + p) * k + channel, count);
      }
    }
    const int l1 = paths.l1[p], l2 = paths.l2[p];
    T* sum = sums + paths.outer[p] * C;
    for (int m1 = 0; m1 < 2 * l1 + 1; ++m1, sum += (2 * l2 + 1) * C) {
      B left[G];
      for (int g = 0; g < G; ++g) left[g] = r[g] * B::load(h[g] + (l1 * l1 + m1) * C);
      switch (l2) {
        case 0: outer_sum<T, C, G, 1>(left, y, 0, sum); break;
        case 1: outer_sum<T, C, G, 3>(left, y, 1, sum); break;
        case 2: outer_sum<T, C, G, 5>(left, y, 4, sum); break;
        case 3: outer_sum<T, C, G, 7>(left, y, 9, sum); break;
        default:
          for (int m = 0; m < 2 * l2 + 1; ++m) outer_sum<T, C, G, 1>(left, y, l2 * l2 + m, sum + m * C);
      }
    }
  }
}

template <class T, int C>
void convolution(const MdplugConvolution& shape, int64_t n_senders, int64_t begin, int64_t end, const T* sent,
                 const T* harmonics, const MdplugRadial& radial, const int32_t* sender, const int32_t* first, T* out,
                 MdplugParallel parallel) {
  using B = Block<T, C>;
  Paths paths(shape);
  const int64_t n = end - begin, k = shape.k, e0 = first[begin], e1 = first[end];
  paths.layout(n);
  const int n_sent = paths.n_sent, n_y = paths.n_harmonics;
  std::vector<Knot<T>> knots(radial.table ? e1 - e0 : 0);
  if (radial.table) {
    auto body = [&](int64_t chunk) {
      const int64_t last = std::min(e1, e0 + (chunk + 1) * 1024);
      for (int64_t e = e0 + chunk * 1024; e < last; ++e) knots[e - e0] = knot<T>(radial, e);
    };
    run(parallel, (e1 - e0 + 1023) / 1024, body);
  }
  std::vector<T> h(n_senders * n_sent * C);
  const int64_t atoms = n > 128 ? 16 : 4;  // per task
  const int64_t row_stride = int64_t(paths.n_paths) * 2 * C;
  for (int64_t block = 0; block * C < k; ++block) {
    const int64_t channel = block * C;
    const int count = int(std::min<int64_t>(C, k - channel));
    pack<T, C>(sent, n_senders, n_sent, k, channel, count, h.data(), parallel);
    const T* table = radial.table ? static_cast<const T*>(radial.table) + block * radial.rows * row_stride : nullptr;
    auto body = [&](int64_t task) {
      std::vector<T> sums(paths.n_outer * C);
      const int64_t last = std::min(end, begin + (task + 1) * atoms);
      for (int64_t i = begin + task * atoms; i < last; ++i) {
        std::fill(sums.begin(), sums.end(), T(0));
        int64_t e = first[i];
        constexpr int G = 4;
        for (; e + G <= first[i + 1]; e += G) {
          const T *hs[G], *ys[G];
          for (int g = 0; g < G; ++g) {
            hs[g] = h.data() + int64_t(sender[e + g]) * n_sent * C;
            ys[g] = harmonics + (e + g) * n_y;
          }
          add_pairs<T, C, G>(paths, radial, table, row_stride, knots.data() + (e - e0), e, e0, channel, count, hs, ys,
                             sums.data());
        }
        for (; e < first[i + 1]; ++e) {
          const T* hs = h.data() + int64_t(sender[e]) * n_sent * C;
          const T* ys = harmonics + e * n_y;
          add_pairs<T, C, 1>(paths, radial, table, row_stride, knots.data() + (e - e0), e, e0, channel, count, &hs, &ys,
                             sums.data());
        }
        for (int o = 0; o < paths.n_out; ++o) {
          B a = B::zero();
          for (int t = paths.starts[o]; t < paths.starts[o + 1]; ++t)
            a.fma(T(shape.coefficient[t]), B::load(sums.data() + shape.coupling[2 * t] * C));
          a.store(out + paths.base[o] + (i - begin) * paths.stride[o] + channel, count);
        }
      }
    };
    run(parallel, (n + atoms - 1) / atoms, body);
  }
}

// Cotangents along one path: t[m1] = sum over m2 of Y Q, d[m2] += sum over channels (left to the lanes) of R H Q.
template <class T, int C, int M>
MDPLUG_INLINE Block<T, C> inner_sum(const T* q, const T* y, const Block<T, C>& left, typename Native<T>::type* d) {
  using B = Block<T, C>;
  B t = B::zero();
  for (int m = 0; m < M; ++m) {
    const B a = B::load(q + m * C);
    t.fma(y[m], a);
    auto s = d[m];
    for (int i = 0; i < B::NV; ++i) s += left.v[i] * a.v[i];
    d[m] = s;
  }
  return t;
}

// With a table, grad_harmonics and grad_radial come in the order of the pairs; else in the order of this call.
template <class T, int C>
void convolution_backward(const MdplugConvolution& shape, int64_t n_senders, int64_t n_receivers, int64_t begin,
                          int64_t end, const T* sent, const T* harmonics, const MdplugRadial& radial,
                          const int32_t* receiver, const int32_t* pair, const int32_t* first, const T* grad,
                          T* grad_sent, T* grad_harmonics, T* grad_radial, MdplugParallel parallel) {
  using B = Block<T, C>;
  using V = typename Native<T>::type;
  Paths paths(shape);
  paths.layout(n_receivers);
  const int64_t k = shape.k, n = end - begin, t0 = first[begin], t1 = first[end];
  const int n_sent = paths.n_sent, n_y = paths.n_harmonics, n_outer = paths.n_outer;
  std::vector<Knot<T>> knots(radial.table ? t1 - t0 : 0);
  if (radial.table) {
    auto body = [&](int64_t chunk) {
      const int64_t last = std::min(t1, t0 + (chunk + 1) * 1024);
      for (int64_t t = t0 + chunk * 1024; t < last; ++t) knots[t - t0] = knot<T>(radial, pair[t]);
    };
    run(parallel, (t1 - t0 + 1023) / 1024, body);
    std::fill(grad_radial, grad_radial + (t1 - t0), T(0));
  }
  std::fill(grad_harmonics, grad_harmonics + (t1 - t0) * n_y, T(0));
  std::vector<T> h(n_senders * n_sent * C), q(n_receivers * n_outer * C);
  const int64_t atoms = n > 128 ? 16 : 4;
  const int64_t row_stride = int64_t(paths.n_paths) * 2 * C;
  for (int64_t block = 0; block * C < k; ++block) {
    const int64_t channel = block * C;
    const int count = int(std::min<int64_t>(C, k - channel));
    pack<T, C>(sent, n_senders, n_sent, k, channel, count, h.data(), parallel);
    auto couple = [&](int64_t chunk) {
      std::vector<T> g(paths.n_out * C);
      const int64_t last = std::min(n_receivers, (chunk + 1) * 32);
      for (int64_t i = chunk * 32; i < last; ++i) {
        for (int o = 0; o < paths.n_out; ++o)
          B::load(grad + paths.base[o] + i * paths.stride[o] + channel, count).store(g.data() + o * C);
        T* to = q.data() + i * n_outer * C;
        for (int w = 0; w < n_outer; ++w) {
          B a = B::zero();
          for (int t = paths.by_outer_start[w]; t < paths.by_outer_start[w + 1]; ++t) {
            const int term = paths.by_outer[t];
            a.fma(T(shape.coefficient[term]), B::load(g.data() + shape.coupling[2 * term + 1] * C));
          }
          a.store(to + w * C);
        }
      }
    };
    run(parallel, (n_receivers + 31) / 32, couple);
    const T* table = radial.table ? static_cast<const T*>(radial.table) + block * radial.rows * row_stride : nullptr;
    auto body = [&](int64_t task) {
      std::vector<T> dh_of(n_sent * C);
      std::vector<T> wide((n_y + 2) * Native<T>::width + 64 / sizeof(T));
      V* d = reinterpret_cast<V*>((reinterpret_cast<uintptr_t>(wide.data()) + 63) & ~uintptr_t(63));
      T* dh = dh_of.data();
      const int64_t last = std::min(end, begin + (task + 1) * atoms);
      for (int64_t a = begin + task * atoms; a < last; ++a) {
        std::fill(dh_of.begin(), dh_of.end(), T(0));
        const T* own = h.data() + a * n_sent * C;
        for (int64_t t = first[a]; t < first[a + 1]; ++t) {
          const T* y = harmonics + int64_t(pair[t]) * n_y;
          const T* from = q.data() + int64_t(receiver[pair[t]]) * n_outer * C;
          for (int m = 0; m < n_y; ++m) d[m] = V{};
          V along = V{};
          for (int p = 0; p < paths.n_paths; ++p) {
            B r, slope;
            if (table) {
              const Knot<T>& at = knots[t - t0];
              const T* row = table + at.row * row_stride + p * 2 * C;
              r = interpolate<T, C>(row, row_stride, at.value);
              slope = interpolate<T, C>(row, row_stride, at.slope);
            } else {
              const T* values = static_cast<const T*>(radial.values);
              r = B::load(values + ((t - t0) * paths.n_paths + p) * k + channel, count);
            }
            B into = B::zero();  // sum over m1 of H[m1] t[m1]: cotangent of R_p
            const int l1 = paths.l1[p], l2 = paths.l2[p];
            const T* qs = from + paths.outer[p] * C;
            for (int m1 = 0; m1 < 2 * l1 + 1; ++m1, qs += (2 * l2 + 1) * C) {
              const B feature = B::load(own + (l1 * l1 + m1) * C);
              const B left = r * feature;
              B s;
              switch (l2) {
                case 0: s = inner_sum<T, C, 1>(qs, y, left, d); break;
                case 1: s = inner_sum<T, C, 3>(qs, y + 1, left, d + 1); break;
                case 2: s = inner_sum<T, C, 5>(qs, y + 4, left, d + 4); break;
                case 3: s = inner_sum<T, C, 7>(qs, y + 9, left, d + 9); break;
                default: {
                  s = B::zero();
                  for (int m = 0; m < 2 * l2 + 1; ++m)
                    s.add(inner_sum<T, C, 1>(qs + m * C, y + l2 * l2 + m, left, d + l2 * l2 + m));
                }
              }
              into.fma(feature, s);
              B own_grad = B::load(dh + (l1 * l1 + m1) * C);
              own_grad.fma(r, s);
              own_grad.store(dh + (l1 * l1 + m1) * C);
            }
            if (table) {
              for (int i = 0; i < B::NV; ++i) along += slope.v[i] * into.v[i];
            } else {
              into.store(grad_radial + ((t - t0) * paths.n_paths + p) * k + channel, count);
            }
          }
          const int64_t to = table ? pair[t] : t - t0;
          lane_sums<T>(d, n_y, grad_harmonics + to * n_y);
          if (table) grad_radial[to] += lanes<T>(along);
        }
        for (int m = 0; m < n_sent; ++m)
          B::load(dh + m * C).store(grad_sent + (m * n + (a - begin)) * k + channel, count);
      }
    };
    run(parallel, (n + atoms - 1) / atoms, body);
  }
}

}  // namespace MDPLUG_ISA
