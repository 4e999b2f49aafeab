// Real spherical harmonics of -r/|r| (upstream's direction): monomials by degree, times a table; and the adjoint.
#pragma once
#include <algorithm>
#include <vector>

#include "radial.h"

namespace MDPLUG_ISA {

// Monomials of a unit vector, degree after degree: each is one of the degree below times one of x, y, z.
template <class T>
MDPLUG_INLINE void monomials(int l_max, int n, const int32_t* left, const int32_t* right, const T* u, T* x) {
  x[0] = 1;
  if (l_max > 0)
    for (int a = 0; a < 3; ++a) x[1 + a] = u[a];
  for (int j = 4; j < n; ++j) x[j] = x[left[j - 4]] * u[right[j - 4]];
}

template <class T>
void harmonics(int64_t n, int l_max, int n_monomials, const int32_t* left, const int32_t* right, const T* table,
               const T* vectors, const T* r, T* out, MdplugParallel parallel) {
  const int m = (l_max + 1) * (l_max + 1);
  auto body = [&](int64_t chunk) {
    std::vector<T> x(n_monomials + 4);
    const int64_t end = std::min(n, (chunk + 1) * 512);
    for (int64_t e = chunk * 512; e < end; ++e) {
      T u[3];
      for (int a = 0; a < 3; ++a) u[a] = -vectors[3 * e + a] / r[e];
      monomials<T>(l_max, n_monomials, left, right, u, x.data());
      T* y = out + e * m;
      for (int c = 0; c < m; ++c) y[c] = 0;
      for (int j = 0; j < n_monomials; ++j)
        for (int c = 0; c < m; ++c) y[c] += x[j] * table[j * m + c];
    }
  };
  run(parallel, (n + 511) / 512, body);
}

// grad: (n, m) of the harmonics, grad_r: (n) of |r|; out: (n, 3) of the vectors.
template <class T>
void harmonics_backward(int64_t n, int l_max, int n_monomials, const int32_t* left, const int32_t* right,
                        const T* table, const T* vectors, const T* r, const T* grad, const T* grad_r, T* out,
                        MdplugParallel parallel) {
  const int m = (l_max + 1) * (l_max + 1);
  std::vector<T> turned(size_t(n_monomials) * m);
  for (int j = 0; j < n_monomials; ++j)
    for (int c = 0; c < m; ++c) turned[c * n_monomials + j] = table[j * m + c];
  auto body = [&](int64_t chunk) {
    std::vector<T> x(n_monomials + 4), d(n_monomials + 4);
    const int64_t end = std::min(n, (chunk + 1) * 512);
    for (int64_t e = chunk * 512; e < end; ++e) {
      T u[3], du[3] = {0, 0, 0};
      for (int a = 0; a < 3; ++a) u[a] = -vectors[3 * e + a] / r[e];
      monomials<T>(l_max, n_monomials, left, right, u, x.data());
      for (int j = 0; j < n_monomials; ++j) d[j] = 0;
      for (int c = 0; c < m; ++c)
        for (int j = 0; j < n_monomials; ++j) d[j] += grad[e * m + c] * turned[c * n_monomials + j];
      for (int j = n_monomials - 1; j >= 4; --j) {
        du[right[j - 4]] += d[j] * x[left[j - 4]];
        d[left[j - 4]] += d[j] * u[right[j - 4]];
      }
      if (l_max > 0)
        for (int a = 0; a < 3; ++a) du[a] += d[1 + a];
      const T along = u[0] * du[0] + u[1] * du[1] + u[2] * du[2];
      for (int a = 0; a < 3; ++a) out[3 * e + a] = -(du[a] - u[a] * along) / r[e] - u[a] * grad_r[e];
    }
  };
  run(parallel, (n + 511) / 512, body);
}

}  // namespace MDPLUG_ISA
