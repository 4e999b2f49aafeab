// What follows the messages of a layer, atom by atom in blocks that stay in the cache: a matrix per irrep, division by
// the density, the polynomial, another matrix per irrep; and the adjoint. And matrices per irrep alone.
#pragma once
#include "polynomial.h"

namespace MDPLUG_ISA {

constexpr int64_t kAtoms = 12;  // a block of them; whole tiles for every instruction set

// Blocks of consecutive atoms of one group.
inline std::vector<int64_t> blocks_of(int64_t n, const int32_t* group) {
  std::vector<int64_t> starts{0};
  for (int64_t i = 1; i < n; ++i)
    if (i - starts.back() == kAtoms || (group && group[i] != group[i - 1])) starts.push_back(i);
  if (n > 0) starts.push_back(n);
  return starts;
}

// Sizes that both directions need.
template <class T>
struct ProductSizes {
  int64_t n_irreps, k_padded, group = 0;  // group: numbers in the matrices of one group of receivers
  std::vector<int64_t> matrix, message;   // where those of each irrep begin
  ProductSizes(const MdplugProduct& p, bool transposed) : n_irreps(p.l_max + 1), k_padded(padded<T>(p.k)) {
    int64_t offset = 0;
    for (int64_t l = 0; l < n_irreps; ++l) {
      matrix.push_back(group);
      message.push_back(offset);
      group += transposed ? p.k * padded<T>(p.rows[l]) : p.rows[l] * k_padded;
      offset += (2 * l + 1) * p.n * p.rows[l];
    }
  }
};

inline int64_t degree(int64_t component) {
  int64_t l = 0;
  while ((l + 1) * (l + 1) <= component) ++l;
  return l;
}

template <class T>
void product(const MdplugProduct& p, const T* messages, const T* linear, const T* norm, const T* coefficients,
             const T* mix, T* out, T* mixed, MdplugParallel parallel) {
  constexpr int C = kLane<T>;
  const MdplugPolynomial& s = *p.polynomial;
  const ProductSizes<T> size(p, false);
  const int64_t n = p.n, k = p.k, width = size.k_padded, blocks = width / C, mix_size = k * padded<T>(p.k_out);
  const std::vector<int64_t> starts = blocks_of(n, p.group);
  auto body = [&](int64_t task) {
    const int64_t from = starts[task], count = starts[task + 1] - from;
    Scratch<T> x((s.n_inputs + s.n_nodes) * C), products(s.n_outputs * kAtoms * width);
    const T* weights = linear + (p.group ? p.group[from] : 0) * size.group;
    for (int64_t l = 0, m = 0; l < size.n_irreps; ++l)
      for (int64_t a = 0; a < 2 * l + 1; ++a, ++m) {
        T* to = mixed + (m * n + from) * k;
        multiply<T>(count, p.rows[l], k, messages + size.message[l] + (a * n + from) * p.rows[l], p.rows[l],
                    weights + size.matrix[l], nullptr, to, k);
        if (norm)
          for (int64_t i = 0; i < count; ++i)
            for (int64_t c = 0; c < k; ++c) to[i * k + c] *= norm[from + i];
      }
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = block * C;
      const int lanes = int(std::min<int64_t>(C, k - channel));
      for (int64_t i = 0; i < count; ++i) {
        fill<T, C>(s, n, k, mixed, from + i, channel, lanes, x.data());
        const int64_t kind = p.kind ? p.kind[from + i] : 0;
        const T* c = coefficients + (kind * blocks + block) * s.n_terms * C;
        for (int64_t o = 0; o < s.n_outputs; ++o)
          output<T, C>(s, x.data(), c, o).store(products.data() + (o * kAtoms + i) * width + channel);
      }
    }
    for (int64_t o = 0; o < s.n_outputs; ++o)
      multiply<T>(count, k, p.k_out, products.data() + o * kAtoms * width, width, mix + degree(o) * mix_size, nullptr,
                  out + (o * n + from) * p.k_out, p.k_out);
  };
  run(parallel, int64_t(starts.size()) - 1, body);
}

