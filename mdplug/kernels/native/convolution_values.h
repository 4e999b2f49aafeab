// Adjoint of the messages where radial functions are given as values, and the adjoint of that adjoint.
//
// Pairs may share a row of the values, so that tasks are blocks of channels: each sums over all pairs by itself.
#pragma once
#include "convolution.h"

namespace MDPLUG_ISA {

inline void in_place(int64_t n, MdplugBody body, void* context) { body(0, n, context); }  // within a task

// Sums over blocks in order: parts (blocks, n) -> out (n).
template <class T>
void add_parts(const T* parts, int64_t blocks, int64_t n, T* out, MdplugParallel parallel) {
  constexpr int64_t chunk = 4096;
  auto body = [&](int64_t task) {
    const int64_t from = task * chunk, to = std::min(n, from + chunk);
    std::memset(out + from, 0, sizeof(T) * (to - from));
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t i = from; i < to; ++i) out[i] += parts[block * n + i];
  };
  run(parallel, (n + chunk - 1) / chunk, body);
}

// grad_values: (rows, blocks, P, C), as the values.
template <class T, int C>
void convolution_values_backward(const MdplugConvolution& shape, int64_t n_senders, int64_t begin, int64_t end,
                                 const T* sent, const T* harmonics, const MdplugRadial& radial, const int32_t* sender,
                                 const int32_t* first, const T* grad, T* grad_sent, T* grad_harmonics, T* grad_values,
                                 MdplugParallel parallel) {
  Paths paths(shape);
  const int64_t k = shape.k, e0 = first[begin], e1 = first[end], blocks = (k + C - 1) / C;
  paths.layout(end - begin);
  const int64_t size = n_senders * paths.n_sent * C, of_block = paths.n_paths * C;
  const int64_t n_y = (e1 - e0) * paths.n_harmonics;
  const std::vector<Knot<T>> knots(1);
  Scratch<T> dy(blocks * n_y);
  std::memset(grad_values, 0, sizeof(T) * radial.rows * paths.value_row(C));
  auto body = [&](int64_t block) {
    Scratch<T> h(size), dh(size);
    const Slice<T, C> slice = slice_of<T, C>(paths, radial, knots, h.data(), harmonics, sender, first, begin, block);
    pack<T, C>(sent, n_senders, paths.n_sent, k, slice.channel, slice.count, h.data(), in_place);
    std::memset(dh.data(), 0, sizeof(T) * size);
    std::memset(dy.data() + block * n_y, 0, sizeof(T) * n_y);
    backward_part<T, C>(paths, slice, begin, end, grad, dh.data(), dy.data() + block * n_y, grad_values + block * of_block);
    unpack<T, C>(dh.data(), 1, n_senders, paths.n_sent, k, slice.channel, slice.count, grad_sent, in_place);
  };
  run(parallel, blocks, body);
  add_parts<T>(dy.data(), blocks, n_y, grad_harmonics, parallel);
}

// Directions in which features, harmonics and values move; h and values those of the block.
template <class T>
struct Moves {
  const T *h, *harmonics, *values;
};

