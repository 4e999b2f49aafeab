// Pairs of one evaluation: those inside the cutoff, by receiver, in the order of the sorted atoms.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace mdplug {

template <class T>
struct Graph {
  int64_t n_pairs, n_owned;
  std::vector<int32_t> first;      // (n_owned + 1)
  std::vector<int64_t> kept;       // original places of the pairs inside, in their order

  // pairs (2, E) receiver and sender; vectors (E, 3); place: atom -> sorted place, ghosts stay themselves.
  Graph(int64_t n, const int64_t* pairs, const T* vectors, const int32_t* place, int64_t owned, T cutoff)
      : n_owned(owned), first(owned + 1, 0), pairs_(pairs), place_(place), n_(n), vectors_(vectors) {
    kept.reserve(n);
    distance_.reserve(n);
    for (int64_t e = 0; e < n; ++e) {
      const T *v = vectors + 3 * e, r = std::sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
      if (!(r < cutoff)) continue;
      kept.push_back(e);
      distance_.push_back(r);
      ++first[place[pairs[e]] + 1];
    }
    n_pairs = int64_t(kept.size());
    for (int64_t i = 0; i < owned; ++i) first[i + 1] += first[i];
  }

  // vectors (P, 3), r (P), receiver (P), sender (P), origin (P).
  void fill(T* vectors, T* r, int32_t* receiver, int32_t* sender, int64_t* origin) const {
    std::vector<int32_t> at(first.begin(), first.end() - 1);
    for (int64_t q = 0; q < n_pairs; ++q) {
      const int64_t e = kept[q];
      const int32_t i = place_[pairs_[e]], p = at[i]++;
      for (int a = 0; a < 3; ++a) vectors[3 * p + a] = vectors_[3 * e + a];
      r[p] = distance_[q];
      receiver[p] = i;
      sender[p] = place_[pairs_[n_ + e]];
      origin[p] = e;
    }
  }

 private:
  const int64_t* pairs_;
  const int32_t* place_;
  int64_t n_;
  const T* vectors_;
  std::vector<T> distance_;
};

}  // namespace mdplug
