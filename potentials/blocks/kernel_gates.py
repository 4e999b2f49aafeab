"""The gates of non-linear layers for the kernels: forward pass, and its adjoint in explicit form."""

from typing import Any, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mdplug.potentials.blocks.convolution import per_irrep, split_irreps
from mdplug.potentials.blocks.radial_nets import silu_slope


class Gated(NamedTuple):
    """What `Gates.forward` keeps for its adjoint.

    Attributes:
        messages: for each l (2l+1, n, rows). norm: (1, n, 1), by which they are multiplied.
        features: for each l (2l+1, n, K), before the gates. gates: (n, l_max * K), before the sigmoid.
    """

    messages: List[Tensor]
    norm: Tensor
    features: List[Tensor]
    gates: Tensor


class Gates(nn.Module):
    """The function `GatedMessenger.combine`, paths to one irrep side by side.

    Args:
        messenger: the GatedMessenger; its weights are copied.
    """

    linear: List[Tensor]
    gate_linear: Tensor
    residual: Tensor
    gate_residual: Tensor
    mixer: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, messenger: Any):
        super().__init__()
        self.channels, self.l_max = messenger.channels, messenger.l_max
        linear = torch.split(messenger.linear.detach(), messenger.messages.fan_in)
        self.linear = [part.flatten(0, 1) for part in linear]
        self.gate_linear = messenger.gate_linear.detach().flatten(0, 1)
        self.residual, self.gate_residual = messenger.residual.detach(), messenger.gate_residual.detach()
        self.mixer, self.alpha, self.beta = messenger.mixer.detach(), messenger.alpha.detach(), messenger.beta.detach()

    def forward(self, messages: List[Tensor], own: Tensor, rho: Tensor) -> Tuple[Tensor, Gated]:
        """((l_max+1)^2, n, K) features, and what `backward` needs.

        Args:
            messages: for each l (2l+1, n, rows). own: ((l_in+1)^2, n, k) features of the receivers. rho: (n,) density.
        """
        norm = (1.0 / (self.beta * rho + self.alpha)).view(1, -1, 1)
        residual = split_irreps(own, 0)
        features: List[Tensor] = []
        for ell, message in enumerate(messages):
            part = torch.matmul(message * norm, self.linear[ell])
            if ell < self.residual.shape[0]:
                part = part + torch.matmul(residual[ell], self.residual[ell])
            features.append(part)
        gates = torch.mm(own[0], self.gate_residual)
        if self.l_max > 0:
            gates = torch.addmm(gates, messages[0][0] * norm[0], self.gate_linear)
        opened = [functional.silu(features[0])]
        for ell in range(1, self.l_max + 1):
            gate = gates.narrow(1, (ell - 1) * self.channels, self.channels)
            opened.append(features[ell] * torch.sigmoid(gate))
        return per_irrep(torch.cat(opened, dim=0), self.mixer), Gated(messages, norm, features, gates)

    def backward(self, grad: Tensor, kept: Gated, own: Tensor) -> Tuple[List[Tensor], Tensor, Tensor]:
        """Cotangents of the messages, for each l, of `own` and of the density."""
        d_opened = split_irreps(per_irrep(grad, self.mixer.transpose(1, 2)), 0)
        d_features = [silu_slope(kept.features[0], d_opened[0])]
        d_gates: List[Tensor] = []
        for ell in range(1, self.l_max + 1):
            gate = torch.sigmoid(kept.gates.narrow(1, (ell - 1) * self.channels, self.channels))
            d_features.append(d_opened[ell] * gate)
            d_gates.append((d_opened[ell] * kept.features[ell]).sum(0) * gate * (1.0 - gate))
        d_messages: List[Tensor] = []
        d_norm = torch.zeros_like(kept.norm)
        d_own = torch.zeros_like(own)
        for ell, message in enumerate(kept.messages):
            d_input = torch.matmul(d_features[ell], self.linear[ell].t())
            if ell == 0 and self.l_max > 0:
                d_input = d_input + torch.mm(torch.cat(d_gates, dim=1), self.gate_linear.t())
            d_messages.append(d_input * kept.norm)
            d_norm = d_norm + (d_input * message).sum(0).sum(1).view(1, -1, 1)
            if ell < self.residual.shape[0]:
                d_own[ell * ell : (ell + 1) * (ell + 1)] = torch.matmul(d_features[ell], self.residual[ell].t())
        if self.l_max > 0:
            d_own[0] += torch.mm(torch.cat(d_gates, dim=1), self.gate_residual.t())
        d_rho = -self.beta * (kept.norm * kept.norm * d_norm).flatten()
        return d_messages, d_own, d_rho
