"""Where a video transformer's call stands: its token grid, its text, the denoising step and the pass.

diffusers tells its attention layers none of this, so a hook before the transformer's forward reads it from
the arguments of the call, once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_attn.methods import Context
from sparse_attn.reuse import LayoutCache


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a sequence lie.

    Attributes:
        grid: (frames, height, width) in tokens, numbered frame by frame, row by row.
        text_len: text tokens in the sequence; 0 where text enters by cross-attention.
        text_first: they come before the video rather than after it.
    """

    grid: tuple[int, int, int]
    text_len: int = 0
    text_first: bool = False

    @property
    def num_video(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def prompt_len(self) -> int:
        """Tokens of the first of the two parts, text and video: SparseD ranks their keys apart."""
        return self.text_len if self.text_first or not self.text_len else self.num_video


class RowGroup(NamedTuple):
    """Rows of a batch that have equally many real tokens.

    Attributes:
        tokens: without padding.
        name: of the rows, for their caches.
        end: number of those tokens.
        rows: as an index; a slice where they lie together, which copies nothing.
    """

    tokens: Tokens
    name: str
    end: int
    rows: slice | list[int]


def _index(rows: list[int]) -> slice | list[int]:
    together = rows == list(range(rows[0], rows[0] + len(rows)))
    return slice(rows[0], rows[0] + len(rows)) if together else rows


@dataclass(frozen=True)
class Family:
    """What is particular to one kind of transformer.

    Attributes:
        layers: (model) -> its self-attention modules, in the order in which layers are numbered.
        stock: names of the processor classes that ours can stand in for.
        processor: our processor class.
        read: (model, arguments by name) -> (tokens, mask [B, text_len] of real text tokens or None).
        arguments: names of the forward's positional arguments.
    """

    layers: Callable[[Any], list[nn.Module]]
    stock: tuple[str, ...]
    processor: type
    read: Callable[[Any, Mapping[str, Any]], tuple[Tokens, Tensor | None]]
    arguments: tuple[str, ...]


@dataclass(eq=False)
class CallState:
    """The state of one patched transformer. Its processors and its hook share it.

    Steps are counted by the timestep: a lower one than before is the next step, a higher one starts a new
    generation, the same one is another pass of the step (classifier-free guidance, one call each). Once
    `set_step` was called, steps are what it says, and calls between two of its calls are passes of a step.

    Attributes:
        num_steps: denoising steps of a generation; None: steps are not counted.
        step, pass_number: of the present call, from 0; -1 before the first.
        tokens: of the present call.
        real_text: real text tokens of each row, None where all are.
        row_groups: rows of equally many real tokens.
        row_order: where each row lies in the groups one after another; None: in order.
    """

    family: Family
    num_steps: int | None = None
    step: int = -1
    pass_number: int = 0
    tokens: Tokens | None = None
    real_text: list[int] | None = None
    row_groups: list[RowGroup] = field(default_factory=list)
    row_order: list[int] | None = None
    told: bool = False
    _timestep: float | None = None
    _caches: dict[Hashable, LayoutCache] = field(default_factory=dict)
    _contexts: dict[Hashable, Context] = field(default_factory=dict)  # of the present call

    @torch.compiler.disable  # a graph would store the state after it has run, when it is too late
    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The hook before the transformer's forward. Waits for the device where text is masked or steps
        are counted, once a call."""
        self._contexts.clear()
        given = {**dict(zip(self.family.arguments, args, strict=False)), **kwargs}
        self.tokens, mask = self.family.read(model, given)
        real = None if mask is None else mask.sum(1).tolist()
        whole = real is None or all(n == self.tokens.text_len for n in real)
        self.real_text = None if whole else [int(n) for n in real]  # type: ignore[union-attr]
        by_length: dict[int, list[int]] = {}
        for row, length in enumerate(self.real_text or ()):
            by_length.setdefault(length, []).append(row)
        video = self.tokens.num_video
        self.row_groups = [
            RowGroup(replace(self.tokens, text_len=n), str(rows), video + n, _index(rows))
            for n, rows in by_length.items()
        ]
        grouped = [row for rows in by_length.values() for row in rows]
        self.row_order = None if grouped == sorted(grouped) else [grouped.index(r) for r in sorted(grouped)]
        if self.num_steps is None:
            return
        if self.told:
            self.pass_number += 1
        else:
            self._count(float(torch.as_tensor(given["timestep"]).max()))  # one a token in Wan 2.2
        if self.step >= self.num_steps:
            raise ValueError(
                f"sparse_attn: this is denoising step {self.step} (from 0), but the model was patched for "
                f"num_steps={self.num_steps}; patch with the num_inference_steps of the pipeline (or, for a "
                "scheduler that calls the model more often, with the number of different timesteps)."
            )

    def _count(self, timestep: float) -> None:
        if self._timestep is None or timestep > self._timestep:
            self.step, self.pass_number = 0, 0
            self._caches.clear()
        elif timestep < self._timestep:
            self.step, self.pass_number = self.step + 1, 0
        else:
            self.pass_number += 1
        self._timestep = timestep

    def set_step(self, step: int) -> None:
        """The next calls belong to this step, whatever their timesteps."""
        self.told, self.step, self.pass_number = True, step, -1
        if step == 0:
            self._caches.clear()

    def restart(self) -> None:
        """Forget steps and patterns; the next call is step 0, counted by the timestep again."""
        self.told, self.step, self.pass_number, self._timestep = False, -1, 0, None
        self._caches.clear()

    def context(self, layer: int, rows: Hashable, prompt_len: int) -> Context:
        """What a method may ask of a call. Passes of a step, and rows of a batch that are run apart, have
        a pattern cache each: `LayoutCache` belongs to one generation."""
        place = (layer, rows)
        if place not in self._contexts:
            if self.num_steps is None:
                made = Context(layer=layer, prompt_len=prompt_len)
            else:
                cache = self._caches.setdefault((self.pass_number, rows), LayoutCache())
                made = Context(
                    layer=layer, step=self.step, num_steps=self.num_steps, prompt_len=prompt_len, cache=cache
                )
            self._contexts[place] = made
        return self._contexts[place]