// linear and mix are those of the forward pass, transposed. grad_norm: by the density, where there is one.
template <class T>
void product_backward(const MdplugProduct& p, const T* grad, const T* mixed, const T* linear, const T* norm,
                      const T* coefficients, const T* mix, T* grad_messages, T* grad_density, MdplugParallel parallel) {
  constexpr int C = kLane<T>;
  using B = Block<T, C>;
  const MdplugPolynomial& s = *p.polynomial;
  const ProductSizes<T> size(p, true);
  const int64_t n = p.n, k = p.k, width = size.k_padded, blocks = width / C, entries = s.n_inputs + s.n_nodes;
  const std::vector<int64_t> starts = blocks_of(n, p.group);
  const Uses uses(s);
  auto body = [&](int64_t task) {
    const int64_t from = starts[task], count = starts[task + 1] - from;
    Scratch<T> work((entries + uses.places(s)) * C), outer(s.n_outputs * kAtoms * width), inner(s.n_inputs * kAtoms * width);
    T *x = work.data(), *d = x + entries * C, *g = outer.data(), *back = inner.data();
    for (int64_t o = 0; o < s.n_outputs; ++o)
      multiply<T>(count, p.k_out, width, grad + (o * n + from) * p.k_out, p.k_out, mix + degree(o) * p.k_out * width,
                  nullptr, g + o * kAtoms * width, width);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = block * C;
      const int lanes = int(std::min<int64_t>(C, k - channel));
      for (int64_t i = 0; i < count; ++i) {
        fill<T, C>(s, n, k, mixed, from + i, channel, lanes, x);
        const int64_t kind = p.kind ? p.kind[from + i] : 0;
        const T* c = coefficients + (kind * blocks + block) * s.n_terms * C;
        const T* found = gradient<T, C>(s, uses, x, c, g + i * width + channel, kAtoms * width, d);
        for (int64_t m = 0; m < s.n_inputs; ++m)
          B::load(found + m * C).store(back + (m * kAtoms + i) * width + channel);
      }
    }
    if (norm)
      for (int64_t i = 0; i < count; ++i) {
        T sum = 0;
        for (int64_t m = 0; m < s.n_inputs; ++m) {
          T* row = back + (m * kAtoms + i) * width;
          const T* value = mixed + (m * n + from + i) * k;
          for (int64_t c = 0; c < k; ++c) sum += row[c] * value[c];
          for (int64_t c = 0; c < k; ++c) row[c] *= norm[from + i];
        }
        grad_density[from + i] = -sum * norm[from + i];
      }
    const T* weights = linear + (p.group ? p.group[from] : 0) * size.group;
    for (int64_t l = 0, m = 0; l < size.n_irreps; ++l)
      for (int64_t a = 0; a < 2 * l + 1; ++a, ++m)
        multiply<T>(count, k, p.rows[l], back + m * kAtoms * width, width, weights + size.matrix[l], nullptr,
                    grad_messages + size.message[l] + (a * n + from) * p.rows[l], p.rows[l]);
  };
  run(parallel, int64_t(starts.size()) - 1, body);
}

// out[m, i] = base[m, i] + features[m, i] W[group[i], l(m)], as far as features and weights go; base may be null.
template <class T>
void irrep_linear(const MdplugLinear& s, const T* features, const T* weight, const T* base, T* out,
                  MdplugParallel parallel) {
  const std::vector<int64_t> starts = blocks_of(s.n, s.group);
  const int64_t size = s.k * padded<T>(s.k_out);
  auto body = [&](int64_t task) {
    const int64_t from = starts[task], count = starts[task + 1] - from;
    const T* weights = weight + (s.group ? s.group[from] : 0) * s.n_irreps * size;
    for (int64_t m = 0; m < s.components; ++m) {
      const int64_t at = (m * s.n + from) * s.k_out;
      if (m < s.n_irreps * s.n_irreps && m < s.components_in)
        multiply<T>(count, s.k, s.k_out, features + (m * s.n + from) * s.k, s.k, weights + degree(m) * size,
                    base ? base + at : nullptr, out + at, s.k_out);
      else if (base)
        std::memcpy(out + at, base + at, sizeof(T) * count * s.k_out);
      else
        std::memset(out + at, 0, sizeof(T) * count * s.k_out);
    }
  };
  run(parallel, int64_t(starts.size()) - 1, body);
}

}  // namespace MDPLUG_ISA
