// What training needs of a sparse polynomial (polynomial.h) beyond its adjoint: the gradient of its coefficients, and the
// adjoint of its adjoint. Tasks are blocks of channels, so that a sum over atoms has one order on any number of threads.
#pragma once
#include "polynomial.h"

namespace MDPLUG_ISA {

// out (kinds, blocks, terms, C): sum over the atoms of a kind of grad[o] x[term].
template <class T, int C>
void polynomial_coefficients(const MdplugPolynomial& s, int64_t n, int64_t k, int64_t kinds, const T* inputs,
                             const int32_t* kind, const T* grad, T* out, MdplugParallel parallel) {
  using B = Block<T, C>;
  const int64_t blocks = (k + C - 1) / C, row = s.n_terms * C;
  auto body = [&](int64_t block) {
    const int64_t channel = block * C;
    const int count = int(std::min<int64_t>(C, k - channel));
    Scratch<T> x((s.n_inputs + s.n_nodes) * C);
    for (int64_t z = 0; z < kinds; ++z) std::memset(out + (z * blocks + block) * row, 0, sizeof(T) * row);
    for (int64_t i = 0; i < n; ++i) {
      fill<T, C>(s, n, k, inputs, i, channel, count, x.data());
      T* sums = out + (kind[i] * blocks + block) * row;
      for (int64_t o = 0; o < s.n_outputs; ++o) {
        const B g = B::load(grad + (o * n + i) * k + channel, count);
        for (int32_t t = s.starts[o]; t < s.starts[o + 1]; ++t) {
          B sum = B::load(sums + t * C);
          sum.fma(g, B::load(x.data() + s.term[t] * C));
          sum.store(sums + t * C);
        }
      }
    }
  };
  run(parallel, blocks, body);
}

// Of S = <along, grad_inputs>, `along` (inputs, n, k) a direction in which the inputs move: dS/dgrad is the change of the
// outputs, dS/dcoefficients and dS/dinputs follow by walking values and their changes backwards together.
template <class T, int C>
void polynomial_second(const MdplugPolynomial& s, int64_t n, int64_t k, int64_t kinds, const T* inputs,
                       const T* coefficients, const int32_t* kind, const T* grad, const T* along, T* grad_grad,
                       T* grad_inputs, T* grad_coefficients, MdplugParallel parallel) {
  using B = Block<T, C>;
  const int64_t blocks = (k + C - 1) / C, row = s.n_terms * C, size = s.n_inputs + s.n_nodes;
  auto body = [&](int64_t block) {
    const int64_t channel = block * C;
    const int count = int(std::min<int64_t>(C, k - channel));
    Scratch<T> memory(4 * size * C);
    T *x = memory.data(), *v = x + size * C, *dx = v + size * C, *dv = dx + size * C;  // v: change of x
    for (int64_t z = 0; z < kinds; ++z) std::memset(grad_coefficients + (z * blocks + block) * row, 0, sizeof(T) * row);
    for (int64_t i = 0; i < n; ++i) {
      fill<T, C>(s, n, k, inputs, i, channel, count, x);
      for (int64_t m = 0; m < s.n_inputs; ++m) B::load(along + (m * n + i) * k + channel, count).store(v + m * C);
      for (int64_t j = 0; j < s.n_nodes; ++j) {
        const int32_t a = s.nodes[2 * j] * C, b = s.nodes[2 * j + 1] * C;
        B change = B::load(v + a) * B::load(x + b);
        change.fma(B::load(x + a), B::load(v + b));
        change.store(v + (s.n_inputs + j) * C);
      }
      std::memset(dx, 0, sizeof(T) * 2 * size * C);
      const int64_t of = (kind[i] * blocks + block) * row;
      for (int64_t o = 0; o < s.n_outputs; ++o) {
        const B g = B::load(grad + (o * n + i) * k + channel, count);
        B sum = B::zero();
        for (int32_t t = s.starts[o]; t < s.starts[o + 1]; ++t) {
          const B c = B::load(coefficients + of + t * C), change = B::load(v + s.term[t] * C);
          sum.fma(c, change);
          B to_c = B::load(grad_coefficients + of + t * C), to_v = B::load(dv + s.term[t] * C);
          to_c.fma(g, change);
          to_c.store(grad_coefficients + of + t * C);
          to_v.fma(g, c);
          to_v.store(dv + s.term[t] * C);
        }
        sum.store(grad_grad + (o * n + i) * k + channel, count);
      }
      for (int64_t j = s.n_nodes - 1; j >= 0; --j) {
        const int32_t a = s.nodes[2 * j] * C, b = s.nodes[2 * j + 1] * C;
        const B q = B::load(dx + (s.n_inputs + j) * C), p = B::load(dv + (s.n_inputs + j) * C);
        const B xa = B::load(x + a), xb = B::load(x + b), va = B::load(v + a), vb = B::load(v + b);
        B to = B::load(dx + a);
        to.fma(q, xb);
        to.fma(p, vb);
        to.store(dx + a);
        to = B::load(dx + b);  // after the store: a may be b
        to.fma(q, xa);
        to.fma(p, va);
        to.store(dx + b);
        to = B::load(dv + a);
        to.fma(p, xb);
        to.store(dv + a);
        to = B::load(dv + b);
        to.fma(p, xa);
        to.store(dv + b);
      }
      for (int64_t m = 0; m < s.n_inputs; ++m)
        B::load(dx + m * C).store(grad_inputs + (m * n + i) * k + channel, count);
    }
  };
  run(parallel, blocks, body);
}

}  // namespace MDPLUG_ISA
