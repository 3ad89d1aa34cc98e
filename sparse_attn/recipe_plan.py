"""One layer of a recipe: groups of heads with one method each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from sparse_attn.recipe_check import by_head_problems, encode_config, methods, schema

EXPECTED = ("relative_error", "mass_recall", "time_us", "dense_time_us")


class Setting(NamedTuple):
    """What an adapter needs of one group: its heads, the method's name and its config object."""

    heads: tuple[int, ...]
    method: str
    config: Any


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads of one layer that run one method with one config.

    Attributes:
        heads: query head numbers, from 0, over all tensor-parallel ranks.
        method: a name of `sparse_attn.methods.METHODS`, or "dense".
        config: an instance of the method's config class. What it holds for each head (`patterns` of vdit,
            tensors of thresholds, layouts with more than one head) is for the heads of this group, in
            their order.
        relative_error: expected |out - dense| / |dense| of each head, or None.
        mass_recall: expected share of the attention mass of each head, in [0, 1], or None.
        time_us, dense_time_us: predicted microseconds of each head, with this method and dense, or None.

    Raises:
        ValueError: an unknown method, a config of another class, expectations for other heads.
    """

    heads: tuple[int, ...]
    method: str
    config: Any
    relative_error: tuple[float, ...] | None = None
    mass_recall: tuple[float, ...] | None = None
    time_us: tuple[float, ...] | None = None
    dense_time_us: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("heads", *EXPECTED):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        problems = []
        if self.method not in methods():
            problems.append(f"method: unknown method {self.method!r}; choose one of {', '.join(methods())}")
        elif not isinstance(self.config, cls := methods()[self.method].config):
            problems.append(f"config: is {type(self.config).__name__}; {self.method} takes {cls.__name__}")
        else:
            problems += by_head_problems(self.config, len(self.heads))
        if not self.heads or not all(isinstance(h, int) and h >= 0 for h in self.heads):
            problems.append(f"heads: {list(self.heads)} are not head numbers; name at least one")
        for name in EXPECTED:
            value = getattr(self, name)
            if value is not None and len(value) != len(self.heads):
                problems.append(
                    f"expected.{name}: has {len(value)} numbers for {len(self.heads)} heads; give one a head"
                )
        if problems:
            raise ValueError("\n".join(problems))

    def expected(self) -> dict[str, list[float]]:
        """The expectations that are known, as plain JSON."""
        known = {name: getattr(self, name) for name in EXPECTED}
        return {name: list(value) for name, value in known.items() if value is not None}


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """All heads of one layer in one phase.

    Groups with equal settings are joined, and groups are put in the order of their first head, so that
    the order in which a search found them does not show. Settings that differ by head (see `HeadGroup`)
    are never joined.

    Attributes:
        layer: number, from 0.
        groups: every head in exactly one of them.
        phase: "prefill", "decode" or "denoising".
        steps: for denoising, the half-open range of steps, (0, 10) for the first ten; None: all steps.

    Raises:
        ValueError: a head covered twice, or left out below the highest one; a bad phase or range.
    """

    layer: int
    groups: tuple[HeadGroup, ...]
    phase: str = "prefill"
    steps: tuple[int, int] | None = None
    _calls: dict = field(default_factory=dict, repr=False)  # of `run_layer`

    def __post_init__(self) -> None:
        if self.steps is not None:
            object.__setattr__(self, "steps", tuple(self.steps))
        problems = [f"groups[{n}].heads: {x}" for n, x in _heads_twice(self.groups)]
        covered = {h for group in self.groups for h in group.heads}
        missing = (h for h in range(max(covered, default=0) + 1) if h not in covered)
        if left_out := numbered(missing):
            problems.append(f"groups: heads {left_out} are in no group")
        phases = schema()["properties"]["layers"]["items"]["properties"]["phase"]["enum"]
        if self.phase not in phases:
            problems.append(f"phase: {self.phase!r} is not one of {', '.join(phases)}")
        if self.steps is not None and self.phase != "denoising":
            problems.append(f"steps: only denoising has steps, not {self.phase}")
        elif self.steps is not None and not 0 <= self.steps[0] < self.steps[1]:
            problems.append(f"steps: {list(self.steps)} is no range; expected [first, end) with first < end")
        if problems:
            raise ValueError("\n".join(problems))
        object.__setattr__(self, "groups", _joined(self.groups))

    @property
    def num_heads(self) -> int:
        return sum(len(group.heads) for group in self.groups)

    @property
    def settings(self) -> list[Setting]:
        return [Setting(group.heads, group.method, group.config) for group in self.groups]


def _heads_twice(groups: Iterable[HeadGroup]) -> list[tuple[int, str]]:
    seen: dict[int, int] = {}
    problems = []
    for n, group in enumerate(groups):
        for head in group.heads:
            if head in seen:
                problems.append((n, f"head {head} is covered twice, also by groups[{seen[head]}]"))
            seen[head] = n
    return problems


def _joined(groups: Iterable[HeadGroup]) -> tuple[HeadGroup, ...]:
    alike: dict[str, list[HeadGroup]] = {}
    for group in groups:
        tensors: dict[str, Tensor] = {}
        plain = encode_config(group.config, tensors, "")
        by_head = tensors or isinstance(plain.get("patterns"), list)
        alike.setdefault(json.dumps([group.method, plain, group.heads if by_head else ()]), []).append(group)
    joined = [x[0] if json.loads(key)[2] else _join(x) for key, x in alike.items()]
    return tuple(sorted(joined, key=lambda group: min(group.heads)))


def _join(groups: list[HeadGroup]) -> HeadGroup:
    order = sorted((head, n, i) for n, group in enumerate(groups) for i, head in enumerate(group.heads))
    expected: dict[str, Any] = {}
    for name in EXPECTED:
        numbers = [getattr(group, name) for group in groups]
        if all(x is not None for x in numbers):
            expected[name] = tuple(numbers[n][i] for _, n, i in order)
    heads = tuple(head for head, _, _ in order)
    return HeadGroup(heads, groups[0].method, groups[0].config, **expected)


def numbered(numbers: Iterable[int], most: int = 12) -> str:
    """ "0, 1, 2", cut where there are many."""
    first = list(islice(numbers, most + 1))
    return ", ".join(map(str, first[:most])) + (", ..." if len(first) > most else "")
