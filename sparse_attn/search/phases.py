"""Denoising phases: ranges of steps with plans of their own, and the passes that are measured in each.

A model that is not run by steps makes one pass over a sample; it has one phase of one step, and nothing here
shows in its recipes or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Moment(NamedTuple):
    """One pass of the model over a calibration sample.

    Attributes:
        sample: number, from 0.
        step: denoising step, from 0; None: the model makes one pass a sample.
        branch: of the step's passes, from 0: guidance may run the model twice a step.
    """

    sample: int
    step: int | None = None
    branch: int = 0

    @property
    def name(self) -> str:
        """What its files are called."""
        step = "" if self.step is None else f"-step{self.step:03d}"
        return f"sample{self.sample}{step}{f'-pass{self.branch}' if self.branch else ''}"


@dataclass(frozen=True)
class Schedule:
    """The passes that a model makes over one sample.

    Attributes:
        num_steps: denoising steps; None: one pass, no steps.
        branches: passes in a step.
        ranges: the phases, [first, end) each, one after another.
        measured: steps of a phase to measure, fewer where it is shorter.
    """

    num_steps: int | None = None
    branches: int = 1
    ranges: tuple[tuple[int, int], ...] = ((0, 1),)
    measured: int = 2

    @classmethod
    def of(
        cls, num_steps: int | None, branches: int, phases: int | Sequence[int] | None, measured: int
    ) -> Schedule:
        """The schedule of a model.

        Args:
            num_steps, branches: of the model.
            phases: a number of ranges as equal as they can be, or the steps at which phases begin, with or
                without the 0 of the first; None: one.

        Raises:
            ValueError: phases of a model without steps, or that do not fit its steps.
        """
        if num_steps is None:
            if phases not in (None, 1):
                raise ValueError(
                    f"search: phases is {phases!r}, but this model makes one pass, not denoising steps; say "
                    "how many there are (CallableModel: num_steps, the command: --steps), or leave it out."
                )
            return cls()
        if measured < 1:
            raise ValueError(f"search: {measured} steps of a phase are to be measured; use 1 or more.")
        return cls(num_steps, branches, split(num_steps, phases), measured)

    # -- passes -----------------------------------------------------------------------------------------

    def passes(self, phase: int) -> int:
        """How many the model makes in a phase."""
        first, end = self.ranges[phase]
        return (end - first) * self.branches

    @property
    def all_passes(self) -> int:
        return sum(self.passes(n) for n in range(len(self.ranges)))

    def phase_of(self, step: int | None) -> int:
        return next(n for n, (_, end) in enumerate(self.ranges) if (step or 0) < end)

    def measured_steps(self, phase: int) -> list[int]:
        """Spread from the first step of the phase to its last; a single one lies in the middle."""
        first, end = self.ranges[phase]
        count = min(self.measured, end - first)
        if count == 1:
            return [(first + end) // 2]
        return [first + round(n * (end - 1 - first) / (count - 1)) for n in range(count)]

    def moments(self, sample: int, phase: int | None = None) -> list[Moment]:
        """The passes that are measured, of one phase or of all, in their order."""
        if self.num_steps is None:
            return [Moment(sample)]
        phases = range(len(self.ranges)) if phase is None else [phase]
        steps = [step for n in phases for step in self.measured_steps(n)]
        return [Moment(sample, step, branch) for step in steps for branch in range(self.branches)]

    # -- plans ------------------------------------------------------------------------------------------

    def steps(self, phase: int) -> tuple[int, int] | None:
        """The range that a plan of a recipe carries; None where there is one phase."""
        return None if len(self.ranges) == 1 else self.ranges[phase]

    def fitted(self, config: Any, phase: int) -> Any:
        """A candidate's config as the recipe has it: what finds its pattern once (SparseD) does so at the
        first step of the phase, or as soon after as it can."""
        if self.num_steps is None or not finds_once(config):
            return config
        return config.beginning_at(self.ranges[phase][0], self.num_steps)

    def found_at(self, config: Any, phase: int) -> int | None:
        """The step of the phase, dense, at which a candidate finds the pattern of the later ones; None for
        one that selects at every step."""
        if self.num_steps is None or not finds_once(config):
            return None
        return self.fitted(config, phase).switch_step(self.num_steps)


ONE_PASS = Schedule()


def finds_once(config: Any) -> bool:
    """Whether a method finds its pattern at one step of a generation and keeps it."""
    return hasattr(config, "beginning_at")


def split(num_steps: int, phases: int | Sequence[int] | None) -> tuple[tuple[int, int], ...]:
    """Ranges of steps; see `Schedule.of`.

    Example:
        >>> split(10, 3), split(10, [2, 7])
        (((0, 3), (3, 6), (6, 10)), ((0, 2), (2, 7), (7, 10)))
    """
    if phases is None or isinstance(phases, int):
        count = 1 if phases is None else phases
        starts = [n * num_steps // count for n in range(count)] if count > 0 else []
    else:
        starts = sorted({0, *phases})
    if not starts or len(set(starts)) < len(starts) or starts[0] < 0 or starts[-1] >= num_steps:
        raise ValueError(
            f"search: phases is {phases!r}; for {num_steps} denoising steps give a number from 1 to "
            f"{num_steps}, or the steps, below {num_steps}, at which phases begin."
        )
    return tuple(zip(starts, [*starts[1:], num_steps], strict=True))


def read_phases(text: str) -> int | list[int]:
    """ "4" -> 4 phases; "0,3,12" -> phases that begin at these steps.

    Raises:
        ValueError: neither.
    """
    try:
        numbers = [int(x) for x in text.split(",")]
    except ValueError:
        raise ValueError(
            f"search: --phases is {text!r}; use a number, 4, or the steps at which phases begin, 0,3,12."
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers
