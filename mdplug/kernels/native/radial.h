// Radial functions of a pair by quintic Hermite interpolation between knots, or as given.
#pragma once
#include <cmath>
#include <vector>

#include "api.h"
#include "block.h"

namespace MDPLUG_ISA {

constexpr int kOrders = 3;  // numbers of a function at a knot: value, slope x step, curvature x step^2

// Weights of those numbers at the two knots around r: for R(r), and for dR/dr.
template <class T>
struct Knot {
  int64_t row;
  T value[2 * kOrders], slope[2 * kOrders];
};

template <class T>
MDPLUG_INLINE Knot<T> knot(const MdplugRadial& radial, int64_t pair) {
  const T first = T(radial.first), inverse = T(1.0 / radial.step);
  const T x = (static_cast<const T*>(radial.r)[pair] - first) * inverse;
  const T last = T(radial.per_kind - 2);
  T index = std::floor(x);
  index = index < 0 ? T(0) : (index > last ? last : index);
  const T s = x - index, u = 1 - s, s2 = s * s, s3 = s2 * s;
  Knot<T> k;
  k.row = int64_t(index) + (radial.kind ? int64_t(radial.kind[pair]) * radial.per_kind : 0);
  k.value[3] = s3 * (10 + s * (6 * s - 15));
  k.value[0] = 1 - k.value[3];
  k.value[1] = s + s3 * (s * (8 - 3 * s) - 6);
  k.value[2] = T(0.5) * s2 * u * u * u;
  k.value[4] = s3 * (s * (7 - 3 * s) - 4);
  k.value[5] = T(0.5) * s3 * u * u;
  k.slope[3] = 30 * s2 * u * u * inverse;
  k.slope[0] = -k.slope[3];
  k.slope[1] = (1 + s2 * (s * (32 - 15 * s) - 18)) * inverse;
  k.slope[2] = T(0.5) * s * (2 + s * (s * (12 - 5 * s) - 9)) * inverse;
  k.slope[4] = s2 * (s * (28 - 15 * s) - 12) * inverse;
  k.slope[5] = T(0.5) * s2 * (3 + s * (5 * s - 8)) * inverse;
  return k;
}

// Hides where a pointer came from: else each of its offsets is kept on the stack.
template <class T>
MDPLUG_INLINE const T* opaque(const T* p) {
  asm("" : "+r"(p));
  return p;
}

// One block of a function; `row` is its place at the lower knot, `stride` on is that at the upper one.
template <class T, int C>
MDPLUG_INLINE Block<T, C> interpolate(const T* row, int64_t stride, const T* weight) {
  const T* upper = opaque(row + stride);
  Block<T, C> out = Block<T, C>::load(row) * weight[0];
  for (int o = 1; o < kOrders; ++o) out.fma(weight[o], Block<T, C>::load(row + o * C));
  for (int o = 0; o < kOrders; ++o) out.fma(weight[kOrders + o], Block<T, C>::load(upper + o * C));
  return out;
}

// Value and slope together: every number is loaded once.
template <class T, int C>
MDPLUG_INLINE void interpolate(const T* row, int64_t stride, const Knot<T>& at, Block<T, C>& value, Block<T, C>& slope) {
  using B = Block<T, C>;
  const T* upper = opaque(row + stride);
  value = slope = B::zero();
  for (int o = 0; o < 2 * kOrders; ++o) {
    const B a = B::load(o < kOrders ? row + o * C : upper + (o - kOrders) * C);
    value.fma(at.value[o], a);
    slope.fma(at.slope[o], a);
  }
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
