// The MD loop's pair list and sums as operators of torch, namespace mdplug; see ../README.md.
#include "cell_list.h"
#include "pair_list.h"
#include "torch_shim.h"

namespace mdplug {
namespace {

void require(bool fits, const char* what) {
  if (!fits) throw std::runtime_error(std::string("mdplug kernels: ") + what);
}

// Indices are followed into memory here: none may point outside.
void inside(const int64_t* index, int64_t n, int64_t end, const char* what) {
  bool fits = true;
  for (int64_t k = 0; k < n; ++k) fits &= uint64_t(index[k]) < uint64_t(end);
  require(fits, what);
}

void op_pair_list(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor &positions = a.tensor(), &reference = a.tensor(), &index = a.tensor(), &shifts = a.tensor(),
         &translations = a.tensor();
  const double cutoff = a.real(), least = a.real(), most = a.real();
  const int64_t atoms = positions.size(0);
  int64_t n = index.size(1);
  require(index.numel() == 2 * n && shifts.numel() == 3 * n && translations.numel() == 3 * n &&
              positions.numel() == 3 * atoms && reference.numel() == 3 * atoms,
          "shapes of a pair list do not agree");
  const int64_t* from = index.data<int64_t>("index");
  inside(from, 2 * n, atoms, "a pair list names an atom that is not there");
  const double* x = positions.data<double>("positions");
  const double moved = largest_move(atoms, x, reference.data<double>("reference"));
  const bool holds = moved < most * most;
  if (!holds) n = 0;
  Compaction list(n, x, from, translations.data<double>("translations"), cutoff, least, parallel);
  const int64_t kept = list.n_kept;
  Tensor to = Tensor::empty<int64_t>({2, kept}), there = Tensor::empty<int64_t>({kept, 3}),
         vectors = Tensor::empty<double>({kept, 3});
  list.fill(shifts.data<int64_t>("shifts"), to.data<int64_t>("index"), there.data<int64_t>("shifts"),
            vectors.data<double>("vectors"));
  stack[0] = to.release();
  stack[1] = there.release();
  stack[2] = vectors.release();
  stack[3] = StableIValue(list.overlap);
  stack[4] = StableIValue(int64_t(holds));
}

void op_cell_list(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor &positions = a.tensor(), &cell = a.tensor(), &inverse = a.tensor();
  const int64_t periodic = a.integer(), atoms = positions.size(0);
  const double cutoff = a.real();
  require(positions.numel() == 3 * atoms && cell.numel() == 9 && inverse.numel() == 9 && cutoff > 0.0,
          "a cell list needs positions, a cell and a cutoff");
  require(atoms < (int64_t(1) << 31), "more than 2^31 atoms");
  CellList list(atoms, positions.data<double>("positions"), cell.data<double>("cell"), inverse.data<double>("inverse"),
                int(periodic), cutoff, parallel);
  Tensor index = Tensor::empty<int64_t>({2, list.n_pairs}), shifts = Tensor::empty<int64_t>({list.n_pairs, 3});
  list.fill(index.data<int64_t>("index"), shifts.data<int64_t>("shifts"));
  stack[0] = index.release();
  stack[1] = shifts.release();
}

void energies(const Tensor& atom_energy, const int64_t* system, int64_t systems, double* sums) {
  const int64_t atoms = atom_energy.numel();
  if (atom_energy.is_float32())
    sum_atoms(atoms, systems, atom_energy.data<float>("atom_energy"), system, sums);
  else
    sum_atoms(atoms, systems, atom_energy.data<double>("atom_energy"), system, sums);
}

void op_sum_atoms(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor &atom_energy = a.tensor(), &system = a.tensor();
  const int64_t systems = a.integer(), atoms = system.numel();
  require(atom_energy.numel() == atoms, "atom energies are not one an atom");
  const int64_t* of = system.data<int64_t>("system");
  inside(of, atoms, systems, "an atom of a structure that is not there");
  Tensor energy = Tensor::empty<double>({systems});
  energies(atom_energy, of, systems, energy.data<double>("energy"));
  stack[0] = energy.release();
}

void op_sum_pairs(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor &vectors = a.tensor(), &gradient = a.tensor(), &pairs = a.tensor(), &atom_energy = a.tensor(),
         &system = a.tensor();
  const int64_t systems = a.integer(), atoms = system.numel(), n = pairs.size(1);
  require(pairs.numel() == 2 * n && vectors.numel() == 3 * n && gradient.numel() == 3 * n &&
              atom_energy.numel() == atoms,
          "shapes of pairs, their gradient and atom energies do not agree");
  const int64_t *index = pairs.data<int64_t>("pairs"), *of = system.data<int64_t>("system");
  inside(index, 2 * n, atoms, "pairs name an atom that is not there");
  inside(of, atoms, systems, "an atom of a structure that is not there");
  Tensor energy = Tensor::empty<double>({systems}), forces = Tensor::empty<double>({atoms, 3}),
         virial = Tensor::empty<double>({systems, 3, 3});
  energies(atom_energy, of, systems, energy.data<double>("energy"));
  const double* r = vectors.data<double>("vectors");
  double *f = forces.data<double>("forces"), *w = virial.data<double>("virial");
  if (gradient.is_float32())
    sum_pairs(n, atoms, systems, r, gradient.data<float>("gradient"), index, of, f, w, parallel);
  else
    sum_pairs(n, atoms, systems, r, gradient.data<double>("gradient"), index, of, f, w, parallel);
  stack[0] = energy.release();
  stack[1] = forces.release();
  stack[2] = virial.release();
}

struct Registration {
  Registration() {
    const Operator operators[] = {
        {"pair_list",
         "Tensor positions, Tensor reference, Tensor index, Tensor shifts, Tensor translations, float cutoff, "
         "float least, float most",
         "(Tensor, Tensor, Tensor, int, int)", op_pair_list},
        {"sum_atoms", "Tensor atom_energy, Tensor system_index, int systems", "Tensor", op_sum_atoms},
        {"cell_list", "Tensor positions, Tensor cell, Tensor inverse, int periodic, float cutoff", "(Tensor, Tensor)",
         op_cell_list},
        {"sum_pairs",
         "Tensor vectors, Tensor gradient, Tensor pairs, Tensor atom_energy, Tensor system_index, int systems",
         "(Tensor, Tensor, Tensor)", op_sum_pairs},
    };
    register_operators(operators);
  }
} registration;

}  // namespace
}  // namespace mdplug
