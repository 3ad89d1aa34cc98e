"""Recipes: which attention each head of a model runs, by layer and phase, as a versioned JSON file.

A recipe is what a search finds and an integration runs::

    recipe = Recipe.load("llama.recipe.json")
    recipe.check_model(model.config)                       # ValueError if it was made for another model
    for heads, method, config in recipe.settings_for(layer=3, phase="prefill"):
        ...
    out = run_layer(recipe.plan_for(3), q, k, v, is_causal=True)      # or all heads at once

`docs/recipes.md` describes the format, `recipe_schema.json` is its JSON Schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_attn.recipe_check import (
    SCHEMA_VERSION,
    DenseConfig,
    decode_config,
    encode_config,
    methods,
    schema,
    schema_problems,
)
from sparse_attn.recipe_files import load_tensors, save_tensors, write_whole
from sparse_attn.recipe_model import Fingerprint, hash_config, hash_tensors
from sparse_attn.recipe_plan import HeadGroup, LayerPlan, Setting, numbered
from sparse_attn.recipe_run import run_layer
from sparse_attn.version import __version__

__all__ = [
    "DenseConfig", "Fingerprint", "HeadGroup", "LayerPlan", "Recipe", "Setting", "hash_config",
    "hash_tensors", "run_layer", "validate",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Recipe:
    """A whole model's attention.

    Attributes:
        model: which model it is for.
        layers: plans; sorted by phase, layer and step on construction.
        calibration_hash: `hash_tensors` of the calibration data, or None.
        num_steps: denoising steps that `steps` ranges count in; required where there are such ranges.
        partial: layers (and steps) without a plan run dense, as after an interrupted search. False: every
            layer has a plan in every phase that occurs.
        created_by: the version of this package that made it.

    Raises:
        ValueError: all problems at once, each with its place.
    """

    model: Fingerprint
    layers: tuple[LayerPlan, ...]
    calibration_hash: str | None = None
    num_steps: int | None = None
    partial: bool = False
    created_by: str = f"sparse_attn {__version__}"

    def __post_init__(self) -> None:
        problems = _coverage_problems(self.model, self.layers, self.num_steps, self.partial)
        if problems:
            raise ValueError("recipe:\n  " + "\n  ".join(problems))
        order = sorted(self.layers, key=lambda x: (x.phase != "prefill", x.phase, x.layer, x.steps or (0, 0)))
        object.__setattr__(self, "layers", tuple(order))

    # -- use ----------------------------------------------------------------------------------------

    @property
    def phases(self) -> list[str]:
        return list(dict.fromkeys(x.phase for x in self.layers))

    def plan_for(self, layer: int, phase: str | None = None, step: int | None = None) -> LayerPlan:
        """The plan of one layer.

        Args:
            layer: number, from 0.
            phase: default: the recipe's only phase.
            step: denoising step, from 0; needed where the recipe has ranges of steps.

        Returns:
            The plan; a dense one where a partial recipe has none.

        Raises:
            ValueError: no such layer, phase or step.
        """
        phase = self._phase(phase)
        if not 0 <= layer < self.model.num_layers:
            raise ValueError(f"recipe: layer {layer} is outside 0..{self.model.num_layers - 1}.")
        if step is not None and self.num_steps is not None and not 0 <= step < self.num_steps:
            raise ValueError(
                f"recipe: step {step} is outside 0..{self.num_steps - 1}; the recipe was made for "
                f"{self.num_steps} denoising steps."
            )
        for plan in self.layers:
            if (plan.phase, plan.layer) != (phase, layer):
                continue
            if plan.steps is None:
                return plan
            if step is None:
                raise ValueError(f"recipe: layer {layer} differs by step; pass step=.")
            if plan.steps[0] <= step < plan.steps[1]:
                return plan
        return LayerPlan(
            layer, (HeadGroup(tuple(range(self.model.num_heads)), "dense", DenseConfig()),), phase
        )

    def settings_for(self, layer: int, phase: str | None = None, step: int | None = None) -> list[Setting]:
        """(heads, method, config object) of each group; arguments and errors as `plan_for`."""
        return self.plan_for(layer, phase, step).settings

    def _phase(self, phase: str | None) -> str:
        if phase is None and len(self.phases) == 1:
            return self.phases[0]
        if phase not in self.phases:
            given = "no phase was given" if phase is None else f"it has no phase {phase!r}"
            raise ValueError(f"recipe: {given}; choose one of {', '.join(self.phases) or 'none'}.")
        return phase

    def check_model(self, model: Any, *, strict: bool = True) -> None:
        """Raise ValueError, saying how they differ, unless the recipe was made for this model.

        Args:
            model: a `Fingerprint`, or what `Fingerprint.of` takes.
            strict: also compare the hash of the model's config.
        """
        found = model if isinstance(model, Fingerprint) else Fingerprint.of(model)
        names = [x for x in asdict(found) if strict or x != "config_hash"]
        differ = [
            f"{name} is {getattr(found, name)}, the recipe's {getattr(self.model, name)}"
            for name in names
            if getattr(found, name) != getattr(self.model, name)
        ]
        if differ:
            only_hash = len(differ) == 1 and differ[0].startswith("config_hash")
            remedy = "pass strict=False to accept that, or search" if only_hash else "search"
            raise ValueError(f"recipe: made for another model: {'; '.join(differ)}; {remedy} on this model.")

    # -- files --------------------------------------------------------------------------------------

    def to_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain JSON, without the "tensors" entry, and the tensors that it refers to."""
        tensors: dict[str, Tensor] = {}
        layers = []
        for n, plan in enumerate(self.layers):
            groups = []
            for m, group in enumerate(plan.groups):
                config = encode_config(group.config, tensors, f"layers.{n}.groups.{m}")
                groups.append({"heads": list(group.heads), "method": group.method, "config": config})
                if group.expected():
                    groups[-1]["expected"] = group.expected()
            steps = {} if plan.steps is None else {"steps": list(plan.steps)}
            layers.append({"layer": plan.layer, "phase": plan.phase, **steps, "groups": groups})
        plain = {
            "schema_version": SCHEMA_VERSION,
            "created_by": self.created_by,
            "model": asdict(self.model),
            "calibration_hash": self.calibration_hash,
            "num_steps": self.num_steps,
            "partial": self.partial,
            "layers": layers,
        }
        return plain, tensors

    @classmethod
    def from_dict(cls, plain: Any, tensors: Path | Mapping[str, Tensor] | None = None) -> Recipe:
        """The recipe of `to_dict`'s result.

        Args:
            tensors: those that `plain` refers to, or the folder of the file that holds them.

        Raises:
            ValueError: all problems at once, each with its place.
        """
        problems, layers = _read(plain, tensors or {})
        if problems:
            raise ValueError("recipe:\n  " + "\n  ".join(problems))
        rest = {x: plain[x] for x in ("calibration_hash", "num_steps", "partial") if x in plain}
        return cls(Fingerprint(**plain["model"]), tuple(layers), created_by=plain["created_by"], **rest)

    def save(self, path: str | Path) -> None:
        """Write the JSON file, and, where configs hold tensors, NAME.safetensors beside it.

        The same recipe gives the same bytes. Each file appears whole or not at all.
        """
        path = Path(path)
        plain, tensors = self.to_dict()
        layers = plain.pop("layers")
        if tensors:
            plain["tensors"] = save_tensors(path.with_suffix(".safetensors"), tensors)
        head = json.dumps(plain, indent=1, allow_nan=False)[:-2]
        rows = ",\n  ".join(json.dumps(x, allow_nan=False) for x in layers)  # a line a layer, for diffs
        write_whole(path, f'{head},\n "layers": [\n  {rows}\n ]\n}}\n'.encode())

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read what `save` wrote.

        Raises:
            ValueError: not a recipe, a newer schema, a bad key (all of them, each with its place), or
                a tensor file that is missing or another one.
        """
        path = Path(path)
        try:
            return cls.from_dict(json.loads(path.read_bytes()), path.parent)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a JSON file: {error}") from None
        except ValueError as error:  # JSON errors are ValueErrors too
            raise ValueError(f"{path}: {error}") from None


# -- the checks of a whole recipe -------------------------------------------------------------------


def _read(plain: Any, folder_or_tensors: Path | Mapping[str, Tensor]) -> tuple[list[str], list[LayerPlan]]:
    """Problems, or the plans of a recipe given as plain JSON.

    Args:
        folder_or_tensors: the tensors, or where their file lies.
    """
    version = plain.get("schema_version") if isinstance(plain, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        by = plain.get("created_by", "an unknown version")
        return [
            f"schema_version: {version}, written by {by}; this is sparse_attn {__version__}, which reads up "
            f"to {SCHEMA_VERSION}. Upgrade sparse_attn"
        ], []
    problems = schema_problems(plain, schema())
    if problems:
        return problems, []
    tensors = folder_or_tensors
    if isinstance(tensors, Path):
        entry = plain.get("tensors")
        tensors = load_tensors(entry, tensors) if entry else {}
    layers: list[LayerPlan] = []
    for n, layer in enumerate(plain["layers"]):
        groups = []
        for m, group in enumerate(layer["groups"]):
            found = _read_group(group, tensors, f"layers[{n}].groups[{m}]")
            groups += [found] if isinstance(found, HeadGroup) else []
            problems += found if isinstance(found, list) else []
        if len(groups) < len(layer["groups"]):
            continue
        try:
            layers.append(LayerPlan(layer["layer"], tuple(groups), layer["phase"], layer.get("steps")))
        except ValueError as error:
            problems += [f"layers[{n}].{line}" for line in str(error).split("\n")]
    return problems, layers


def _read_group(group: dict[str, Any], tensors: Mapping[str, Tensor], path: str) -> HeadGroup | list[str]:
    method = group["method"]
    if method not in methods():
        return [f"{path}.method: unknown method {method!r}; choose one of {', '.join(methods())}"]
    config, problems = decode_config(method, group["config"], tensors, f"{path}.config")
    if problems:
        return problems
    try:
        return HeadGroup(tuple(group["heads"]), method, config, **group.get("expected", {}))
    except ValueError as error:
        return [f"{path}.{line}" for line in str(error).split("\n")]


def _coverage_problems(
    model: Fingerprint, layers: Iterable[LayerPlan], num_steps: int | None, partial: bool
) -> list[str]:
    """Whether the plans are those of this model: heads, layers and steps."""
    problems: list[str] = []
    ranges: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for n, plan in enumerate(layers):
        path = f"layers[{n}]"
        if not 0 <= plan.layer < model.num_layers:
            problems.append(f"{path}.layer: {plan.layer} is outside 0..{model.num_layers - 1}")
        if plan.num_heads > model.num_heads:
            problems.append(
                f"{path}.groups: cover heads 0..{plan.num_heads - 1}, but the model has {model.num_heads}"
            )
        elif plan.num_heads < model.num_heads:
            missing = range(plan.num_heads, model.num_heads)
            problems.append(f"{path}.groups: heads {numbered(missing)} are in no group")
        if plan.steps is not None and num_steps is None:
            problems.append(f"{path}.steps: the recipe has no num_steps; set it to what steps are counted in")
        elif plan.steps is not None and plan.steps[1] > (num_steps or 0):
            problems.append(f"{path}.steps: {list(plan.steps)} ends after num_steps = {num_steps}")
        steps = plan.steps or (0, num_steps or 1)
        taken = ranges.setdefault((plan.phase, plan.layer), [])
        if any(steps[0] < end and first < steps[1] for first, end in taken):
            problems.append(
                f"{path}: layer {plan.layer} has another plan for the same {plan.phase}"
                f"{'' if plan.steps is None else ' steps'}"
            )
        taken.append(steps)
    if not partial:
        problems += _gaps(model, ranges, num_steps)
    return problems


def _gaps(
    model: Fingerprint, ranges: Mapping[tuple[str, int], list[tuple[int, int]]], num_steps: int | None
) -> list[str]:
    problems = [] if ranges else ["layers: there is no plan at all; set partial to true"]
    for phase in dict.fromkeys(phase for phase, _ in ranges):
        absent = numbered(n for n in range(model.num_layers) if (phase, n) not in ranges)
        if absent:
            problems.append(
                f"layers: {phase} has no plan for layers {absent}; set partial to true to leave them dense"
            )
    for (phase, layer), taken in ranges.items():
        if sum(end - first for first, end in taken) < (num_steps or 1):
            problems.append(f"layers: layer {layer} has no plan for some {phase} steps of {num_steps}")
    return problems


def validate(plain: Any, tensors: Mapping[str, Tensor] | None = None) -> list[str]:
    """ "place: what is wrong" for every problem of a recipe given as plain JSON; [] if it is good."""
    problems, layers = _read(plain, tensors or {})
    if problems:
        return problems
    model = Fingerprint(**plain["model"])
    return _coverage_problems(model, layers, plain.get("num_steps"), plain.get("partial", False))
