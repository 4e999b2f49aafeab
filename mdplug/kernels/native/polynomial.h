// Sparse polynomials of an atom's features, channel by channel: out[o] = sum over terms of c[kind, term] x[term].
//
// x holds the inputs and products of two earlier entries; the adjoint walks the products backwards, and collects what
// an entry receives in registers. Coefficients come in blocks of channels, (kinds, blocks, terms, C): those of one block
// stay in the cache while some atoms pass.
#pragma once
#include <algorithm>
#include <vector>

#include "matrix.h"
#include "radial.h"

namespace MDPLUG_ISA {

// Where each entry is used: in terms (the term, its output) and in products (the product, its other factor).
struct Uses {
  struct Use {
    int32_t at, with;
  };
  std::vector<int32_t> terms_from, products_from;
  std::vector<Use> terms, products;

  explicit Uses(const MdplugPolynomial& s)
      : terms_from(s.n_inputs + s.n_nodes + 1, 0), products_from(terms_from), terms(s.n_terms), products(2 * s.n_nodes) {
    const int32_t entries = int32_t(terms_from.size()) - 1;
    for (int64_t t = 0; t < s.n_terms; ++t) ++terms_from[s.term[t] + 1];
    for (int64_t j = 0; j < 2 * s.n_nodes; ++j) ++products_from[s.nodes[j] + 1];
    for (int32_t q = 0; q < entries; ++q) {
      terms_from[q + 1] += terms_from[q];
      products_from[q + 1] += products_from[q];
    }
    std::vector<int32_t> term_at(terms_from), product_at(products_from);
    for (int32_t o = 0; o < s.n_outputs; ++o)
      for (int32_t t = s.starts[o]; t < s.starts[o + 1]; ++t) terms[term_at[s.term[t]]++] = {t, o};
    for (int32_t j = 0; j < s.n_nodes; ++j)
      for (int side = 0; side < 2; ++side)
        products[product_at[s.nodes[2 * j + side]]++] = {int32_t(s.n_inputs) + j, s.nodes[2 * j + 1 - side]};
  }
};

// Inputs of one atom and block of channels, and their products.
template <class T, int C>
MDPLUG_INLINE void fill(const MdplugPolynomial& s, int64_t n, int64_t k, const T* inputs, int64_t i, int64_t channel,
                        int count, T* x) {
  using B = Block<T, C>;
  for (int64_t m = 0; m < s.n_inputs; ++m) B::load(inputs + (m * n + i) * k + channel, count).store(x + m * C);
  T* to = x + s.n_inputs * C;
  for (int64_t j = 0; j < s.n_nodes; ++j, to += C)
    (B::load(x + s.nodes[2 * j] * C) * B::load(x + s.nodes[2 * j + 1] * C)).store(to);
}

// One output.
template <class T, int C>
MDPLUG_INLINE Block<T, C> output(const MdplugPolynomial& s, const T* x, const T* c, int64_t o) {
  using B = Block<T, C>;
  B sum = B::zero();
  for (int32_t t = s.starts[o]; t < s.starts[o + 1]; ++t) sum.fma(B::load(c + t * C), B::load(x + s.term[t] * C));
  return sum;
}

// Cotangents d of all entries, inputs among them, from those of the outputs, g[o * g_row].
template <class T, int C>
MDPLUG_INLINE void gradient(const MdplugPolynomial& s, const Uses& uses, const T* x, const T* c, const T* g,
                            int64_t g_row, T* d) {
  using B = Block<T, C>;
  for (int64_t q = s.n_inputs + s.n_nodes - 1; q >= 0; --q) {
    B sum = B::zero();
    for (int32_t u = uses.terms_from[q]; u < uses.terms_from[q + 1]; ++u)
      sum.fma(B::load(c + uses.terms[u].at * C), B::load(g + uses.terms[u].with * g_row));
    for (int32_t u = uses.products_from[q]; u < uses.products_from[q + 1]; ++u)
      sum.fma(B::load(d + uses.products[u].at * C), B::load(x + uses.products[u].with * C));
    sum.store(d + q * C);
  }
}

template <class T>
void polynomial(const MdplugPolynomial& s, int64_t n, int64_t k, const T* inputs, const T* coefficients,
                const int32_t* kind, T* out, MdplugParallel parallel) {
  constexpr int C = kLane<T>;
  const int64_t blocks = (k + C - 1) / C, chunk = 8;
  auto body = [&](int64_t task) {
    Scratch<T> x((s.n_inputs + s.n_nodes) * C);
    const int64_t end = std::min(n, (task + 1) * chunk);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = block * C;
      const int count = int(std::min<int64_t>(C, k - channel));
      for (int64_t i = task * chunk; i < end; ++i) {
        fill<T, C>(s, n, k, inputs, i, channel, count, x.data());
        const T* c = coefficients + (kind[i] * blocks + block) * s.n_terms * C;
        for (int64_t o = 0; o < s.n_outputs; ++o)
          output<T, C>(s, x.data(), c, o).store(out + (o * n + i) * k + channel, count);
      }
    }
  };
  run(parallel, (n + chunk - 1) / chunk, body);
}

template <class T>
void polynomial_backward(const MdplugPolynomial& s, int64_t n, int64_t k, const T* inputs, const T* coefficients,
                         const int32_t* kind, const T* grad, T* grad_inputs, MdplugParallel parallel) {
  constexpr int C = kLane<T>;
  using B = Block<T, C>;
  const int64_t blocks = (k + C - 1) / C, chunk = 8, size = s.n_inputs + s.n_nodes;
  const Uses uses(s);
  auto body = [&](int64_t task) {
    Scratch<T> x(size * C), d(size * C), g(s.n_outputs * C);
    const int64_t end = std::min(n, (task + 1) * chunk);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = block * C;
      const int count = int(std::min<int64_t>(C, k - channel));
      for (int64_t i = task * chunk; i < end; ++i) {
        fill<T, C>(s, n, k, inputs, i, channel, count, x.data());
        for (int64_t o = 0; o < s.n_outputs; ++o)
          B::load(grad + (o * n + i) * k + channel, count).store(g.data() + o * C);
        const T* c = coefficients + (kind[i] * blocks + block) * s.n_terms * C;
        gradient<T, C>(s, uses, x.data(), c, g.data(), C, d.data());
        for (int64_t m = 0; m < s.n_inputs; ++m)
          B::load(d.data() + m * C).store(grad_inputs + (m * n + i) * k + channel, count);
      }
    }
  };
  run(parallel, (n + chunk - 1) / chunk, body);
}

}  // namespace MDPLUG_ISA
