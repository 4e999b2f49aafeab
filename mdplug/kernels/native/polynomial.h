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

// How cotangents flow. They lie in one array: of the terms, then of the entries. A product that nothing but one term
// uses has no place of its own: its cotangent is that of the term.
struct Uses {
  struct Use {
    int32_t at, with;  // a cotangent, and the entry that it is multiplied with
  };
  std::vector<int32_t> output;  // of each term
  std::vector<int32_t> entries;  // with a place of their own, last first
  std::vector<int32_t> terms_from, products_from;  // of each of those: its terms and products, below
  std::vector<int32_t> terms;
  std::vector<Use> products;

  explicit Uses(const MdplugPolynomial& s) {
    const int32_t n = int32_t(s.n_inputs + s.n_nodes), n_terms = int32_t(s.n_terms);
    std::vector<std::vector<int32_t>> terms_of(n);
    std::vector<std::vector<int32_t>> products_of(n);
    for (int32_t o = 0; o < s.n_outputs; ++o)
      for (int32_t t = s.starts[o]; t < s.starts[o + 1]; ++t) {
        output.push_back(o);
        terms_of[s.term[t]].push_back(t);
      }
    for (int32_t j = 0; j < 2 * s.n_nodes; ++j) products_of[s.nodes[j]].push_back(j);
    auto place = [&](int32_t q) {
      return q >= s.n_inputs && products_of[q].empty() && terms_of[q].size() == 1 ? terms_of[q][0] : n_terms + q;
    };
    terms_from.push_back(0);
    products_from.push_back(0);
    for (int32_t q = n - 1; q >= 0; --q) {
      if (place(q) < n_terms) continue;
      entries.push_back(q);
      terms.insert(terms.end(), terms_of[q].begin(), terms_of[q].end());
      for (int32_t j : products_of[q]) products.push_back({place(int32_t(s.n_inputs) + j / 2), s.nodes[j ^ 1]});
      terms_from.push_back(int32_t(terms.size()));
      products_from.push_back(int32_t(products.size()));
    }
  }
  int64_t places(const MdplugPolynomial& s) const { return s.n_terms + s.n_inputs + s.n_nodes; }
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

// Cotangents of the inputs, (n_inputs, C) from the place returned on, from those of the outputs, g[o * g_row].
template <class T, int C>
MDPLUG_INLINE const T* gradient(const MdplugPolynomial& s, const Uses& uses, const T* x, const T* c, const T* g,
                                int64_t g_row, T* d) {
  using B = Block<T, C>;
  const int32_t* output = uses.output.data();
  for (int64_t t = 0; t < s.n_terms; ++t) (B::load(c + t * C) * B::load(g + output[t] * g_row)).store(d + t * C);
  T* of_entries = d + s.n_terms * C;
  const int32_t *terms = uses.terms.data(), *terms_to = uses.terms_from.data() + 1;
  const int32_t* products_to = uses.products_from.data() + 1;
  const Uses::Use* products = uses.products.data();
  int32_t t = 0, p = 0;
  for (const int32_t q : uses.entries) {
    B sum = B::zero();
    for (; t < *terms_to; ++t) sum.add(B::load(d + terms[t] * C));
    for (; p < *products_to; ++p) sum.fma(B::load(d + products[p].at * C), B::load(x + products[p].with * C));
    sum.store(of_entries + q * C);
    ++terms_to, ++products_to;
  }
  return of_entries;
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
    Scratch<T> x(size * C), d(uses.places(s) * C), g(s.n_outputs * C);
    const int64_t end = std::min(n, (task + 1) * chunk);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = block * C;
      const int count = int(std::min<int64_t>(C, k - channel));
      for (int64_t i = task * chunk; i < end; ++i) {
        fill<T, C>(s, n, k, inputs, i, channel, count, x.data());
        for (int64_t o = 0; o < s.n_outputs; ++o)
          B::load(grad + (o * n + i) * k + channel, count).store(g.data() + o * C);
        const T* c = coefficients + (kind[i] * blocks + block) * s.n_terms * C;
        const T* found = gradient<T, C>(s, uses, x.data(), c, g.data(), C, d.data());
        for (int64_t m = 0; m < s.n_inputs; ++m)
          B::load(found + m * C).store(grad_inputs + (m * n + i) * k + channel, count);
      }
    }
  };
  run(parallel, (n + chunk - 1) / chunk, body);
}

}  // namespace MDPLUG_ISA
