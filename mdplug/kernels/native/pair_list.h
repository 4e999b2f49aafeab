// Pairs of the MD loop around the model: candidates of a skin list cut down to the cutoff, candidates put in order, and
// what forces and virial are summed from. Sums are split in pieces that do not depend on how many threads there are.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace mdplug {

typedef void (*Parallel)(int64_t n, void (*body)(int64_t, int64_t, void*), void* context);

template <class F>
void in_pieces(int64_t pieces, Parallel parallel, F& body) {
  parallel(pieces, [](int64_t begin, int64_t end, void* f) {
    for (int64_t p = begin; p < end; ++p) (*static_cast<F*>(f))(p);
  }, &body);
}

// Candidates whose distance at present positions is below the cutoff, in their order.
struct Compaction {
  static constexpr int64_t PIECE = 1 << 15;
  const int64_t n, pieces;
  int64_t n_kept = 0, overlap = -1;  // place of the first candidate that is closer than `least`, or -1

  // positions (N, 3); index (2, n) receiver and sender; translations (n, 3).
  Compaction(int64_t n, const double* positions, const int64_t* index, const double* translations, double cutoff,
             double least, Parallel parallel)
      : n(n), pieces((n + PIECE - 1) / PIECE), positions_(positions), index_(index), translations_(translations),
        parallel_(parallel), kept_(n), counts_(pieces, 0) {
    std::vector<int64_t> close(pieces, -1);
    const double square = cutoff * cutoff, tiny = least * least;
    auto body = [&](int64_t piece) {
      const int64_t begin = piece * PIECE, end = std::min(n, begin + PIECE);
      int64_t count = 0;
      for (int64_t e = begin; e < end; ++e) {
        double v[3];
        vector(e, v);
        const double s = v[0] * v[0] + v[1] * v[1] + v[2] * v[2];
        kept_[begin + count] = int32_t(e - begin);  // written always, counted where it stays: no branch
        count += s < square;
        if (s < tiny && close[piece] < 0) close[piece] = e;
      }
      counts_[piece] = count;
    };
    in_pieces(pieces, parallel, body);
    for (int64_t p = 0; p < pieces; ++p) {
      n_kept += counts_[p];
      if (overlap < 0) overlap = close[p];
    }
  }

  // index (2, kept), shifts (kept, 3), vectors (kept, 3).
  void fill(const int64_t* shifts, int64_t* index, int64_t* kept_shifts, double* vectors) {
    std::vector<int64_t> first(pieces + 1, 0);
    for (int64_t p = 0; p < pieces; ++p) first[p + 1] = first[p] + counts_[p];
    auto body = [&](int64_t piece) {
      for (int64_t k = 0, q = first[piece]; k < counts_[piece]; ++k, ++q) {
        const int64_t e = piece * PIECE + kept_[piece * PIECE + k];
        index[q] = index_[e];
        index[n_kept + q] = index_[n + e];
        std::memcpy(kept_shifts + 3 * q, shifts + 3 * e, 3 * sizeof(int64_t));
        vector(e, vectors + 3 * q);
      }
    };
    in_pieces(pieces, parallel_, body);
  }

 private:
  void vector(int64_t e, double* v) const {
    const double *i = positions_ + 3 * index_[e], *j = positions_ + 3 * index_[n + e], *t = translations_ + 3 * e;
    for (int a = 0; a < 3; ++a) v[a] = j[a] - i[a] + t[a];
  }
  const double* positions_;
  const int64_t* index_;
  const double* translations_;
  Parallel parallel_;
  std::vector<int32_t> kept_;
  std::vector<int64_t> counts_;
};

