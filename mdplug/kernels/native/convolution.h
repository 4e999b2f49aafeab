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

// One call's arrays, for one block of channels.
template <class T, int C>
struct Slice {
  const Paths& paths;
  const MdplugRadial& radial;
  const T* table;                // of the block, or null
  const T* values;               // of the block in the first row, where there is no table
  const std::vector<Knot<T>>& knots;
  const T* h;                    // (n_senders, components, C)
  const T* harmonics;
  const int32_t *sender, *first;
  int64_t begin, e0, channel;
  int count;

  MDPLUG_INLINE const T* row(const Path& path, int64_t e, int64_t stride) const {
    return table + knots[e - e0].row * stride + path.number * kOrders * C;
  }
  MDPLUG_INLINE Block<T, C> radial_of(const Path& path, int64_t e) const {
    const int64_t stride = int64_t(paths.n_paths) * kOrders * C;
    if (table) return interpolate<T, C>(row(path, e, stride), stride, knots[e - e0].value);
    return Block<T, C>::load(values + value(path, e));
  }
  // Place of a pair's radial function among the values; pairs may share a row.
  MDPLUG_INLINE int64_t value(const Path& path, int64_t e) const {
    return (radial.kind ? radial.kind[e] : e - e0) * paths.value_row(C) + path.number * C;
  }
  // Asks for the values of a later pair, and for where their cotangents go (or null): neighbours lie far apart.
  MDPLUG_INLINE void expect(const Group& group, int64_t e, const T* other, const T* cotangents) const {
    for (const Path& path : group.paths) {
      const int64_t at = value(path, e);
      __builtin_prefetch(values + at);
      if (other) __builtin_prefetch(other + at);
      if (cotangents) __builtin_prefetch(cotangents + at, 1);
    }
  }
  MDPLUG_INLINE const T* features(int64_t e) const { return h + int64_t(sender[e]) * paths.n_sent * C; }
};

// Where one block of channels of the table, or of the values, begins; null where there is none.
template <class T, int C>
const T* table_of(const MdplugRadial& radial, const Paths& paths, int64_t block) {
  if (!radial.table) return nullptr;
  return static_cast<const T*>(radial.table) + block * radial.rows * paths.n_paths * kOrders * C;
}
template <class T, int C>
const T* values_of(const MdplugRadial& radial, const Paths& paths, int64_t block) {
  return radial.values ? static_cast<const T*>(radial.values) + block * paths.n_paths * C : nullptr;
}

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
MDPLUG_INLINE void add_pairs(const Slice<T, C>& s, const Group& group, int64_t e, T* sums) {
  using B = Block<T, C>;
  const T *h[G], *y[G];
  for (int g = 0; g < G; ++g) {
    h[g] = s.features(e + g);
    y[g] = s.harmonics + (e + g) * s.paths.n_harmonics + group.l2 * group.l2;
  }
  for (const Path& path : group.paths) {
    B r[G];
    for (int g = 0; g < G; ++g) r[g] = s.radial_of(path, e + g);
    T* sum = sums + path.outer * C;
    for (int m1 = 0; m1 < 2 * path.l1 + 1; ++m1, sum += M * C) {
      B left[G];
      for (int g = 0; g < G; ++g) left[g] = r[g] * B::load(h[g] + (path.l1 * path.l1 + m1) * C);
      for (int m = 0; m < M; ++m) {
        B total = B::load(sum + m * C);
        for (int g = 0; g < G; ++g) total.fma(y[g][m], left[g]);
        total.store(sum + m * C);
      }
    }
  }
}

// Cotangents of the outer sums of a group, from those of the messages of receiver i.
template <class T, int C>
MDPLUG_INLINE void uncouple(const Slice<T, C>& s, const Group& group, int64_t i, const T* grad, T* q) {
  using B = Block<T, C>;
  for (size_t t = 0; t < group.by_outer.size();) {
    const int w = group.by_outer[t].outer;
    B a = B::zero();
    for (; t < group.by_outer.size() && group.by_outer[t].outer == w; ++t) {
      const int o = group.by_outer[t].out;
      const T* g = grad + s.paths.base[o] + (i - s.begin) * s.paths.stride[o] + s.channel;
      a.fma(T(group.by_outer[t].value), B::load(g, s.count));
    }
    a.store(q + w * C);
  }
}

// Messages of receiver i from the outer sums of a group.
template <class T, int C>
MDPLUG_INLINE void couple(const Slice<T, C>& s, const Group& group, int64_t i, const T* sums, T* out) {
  using B = Block<T, C>;
  for (size_t t = 0; t < group.terms.size();) {
    const int o = group.terms[t].out;
    B a = B::zero();
    for (; t < group.terms.size() && group.terms[t].out == o; ++t)
      a.fma(T(group.terms[t].value), B::load(sums + group.terms[t].outer * C));
    a.store(out + s.paths.base[o] + (i - s.begin) * s.paths.stride[o] + s.channel, s.count);
  }
}

