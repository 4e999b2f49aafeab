// All pairs of one structure closer than a cutoff, periodic images included, sorted by receiver, sender and shift.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "pair_list.h"

namespace mdplug {

class CellList {
 public:
  int64_t n_pairs = 0;

  // positions (n, 3); cell (3, 3) rows and its inverse; periodic: bit k for direction k.
  CellList(int64_t n, const double* positions, const double* cell, const double* inverse, int periodic, double cutoff,
           Parallel parallel)
      : n_(n), cell_(cell), periodic_(periodic), square_(cutoff * cutoff), blocks_((n + BLOCK - 1) / BLOCK),
        parallel_(parallel) {
    place(positions, inverse, cutoff);
    auto body = [&](int64_t b) { search(b); };
    in_pieces(int64_t(blocks_.size()), parallel, body);
    for (const auto& block : blocks_) n_pairs += int64_t(block.size());
  }

  // index (2, pairs), shifts (pairs, 3).
  void fill(int64_t* index, int64_t* shifts) {
    std::vector<int64_t> first(blocks_.size() + 1, 0);
    for (size_t b = 0; b < blocks_.size(); ++b) first[b + 1] = first[b] + int64_t(blocks_[b].size());
    auto body = [&](int64_t b) {
      int64_t q = first[b];
      for (const Found& f : blocks_[b]) {
        index[q] = f.i;
        index[n_pairs + q] = f.j;
        for (int a = 0; a < 3; ++a) shifts[3 * q + a] = f.shift[a];
        ++q;
      }
    };
    in_pieces(int64_t(blocks_.size()), parallel_, body);
  }

 private:
  static constexpr int64_t BLOCK = 64;  // receivers of one piece of work
  struct Found {
    int32_t i, j;
    std::array<int32_t, 3> shift;
  };
  struct Atom {  // in the cell: at x, `home` lattice vectors away from where it was given
    double x[3];
    int32_t index;
    std::array<int32_t, 3> home, bin;
  };

  // Atoms into the cell and into bins about half a cutoff wide, sorted by bin.
  void place(const double* positions, const double* inverse, double cutoff) {
    std::vector<Atom> atoms(n_);
    std::vector<double> fraction(3 * n_);
    double low[3], high[3];
    for (int k = 0; k < 3; ++k) low[k] = INFINITY, high[k] = -INFINITY;
    for (int64_t i = 0; i < n_; ++i) {
      const double* x = positions + 3 * i;
      Atom& atom = atoms[i];
      atom.index = int32_t(i);
      for (int a = 0; a < 3; ++a) atom.x[a] = x[a];
      for (int k = 0; k < 3; ++k) {
        double f = x[0] * inverse[k] + x[1] * inverse[3 + k] + x[2] * inverse[6 + k];
        atom.home[k] = 0;
        if (periodic_ >> k & 1) {
          const double whole = std::floor(f);
          if (!(std::fabs(whole) < 1e9)) throw std::runtime_error("mdplug kernels: an atom is too many cells away");
          f -= whole;
          atom.home[k] = int32_t(whole);
          for (int a = 0; a < 3; ++a) atom.x[a] -= whole * cell_[3 * k + a];
        }
        fraction[3 * i + k] = f;
        low[k] = std::min(low[k], f);
        high[k] = std::max(high[k], f);
      }
    }
    double width[3], wanted[3], product = 1.0;
    for (int k = 0; k < 3; ++k) {
      const bool wraps = periodic_ >> k & 1;
      if (wraps) low[k] = 0.0, high[k] = 1.0;
      const double norm = std::sqrt(inverse[k] * inverse[k] + inverse[3 + k] * inverse[3 + k] +
                                    inverse[6 + k] * inverse[6 + k]);
      width[k] = (high[k] - low[k]) / norm;
      wanted[k] = std::min(std::max(1.0, std::floor(2.0 * width[k] / cutoff)), 1e6);
      product *= wanted[k];
    }
    const double most = std::max(64.0, 2.0 * double(n_));  // sparse systems: no more bins than make sense
    const double shrink = product > most ? std::cbrt(most / product) : 1.0;
    for (int k = 0; k < 3; ++k) {
      bins_[k] = int32_t(std::max(1.0, std::floor(wanted[k] * shrink)));
      const double ratio = width[k] > 0.0 ? cutoff * bins_[k] / width[k] : 0.0;
      reach_[k] = int32_t(std::min(std::floor(ratio) + 1.0, 1e9));
      if (!(periodic_ >> k & 1)) reach_[k] = std::min(reach_[k], bins_[k] - 1);
    }
    first_.assign(int64_t(bins_[0]) * bins_[1] * bins_[2] + 1, 0);
    for (int64_t i = 0; i < n_; ++i) {
      for (int k = 0; k < 3; ++k) {
        const double span = high[k] - low[k], f = span > 0.0 ? (fraction[3 * i + k] - low[k]) / span : 0.0;
        atoms[i].bin[k] = std::min(int32_t(f * bins_[k]), bins_[k] - 1);
      }
      ++first_[number(atoms[i].bin) + 1];
    }
    for (size_t b = 1; b < first_.size(); ++b) first_[b] += first_[b - 1];
    std::vector<int64_t> at(first_.begin(), first_.end() - 1);
    sorted_.resize(n_);
    where_.resize(n_);
    for (const Atom& atom : atoms) {
      const int64_t p = at[number(atom.bin)]++;
      sorted_[p] = atom;
      where_[atom.index] = p;
    }
  }

