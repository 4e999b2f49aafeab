// Rows times a matrix. The matrix is stored in blocks of C columns, (blocks, rows, C), padded with zeros.
#pragma once
#include <algorithm>

#include "block.h"

namespace MDPLUG_ISA {

template <class T>
constexpr int kLane = 64 / sizeof(T);  // columns of a block: one line of cache

template <class T>
constexpr int64_t padded(int64_t columns) {
  return (columns + kLane<T> - 1) / kLane<T> * kLane<T>;
}

// R rows by one block of columns; `base`, where there is one, is added.
template <class T, int R>
MDPLUG_INLINE void tile(int64_t inner, const T* x, int64_t x_row, const T* w, const T* base, T* out, int64_t out_row,
                        int count) {
  using B = Block<T, kLane<T>>;
  B sum[R];
  for (int r = 0; r < R; ++r) sum[r] = base ? B::load(base + r * out_row, count) : B::zero();
  for (int64_t q = 0; q < inner; ++q) {
    const B column = B::load(w + q * kLane<T>);
    for (int r = 0; r < R; ++r) sum[r].fma(x[r * x_row + q], column);
  }
  for (int r = 0; r < R; ++r) sum[r].store(out + r * out_row, count);
}

// out[i] = base[i] + x[i] W for n rows i; rows of `base` lie as those of `out`. Sums run in one order, whatever n is.
template <class T>
void multiply(int64_t n, int64_t inner, int64_t columns, const T* x, int64_t x_row, const T* w, const T* base, T* out,
              int64_t out_row) {
  constexpr int R = 12 / Block<T, kLane<T>>::NV;  // sums that the registers hold
  for (int64_t c = 0; c < columns; c += kLane<T>, w += inner * kLane<T>) {
    const int count = int(std::min<int64_t>(kLane<T>, columns - c));
    const T* from = base ? base + c : nullptr;
    int64_t i = 0;
    auto rows = [&](auto number) {
      constexpr int size = decltype(number)::value;
      for (; i + size <= n; i += size)
        tile<T, size>(inner, x + i * x_row, x_row, w, from ? from + i * out_row : nullptr, out + i * out_row + c, out_row,
                      count);
    };
    rows(std::integral_constant<int, R>());
    if (R > 3) rows(std::integral_constant<int, 3>());
    rows(std::integral_constant<int, 1>());
  }
}

}  // namespace MDPLUG_ISA
