"""Bytes that forward and backward of our model hold, by scan backend.

Counted tensor by tensor from the code that allocates them (`model.Block`, the scan backends, `loss`). A test
holds the `torch` counts against what autograd really saves; the `mamba_ssm` counts follow its `MambaInnerFn`,
which recomputes convolution and dt in the backward.

`tokens` is micro-batch x sequence length. E = d_inner, N = d_state, R = dt_rank, `width` = bytes of a weight.
"""

from __future__ import annotations

import math

from mamba_trainer.config import ModelConfig

#: fp32 bytes of one chunk of logits, as `loss.CHUNK_BYTES` (which cannot be imported without torch).
LOSS_CHUNK_BYTES = 256 * 2**20

#: Elements of one work tensor of the torch scan, as `torch_scan._CHUNK_ELEMENTS`.
_TORCH_CHUNK_ELEMENTS = 2**18
_TORCH_SHORTEST_CHUNK = 8

#: The fused kernel keeps one state of each channel per this many time steps.
_FUSED_SCAN_CHUNK = 2_048


def boundary(model: ModelConfig, tokens: int, width: int) -> int:
    """The residual stream between two blocks."""
    return tokens * model.d_model * _stream_width(model, width)


def saved_by_block(model: ModelConfig, backend: str, batch: int, length: int, width: int) -> int:
    """What autograd keeps of one block without recompute."""
    tokens, e, n, rank = batch * length, model.d_inner, model.d_state, model.resolved_dt_rank
    # The norm keeps its input in fp32 (the stream itself where that is fp32), the projection its output.
    norm = tokens * model.d_model * (4 + width)
    if backend == "mamba_ssm":
        wide = 3 * e * width  # x and z, and the scan's output before the gate
        narrow = (rank + 4 * n) * width  # dt, B, C as projected; B and C again in the kernel's layout
        states = batch * e * math.ceil(length / _FUSED_SCAN_CHUNK) * 2 * n * 4
    else:
        # x and z, convolution, its SiLU, the projection's input; in fp32: u, dt before and after softplus,
        # the output before the gate, z and its SiLU (z in fp32 weights is x and z already).
        wide = e * (5 * width + (20 if width == 4 else 24))
        narrow = (rank + 2 * n) * width + (2 * n * 4 if width < 4 else 0)
        states = math.ceil(length / _torch_chunk(model, batch, length)) * batch * e * n * 4
    return norm + tokens * (wide + narrow) + states


def block_temporaries(model: ModelConfig, backend: str, batch: int, length: int, width: int) -> int:
    """What the backward of one block holds beside what was saved, the incoming gradient included."""
    tokens, e = batch * length, model.d_inner
    gradient = boundary(model, tokens, width)
    if backend == "mamba_ssm":
        # dx and dz (2), convolution and dt recomputed, gated output, gradients of scan output, u and dt, and
        # one.
        return gradient + 9 * tokens * e * width
    steps = _torch_chunk(model, batch, length)
    work = 5 * steps * batch * e * model.d_state * 4  # states, decay, gradient of states, two products
    return gradient + 24 * tokens * e + work


def loss_forward(model: ModelConfig, tokens: int, width: int, *, fp16: bool) -> int:
    """One chunk of logits, and the gradients of hidden states and head that come out with the loss."""
    rows = min(tokens, max(1, LOSS_CHUNK_BYTES // (4 * model.padded_vocab_size)))
    chunk = rows * model.padded_vocab_size * (10 if fp16 else 8)  # logits, and logsumexp's copy or the narrow ones
    hidden = tokens * model.d_model * (4 + 2 * width)  # the last norm's input and output, and the gradient
    return chunk + hidden + head_gradient(model, 4 if fp16 else width)


def head_gradient(model: ModelConfig, width: int) -> int:
    """Lives through the whole backward where the head is tied: the embedding adds to it at the very end."""
    return model.padded_vocab_size * model.d_model * width


def _stream_width(model: ModelConfig, width: int) -> int:
    return 4 if model.residual_in_fp32 else width


def _torch_chunk(model: ModelConfig, batch: int, length: int) -> int:
    per_step = batch * model.d_inner * model.d_state
    return max(1, min(length, max(_TORCH_SHORTEST_CHUNK, _TORCH_CHUNK_ELEMENTS // per_step)))
