// Messages: A[p, m3] = sum over pairs, m1, m2 of CG[m1, m2, m3] R_p(r) H[m1] Y[m2], and its adjoint.
//
// Outer products R_p H[m1] Y[m2] are summed per atom and coupled once per atom. Channels are treated in blocks, paths in
// groups of one l2: what a group needs of the radial table stays in the first-level cache while some atoms pass.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "radial.h"

namespace MDPLUG_ISA {

constexpr int kAhead = 4;  // pairs

struct Term {
  int outer, out;  // within the group: block of the outer sums; of all: output component
  double value;
};

struct Path {
  int number, l1, outer;  // outer: its first block among those of the group
};

struct Group {
  int l2, n_outer = 0;
  std::vector<Path> paths;
  std::vector<Term> terms;     // sorted by output component
  std::vector<Term> by_outer;  // the same, by outer block
};

struct Paths {
  int n_paths, n_out, n_sent, n_harmonics;
  std::vector<Group> groups;
  std::vector<int64_t> base, stride;  // of each output component (path, m3): see `layout`
  const MdplugConvolution& shape;

  explicit Paths(const MdplugConvolution& s) : shape(s) {
    n_paths = int(s.n_paths);
    n_sent = int((s.l_in + 1) * (s.l_in + 1));
    n_harmonics = int((s.l_max + 1) * (s.l_max + 1));
    n_out = 0;
    std::vector<int> first_outer(n_paths + 1, 0);
    for (int p = 0; p < n_paths; ++p) {
      const int32_t* l = s.paths + 3 * p;
      first_outer[p + 1] = first_outer[p] + (2 * l[0] + 1) * (2 * l[1] + 1);
      n_out += 2 * l[2] + 1;
    }
    for (int l2 = 0; l2 <= s.l_max; ++l2) {
      Group g;
      g.l2 = l2;
      for (int p = 0; p < n_paths; ++p) {
        if (s.paths[3 * p + 1] != l2) continue;
        g.paths.push_back({p, s.paths[3 * p], g.n_outer});
        for (int64_t t = 0; t < s.n_coupling; ++t)
          if (s.coupling[2 * t] >= first_outer[p] && s.coupling[2 * t] < first_outer[p + 1])
            g.terms.push_back({g.n_outer + s.coupling[2 * t] - first_outer[p], s.coupling[2 * t + 1], s.coefficient[t]});
        g.n_outer += first_outer[p + 1] - first_outer[p];
      }
      if (g.paths.empty()) continue;
      auto order = [](const Term& a, const Term& b) { return a.out < b.out; };
      auto outer = [](const Term& a, const Term& b) { return a.outer < b.outer; };
      std::stable_sort(g.terms.begin(), g.terms.end(), order);
      g.by_outer = g.terms;
      std::stable_sort(g.by_outer.begin(), g.by_outer.end(), outer);
      groups.push_back(g);
    }
  }

  // Numbers of one row of the values, (blocks, P, C).
  int64_t value_row(int64_t block) const { return (shape.k + block - 1) / block * block * n_paths; }

