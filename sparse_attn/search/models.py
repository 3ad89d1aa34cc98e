"""Models as a search sees them: something to run over calibration samples with another attention.

`LanguageModel` is a causal (or bidirectional) model of transformers reading text; `CallableModel` is any
function whose attention goes through `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from sparse_attn.recipe_model import Fingerprint, hash_tensors
from sparse_attn.search.capture import AttentionFunction, intercept_sdpa, sdpa
from sparse_attn.search.outcome import sdpa_layer

# (layer, gradient [B, Hq, L, Dv])
KeepGradient = Callable[[int, Tensor], None]


class Model(Protocol):
    """What `search` needs of a model."""

    fingerprint: Fingerprint
    calibration_hash: str
    num_samples: int
    phase: str
    num_steps: int | None  # denoising steps of a pass over a sample; None: it is not run by steps
    branches: int  # forward passes in a step
    length: int
    device: torch.device  # where its attention runs

    def run(self, sample: int, attention: AttentionFunction) -> None:
        """One pass over a calibration sample with `attention` in every layer, in their order; where there are
        steps, through all of them, and `attention` is also given `step` and `branch`, from 0."""

    def gradients(self, sample: int, keep: KeepGradient, seed: int) -> bool:
        """Give `keep` the gradient of the log-likelihood by each layer's attention output. Not asked of a
        model that has steps.

        Returns:
            Whether the model has such a thing.
        """

    def loss(self, attention: AttentionFunction) -> float | None:
        """Mean negative log-likelihood a token, in nats, over all calibration samples; None where the
        model has none."""

    def changed(self, attention: AttentionFunction) -> float | None:
        """Share of the tokens after which another next token is the most likely one than in the dense model;
        None where the model predicts no tokens."""


class LanguageModel:
    """A language model of transformers.

    Args:
        model: a `PreTrainedModel` in evaluation mode whose attention goes through `AttentionInterface`.
        ids: int64 [samples, T], the tokens that it reads.
        check: int64 [samples, T], what recipes are tried on; default: `ids`.
        chunk: rows of logits made at once.
    """

    phase = "prefill"
    num_steps: int | None = None
    branches = 1

    def __init__(self, model: Any, ids: Tensor, *, check: Tensor | None = None, chunk: int = 512) -> None:
        if ids.dim() != 2 or ids.shape[1] < 2:
            raise ValueError(
                f"search: ids have shape {tuple(ids.shape)}; expected [samples, 2 or more tokens]."
            )
        self.model, self.ids, self.chunk = model, ids, chunk
        self.check = ids if check is None else check
        self.fingerprint = Fingerprint.of(model)
        self.calibration_hash = hash_tensors([ids] if check is None else [ids, check])
        self.num_samples, self.length = ids.shape
        self.device: torch.device = model.device
        self._dense_tokens: Tensor | None = None

    def run(self, sample: int, attention: AttentionFunction) -> None:
        with torch.no_grad(), _attending(self.model, attention):
            self.model.base_model(self.ids[sample : sample + 1], use_cache=False)

    def gradients(self, sample: int, keep: KeepGradient, seed: int) -> bool:
        """Of the log-likelihood of tokens drawn from the model's own predictions, which makes the mean
        of (g . change)^2 / 2 the Fisher information's estimate of the divergence. Layers are recomputed in
        the backward pass, so that one layer's activations are held at a time."""
        generator = torch.Generator(device=self.ids.device).manual_seed(seed * 1_000_003 + sample)
        model, ids = self.model, self.ids[sample : sample + 1]

        def attention(
            q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool, scale: float
        ) -> Tensor:
            out = sdpa(q, k, v, is_causal=is_causal, scale=scale)
            if out.requires_grad:
                out.register_hook(lambda g: keep(layer, g))
            return out

        with _attending(model, attention), _recomputing(model), torch.enable_grad():
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            states = hidden.detach()[0].requires_grad_()
            for rows in states.split(self.chunk):
                logits = self._logits(rows)
                with torch.no_grad():
                    drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
                (-cross_entropy(logits, drawn, reduction="sum")).backward()
            hidden.backward(states.grad[None])
        return True

    def loss(self, attention: AttentionFunction) -> float | None:
        return self.loss_on(self.check, attention)

    def changed(self, attention: AttentionFunction) -> float | None:
        if self._dense_tokens is None:
            self._dense_tokens = self.next_tokens(self.check, sdpa_layer)
        return (self.next_tokens(self.check, attention) != self._dense_tokens).double().mean().item()

    @torch.no_grad()
    def next_tokens(self, ids: Tensor, attention: AttentionFunction) -> Tensor:
        """int64 [samples, T]: the most likely token after each token."""
        rows = []
        for row in ids.split(1):
            with _attending(self.model, attention):
                hidden = self.model.base_model(row, use_cache=False).last_hidden_state
            rows.append(torch.cat([self._logits(x).argmax(-1) for x in hidden[0].split(self.chunk)]))
        return torch.stack(rows)

    @torch.no_grad()
    def loss_on(self, ids: Tensor, attention: AttentionFunction | None = None) -> float:
        """Mean negative log-likelihood, nats, of tokens 1.. of each row; `attention` None: the model's."""
        total = 0.0
        for row in ids.split(1):
            if attention is None:
                hidden = self.model.base_model(row, use_cache=False).last_hidden_state
            else:
                with _attending(self.model, attention):
                    hidden = self.model.base_model(row, use_cache=False).last_hidden_state
            pairs = zip(hidden[0, :-1].split(self.chunk), row[0, 1:].split(self.chunk), strict=True)
            for states, targets in pairs:
                total += cross_entropy(self._logits(states), targets, reduction="sum").item()
        return total / (ids.shape[0] * (ids.shape[1] - 1))

    def _logits(self, states: Tensor) -> Tensor:
        """float32 [rows, vocabulary]"""
        logits = self.model.get_output_embeddings()(states).float()
        config = self.model.config
        cap = getattr(config, "final_logit_softcapping", None)
        if cap is not None:
            return cap * torch.tanh(logits / cap)
        scale = getattr(config, "logit_scale", None)
        divide = getattr(config, "logits_scaling", None)
        return logits * (1 if scale is None else scale) / (1 if divide is None else divide)


