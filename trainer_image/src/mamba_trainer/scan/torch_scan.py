"""The reference scan in plain PyTorch: runs anywhere, is exact, and never holds a (batch, length, E, N) tensor.

The recurrence h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t . h_t (arXiv 2312.00752, eq. 2-3) is walked in
chunks. Only the state at each chunk's border is kept for the backward, which recomputes one chunk at a time and
walks it in reverse. Within a chunk all that does not depend on the previous state is one large tensor operation,
and a time step is a single fused multiply-add; on CPUs that beats log-depth scans, which move far more memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_trainer.config import ModelConfig
from mamba_trainer.scan import MixerWeights

#: Elements of one (chunk, batch, E, N) work tensor. 2**20 fp32 = 4 MiB stays in the cache of a CPU core.
_CHUNK_ELEMENTS = 2**20


class TorchScan:
    name = "torch"

    def unsupported(self, model: ModelConfig, device: torch.device) -> str | None:
        return None

    def inner(self, xz: Tensor, weights: MixerWeights) -> Tensor:
        x, z = xz.chunk(2, dim=1)
        x = causal_conv1d_silu(x, weights.conv_weight, weights.conv_bias)
        rank, n = weights.dt_proj.shape[1], weights.A.shape[1]
        projected = F.linear(x.transpose(1, 2), weights.x_proj)  # (batch, length, R + 2 N)
        dt, B, C = projected.split([rank, n, n], dim=-1)
        dt = F.softplus(F.linear(dt, weights.dt_proj).float() + weights.dt_bias)  # (batch, length, E)
        u = x.transpose(1, 2).float()
        y = SelectiveScan.apply(u, dt, weights.A, B.float(), C.float())
        y = (y + u * weights.D) * F.silu(z.transpose(1, 2).float())
        return F.linear(y.to(xz.dtype), weights.out_proj)


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of the depthwise causal convolution: x (batch, E, length), weight (E, 1, K), bias (E)."""
    length, taps = x.shape[-1], weight.shape[-1]
    return F.silu(F.conv1d(x, weight, bias.to(x.dtype), padding=taps - 1, groups=x.shape[1])[..., :length])


class SelectiveScan(torch.autograd.Function):
    """y of the recurrence, everything fp32: u, dt (batch, length, E); A (E, N); B, C (batch, length, N)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        batch, length, channels = u.shape
        chunk = _chunk_length(batch * A.numel(), length)
        y = torch.empty_like(u)
        state = u.new_zeros(batch, channels, A.shape[1])
        borders = []
        for start in range(0, length, chunk):
            part = slice(start, start + chunk)
            borders.append(state)
            states, _ = scan_states(state, u[:, part], dt[:, part], A, B[:, part])
            y[:, part] = torch.einsum("tben,btn->bte", states, C[:, part])
            state = states[-1].clone()
        ctx.chunk = chunk
        ctx.save_for_backward(u, dt, A, B, C, torch.stack(borders))
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        (dy,) = grad_outputs
        u, dt, A, B, C, borders = ctx.saved_tensors
        du, ddt, dA, dB, dC = (torch.empty_like(t) for t in (u, dt, A, B, C))
        dA.zero_()
        carried = torch.zeros_like(borders[0])  # gradient that reaches the chunk's last state from later chunks
        for index in reversed(range(len(borders))):
            part = slice(index * ctx.chunk, (index + 1) * ctx.chunk)
            before = borders[index]
            states, decay = scan_states(before, u[:, part], dt[:, part], A, B[:, part])
            dC[:, part] = torch.einsum("tben,bte->btn", states, dy[:, part])

            # g_t = dL/dh_t, walked backwards in place: g_t = C_t dy_t + decay_{t+1} g_{t+1}
            g = torch.einsum("bte,btn->tben", dy[:, part], C[:, part]).contiguous()
            g[-1] += carried
            for t in range(g.shape[0] - 2, -1, -1):
                g[t].addcmul_(decay[t + 1], g[t + 1])
            carried = decay[0] * g[0]

            gB = torch.einsum("tben,btn->bte", g, B[:, part])
            du[:, part] = gB * dt[:, part]
            dB[:, part] = torch.einsum("tben,bte->btn", g, u[:, part] * dt[:, part])
            # d(decay) * decay is what A and dt share: q = g h_{t-1} decay
            q = g.mul_(decay)
            q[0] *= before
            q[1:] *= states[:-1]
            ddt[:, part] = gB * u[:, part] + torch.einsum("tben,en->bte", q, A)
            dA += torch.einsum("tben,bte->en", q, dt[:, part])
        return du, ddt, dA, dB, dC


def scan_states(state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """All states of a chunk and the decays, both (time, batch, E, N), time outermost so that a step is contiguous."""
    decay = torch.exp(dt.transpose(0, 1).unsqueeze(-1) * A)
    states = (dt * u).transpose(0, 1).unsqueeze(-1) * B.transpose(0, 1).unsqueeze(2)
    for t in range(states.shape[0]):
        states[t].addcmul_(decay[t], state)
        state = states[t]
    return states, decay


def _chunk_length(elements_per_step: int, length: int) -> int:
    return max(1, min(length, max(8, _CHUNK_ELEMENTS // elements_per_step)))