  // Output of n atoms: for each l3 a matrix (2 l3 + 1, n, paths to l3, k), one after another.
  void layout(int64_t n) {
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

// One call's arrays, for one block of channels. Kernels copy it: stores of vectors may alias anything but locals.
template <class T, int C>
struct Slice {
  const T* table;                // of the block, or null
  const T* values;               // of the block in the first row, where there is no table
  const Knot<T>* knots;          // of the call's first pair
  const T* h;                    // (n_senders, components, C)
  const T* harmonics;
  const int32_t *sender, *first, *kind;
  const int64_t *base, *out_stride;  // of the output components, see Paths::layout
  int64_t begin, e0, channel, knot_stride, value_row;
  int count, n_sent, n_harmonics;

  MDPLUG_INLINE const T* row(int path, int64_t e) const {
    return table + knots[e - e0].row * knot_stride + path * (kOrders * C);
  }
  MDPLUG_INLINE Block<T, C> radial_of(int path, int64_t e) const {
    if (table) return interpolate<T, C>(row(path, e), knot_stride, knots[e - e0].value);
    return Block<T, C>::load(values + value(path, e));
  }
  // Place of a pair's radial function among the values; pairs may share a row.
  MDPLUG_INLINE int64_t value(int path, int64_t e) const { return (kind ? kind[e] : e - e0) * value_row + path * C; }
  // Asks for the values of a later pair, and for where their cotangents go (or null): neighbours lie far apart.
  MDPLUG_INLINE void expect(const Path* paths, const Path* end, int64_t e, const T* other, const T* cotangents) const {
    for (; paths != end; ++paths) {
      const int64_t at = value(paths->number, e);
      __builtin_prefetch(values + at);
      if (other) __builtin_prefetch(other + at);
      if (cotangents) __builtin_prefetch(cotangents + at, 1);
    }
  }
  MDPLUG_INLINE const T* features(int64_t e) const { return h + int64_t(sender[e]) * n_sent * C; }
};

// Interpolation weights of pairs e0..e1; one entry where there is no table.
template <class T>
std::vector<Knot<T>> all_knots(const MdplugRadial& radial, int64_t e0, int64_t e1, MdplugParallel parallel) {
  std::vector<Knot<T>> knots(radial.table ? e1 - e0 : 1);
  auto body = [&](int64_t chunk) {
    const int64_t last = std::min(e1, e0 + (chunk + 1) * 1024);
    for (int64_t e = e0 + chunk * 1024; e < last; ++e) knots[e - e0] = knot<T>(radial, e);
  };
  if (radial.table) run(parallel, (e1 - e0 + 1023) / 1024, body);
  return knots;
}

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

// Calls f with 2 l2 + 1 as a constant.
template <class F>
MDPLUG_INLINE void with_width(int l2, F&& f) {
  switch (l2) {
    case 0: return f(std::integral_constant<int, 1>());
    case 1: return f(std::integral_constant<int, 3>());
    case 2: return f(std::integral_constant<int, 5>());
    case 3: return f(std::integral_constant<int, 7>());
    case 4: return f(std::integral_constant<int, 9>());
    case 5: return f(std::integral_constant<int, 11>());
    default: throw std::runtime_error("mdplug kernels: harmonics beyond l = 5");
  }
}

// Adds G pairs of one receiver, from e on, to its outer sums of a group.
template <class T, int C, int M, int G>
MDPLUG_INLINE void add_pairs(const Slice<T, C>& s, const Path* paths, const Path* end, int from_y, int64_t e, T* sums) {
  using B = Block<T, C>;
  const T *h[G], *y[G];
  for (int g = 0; g < G; ++g) {
    h[g] = s.features(e + g);
    y[g] = s.harmonics + (e + g) * s.n_harmonics + from_y;
  }
  for (; paths != end; ++paths) {
    const Path path = *paths;
    B r[G];
    for (int g = 0; g < G; ++g) r[g] = s.radial_of(path.number, e + g);
    T* sum = sums + path.outer * C;
    const int64_t from = path.l1 * path.l1 * C, to = (path.l1 + 1) * (path.l1 + 1) * C;
    for (int64_t at = from; at < to; at += C, sum += M * C) {
      B left[G];
      for (int g = 0; g < G; ++g) left[g] = r[g] * B::load(h[g] + at);
      for (int m = 0; m < M; ++m) {
        B total = B::load(sum + m * C);
        for (int g = 0; g < G; ++g) total.fma(y[g][m], left[g]);
        total.store(sum + m * C);
      }
    }
  }
}

// Messages of receiver i from the outer sums of a group.
template <class T, int C>
MDPLUG_INLINE void couple(const Slice<T, C>& s, const Group& group, int64_t i, const T* sums, T* out) {
  using B = Block<T, C>;
  const Term *term = group.terms.data(), *end = term + group.terms.size();
  while (term != end) {
    const int o = term->out;
    B a = B::zero();
    for (; term != end && term->out == o; ++term) a.fma(T(term->value), B::load(sums + term->outer * C));
    a.store(out + s.base[o] + (i - s.begin) * s.out_stride[o] + s.channel, s.count);
  }
}

template <class T, int C, int M>
void group_forward(const Slice<T, C> s, const Group& group, int64_t from, int64_t to, T* sums, T* out) {
  constexpr int G = Block<T, C>::NV <= 2 ? 4 : 2;  // as many as the registers hold
  const Path *paths = group.paths.data(), *end = paths + group.paths.size();
  const int from_y = group.l2 * group.l2;
  for (int64_t i = from; i < to; ++i) {
    std::memset(sums, 0, sizeof(T) * group.n_outer * C);
    const int64_t last = s.first[i + 1];
    int64_t e = s.first[i];
    for (; e + G <= last; e += G) {
      if (s.values)
        for (int g = 0; g < G; ++g)
          if (e + kAhead + g < last) s.expect(paths, end, e + kAhead + g, nullptr, nullptr);
      add_pairs<T, C, M, G>(s, paths, end, from_y, e, sums);
    }
    for (; e < last; ++e) add_pairs<T, C, M, 1>(s, paths, end, from_y, e, sums);
    couple<T, C>(s, group, i, sums, out);
  }
}

// What a call's blocks of channels have in common.
template <class T, int C>
Slice<T, C> slice_of(const Paths& paths, const MdplugRadial& radial, const std::vector<Knot<T>>& knots, const T* h,
                     const T* harmonics, const int32_t* sender, const int32_t* first, int64_t begin, int64_t block) {
  const int64_t k = paths.shape.k, channel = block * C, stride = int64_t(paths.n_paths) * kOrders * C;
  const T* table = static_cast<const T*>(radial.table);
  return {table ? table + block * radial.rows * stride : nullptr,
          radial.values ? static_cast<const T*>(radial.values) + block * paths.n_paths * C : nullptr,
          knots.data(),
          h,
          harmonics,
          sender,
          first,
          radial.kind,
          paths.base.data(),
          paths.stride.data(),
          begin,
          first[begin],
          channel,
          stride,
          paths.value_row(C),
          int(std::min<int64_t>(C, k - channel)),
          paths.n_sent,
          paths.n_harmonics};
}

template <class T, int C>
void convolution(const MdplugConvolution& shape, int64_t n_senders, int64_t begin, int64_t end, const T* sent,
                 const T* harmonics, const MdplugRadial& radial, const int32_t* sender, const int32_t* first, T* out,
                 MdplugParallel parallel) {
  Paths paths(shape);
  const int64_t n = end - begin, k = shape.k, e0 = first[begin], e1 = first[end];
  paths.layout(n);
  const std::vector<Knot<T>> knots = all_knots<T>(radial, e0, e1, parallel);
  Scratch<T> h(n_senders * paths.n_sent * C);
  const int64_t atoms = n >= 64 ? 16 : 4;  // per task
  for (int64_t block = 0; block * C < k; ++block) {
    const Slice<T, C> slice = slice_of<T, C>(paths, radial, knots, h.data(), harmonics, sender, first, begin, block);
    pack<T, C>(sent, n_senders, paths.n_sent, k, slice.channel, slice.count, h.data(), parallel);
    auto body = [&](int64_t task) {
      const int64_t from = begin + task * atoms, to = std::min(end, from + atoms);
      for (const Group& group : paths.groups) {
        Scratch<T> sums(group.n_outer * C);
        with_width(group.l2, [&](auto m) { group_forward<T, C, m()>(slice, group, from, to, sums.data(), out); });
      }
    };
    run(parallel, (n + atoms - 1) / atoms, body);
  }
}

// Cotangents q of the outer sums of receiver i, from those of its messages.
template <class T, int C>
MDPLUG_INLINE void uncouple(const Slice<T, C>& s, const Group& group, int64_t i, const T* grad, T* q) {
  using B = Block<T, C>;
  const Term *term = group.by_outer.data(), *end = term + group.by_outer.size();
  while (term != end) {
    const int w = term->outer;
    B a = B::zero();
    for (; term != end && term->outer == w; ++term) {
      const T* g = grad + s.base[term->out] + (i - s.begin) * s.out_stride[term->out] + s.channel;
      a.fma(T(term->value), B::load(g, s.count));
    }
    a.store(q + w * C);
  }
}

// What the pairs of receivers from..to give through one group: dh of all senders, dy and dr (or dvalues) of the pairs.
template <class T, int C, int M>
void group_backward(const Slice<T, C> s, const Group& group, int64_t from, int64_t to, const T* grad, T* q, T* dh,
                    T* dy, T* dr) {
  using B = Block<T, C>;
  using V = typename Native<T>::type;
  const int n_sent = s.n_sent, n_y = s.n_harmonics, from_y = group.l2 * group.l2;
  const Path *paths = group.paths.data(), *end = paths + group.paths.size();
  constexpr int N = (M + 4) / 4 * 4;  // derivatives by Y, then by r
  std::memset(q, 0, sizeof(T) * group.n_outer * C);  // some (m1, m2) couple to nothing
  for (int64_t i = from; i < to; ++i) {
    uncouple<T, C>(s, group, i, grad, q);
    const int64_t last = s.first[i + 1];
    for (int64_t e = s.first[i]; e < last; ++e) {
      if (s.values && e + kAhead < last) s.expect(paths, end, e + kAhead, nullptr, dr);
      const T *y = s.harmonics + e * n_y + from_y, *own = s.features(e);
      T* to_sender = dh + int64_t(s.sender[e]) * n_sent * C;
      V d[N];
      for (int m = 0; m < N; ++m) d[m] = V{};
      for (const Path* p = paths; p != end; ++p) {
        const Path path = *p;
        B r, slope = B::zero();
        if (s.table)
          interpolate<T, C>(s.row(path.number, e), s.knot_stride, s.knots[e - s.e0], r, slope);
        else
          r = s.radial_of(path.number, e);
        B into = B::zero();  // sum over m1 of H[m1] t[m1]: cotangent of R_p
        const T* qs = q + path.outer * C;
        const int64_t start = path.l1 * path.l1 * C, stop = (path.l1 + 1) * (path.l1 + 1) * C;
        for (int64_t at = start; at < stop; at += C, qs += M * C) {
          const B feature = B::load(own + at), left = r * feature;
          B t = B::zero();  // sum over m2 of Y Q
          for (int m = 0; m < M; ++m) {
            const B a = B::load(qs + m * C);
            t.fma(y[m], a);
            d[m] += left.dot(a);
          }
          into.fma(feature, t);
          B total = B::load(to_sender + at);
          total.fma(r, t);
          total.store(to_sender + at);
        }
        if (s.table) {
          d[M] += slope.dot(into);
        } else {
          T* row = dr + s.value(path.number, e);
          into.add(B::load(row));
          into.store(row);
        }
      }
      T sums[N];
      lane_sums<T>(d, N, sums);
      T* to_y = dy + (e - s.e0) * n_y + from_y;
      for (int m = 0; m < M; ++m) to_y[m] += sums[m];
      if (s.table) dr[e - s.e0] += sums[M];
    }
  }
}

// dy and dr of all pairs of receivers from..to, dh (senders, components, C) of all senders: added to.
template <class T, int C>
void backward_part(const Paths& paths, const Slice<T, C>& slice, int64_t from, int64_t to, const T* grad, T* dh, T* dy,
                   T* dr) {
  const int64_t atoms = slice.table ? 16 : 1;  // values of a pair are used by this pair alone
  for (int64_t i = from; i < to; i += atoms)
    for (const Group& group : paths.groups) {
      Scratch<T> q(group.n_outer * C);
      with_width(group.l2, [&](auto m) {
        group_backward<T, C, m()>(slice, group, i, std::min(to, i + atoms), grad, q.data(), dh, dy, dr);
      });
    }
}

// Features of a block of channels, (parts, senders, components, C) summed over the parts in order, back in their layout.
template <class T, int C>
void unpack(const T* packed, int64_t parts, int64_t n, int components, int64_t k, int64_t channel, int count, T* out,
            MdplugParallel parallel) {
  using B = Block<T, C>;
  auto body = [&](int64_t chunk) {
    const int64_t last = std::min(n, (chunk + 1) * 64);
    for (int64_t j = chunk * 64; j < last; ++j)
      for (int m = 0; m < components; ++m) {
        B sum = B::zero();
        for (int64_t part = 0; part < parts; ++part) sum.add(B::load(packed + ((part * n + j) * components + m) * C));
        sum.store(out + (m * n + j) * k + channel, count);
      }
  };
  run(parallel, (n + 63) / 64, body);
}

// With a table, receivers are split into a number of parts that does not depend on the threads; each part has its own
// sum over senders, and the parts are added in order: the same result, bit for bit, on any number of threads.
template <class T, int C>
void convolution_backward(const MdplugConvolution& shape, int64_t n_senders, int64_t begin, int64_t end, const T* sent,
                          const T* harmonics, const MdplugRadial& radial, const int32_t* sender, const int32_t* first,
                          const T* grad, T* grad_sent, T* grad_harmonics, T* grad_radial, MdplugParallel parallel) {
  Paths paths(shape);
  const int64_t k = shape.k, n = end - begin, e0 = first[begin], e1 = first[end];
  paths.layout(n);
  const int n_sent = paths.n_sent, size = n_sent * C;
  const std::vector<Knot<T>> knots = all_knots<T>(radial, e0, e1, parallel);
  std::memset(grad_radial, 0, sizeof(T) * (e1 - e0));
  std::memset(grad_harmonics, 0, sizeof(T) * (e1 - e0) * paths.n_harmonics);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(8, n / 4));
  Scratch<T> h(n_senders * size), dh(parts * n_senders * size);
  for (int64_t block = 0; block * C < k; ++block) {
    const Slice<T, C> slice = slice_of<T, C>(paths, radial, knots, h.data(), harmonics, sender, first, begin, block);
    pack<T, C>(sent, n_senders, n_sent, k, slice.channel, slice.count, h.data(), parallel);
    auto body = [&](int64_t part) {
      T* sums = dh.data() + part * n_senders * size;
      std::memset(sums, 0, sizeof(T) * n_senders * size);
      backward_part<T, C>(paths, slice, begin + n * part / parts, begin + n * (part + 1) / parts, grad, sums,
                          grad_harmonics, grad_radial);
    };
    run(parallel, parts, body);
    unpack<T, C>(dh.data(), parts, n_senders, n_sent, k, slice.channel, slice.count, grad_sent, parallel);
  }
}

}  // namespace MDPLUG_ISA