// Pairs by receiver, sender, shift: two stable counting sorts, then the few images of one pair among themselves.
inline void sort_pairs(int64_t n, int64_t atoms, const int64_t* receiver, const int64_t* sender, const int32_t* shifts,
                       int64_t* index, int64_t* sorted_shifts) {
  std::vector<int32_t> by_sender(n), order(n);
  std::vector<int64_t> at(atoms + 1, 0);
  auto starts = [&](const int64_t* key) {
    std::fill(at.begin(), at.end(), 0);
    for (int64_t e = 0; e < n; ++e) ++at[key[e] + 1];
    for (int64_t a = 0; a < atoms; ++a) at[a + 1] += at[a];
  };
  starts(sender);
  for (int64_t e = 0; e < n; ++e) by_sender[at[sender[e]]++] = int32_t(e);
  starts(receiver);
  for (int64_t e = 0; e < n; ++e) order[at[receiver[by_sender[e]]]++] = by_sender[e];
  auto earlier = [&](int32_t a, int32_t b) {
    return std::lexicographical_compare(shifts + 3 * a, shifts + 3 * a + 3, shifts + 3 * b, shifts + 3 * b + 3);
  };
  for (int64_t begin = 0, end; begin < n; begin = end) {
    const int32_t e = order[begin];
    for (end = begin + 1; end < n && receiver[order[end]] == receiver[e] && sender[order[end]] == sender[e]; ++end) {
    }
    if (end - begin > 1) std::sort(order.begin() + begin, order.begin() + end, earlier);
  }
  for (int64_t q = 0; q < n; ++q) {
    const int32_t e = order[q];
    index[q] = receiver[e];
    index[n + q] = sender[e];
    for (int a = 0; a < 3; ++a) sorted_shifts[3 * q + a] = shifts[3 * int64_t(e) + a];
  }
}

// forces (N, 3) = sum over pairs of +gradient at the receiver and -gradient at the sender; virial (S, 3, 3), symmetric,
// = -sum of r (x) gradient. vectors (n, 3); gradient (n, 3); pairs (2, n); system (N) of each atom.
template <class T>
void sum_pairs(int64_t n, int64_t atoms, int64_t systems, const double* vectors, const T* gradient,
               const int64_t* pairs, const int64_t* system, double* forces, double* virial, Parallel parallel) {
  constexpr int64_t MOST = 16, LEAST = 1 << 16, BLOCK = 4096;
  const int64_t pieces = std::max<int64_t>(1, std::min(MOST, n / LEAST));
  std::vector<double> partial((pieces - 1) * atoms * 3, 0.0), virials(pieces * systems * 9, 0.0);
  std::memset(forces, 0, sizeof(double) * 3 * atoms);
  auto body = [&](int64_t piece) {
    const int64_t begin = n * piece / pieces, end = n * (piece + 1) / pieces;
    double* f = piece ? partial.data() + (piece - 1) * atoms * 3 : forces;
    double* v = virials.data() + piece * systems * 9;
    for (int64_t e = begin; e < end;) {  // a run of one receiver at a time
      const int64_t i = pairs[e];
      double own[3] = {0, 0, 0}, w[9] = {0, 0, 0, 0, 0, 0, 0, 0, 0};
      for (; e < end && pairs[e] == i; ++e) {
        double* other = f + 3 * pairs[n + e];
        for (int b = 0; b < 3; ++b) {
          const double g = double(gradient[3 * e + b]);
          own[b] += g;
          other[b] -= g;
          for (int a = 0; a < 3; ++a) w[3 * a + b] += vectors[3 * e + a] * g;
        }
      }
      for (int b = 0; b < 3; ++b) f[3 * i + b] += own[b];
      double* into = v + 9 * system[i];
      for (int k = 0; k < 9; ++k) into[k] += w[k];
    }
  };
  in_pieces(pieces, parallel, body);
  if (pieces > 1) {
    auto reduce = [&](int64_t block) {
      const int64_t end = std::min(3 * atoms, (block + 1) * BLOCK);
      for (int64_t p = 0; p + 1 < pieces; ++p)
        for (int64_t k = block * BLOCK; k < end; ++k) forces[k] += partial[p * atoms * 3 + k];
    };
    in_pieces((3 * atoms + BLOCK - 1) / BLOCK, parallel, reduce);
  }
  for (int64_t s = 0; s < systems; ++s) {
    double sum[9] = {0, 0, 0, 0, 0, 0, 0, 0, 0};
    for (int64_t p = 0; p < pieces; ++p)
      for (int k = 0; k < 9; ++k) sum[k] += virials[(p * systems + s) * 9 + k];
    for (int a = 0; a < 3; ++a)
      for (int b = 0; b < 3; ++b) virial[9 * s + 3 * a + b] = -0.5 * (sum[3 * a + b] + sum[3 * b + a]);
  }
}

}  // namespace mdplug
