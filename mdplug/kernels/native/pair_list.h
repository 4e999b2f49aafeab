// The MD loop around the model: candidates of a skin list cut down to the cutoff, and the sums of energies, forces and
// virial. Sums are split in pieces that do not depend on how many threads there are.
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

// Largest squared distance between two sets of positions (3 n numbers); NaN where one is not finite.
inline double largest_move(int64_t n, const double* a, const double* b) {
  double most = 0.0, sum = 0.0;
  for (int64_t k = 0; k < 3 * n; k += 3) {
    const double x = a[k] - b[k], y = a[k + 1] - b[k + 1], z = a[k + 2] - b[k + 2], s = x * x + y * y + z * z;
    most = std::max(most, s);
    sum += s;  // a comparison would lose NaN
  }
  return sum == sum ? most : sum;
}

// Sums of atom energies over structures, in the order of the atoms.
template <class T>
void sum_atoms(int64_t atoms, int64_t systems, const T* values, const int64_t* system, double* sums) {
  std::fill(sums, sums + systems, 0.0);
  for (int64_t i = 0; i < atoms; ++i) sums[system[i]] += double(values[i]);
}

// Candidates whose distance at present positions is below the cutoff, in their order.
struct Compaction {
  static constexpr int64_t PIECE = 1 << 15;
  const int64_t n, pieces;
  int64_t n_kept = 0, overlap = -1;  // place of the first candidate that is closer than `least`, or -1

  // positions (N, 3); index (2, n) receiver and sender; translations (n, 3).
  Compaction(int64_t n, const double* positions, const int64_t* index, const double* translations, double cutoff,
             double least, Parallel parallel)
      : n(n), pieces((n + PIECE - 1) / PIECE), source_{n, positions, index, translations}, parallel_(parallel),
        kept_(n), counts_(pieces, 0) {
    std::vector<int64_t> close(pieces, -1);
    const double square = cutoff * cutoff, tiny = least * least;
    auto body = [&](int64_t piece) {
      const int64_t begin = piece * PIECE, end = std::min(n, begin + PIECE);
      const Source at = source_;
      int32_t* kept = kept_.data() + begin;
      int64_t count = 0;
      double least_square = square;
      for (int64_t e = begin; e < end; ++e) {
        const Vector v = at.vector(e);
        const double s = v.x * v.x + v.y * v.y + v.z * v.z;
        kept[count] = int32_t(e - begin);  // written always, counted where it stays: no branch
        count += int64_t(s < square);
        least_square = std::min(least_square, s);
      }
      counts_[piece] = count;
      if (least_square < tiny)
        for (int64_t e = end - 1; e >= begin; --e) {
          const Vector v = at.vector(e);
          if (v.x * v.x + v.y * v.y + v.z * v.z < tiny) close[piece] = e;
        }
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
      const Source at = source_;
      const int32_t* kept = kept_.data() + piece * PIECE;
      const int64_t count = counts_[piece], q0 = first[piece], all = n_kept;
      for (int64_t k = 0; k < count; ++k) {
        const int64_t e = piece * PIECE + kept[k], q = q0 + k;
        const Vector v = at.vector(e);
        index[q] = at.index[e];
        index[all + q] = at.index[at.n + e];
        std::memcpy(kept_shifts + 3 * q, shifts + 3 * e, 3 * sizeof(int64_t));
        std::memcpy(vectors + 3 * q, &v, sizeof v);
      }
    };
    in_pieces(pieces, parallel_, body);
  }

 private:
  struct Vector {
    double x, y, z;
  };
  struct Source {
    int64_t n;
    const double* positions;
    const int64_t* index;
    const double* translations;
    Vector vector(int64_t e) const {
      const double *i = positions + 3 * index[e], *j = positions + 3 * index[n + e], *t = translations + 3 * e;
      return {j[0] - i[0] + t[0], j[1] - i[1] + t[1], j[2] - i[2] + t[2]};
    }
  };
  const Source source_;
  Parallel parallel_;
  std::vector<int32_t> kept_;
  std::vector<int64_t> counts_;
};

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
        const double *r = vectors + 3 * e, x = r[0], y = r[1], z = r[2];
#pragma GCC unroll 3
        for (int b = 0; b < 3; ++b) {
          const double g = double(gradient[3 * e + b]);
          own[b] += g;
          other[b] -= g;
          w[b] += x * g;
          w[3 + b] += y * g;
          w[6 + b] += z * g;
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
