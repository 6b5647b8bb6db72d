"""The Mamba-1 language model (arXiv 2312.00752), with the parameter names and shapes of mamba_ssm.

- one residual stream: a block adds its mixer's output to it, so a recompute boundary is one tensor, not two
- RMSNorm in fp32 arithmetic, tied embeddings, vocabulary padded
- the loss is computed inside the head's forward, in chunks: T x V logits never exist, and a ZeRO-3 partition of
  the tied weight is gathered while it is read
- `A_log`, `D` and the dt bias enter the forward as fp32, whatever the weights are stored in (see `fp32_values`)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamba_trainer.config import ModelConfig
from mamba_trainer.loss import linear_cross_entropy
from mamba_trainer.scan import MixerWeights, ScanBackend
from mamba_trainer.scan.torch_scan import TorchScan

#: Parameters whose 16-bit rounding would change the recurrence (mamba's README, "Precision").
FP32_PARAMETERS = ("A_log", "D", "dt_proj.bias")


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) of any float type -> the same shape in the weight's type."""
        normed = F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.epsilon)
        return normed.to(self.weight.dtype)


class _ExactDynamics(torch.autograd.Function):
    """A = -exp(A_log), D and the dt bias from their fp32 values; gradients go to the 16-bit parameters.

    One node for the three: on small models the launch of operations is what a step takes its time for.
    """

    @staticmethod
    def forward(
        ctx: Any, A_log: Tensor, D: Tensor, dt_bias: Tensor, exact_A_log: Tensor, exact_D: Tensor, exact_dt_bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        A = exact_A_log.exp().neg_()
        ctx.save_for_backward(A)
        ctx.dtype = A_log.dtype
        return A, exact_D.view_as(exact_D), exact_dt_bias.view_as(exact_dt_bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (A,) = ctx.saved_tensors
        dA, dD, d_dt_bias = grad_outputs
        return (dA * A).to(ctx.dtype), dD.to(ctx.dtype), d_dt_bias.to(ctx.dtype), None, None, None


class Mixer(nn.Module):
    """The Mamba-1 mixer: projections around a selective scan. E = d_inner, N = d_state."""

    def __init__(self, config: ModelConfig, scan: ScanBackend) -> None:
        super().__init__()
        d, e, n, r = config.d_model, config.d_inner, config.d_state, config.resolved_dt_rank
        self.scan = scan
        self.A_log = nn.Parameter(torch.empty(e, n))
        self.D = nn.Parameter(torch.empty(e))
        self.in_proj = nn.Linear(d, 2 * e, bias=False)
        self.conv1d = nn.Conv1d(e, e, config.d_conv, groups=e, padding=config.d_conv - 1)
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, e)
        self.out_proj = nn.Linear(e, d, bias=False)
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.D._no_weight_decay = True  # type: ignore[attr-defined]
        #: Exact values of FP32_PARAMETERS where the parameters themselves are 16 bit; kept by `Fp32Values`.
        self.fp32_values: dict[str, Tensor] = {}

    def _dynamics(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, D and the dt bias in fp32."""
        stored = (self.A_log, self.D, self.dt_proj.bias)
        if not self.fp32_values:
            A_log, D, dt_bias = (parameter.float() for parameter in stored)
            return -torch.exp(A_log), D, dt_bias
        exact: tuple[Tensor, Tensor, Tensor] = _ExactDynamics.apply(
            *stored, *(self.fp32_values[name] for name in FP32_PARAMETERS)
        )
        return exact

    def weights(self) -> MixerWeights:
        A, D, dt_bias = self._dynamics()
        return MixerWeights(
            conv_weight=self.conv1d.weight,
            conv_bias=self.conv1d.get_parameter("bias"),
            x_proj=self.x_proj.weight,
            dt_proj=self.dt_proj.weight,
            out_proj=self.out_proj.weight,
            A=A,
            D=D,
            dt_bias=dt_bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, d_model) -> the same."""
        batch, length, width = x.shape
        # Channels first, as convolution and scan read it: one product instead of a product and a transpose.
        xz = (self.in_proj.weight @ x.reshape(batch * length, width).t()).view(-1, batch, length).transpose(0, 1)
        out: Tensor = self.scan.inner(xz, self.weights())
        return out


class Block(nn.Module):
    """residual + mixer(norm(residual)). A unit of recompute, and of gathering under ZeRO-3."""

    def __init__(self, config: ModelConfig, scan: ScanBackend) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.mixer = Mixer(config, scan)

    def forward(self, residual: Tensor) -> Tensor:
        # Addition promotes: an fp32 residual stays fp32 without a cast of its own.
        stream: Tensor = residual + self.mixer(self.norm(residual))
        return stream


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig, make_block: Callable[[int], Block]) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(make_block(index) for index in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_epsilon)
        self.recompute_every = 0

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, length) int64 -> hidden states (batch, length, d_model)."""
        residual = self.embedding(tokens)
        if self.residual_in_fp32:
            residual = residual.float()
        if not (self.recompute_every and torch.is_grad_enabled()):
            for block in self.layers:
                residual = block(residual)
        else:
            for start in range(0, len(self.layers), self.recompute_every):
                segment = self.layers[start : start + self.recompute_every]
                residual = checkpoint(_run_blocks, segment, residual, use_reentrant=False, preserve_rng_state=False)
        hidden: Tensor = self.norm_f(residual)
        return hidden


def _run_blocks(blocks: nn.ModuleList, residual: Tensor) -> Tensor:
    for block in blocks:
        residual = block(residual)
    return residual


class LMHead(nn.Module):
    """Projection to the vocabulary, and the loss: it alone reads the (tied) weight, inside its own forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.padded_vocab_size, config.d_model))

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """hidden (batch, length, d_model); targets (batch, length), -100 where there is none.

        Returns:
            The mean loss in nats per target, or without targets the logits (batch, length, padded vocabulary).
        """
        if targets is None:
            return F.linear(hidden, self.weight)
        return linear_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten())


class MambaLM(nn.Module):
    """Language model; state dict as `mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel`.

    Constructed uninitialised: `build.build_model` places and initialises it for a ZeRO stage.
    """

    def __init__(
        self,
        config: ModelConfig,
        scan: ScanBackend | None = None,
        make_block: Callable[[int], Block] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        backend = scan or TorchScan()
        self.backbone = Backbone(config, make_block or (lambda _: Block(config, backend)))
        self.lm_head = LMHead(config)
        if config.tie_embeddings:
            self.lm_head.register_parameter("weight", self.backbone.embedding.get_parameter("weight"))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """The loss when targets are given, else logits; shapes as in `LMHead.forward`."""
        loss_or_logits: Tensor = self.lm_head(self.backbone(tokens), targets)
        return loss_or_logits

    def set_recompute(self, every: int) -> None:
        """Keeps one boundary every `every` blocks and recomputes between them in the backward; 0: keeps all."""
        self.backbone.recompute_every = every

    def mixers(self) -> list[Mixer]:
        return [module for module in self.modules() if isinstance(module, Mixer)]
