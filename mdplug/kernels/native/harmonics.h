// Real spherical harmonics of -r/|r| (upstream's direction): monomials by degree, times a sparse table; and the adjoint.
//
// A register holds one number of W pairs, so that everything but the transposed loads and stores is arithmetic.
#pragma once
#include <algorithm>
#include <vector>

#include "radial.h"

namespace MDPLUG_ISA {

template <class T>
struct Harmonics {
  using V = typename Native<T>::type;
  static constexpr int W = Native<T>::width;
  struct Term {
    int monomial, component;
    T value;
  };
  int l_max, n_monomials, m;
  const int32_t *left, *right;  // each monomial from the fifth on: one of those before it times x, y or z
  std::vector<Term> terms;

  Harmonics(int l, int n, const int32_t* a, const int32_t* b, const T* table)
      : l_max(l), n_monomials(n), m((l + 1) * (l + 1)), left(a), right(b) {
    for (int j = 0; j < n; ++j)
      for (int c = 0; c < m; ++c)
        if (table[j * m + c] != 0) terms.push_back({j, c, table[j * m + c]});
  }
  // Unit vectors and monomials of pairs e..e+count; lanes beyond repeat the last one.
  void start(const T* vectors, const T* r, int64_t e, int count, V* u, V* inverse, V* x) const {
    T buffer[4][W];
    for (int w = 0; w < W; ++w) {
      const int64_t at = e + std::min(w, count - 1);
      for (int a = 0; a < 3; ++a) buffer[a][w] = vectors[3 * at + a];
      buffer[3][w] = r[at];
    }
    V v[4];
    std::memcpy(v, buffer, sizeof buffer);
    *inverse = T(1) / v[3];
    for (int a = 0; a < 3; ++a) u[a] = -v[a] * *inverse;
    x[0] = V{} + T(1);
    if (l_max > 0)
      for (int a = 0; a < 3; ++a) x[1 + a] = u[a];
    for (int j = 4; j < n_monomials; ++j) x[j] = x[left[j - 4]] * u[right[j - 4]];
  }
};

template <class T>
void harmonics(int64_t n, int l_max, int n_monomials, const int32_t* left, const int32_t* right, const T* table,
               const T* vectors, const T* r, T* out, MdplugParallel parallel) {
  using H = Harmonics<T>;
  using V = typename H::V;
  constexpr int W = H::W, chunk = 64;
  const H h(l_max, n_monomials, left, right, table);
  auto body = [&](int64_t task) {
    Scratch<T> memory((n_monomials + 4 + h.m) * W);
    V *x = reinterpret_cast<V*>(memory.data()), *y = x + n_monomials + 4;
    const int64_t last = std::min(n, (task + 1) * chunk * W);
    for (int64_t e = task * chunk * W; e < last; e += W) {
      const int count = int(std::min<int64_t>(W, last - e));
      V u[3], inverse;
      h.start(vectors, r, e, count, u, &inverse, x);
      for (int c = 0; c < h.m; ++c) y[c] = V{};
      for (const auto& t : h.terms) y[t.component] += t.value * x[t.monomial];
      const T* from = reinterpret_cast<const T*>(y);
      for (int w = 0; w < count; ++w)
        for (int c = 0; c < h.m; ++c) out[(e + w) * h.m + c] = from[c * W + w];
    }
  };
  run(parallel, (n + chunk * W - 1) / (chunk * W), body);
}

// grad: (n, m) of the harmonics, grad_r: (n) of |r|; out: (n, 3) of the vectors.
template <class T>
void harmonics_backward(int64_t n, int l_max, int n_monomials, const int32_t* left, const int32_t* right,
                        const T* table, const T* vectors, const T* r, const T* grad, const T* grad_r, T* out,
                        MdplugParallel parallel) {
  using H = Harmonics<T>;
  using V = typename H::V;
  constexpr int W = H::W, chunk = 64;
  const H h(l_max, n_monomials, left, right, table);
  auto body = [&](int64_t task) {
    Scratch<T> memory((2 * (n_monomials + 4) + h.m + 1) * W);
    V *x = reinterpret_cast<V*>(memory.data()), *d = x + n_monomials + 4, *g = d + n_monomials + 4;
    T* into = reinterpret_cast<T*>(g);
    const int64_t last = std::min(n, (task + 1) * chunk * W);
    for (int64_t e = task * chunk * W; e < last; e += W) {
      const int count = int(std::min<int64_t>(W, last - e));
      V u[3], inverse, du[3] = {V{}, V{}, V{}};
      h.start(vectors, r, e, count, u, &inverse, x);
      for (int w = 0; w < W; ++w) {
        const int64_t at = e + std::min(w, count - 1);
        for (int c = 0; c < h.m; ++c) into[c * W + w] = grad[at * h.m + c];
        into[h.m * W + w] = grad_r[at];
      }
      for (int j = 0; j < n_monomials; ++j) d[j] = V{};
      for (const auto& t : h.terms) d[t.monomial] += t.value * g[t.component];
      for (int j = n_monomials - 1; j >= 4; --j) {
        du[right[j - 4]] += d[j] * x[left[j - 4]];
        d[left[j - 4]] += d[j] * u[right[j - 4]];
      }
      if (l_max > 0)
        for (int a = 0; a < 3; ++a) du[a] += d[1 + a];
      const V along = u[0] * du[0] + u[1] * du[1] + u[2] * du[2];
      T result[3][W];
      V v[3];
      for (int a = 0; a < 3; ++a) v[a] = -(du[a] - u[a] * along) * inverse - u[a] * g[h.m];
      std::memcpy(result, v, sizeof result);
      for (int w = 0; w < count; ++w)
        for (int a = 0; a < 3; ++a) out[3 * (e + w) + a] = result[a][w];
    }
  };
  run(parallel, (n + chunk * W - 1) / (chunk * W), body);
}

// The transpose of the adjoint: how harmonics (out) and |r| (out_r) change as the vectors move along `along` (n, 3).
template <class T>
void harmonics_tangent(int64_t n, int l_max, int n_monomials, const int32_t* left, const int32_t* right, const T* table,
                       const T* vectors, const T* r, const T* along, T* out, T* out_r, MdplugParallel parallel) {
  using H = Harmonics<T>;
  using V = typename H::V;
  constexpr int W = H::W, chunk = 64;
  const H h(l_max, n_monomials, left, right, table);
  auto body = [&](int64_t task) {
    Scratch<T> memory((2 * (n_monomials + 4) + h.m) * W);
    V *x = reinterpret_cast<V*>(memory.data()), *d = x + n_monomials + 4, *y = d + n_monomials + 4;
    const int64_t last = std::min(n, (task + 1) * chunk * W);
    for (int64_t e = task * chunk * W; e < last; e += W) {
      const int count = int(std::min<int64_t>(W, last - e));
      V u[3], inverse, v[3], du[3];
      h.start(vectors, r, e, count, u, &inverse, x);
      T buffer[3][W];
      for (int w = 0; w < W; ++w)
        for (int a = 0; a < 3; ++a) buffer[a][w] = along[3 * (e + std::min(w, count - 1)) + a];
      std::memcpy(v, buffer, sizeof buffer);
      const V radial = u[0] * v[0] + u[1] * v[1] + u[2] * v[2];
      for (int a = 0; a < 3; ++a) du[a] = (u[a] * radial - v[a]) * inverse;
      d[0] = V{};
      if (l_max > 0)
        for (int a = 0; a < 3; ++a) d[1 + a] = du[a];
      for (int j = 4; j < n_monomials; ++j)
        d[j] = d[left[j - 4]] * u[right[j - 4]] + x[left[j - 4]] * du[right[j - 4]];
      for (int c = 0; c < h.m; ++c) y[c] = V{};
      for (const auto& t : h.terms) y[t.component] += t.value * d[t.monomial];
      const T* from = reinterpret_cast<const T*>(y);
      for (int w = 0; w < count; ++w) {
        for (int c = 0; c < h.m; ++c) out[(e + w) * h.m + c] = from[c * W + w];
        out_r[e + w] = -radial[w];
      }
    }
  };
  run(parallel, (n + chunk * W - 1) / (chunk * W), body);
}

}  // namespace MDPLUG_ISA