  int64_t number(const std::array<int32_t, 3>& bin) const {
    return (int64_t(bin[0]) * bins_[1] + bin[1]) * bins_[2] + bin[2];
  }

  void search(int64_t block) {
    std::vector<Found>& out = blocks_[block];
    std::vector<Found> mine;
    std::vector<uint64_t> keys;
    const int64_t end = std::min(n_, (block + 1) * BLOCK);
    for (int64_t i = block * BLOCK; i < end; ++i) {
      mine.clear();
      around(sorted_[where_[i]], mine);
      keys.resize(mine.size());
      for (size_t k = 0; k < mine.size(); ++k) keys[k] = uint64_t(mine[k].j) << 32 | k;
      std::sort(keys.begin(), keys.end());
      const size_t start = out.size();
      for (const uint64_t key : keys) {
        out.push_back(mine[key & 0xffffffffu]);
        for (size_t q = out.size() - 1; q > start && out[q - 1].j == out[q].j && out[q].shift < out[q - 1].shift; --q)
          std::swap(out[q], out[q - 1]);
      }
    }
  }

  struct Walk {  // along one direction: a bin, and how many lattice vectors away it lies
    int32_t bins, bin, image;
    Walk(int32_t at, int32_t reach, int32_t bins) : bins(bins), image(0) {
      const int32_t b = at - reach;
      if (b < 0) image = -((bins - 1 - b) / bins);
      bin = b - image * bins;
    }
    void next() {
      if (++bin == bins) bin = 0, ++image;
    }
  };

  void around(const Atom& atom, std::vector<Found>& out) const {
    const int32_t width[3] = {2 * reach_[0] + 1, 2 * reach_[1] + 1, 2 * reach_[2] + 1};
    auto open = [&](int k, const Walk& at) { return at.image == 0 || (periodic_ >> k & 1); };
    Walk at0(atom.bin[0], reach_[0], bins_[0]);
    for (int32_t d0 = 0; d0 < width[0]; ++d0, at0.next()) {
      if (!open(0, at0)) continue;
      Walk at1(atom.bin[1], reach_[1], bins_[1]);
      for (int32_t d1 = 0; d1 < width[1]; ++d1, at1.next()) {
        if (!open(1, at1)) continue;
        const int64_t row = (int64_t(at0.bin) * bins_[1] + at1.bin) * bins_[2];
        Walk at2(atom.bin[2], reach_[2], bins_[2]);  // bins of one image follow one another
        for (int32_t left = width[2]; left > 0; left -= bins_[2] - at2.bin, at2.bin = 0, ++at2.image) {
          const int64_t begin = first_[row + at2.bin], end = first_[row + std::min(at2.bin + left, bins_[2])];
          if (open(2, at2)) look(atom, begin, end, {at0.image, at1.image, at2.image}, out);
        }
      }
    }
  }

  // Sorted atoms begin..end, `image` lattice vectors away.
  void look(const Atom& atom, int64_t begin, int64_t end, const std::array<int32_t, 3>& image,
            std::vector<Found>& out) const {
    double from[3];
    for (int a = 0; a < 3; ++a)
      from[a] = image[0] * cell_[a] + image[1] * cell_[3 + a] + image[2] * cell_[6 + a] - atom.x[a];
    const bool itself = image[0] == 0 && image[1] == 0 && image[2] == 0;
    constexpr int64_t MOST = 256;
    int32_t hits[MOST];
    for (int64_t start = begin; start < end; start += MOST) {
      const int64_t stop = std::min(end, start + MOST);
      int64_t count = 0;
      for (int64_t p = start; p < stop; ++p) {  // written always, counted where it is near: no branch
        const double* o = sorted_[p].x;
        const double x = o[0] + from[0], y = o[1] + from[1], z = o[2] + from[2];
        hits[count] = int32_t(p);
        count += int64_t(x * x + y * y + z * z < square_);
      }
      for (int64_t h = 0; h < count; ++h) {
        const Atom& other = sorted_[hits[h]];
        if (itself && other.index == atom.index) continue;
        Found found{atom.index, other.index, {}};
        for (int k = 0; k < 3; ++k) found.shift[k] = image[k] - other.home[k] + atom.home[k];
        out.push_back(found);
      }
    }
  }

  const int64_t n_;
  const double* cell_;
  const int periodic_;
  const double square_;
  std::vector<std::vector<Found>> blocks_;
  Parallel parallel_;
  int32_t bins_[3], reach_[3];
  std::vector<int64_t> first_, where_;
  std::vector<Atom> sorted_;
};

}  // namespace mdplug