def _attending(model: Any, attention: AttentionFunction):
    from sparse_attn.integrations.patching import patched

    return patched(model, attention)


class _recomputing:
    """Context manager: decoder layers keep no activations but their inputs.

    transformers checkpoints a layer only where it is in training mode; the flag is set on the layer alone,
    not on what it holds, so that dropout stays off.
    """

    def __init__(self, model: Any) -> None:
        self.layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing") and m is not model]

    def __enter__(self) -> None:
        self.before = [(m, m.training, m.gradient_checkpointing) for m in self.layers]
        for m in self.layers:
            m.training, m.gradient_checkpointing = True, True
            if not hasattr(m, "_gradient_checkpointing_func"):
                m._gradient_checkpointing_func = _checkpoint

    def __exit__(self, *_: object) -> None:
        for m, training, checkpointing in self.before:
            m.training, m.gradient_checkpointing = training, checkpointing


def _checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


class CallableModel:
    """Any function whose attention goes through `scaled_dot_product_attention`.

    Args:
        function: called with one sample; what it returns is ignored. With `num_steps`: a denoising loop.
        samples: calibration inputs.
        fingerprint: of the model; its number of layers says how many self-attention calls a pass makes.
        length: tokens of a sequence.
        calibration_hash: of the inputs; see `hash_tensors`.
        phase: "prefill" or "denoising"; default: the second with `num_steps`, else the first.
        device: where its attention runs; default: that of the first tensor in `samples`, else the CPU.
        num_steps: denoising steps that the function runs; default: it makes one forward pass.
        branches: forward passes in a step: 2 for guidance that runs the model twice.

    Raises:
        ValueError: num_steps or branches below 1, or steps of another phase than "denoising". In a search:
            the function makes other passes than these.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        samples: Sequence[Any],
        fingerprint: Fingerprint,
        *,
        length: int,
        calibration_hash: str,
        phase: str | None = None,
        device: torch.device | str | None = None,
        num_steps: int | None = None,
        branches: int = 1,
    ) -> None:
        phase = phase or ("prefill" if num_steps is None else "denoising")
        if branches < 1 or (num_steps is not None and (num_steps < 1 or phase != "denoising")):
            raise ValueError(
                f"search: num_steps is {num_steps}, branches {branches} and phase {phase!r}; steps and "
                "branches are 1 or more, and only denoising has steps."
            )
        self.num_steps, self.branches = num_steps, branches
        self.function, self.samples = function, list(samples)
        self.fingerprint, self.calibration_hash = fingerprint, calibration_hash
        self.num_samples, self.phase, self.length = len(self.samples), phase, length
        found = (x.device for x in tree_leaves(self.samples) if isinstance(x, Tensor))
        self.device = next(found, torch.device("cpu")) if device is None else torch.device(device)

    def run(self, sample: int, attention: AttentionFunction) -> None:
        how: dict[str, Any] = {"num_steps": self.num_steps, "branches": self.branches}
        layers = self.fingerprint.num_layers
        with torch.no_grad(), intercept_sdpa(attention, layers, **how) as calls:
            self.function(self.samples[sample])
        if self.num_steps is not None and calls.count != self.num_steps * self.branches * layers:
            raise ValueError(
                f"search: the function made {calls.count} self-attention calls that a search can see; "
                f"{self.num_steps} steps of {self.branches} passes through {layers} layers make "
                f"{self.num_steps * self.branches * layers}. Give the num_steps, branches and num_layers (of "
                "the fingerprint) that it has."
            )

    def gradients(self, sample: int, keep: KeepGradient, seed: int) -> bool:
        return False

    def loss(self, attention: AttentionFunction) -> float | None:
        return None

    def changed(self, attention: AttentionFunction) -> float | None:
        return None