template <class T, int C, int M>
void group_forward(const Slice<T, C>& s, const Group& group, int64_t from, int64_t to, T* sums, T* out) {
  constexpr int G = Block<T, C>::NV <= 2 ? 4 : 2;  // as many as the registers hold
  for (int64_t i = from; i < to; ++i) {
    std::memset(sums, 0, sizeof(T) * group.n_outer * C);
    int64_t e = s.first[i];
    for (; e + G <= s.first[i + 1]; e += G) {
      if (s.values)
        for (int g = 0; g < G; ++g)
          if (e + kAhead + g < s.first[i + 1]) s.expect(group, e + kAhead + g, nullptr, nullptr);
      add_pairs<T, C, M, G>(s, group, e, sums);
    }
    for (; e < s.first[i + 1]; ++e) add_pairs<T, C, M, 1>(s, group, e, sums);
    couple<T, C>(s, group, i, sums, out);
  }
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
    const int64_t channel = block * C;
    const int count = int(std::min<int64_t>(C, k - channel));
    pack<T, C>(sent, n_senders, paths.n_sent, k, channel, count, h.data(), parallel);
    const Slice<T, C> slice{paths, radial, table_of<T, C>(radial, paths, block), values_of<T, C>(radial, paths, block),
                            knots, h.data(), harmonics, sender, first, begin, e0, channel, count};
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

// What the pairs of receivers from..to give through one group: dh of all senders, dy and dr (or dvalues) of the pairs.
template <class T, int C, int M>
void group_backward(const Slice<T, C>& s, const Group& group, int64_t from, int64_t to, const T* grad, T* q, T* dh,
                    T* dy, T* dr) {
  using B = Block<T, C>;
  using V = typename Native<T>::type;
  const int n_sent = s.paths.n_sent, n_y = s.paths.n_harmonics;
  std::memset(q, 0, sizeof(T) * group.n_outer * C);  // some (m1, m2) couple to nothing
  for (int64_t i = from; i < to; ++i) {
    uncouple<T, C>(s, group, i, grad, q);
    for (int64_t e = s.first[i]; e < s.first[i + 1]; ++e) {
      if (s.values && e + kAhead < s.first[i + 1]) s.expect(group, e + kAhead, nullptr, dr);
      const T *y = s.harmonics + e * n_y + group.l2 * group.l2, *own = s.features(e);
      T* to_sender = dh + int64_t(s.sender[e]) * n_sent * C;
      constexpr int N = (M + 4) / 4 * 4;  // derivatives by Y, then by r
      V d[N];
      for (int m = 0; m < N; ++m) d[m] = V{};
      for (const Path& path : group.paths) {
        B r, slope = B::zero();
        const int64_t stride = int64_t(s.paths.n_paths) * kOrders * C;
        if (s.table)
          interpolate<T, C>(s.row(path, e, stride), stride, s.knots[e - s.e0], r, slope);
        else
          r = s.radial_of(path, e);
        B into = B::zero();  // sum over m1 of H[m1] t[m1]: cotangent of R_p
        const T* qs = q + path.outer * C;
        for (int m1 = 0; m1 < 2 * path.l1 + 1; ++m1, qs += M * C) {
          const B feature = B::load(own + (path.l1 * path.l1 + m1) * C), left = r * feature;
          B t = B::zero();  // sum over m2 of Y Q
          for (int m = 0; m < M; ++m) {
            const B a = B::load(qs + m * C);
            t.fma(y[m], a);
            for (int v = 0; v < B::NV; ++v) d[m] += left.v[v] * a.v[v];
          }
          into.fma(feature, t);
          T* sum = to_sender + (path.l1 * path.l1 + m1) * C;
          B total = B::load(sum);
          total.fma(r, t);
          total.store(sum);
        }
        if (s.table)
          for (int v = 0; v < B::NV; ++v) d[M] += slope.v[v] * into.v[v];
        else {
          T* row = dr + s.value(path, e);
          into.add(B::load(row));
          into.store(row);
        }
      }
      T sums[N];
      lane_sums<T>(d, N, sums);
      T* to_y = dy + (e - s.e0) * n_y + group.l2 * group.l2;
      for (int m = 0; m < M; ++m) to_y[m] += sums[m];
      if (s.table) dr[e - s.e0] += sums[M];
    }
  }
}

// dy and dr of all pairs of receivers from..to, dh (senders, components, C) of all senders: added to.
template <class T, int C>
void backward_part(const Slice<T, C>& slice, int64_t from, int64_t to, const T* grad, T* dh, T* dy, T* dr) {
  const int64_t atoms = slice.table ? 16 : 1;  // values of a pair are used by this pair alone
  for (int64_t i = from; i < to; i += atoms)
    for (const Group& group : slice.paths.groups) {
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
    const int64_t channel = block * C;
    const int count = int(std::min<int64_t>(C, k - channel));
    pack<T, C>(sent, n_senders, n_sent, k, channel, count, h.data(), parallel);
    const Slice<T, C> slice{paths, radial, table_of<T, C>(radial, paths, block), nullptr, knots, h.data(), harmonics,
                            sender, first, begin, e0, channel, count};
    auto body = [&](int64_t part) {
      T* sums = dh.data() + part * n_senders * size;
      std::memset(sums, 0, sizeof(T) * n_senders * size);
      backward_part<T, C>(slice, begin + n * part / parts, begin + n * (part + 1) / parts, grad, sums, grad_harmonics,
                          grad_radial);
    };
    run(parallel, parts, body);
    unpack<T, C>(dh.data(), parts, n_senders, n_sent, k, channel, count, grad_sent, parallel);
  }
}

}  // namespace MDPLUG_ISA
