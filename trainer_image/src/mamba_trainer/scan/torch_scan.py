"""The reference scan in plain PyTorch: runs anywhere, is exact, and never holds a (length, batch, N, E) tensor.

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

#: Elements of one (chunk, batch, N, E) work tensor. 2**18 fp32 = 1 MiB: a few of them stay in a core's cache.
_CHUNK_ELEMENTS = 2**18


class TorchScan:
    name = "torch"

    def unsupported(self, model: ModelConfig, device: torch.device) -> str | None:
        return None

    def inner(self, xz: Tensor, weights: MixerWeights) -> Tensor:
        x, z = xz.chunk(2, dim=1)
        x = causal_conv1d_silu(x, weights.conv_weight, weights.conv_bias)
        # Time outermost from here on: a step of the recurrence then reads and writes contiguous memory.
        x, z = (t.permute(2, 0, 1).contiguous() for t in (x, z))  # (length, batch, E)
        rank, n = weights.dt_proj.shape[1], weights.A.shape[1]
        dt, B, C = F.linear(x, weights.x_proj).split([rank, n, n], dim=-1)
        dt = F.softplus(F.linear(dt, weights.dt_proj).float() + weights.dt_bias)
        u = x.float()
        y = SelectiveScan.apply(u, dt, weights.A, B.float(), C.float())
        y = (y + u * weights.D) * F.silu(z.float())
        return F.linear(y.to(xz.dtype), weights.out_proj).transpose(0, 1)


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of the depthwise causal convolution: x (batch, E, length), weight (E, 1, K), bias (E)."""
    length, taps = x.shape[-1], weight.shape[-1]
    return F.silu(F.conv1d(x, weight, bias.to(x.dtype), padding=taps - 1, groups=x.shape[1])[..., :length])


class SelectiveScan(torch.autograd.Function):
    """y of the recurrence, everything fp32: u, dt (length, batch, E); A (E, N); B, C (length, batch, N)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        length, batch, channels = u.shape
        chunk = _chunk_length(batch * A.numel(), length)
        y = torch.empty_like(u)
        state = u.new_zeros(batch, A.shape[1], channels)
        borders = []
        for start in range(0, length, chunk):
            part = slice(start, start + chunk)
            borders.append(state)
            states, _ = scan_states(state, u[part], dt[part], A, B[part])
            y[part] = _over_states(C[part], states)
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
        carried = torch.zeros_like(borders[0])  # gradient that later chunks send to the last state of this one
        for index in reversed(range(len(borders))):
            part = slice(index * ctx.chunk, (index + 1) * ctx.chunk)
            before, du_t, dt_t = borders[index], u[part] * dt[part], dt[part]
            states, decay = scan_states(before, u[part], dt_t, A, B[part])
            dC[part] = _over_channels(states, dy[part])

            # g_t = dL/dh_t, walked backwards in place: g_t = C_t dy_t + decay_{t+1} g_{t+1}
            g = dy[part].unsqueeze(2) * C[part].unsqueeze(-1)
            g[-1] += carried
            for t in range(g.shape[0] - 2, -1, -1):
                g[t].addcmul_(decay[t + 1], g[t + 1])
            carried = decay[0] * g[0]

            gB = _over_states(B[part], g)
            du[part] = gB * dt_t
            dB[part] = _over_channels(g, du_t)
            # d(decay) * decay is what A and dt share: q = g h_{t-1} decay
            q = g.mul_(decay)
            q[0] *= before
            q[1:] *= states[:-1]
            ddt[part] = gB * u[part] + torch.mul(q, A.t(), out=decay).sum(2)
            dA += q.mul_(dt_t.unsqueeze(2)).sum((0, 1)).t()
        return du, ddt, dA, dB, dC


def scan_states(state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """All states of a chunk, from the one before it, and the decays: both (time, batch, N, E).

    Channels innermost: they are many and contiguous, so that every product over them is vectorised.
    """
    decay = (dt.unsqueeze(2) * A.t()).exp_()
    states = (dt * u).unsqueeze(2) * B.unsqueeze(-1)
    for t in range(states.shape[0]):
        states[t].addcmul_(decay[t], state)
        state = states[t]
    return states, decay


def _over_states(vectors: Tensor, matrices: Tensor) -> Tensor:
    """(time, batch, N) x (time, batch, N, E) -> (time, batch, E)"""
    return torch.matmul(vectors.unsqueeze(2), matrices).squeeze(2)


def _over_channels(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(time, batch, N, E) x (time, batch, E) -> (time, batch, N)"""
    return torch.matmul(matrices, vectors.unsqueeze(-1)).squeeze(-1)


def _chunk_length(elements_per_step: int, length: int) -> int:
    return max(1, min(length, max(8, _CHUNK_ELEMENTS // elements_per_step)))
