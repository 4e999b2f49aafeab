"""Stillinger-Weber: two- and three-body energies, the many-body analytic reference.

F. H. Stillinger, T. A. Weber, Phys. Rev. B 31, 5262 (1985), eqs. 2.3-2.7:
  v2(r) = eps A (B x^-p - x^-q) exp(1/(x - a)),  x = r/sigma, zero from x = a on
  v3(i; j, k) = eps lambda exp(gamma/(x_ij - a) + gamma/(x_ik - a)) (cos theta_jik + 1/3)^2
"""

from typing import Dict

import torch
from torch import Tensor, nn

from mdplug.potential import Potential
from mdplug.spec import Spec

SILICON = {
    "epsilon": 2.1683, "sigma": 2.0951, "a": 1.80, "lam": 21.0, "gamma": 1.20,
    "A": 7.049556277, "B": 0.6022245584, "p": 4.0, "q": 0.0,
}  # fmt: skip


class StillingerWeber(Potential):
    """One kind of atom; `new()` gives silicon (A, eV)."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        values = [float(spec.config[k]) for k in ("epsilon", "sigma", "a", "lam", "gamma", "A", "B", "p", "q")]
        self.parameters_ = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    @classmethod
    def new(cls, species: int = 14, **changes: float) -> "StillingerWeber":
        """Silicon, or with parameters of one's own (keys as in SILICON)."""
        config = {**SILICON, **changes}
        return cls(
            Spec(
                name="stillinger-weber",
                architecture=f"{cls.__module__}:{cls.__name__}",
                config=config,
                cutoff=config["a"] * config["sigma"],
                species=(species,),
                licence="MIT",
                cite=("Stillinger and Weber, Phys. Rev. B 31, 5262 (1985)",),
            )
        )

    def local(
        self,
        numbers: Tensor,
        pairs: Tensor,
        vectors: Tensor,
        n_owned: int,
        system_index: Tensor,
        total_charge: Tensor,
        total_spin: Tensor,
        head: Tensor,
    ) -> Dict[str, Tensor]:
        """See `Potential.local`."""
        eps, sigma, a, lam, gamma, big_a, big_b, p, q = self.parameters_.unbind()
        r = torch.linalg.vector_norm(vectors, dim=1)
        # exp(1/(x-a)) goes to zero from below with all derivatives; the clamp keeps it finite at x = a.
        gap = (r / sigma - a).clamp(max=-1e-2)
        x = r / sigma
        two = 0.5 * eps * big_a * (big_b * x.pow(-p) - x.pow(-q)) * torch.exp(1.0 / gap)
        energy = vectors.new_zeros(n_owned).index_add(0, pairs[0], two)
        # sum_jk g_j g_k (c_jk + 1/3)^2 = |T|^2 + 2/3 |v|^2 + s^2/9 with T = sum g u u, v = sum g u, s = sum g;
        # half of it, less the j = k terms, counts each angle once.
        g = torch.exp(gamma / gap)
        u = vectors / r.unsqueeze(1)
        s = vectors.new_zeros(n_owned).index_add(0, pairs[0], g)
        v = vectors.new_zeros(n_owned, 3).index_add(0, pairs[0], g.unsqueeze(1) * u)
        t = vectors.new_zeros(n_owned, 9).index_add(
            0, pairs[0], (g.unsqueeze(1).unsqueeze(2) * u.unsqueeze(1) * u.unsqueeze(2)).reshape(-1, 9)
        )
        same = vectors.new_zeros(n_owned).index_add(0, pairs[0], g * g) * (16.0 / 9.0)
        every = t.square().sum(dim=1) + (2.0 / 3.0) * v.square().sum(dim=1) + s * s / 9.0
        return {"atom_energy": energy + 0.5 * eps * lam * (every - same)}
