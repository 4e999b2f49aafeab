// The neighbour density of the first layer, D[m, i, z, b] = sum over neighbours of kind z of phi_b(r) Y_m, and its adjoint.
#pragma once
#include <algorithm>
#include <vector>

#include "radial.h"

namespace MDPLUG_ISA {

// phi (and its slope) of one pair, b numbers; the table is (rows, 2, b).
template <class T>
MDPLUG_INLINE void features(const MdplugRadial& radial, int64_t pair, int64_t value_row, int64_t b, T* phi, T* slope) {
  if (radial.table) {
    const Knot<T> at = knot<T>(radial, pair);
    const T* row = static_cast<const T*>(radial.table) + at.row * 2 * b;
    for (int64_t c = 0; c < b; ++c) {
      const T y0 = row[c], d0 = row[b + c], y1 = row[2 * b + c], d1 = row[3 * b + c];
      phi[c] = at.value[0] * y0 + at.value[1] * d0 + at.value[2] * y1 + at.value[3] * d1;
      if (slope) slope[c] = at.slope[0] * y0 + at.slope[1] * d0 + at.slope[2] * y1 + at.slope[3] * d1;
    }
  } else {
    std::memcpy(phi, static_cast<const T*>(radial.values) + value_row * b, sizeof(T) * b);
  }
}

template <class T>
void density(int64_t begin, int64_t end, int64_t b, int64_t m, int64_t kinds, const T* harmonics,
             const MdplugRadial& radial, const int32_t* species, const int32_t* first, T* out,
             MdplugParallel parallel) {
  const int64_t n = end - begin, width = kinds * b;
  auto body = [&](int64_t i) {
    std::vector<T> sums(kinds * m * b, T(0)), phi(b);
    for (int64_t e = first[begin + i]; e < first[begin + i + 1]; ++e) {
      features<T>(radial, e, e - first[begin], b, phi.data(), nullptr);
      T* sum = sums.data() + species[e] * m * b;
      for (int64_t j = 0; j < m; ++j) {
        const T y = harmonics[e * m + j];
        for (int64_t c = 0; c < b; ++c) sum[j * b + c] += y * phi[c];
      }
    }
    for (int64_t z = 0; z < kinds; ++z)
      for (int64_t j = 0; j < m; ++j)
        std::memcpy(out + (j * n + i) * width + z * b, sums.data() + (z * m + j) * b, sizeof(T) * b);
  };
  run(parallel, n, body);
}

template <class T>
void density_backward(int64_t begin, int64_t end, int64_t b, int64_t m, int64_t kinds, const T* harmonics,
                      const MdplugRadial& radial, const int32_t* species, const int32_t* first, const T* grad,
                      T* grad_harmonics, T* grad_radial, MdplugParallel parallel) {
  const int64_t n = end - begin, width = kinds * b, e0 = first[begin];
  auto body = [&](int64_t i) {
    std::vector<T> phi(b), slope(b), back(b);
    for (int64_t e = first[begin + i]; e < first[begin + i + 1]; ++e) {
      features<T>(radial, e, e - e0, b, phi.data(), radial.table ? slope.data() : nullptr);
      std::fill(back.begin(), back.end(), T(0));
      for (int64_t j = 0; j < m; ++j) {
        const T* g = grad + (j * n + i) * width + species[e] * b;
        const T y = harmonics[e * m + j];
        T dot = 0;
        for (int64_t c = 0; c < b; ++c) {
          dot += phi[c] * g[c];
          back[c] += y * g[c];
        }
        grad_harmonics[(e - e0) * m + j] = dot;
      }
      if (radial.table) {
        T along = 0;
        for (int64_t c = 0; c < b; ++c) along += slope[c] * back[c];
        grad_radial[e - e0] = along;
      } else {
        std::memcpy(grad_radial + (e - e0) * b, back.data(), sizeof(T) * b);
      }
    }
  };
  run(parallel, n, body);
}

}  // namespace MDPLUG_ISA
