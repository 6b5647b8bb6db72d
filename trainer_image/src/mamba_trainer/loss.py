"""Cross entropy of a linear head without the logits: chunk by chunk, gradients computed with the loss.

At vocabulary 50264 the logits of 4096 tokens and their gradient would take 3.3 GB at the moment of the activation
peak. Here one chunk of logits lives at a time. The gradients of hidden states and weight come out of the forward,
so the weight enters the graph once: several uses in one backward are what ZeRO-2 lost silently (DeepSpeed#8224).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100

#: fp32 bytes of one chunk of logits.
CHUNK_BYTES = 256 * 2**20


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats over the targets that are not -100.

    Args:
        hidden: (tokens, d_model).
        weight: (vocabulary, d_model), same dtype as hidden.
        targets: (tokens) int64.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        count = (targets != IGNORE).sum().clamp_min(1)
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        needs_gradient = any(ctx.needs_input_grad[:2])
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if needs_gradient else None
        # In fp16 a sum over tokens can pass 65504; bf16 has the range, and one rounding per chunk is harmless.
        accumulate_in = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        d_weight = torch.zeros_like(weight, dtype=accumulate_in) if needs_gradient else None
        for h, t, dh in zip(
            hidden.split(rows),
            targets.split(rows),
            d_hidden.split(rows) if d_hidden is not None else [None] * len(hidden.split(rows)),
            strict=True,
        ):
            logits = (h @ weight.t()).float()
            log_sum = logits.logsumexp(dim=-1)
            kept = t != IGNORE
            index = t.clamp_min(0).unsqueeze(-1)
            picked = logits.gather(-1, index).squeeze(-1)
            total += torch.where(kept, log_sum - picked, 0.0).sum()
            if dh is None or d_weight is None:
                continue
            # Gradient of the *sum*: values within [-1, 1] survive fp16; the mean's 1 / count comes in backward.
            d_logits = logits.sub_(log_sum.unsqueeze(-1)).exp_()
            d_logits.scatter_add_(-1, index, torch.full_like(picked, -1.0).unsqueeze(-1))
            d_logits.mul_(kept.unsqueeze(-1))
            narrow = d_logits.to(weight.dtype)
            torch.mm(narrow, weight, out=dh)
            d_weight.addmm_(narrow.t().to(accumulate_in), h.to(accumulate_in))
        if needs_gradient:
            ctx.save_for_backward(d_hidden, d_weight, count)
            ctx.dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_weight, count = ctx.saved_tensors
        scale = grad_outputs[0].float() / count
        return d_hidden * scale.to(d_hidden.dtype), (d_weight * scale).to(ctx.dtype), None
