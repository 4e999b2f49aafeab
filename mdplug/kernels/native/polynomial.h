// Sparse polynomials of an atom's features, channel by channel: out[o] = sum over terms of c[kind, term] x[term].
//
// x holds the inputs and products of two earlier entries; the adjoint walks the products backwards. Coefficients come in
// blocks of channels, (kinds, blocks, terms, C): those of one block stay in the cache while some atoms pass.
#pragma once
#include <algorithm>
#include <vector>

#include "radial.h"

namespace MDPLUG_ISA {

template <class T, int C>
MDPLUG_INLINE void fill(const MdplugPolynomial& s, int64_t n, int64_t k, const T* inputs, int64_t i, int64_t channel,
                        int count, T* x) {
  using B = Block<T, C>;
  for (int64_t m = 0; m < s.n_inputs; ++m) B::load(inputs + (m * n + i) * k + channel, count).store(x + m * C);
  T* to = x + s.n_inputs * C;
  for (int64_t j = 0; j < s.n_nodes; ++j, to += C)
    (B::load(x + s.nodes[2 * j] * C) * B::load(x + s.nodes[2 * j + 1] * C)).store(to);
}

template <class T, int C>
void polynomial(const MdplugPolynomial& s, int64_t n, int64_t k, const T* inputs, const T* coefficients,
                const int32_t* kind, T* out, MdplugParallel parallel) {
  using B = Block<T, C>;
  const int64_t blocks = (k + C - 1) / C, chunk = 4;
  auto body = [&](int64_t task) {
    Scratch<T> x((s.n_inputs + s.n_nodes) * C);
    const int64_t end = std::min(n, (task + 1) * chunk);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = block * C;
      const int count = int(std::min<int64_t>(C, k - channel));
      for (int64_t i = task * chunk; i < end; ++i) {
        fill<T, C>(s, n, k, inputs, i, channel, count, x.data());
        const T* c = coefficients + (kind[i] * blocks + block) * s.n_terms * C;
        for (int64_t o = 0; o < s.n_outputs; ++o) {
          B sum = B::zero();
          for (int32_t t = s.starts[o]; t < s.starts[o + 1]; ++t)
            sum.fma(B::load(c + t * C), B::load(x.data() + s.term[t] * C));
          sum.store(out + (o * n + i) * k + channel, count);
        }
      }
    }
  };
  run(parallel, (n + chunk - 1) / chunk, body);
}

template <class T, int C>
void polynomial_backward(const MdplugPolynomial& s, int64_t n, int64_t k, const T* inputs, const T* coefficients,
                         const int32_t* kind, const T* grad, T* grad_inputs, MdplugParallel parallel) {
  using B = Block<T, C>;
  const int64_t blocks = (k + C - 1) / C, chunk = 4, size = s.n_inputs + s.n_nodes;
  auto body = [&](int64_t task) {
    Scratch<T> x(size * C), d(size * C);
    const int64_t end = std::min(n, (task + 1) * chunk);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = block * C;
      const int count = int(std::min<int64_t>(C, k - channel));
      for (int64_t i = task * chunk; i < end; ++i) {
        fill<T, C>(s, n, k, inputs, i, channel, count, x.data());
        std::memset(d.data(), 0, sizeof(T) * size * C);
        const T* c = coefficients + (kind[i] * blocks + block) * s.n_terms * C;
        for (int64_t o = 0; o < s.n_outputs; ++o) {
          const B g = B::load(grad + (o * n + i) * k + channel, count);
          for (int32_t t = s.starts[o]; t < s.starts[o + 1]; ++t) {
            T* at = d.data() + s.term[t] * C;
            B sum = B::load(at);
            sum.fma(B::load(c + t * C), g);
            sum.store(at);
          }
        }
        for (int64_t j = s.n_nodes - 1; j >= 0; --j) {
          const B g = B::load(d.data() + (s.n_inputs + j) * C);
          const int32_t a = s.nodes[2 * j], b = s.nodes[2 * j + 1];
          B da = B::load(d.data() + a * C);
          da.fma(g, B::load(x.data() + b * C));
          da.store(d.data() + a * C);
          B db = B::load(d.data() + b * C);  // after da: a may be b
          db.fma(g, B::load(x.data() + a * C));
          db.store(d.data() + b * C);
        }
        for (int64_t m = 0; m < s.n_inputs; ++m)
          B::load(d.data() + m * C).store(grad_inputs + (m * n + i) * k + channel, count);
      }
    }
  };
  run(parallel, (n + chunk - 1) / chunk, body);
}

}  // namespace MDPLUG_ISA
