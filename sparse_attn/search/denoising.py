"""Diffusion language models as a search sees them: masks filled step by step, the surest ones first."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_attn.integrations.patching import patched
from sparse_attn.search.capture import AttentionFunction
from sparse_attn.search.models import KeepGradient, LanguageModel
from sparse_attn.search.outcome import sdpa_layer


@torch.no_grad()
def _is_causal(model: Any, ids: Tensor) -> bool:
    """Whether a layer of the model is: only its calls tell."""
    seen = []

    def attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, **how: Any) -> Tensor:
        seen.append(is_causal)
        return sdpa_layer(q, k, v, is_causal=is_causal, **how)

    with patched(model, attention):
        model.base_model(ids, use_cache=False)
    return any(seen)


class DenoisingModel(LanguageModel):
    """A bidirectional language model of transformers that fills masks, as LLaDA does.

    A pass over a sample is a generation: the tokens after the prompt are masked, and each step fills those of
    which the model is surest, as many at each, so that none is left after the last.

    Args:
        model: a `PreTrainedModel` in evaluation mode whose attention goes through `AttentionInterface` and is
            not causal. Its logits at a position are of that position's own token.
        ids: int64 [samples, T], of which the tokens from `prompt_len` on are only counted.
        num_steps: of a generation, at most T - prompt_len.
        prompt_len: tokens that are given, 0 .. T - 1.
        mask_id: the token that stands for a mask.
        check: int64 [samples, T], what recipes are tried on; default: `ids`.
        chunk: rows of logits made at once.

    Raises:
        ValueError: a causal model, or numbers out of range.
    """

    phase = "denoising"
    is_causal = False

    def __init__(
        self, model: Any, ids: Tensor, *, num_steps: int, prompt_len: int, mask_id: int,
        check: Tensor | None = None, chunk: int = 512,
    ) -> None:  # fmt: skip
        super().__init__(model, ids, check=check, chunk=chunk)
        count, vocabulary = ids.shape[1] - prompt_len, model.get_output_embeddings().weight.shape[0]
        problems = []
        if prompt_len < 0 or not 1 <= num_steps <= count:
            problems.append(
                f"there are {num_steps} steps and a prompt of {prompt_len} of {ids.shape[1]} tokens, but a "
                "step fills one token or more"
            )
        if not 0 <= mask_id < vocabulary:
            problems.append(f"the mask is token {mask_id} of {vocabulary}")
        if _is_causal(model, ids[:1, :2]):
            problems.append(
                "the model's attention is causal, so that no mask sees what follows; pass a diffusion model"
            )
        if problems:
            raise ValueError(f"search: {'; '.join(problems)}.")
        self.num_steps, self.prompt_len, self.mask_id = num_steps, prompt_len, mask_id
        self._dense: list[list[tuple[Tensor, Tensor]]] | None = None

    def run(self, sample: int, attention: AttentionFunction) -> None:
        self.generate(self.ids[sample : sample + 1], attention)

    def gradients(self, sample: int, keep: KeepGradient, seed: int) -> bool:
        return False

    def loss(self, attention: AttentionFunction) -> float | None:
        return None

    def changed(self, attention: AttentionFunction) -> float | None:
        """Share of the masks, over all steps, whose most likely token is another one than in the dense model,
        which reads the same tokens: those of its own generation."""
        if self._dense is None:
            self._dense = [self._generate(row, sdpa_layer)[1] for row in self.check.split(1)]
        changed = total = 0
        for steps in self._dense:
            for step, (tokens, likely) in enumerate(steps):
                masked = tokens[0] == self.mask_id
                changed += int((self._likely(tokens, attention, step)[0] != likely)[masked].sum())
                total += int(masked.sum())
        return changed / total

    def generate(self, ids: Tensor, attention: AttentionFunction) -> Tensor:
        """int64 [1, T]: the prompt of ids [1, T] and what the model writes after it."""
        return self._generate(ids, attention)[0]

    @torch.no_grad()
    def _generate(
        self, ids: Tensor, attention: AttentionFunction
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The tokens after the last step; and of each step those that it reads [1, T], and the likely [T]."""
        assert self.num_steps is not None
        tokens = ids.clone()
        tokens[:, self.prompt_len :] = self.mask_id
        count, steps = ids.shape[1] - self.prompt_len, []
        for step in range(self.num_steps):
            likely, surety = self._likely(tokens, attention, step)
            steps.append((tokens, likely))
            surety = surety.masked_fill(tokens[0] != self.mask_id, -torch.inf)
            share = count * (step + 1) // self.num_steps - count * step // self.num_steps
            best = surety.topk(share).indices
            tokens = tokens.clone()
            tokens[0, best] = likely[best]
        return tokens, steps

    @torch.no_grad()
    def _likely(self, tokens: Tensor, attention: AttentionFunction, step: int) -> tuple[Tensor, Tensor]:
        """The most likely token of each position, never the mask: int64 [T]; and its log-probability [T]."""
        with patched(self.model, partial(attention, step=step, branch=0)):
            hidden = self.model.base_model(tokens, use_cache=False).last_hidden_state
        parts = []
        for states in hidden[0].split(self.chunk):
            logits = self._logits(states)
            logits[:, self.mask_id] = -torch.inf
            parts.append(logits.log_softmax(-1).max(-1))
        return torch.cat([x.indices for x in parts]), torch.cat([x.values for x in parts])