// Receiver i through one group: changes of the messages are coupled into dgrad; dh and dvalues are added to.
template <class T, int C, int M>
void group_second(const Slice<T, C> s, const Moves<T>& move, const Group& group, int64_t i, const T* grad, T* q,
                  T* sums, T* dgrad, T* dh, T* dvalues) {
  using B = Block<T, C>;
  const int n_sent = s.n_sent, n_y = s.n_harmonics;
  const Path *paths = group.paths.data(), *end = paths + group.paths.size();
  std::memset(q, 0, sizeof(T) * group.n_outer * C);  // some (m1, m2) couple to nothing
  std::memset(sums, 0, sizeof(T) * group.n_outer * C);
  uncouple<T, C>(s, group, i, grad, q);
  for (int64_t e = s.first[i]; e < s.first[i + 1]; ++e) {
    if (e + kAhead < s.first[i + 1]) s.expect(paths, end, e + kAhead, move.values, dvalues);
    const T *y = s.harmonics + e * n_y + group.l2 * group.l2, *dy = move.harmonics + e * n_y + group.l2 * group.l2;
    const int64_t from = int64_t(s.sender[e]) * n_sent * C;
    for (const Path& path : group.paths) {
      const int64_t at = s.value(path.number, e);
      const B r = B::load(s.values + at), dr = B::load(move.values + at);
      B into = B::load(dvalues + at);
      int64_t component = from + path.l1 * path.l1 * C;
      const T* qs = q + path.outer * C;
      T* sum = sums + path.outer * C;
      for (int m1 = 0; m1 < 2 * path.l1 + 1; ++m1, qs += M * C, sum += M * C, component += C) {
        const B f = B::load(s.h + component), df = B::load(move.h + component), left = r * f;
        B change = r * df;
        change.fma(dr, f);
        B t = B::zero(), dt = B::zero();  // sums over m2 of Y Q, and of dY Q
        for (int m = 0; m < M; ++m) {
          const B a = B::load(qs + m * C);
          t.fma(y[m], a);
          dt.fma(dy[m], a);
          B total = B::load(sum + m * C);
          total.fma(y[m], change);
          total.fma(dy[m], left);
          total.store(sum + m * C);
        }
        into.fma(df, t);
        into.fma(f, dt);
        B to = B::load(dh + component);
        to.fma(dr, t);
        to.fma(r, dt);
        to.store(dh + component);
      }
      into.store(dvalues + at);
    }
  }
  couple<T, C>(s, group, i, sums, dgrad);
}

// Of S = <messages' change along (move_sent, move_harmonics, move_values), grad>: its derivatives by grad, features and
// values. Arrays are laid out as what they move or derive by.
template <class T, int C>
void convolution_second(const MdplugConvolution& shape, int64_t n_senders, int64_t begin, int64_t end, const T* sent,
                        const T* harmonics, const MdplugRadial& radial, const int32_t* sender, const int32_t* first,
                        const T* grad, const T* move_sent, const T* move_harmonics, const T* move_values, T* grad_grad,
                        T* grad_sent, T* grad_values, MdplugParallel parallel) {
  Paths paths(shape);
  const int64_t k = shape.k, blocks = (k + C - 1) / C;
  paths.layout(end - begin);
  const int64_t size = n_senders * paths.n_sent * C, of_block = paths.n_paths * C;
  std::memset(grad_values, 0, sizeof(T) * radial.rows * paths.value_row(C));
  int most = 0;
  for (const Group& group : paths.groups) most = std::max(most, group.n_outer);
  const std::vector<Knot<T>> knots(1);
  auto body = [&](int64_t block) {
    Scratch<T> h(size), move_h(size), dh(size);
    const Slice<T, C> slice = slice_of<T, C>(paths, radial, knots, h.data(), harmonics, sender, first, begin, block);
    pack<T, C>(sent, n_senders, paths.n_sent, k, slice.channel, slice.count, h.data(), in_place);
    pack<T, C>(move_sent, n_senders, paths.n_sent, k, slice.channel, slice.count, move_h.data(), in_place);
    std::memset(dh.data(), 0, sizeof(T) * size);
    const Moves<T> move{move_h.data(), move_harmonics, move_values + block * of_block};
    Scratch<T> q(most * C), sums(most * C);
    for (int64_t i = begin; i < end; ++i)
      for (const Group& group : paths.groups)
        with_width(group.l2, [&](auto m) {
          group_second<T, C, m()>(slice, move, group, i, grad, q.data(), sums.data(), grad_grad, dh.data(),
                                  grad_values + block * of_block);
        });
    unpack<T, C>(dh.data(), 1, n_senders, paths.n_sent, k, slice.channel, slice.count, grad_sent, in_place);
  };
  run(parallel, blocks, body);
}

}  // namespace MDPLUG_ISA
