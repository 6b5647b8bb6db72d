"""Generation with a recurrent cache: constant time and memory per token, whatever came before.

The arithmetic is that of `scan.torch_scan`, carried on from a state instead of starting from zero, so that
logits equal the parallel form's. A prompt and a single token take the same way; only the length differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_trainer.build import build_model
from mamba_trainer.contract import UserError
from mamba_trainer.convert import open_model
from mamba_trainer.model import MambaLM, Mixer
from mamba_trainer.scan.torch_scan import TorchScan, scan_states

#: Tokens that are scanned at once: bounds the (time, batch, E, N) work tensor of a long prompt.
_CHUNK = 64


def load_for_generation(source: Path, device: torch.device, dtype: torch.dtype) -> MambaLM:
    """The model of a training checkpoint or of a folder in any format, for `Recurrent` and `generate`.

    Raises:
        UserError: see `convert.open_model`.
    """
    config, weights = open_model(source)
    model = build_model(config, lambda name: weights.read(name).float(), TorchScan(), device, dtype)
    return model.eval().requires_grad_(False)


class Recurrent:
    """A model and, for each layer, what it remembers of the tokens fed so far."""

    def __init__(self, model: MambaLM, batch: int = 1) -> None:
        config, weight = model.config, model.lm_head.weight
        self.model = model
        self._conv = [
            weight.new_zeros(batch, config.d_inner, config.d_conv - 1) for _ in range(config.n_layer)
        ]  # the inputs that the next convolutions still see
        self._ssm = [
            torch.zeros(batch, config.d_state, config.d_inner, device=weight.device) for _ in range(config.n_layer)
        ]

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> Tensor:
        """tokens (batch, length) that follow those fed before -> logits (batch, length, vocabulary)."""
        backbone = self.model.backbone
        parts = [self._hidden(part) for part in tokens.split(_CHUNK, dim=1)]
        logits: Tensor = self.model.lm_head(backbone.norm_f(torch.cat(parts, dim=1)))
        return logits

    def step(self, token: Tensor) -> Tensor:
        """token (batch) -> logits (batch, vocabulary) of the one after it."""
        return self.prefill(token.unsqueeze(1)).squeeze(1)

    def _hidden(self, tokens: Tensor) -> Tensor:
        backbone = self.model.backbone
        residual: Tensor = backbone.embedding(tokens)
        if backbone.residual_in_fp32:
            residual = residual.float()
        for layer, mixer in enumerate(self.model.mixers()):
            normed = backbone.layers[layer].get_submodule("norm")(residual)
            residual = residual + self._mix(layer, mixer, normed).to(residual.dtype)
        return residual

    def _mix(self, layer: int, mixer: Mixer, x: Tensor) -> Tensor:
        """x (batch, length, d_model) -> the same; moves the layer's memory on."""
        weights = mixer.weights()
        rank, n = weights.dt_proj.shape[1], weights.A.shape[1]
        x, z = F.linear(x, mixer.in_proj.weight).chunk(2, dim=-1)
        seen = torch.cat([self._conv[layer], x.transpose(1, 2)], dim=2)
        self._conv[layer] = seen[..., x.shape[1] :]
        x = F.silu(F.conv1d(seen, weights.conv_weight, weights.conv_bias, groups=seen.shape[1])).permute(2, 0, 1)
        dt, B, C = F.linear(x, weights.x_proj).split([rank, n, n], dim=-1)
        dt = F.softplus(F.linear(dt, weights.dt_proj).float() + weights.dt_bias)
        u = x.float()
        states, _ = scan_states(self._ssm[layer], u, dt, weights.A, B.float())
        self._ssm[layer] = states[-1].clone()
        y = torch.einsum("tbne,tbn->bte", states, C.float()) + u.transpose(0, 1) * weights.D
        return F.linear((y * F.silu(z.float())).to(z.dtype), weights.out_proj)


def generate(
    model: MambaLM,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Continues `tokens`, one token at a time, until `stop_id` (which is not given out) or `max_new_tokens`.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: chooses among the k likeliest; 0: among all.
        top_p: chooses among the likeliest that together have this probability.

    Raises:
        UserError: no tokens, or one that the vocabulary does not have.
    """
    vocabulary = model.config.vocab_size
    if not tokens:
        raise UserError("There is nothing to continue: give at least one token.")
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise UserError(f"A token of the prompt is outside the model's vocabulary of {vocabulary}: other tokenizer?")
    device = model.lm_head.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    recurrent = Recurrent(model)
    logits = recurrent.prefill(torch.tensor([list(tokens)], device=device))[0, -1]
    for _ in range(max_new_tokens):
        # Padding of the vocabulary is never a token.
        token = choose(logits[:vocabulary].float(), temperature, top_k, top_p, generator)
        if token == stop_id:
            return
        yield token
        logits = recurrent.step(torch.tensor([token], device=device))[0]


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """A token drawn from logits (vocabulary), after temperature, top k and top p in that order."""
    if temperature <= 0:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits / temperature, dim=-1).sort(descending=True, stable=True)
    if top_k:
        probabilities, ids = probabilities[:top_k], ids[:top_k]
        probabilities = probabilities / probabilities.sum()
    mass_before = probabilities.cumsum(0) - probabilities
    probabilities = probabilities.where(mass_before < top_p, 0.0)
    probabilities[0] = probabilities[0].clamp_min(1e-9)  # the likeliest stays, were top_p 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
