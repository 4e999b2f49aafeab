// The neighbour density of the first layer, D[m, i, z, b] = sum over neighbours of kind z of phi_b(r) Y_m, and its adjoint.
#pragma once
#include <algorithm>
#include <vector>

#include "radial.h"

namespace MDPLUG_ISA {

// phi (and its slope) of one pair, `width` numbers of which b count; the table is (rows, 3, b).
template <class T>
MDPLUG_INLINE void features(const MdplugRadial& radial, int64_t pair, int64_t value_row, int64_t b,
                            T* __restrict__ phi, T* __restrict__ slope) {
  if (radial.table) {
    const Knot<T> at = knot<T>(radial, pair);
    const T* __restrict__ row = static_cast<const T*>(radial.table) + at.row * kOrders * b;
    for (int64_t c = 0; c < b; ++c) {
      T f = 0, d = 0;
      for (int o = 0; o < 2 * kOrders; ++o) {
        f += at.value[o] * row[o * b + c];
        d += at.slope[o] * row[o * b + c];
      }
      phi[c] = f;
      slope[c] = d;
    }
  } else {
    std::memcpy(phi, static_cast<const T*>(radial.values) + value_row * b, sizeof(T) * b);
  }
}

template <class T>
void density(int64_t begin, int64_t end, int64_t b, int64_t m, int64_t kinds, const T* harmonics,
             const MdplugRadial& radial, const int32_t* species, const int32_t* first, T* out,
             MdplugParallel parallel) {
  using U = typename Native<T>::unaligned;
  constexpr int W = Native<T>::width;
  const int64_t n = end - begin, width = (b + W - 1) / W * W, row = kinds * b, atoms = 4;
  auto body = [&](int64_t task) {
    Scratch<T> sums_of(kinds * m * width), phi_of(width), slope(width);
    T *sums = sums_of.data(), *phi = phi_of.data();
    std::memset(phi, 0, sizeof(T) * width);
    const int64_t last = std::min(n, (task + 1) * atoms);
    for (int64_t i = task * atoms; i < last; ++i) {
      std::memset(sums, 0, sizeof(T) * kinds * m * width);
      for (int64_t e = first[begin + i]; e < first[begin + i + 1]; ++e) {
        features<T>(radial, e, e - first[begin], b, phi, slope.data());
        T* sum = sums + species[e] * m * width;
        for (int64_t c = 0; c < width; c += W) {
          const auto f = *reinterpret_cast<const U*>(phi + c);
          for (int64_t j = 0; j < m; ++j) {
            U& s = *reinterpret_cast<U*>(sum + j * width + c);
            s += harmonics[e * m + j] * f;
          }
        }
      }
      for (int64_t z = 0; z < kinds; ++z)
        for (int64_t j = 0; j < m; ++j)
          std::memcpy(out + (j * n + i) * row + z * b, sums + (z * m + j) * width, sizeof(T) * b);
    }
  };
  run(parallel, (n + atoms - 1) / atoms, body);
}

template <class T>
void density_backward(int64_t begin, int64_t end, int64_t b, int64_t m, int64_t kinds, const T* harmonics,
                      const MdplugRadial& radial, const int32_t* species, const int32_t* first, const T* grad,
                      T* grad_harmonics, T* grad_radial, MdplugParallel parallel) {
  using V = typename Native<T>::type;
  using U = typename Native<T>::unaligned;
  constexpr int W = Native<T>::width;
  const int64_t n = end - begin, width = (b + W - 1) / W * W, row = kinds * b, e0 = first[begin], atoms = 4;
  auto body = [&](int64_t task) {
    Scratch<T> grad_of(kinds * m * width), work(3 * width), wide((m + 3) / 4 * 4 * W), sums(m + 3);
    T *g = grad_of.data(), *phi = work.data(), *slope = phi + width, *back = slope + width;
    V* d = reinterpret_cast<V*>(wide.data());
    std::memset(g, 0, sizeof(T) * kinds * m * width);
    std::memset(phi, 0, sizeof(T) * 3 * width);
    const int64_t last = std::min(n, (task + 1) * atoms);
    for (int64_t i = task * atoms; i < last; ++i) {
      for (int64_t z = 0; z < kinds; ++z)
        for (int64_t j = 0; j < m; ++j)
          std::memcpy(g + (z * m + j) * width, grad + (j * n + i) * row + z * b, sizeof(T) * b);
      for (int64_t e = first[begin + i]; e < first[begin + i + 1]; ++e) {
        features<T>(radial, e, e - e0, b, phi, slope);
        const T *of_kind = g + species[e] * m * width, *y = harmonics + e * m;
        for (int64_t j = 0; j < (m + 3) / 4 * 4; ++j) d[j] = V{};
        for (int64_t c = 0; c < width; c += W) {
          const V f = *reinterpret_cast<const U*>(phi + c);
          V sum = V{};
          for (int64_t j = 0; j < m; ++j) {
            const V a = *reinterpret_cast<const U*>(of_kind + j * width + c);
            d[j] += f * a;
            sum += y[j] * a;
          }
          *reinterpret_cast<U*>(back + c) = sum;
        }
        lane_sums<T>(d, int((m + 3) / 4 * 4), sums.data());
        std::memcpy(grad_harmonics + (e - e0) * m, sums.data(), sizeof(T) * m);
        if (radial.table) {
          V along = V{};
          for (int64_t c = 0; c < width; c += W)
            along += *reinterpret_cast<const U*>(slope + c) * *reinterpret_cast<const U*>(back + c);
          grad_radial[e - e0] = lanes<T>(along);
        } else {
          std::memcpy(grad_radial + (e - e0) * b, back, sizeof(T) * b);
        }
      }
    }
  };
  run(parallel, (n + atoms - 1) / atoms, body);
}

}  // namespace MDPLUG_ISA
