// Radial functions of a pair by cubic Hermite interpolation between knots, or as given.
#pragma once
#include <cmath>
#include <vector>

#include "api.h"
#include "block.h"

namespace MDPLUG_ISA {

// Weights of (value, slope) at the two knots around r: for R(r), and for dR/dr.
template <class T>
struct Knot {
  int64_t row;
  T value[4], slope[4];
};

template <class T>
MDPLUG_INLINE Knot<T> knot(const MdplugRadial& radial, int64_t pair) {
  const T first = T(radial.first), inverse = T(1.0 / radial.step);
  const T x = (static_cast<const T*>(radial.r)[pair] - first) * inverse;
  T index = std::floor(x);
  const T last = T(radial.per_kind - 2);
  index = index < 0 ? T(0) : (index > last ? last : index);
  const T s = x - index, u = 1 - s;
  Knot<T> k;
  k.row = int64_t(index) + (radial.kind ? int64_t(radial.kind[pair]) * radial.per_kind : 0);
  k.value[0] = (1 + 2 * s) * u * u;
  k.value[1] = s * u * u;
  k.value[2] = s * s * (3 - 2 * s);
  k.value[3] = -s * s * u;
  k.slope[0] = -6 * s * u * inverse;
  k.slope[1] = (1 - 4 * s + 3 * s * s) * inverse;
  k.slope[2] = 6 * s * u * inverse;
  k.slope[3] = (3 * s * s - 2 * s) * inverse;
  return k;
}

// Four numbers per channel around r: row [value, slope] of one function at a knot, `stride` to the next knot.
template <class T, int C>
MDPLUG_INLINE Block<T, C> interpolate(const T* row, int64_t stride, const T* weight) {
  using B = Block<T, C>;
  B out = B::load(row) * weight[0];
  out.fma(weight[1], B::load(row + C));
  out.fma(weight[2], B::load(row + stride));
  out.fma(weight[3], B::load(row + stride + C));
  return out;
}

template <class Body>
void run(MdplugParallel parallel, int64_t n, Body& body) {
  if (n <= 0) return;
  auto call = [](int64_t begin, int64_t end, void* context) {
    Body& b = *static_cast<Body*>(context);
    for (int64_t i = begin; i < end; ++i) b(i);
  };
  parallel(n, call, &body);
}

}  // namespace MDPLUG_ISA
