"""What vLLM's attention layers run, from `SPARSE_ATTN_VLLM_CONFIG`. Needs no vLLM.

vLLM has no channel for the settings of a plugin, so they come from the environment, which its worker
processes inherit: JSON, the path of a JSON file, or the path of a recipe.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_attn.integrations.settings import DENSE, describe
from sparse_attn.methods import METHODS, Context, Method
from sparse_attn.recipe import LayerPlan, Recipe
from sparse_attn.recipe_paged import run_layer_paged
from sparse_attn.varlen import sparse_attention_paged

ENV = "SPARSE_ATTN_VLLM_CONFIG"
_KEYS = ("method", "options", "recipe", "strict", "layers", "decode", "min_keys", "engine")


@dataclass(frozen=True)
class Heads:
    """Query and key heads of this tensor-parallel rank and of all ranks, and where this rank begins."""

    num: int
    num_kv: int
    total: int
    total_kv: int
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Rule:
    """What the sparse sequences of a layer run: a method on all heads, or a recipe's plan."""

    method: Method | None = None
    config: Any = None
    plan: LayerPlan | None = None

    def __str__(self) -> str:
        if self.method is not None:
            return describe(self.method.name, self.config)
        assert self.plan is not None
        return ", ".join(f"{len(x.heads)} heads {x.method}" for x in self.plan.groups)

    def attend(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cu_seqlens_q: list[int],
        block_table: Tensor,
        seqused_k: list[int],
        scale: float,
        layer: int,
        heads: Heads,
        engine: str | None,
        out: Tensor,
    ) -> None:
        """Causal attention of packed sequences over pages, written into `out`; arguments as
        `sparse_attention_paged`. The block table is vLLM's, and not checked."""
        pages: dict[str, Any] = {
            "cu_seqlens_q": cu_seqlens_q, "block_table": block_table, "seqused_k": seqused_k,
            "is_causal": True, "scale": scale, "engine": engine, "trust_table": True,
            "out": out,
        }  # fmt: skip
        if self.plan is not None:
            run_layer_paged(self.plan, query, k_cache, v_cache, head_offset=heads.offset, **pages)
            return
        assert self.method is not None
        sparse_attention_paged(
            query, k_cache, v_cache, method=self.method, config=_of_all_ranks(self.config, heads),
            context=_context(layer, heads.offset), enable_gqa=True, **pages,
        )  # fmt: skip


@cache
def _context(layer: int, head_offset: int) -> Context:
    return Context(layer=layer, head_offset=head_offset)


def _of_all_ranks(config: Any, heads: Heads) -> Any:
    """The config with the number of heads over all ranks, where it has such fields left to the call."""
    if heads.total == heads.num:
        return config
    names = {x.name for x in fields(config) if getattr(config, x.name) is None}
    given = {"num_heads": heads.total, "num_kv_heads": heads.total_kv}
    return replace(config, **{name: value for name, value in given.items() if name in names})


@dataclass(frozen=True, eq=False)
class Settings:
    """All that `SPARSE_ATTN_VLLM_CONFIG` says.

    Attributes:
        default: of layers that are not named; None is dense.
        layers: of single layers, by number.
        recipe: instead of a default.
        strict: compare the hash of the model's config with the recipe's.
        decode: sequences with one new token (or, with speculative decoding, a few): "dense", or "sparse" by
            the layer's rule (a recipe's plans for decoding, if it has any).
        min_keys: sequences with fewer keys run dense.
        engine: insist on one engine.
    """

    default: Rule | None = None
    layers: Mapping[int, Rule | None] = field(default_factory=dict)
    recipe: Recipe | None = None
    strict: bool = True
    decode: str = DENSE
    min_keys: int = 0
    engine: str | None = None

    @property
    def decodes_sparse(self) -> bool:
        return self.decode == "sparse"

    @property
    def has_decode_rules(self) -> bool:
        """Whether layers have other rules for decoding than for prefill."""
        return self.recipe is not None and "decode" in self.recipe.phases

    @property
    def follows_heads(self) -> bool:
        """Whether heads differ by their number in the model."""
        rules = [self.default, *self.layers.values()]
        return self.recipe is not None or any(rule and hasattr(rule.config, "num_heads") for rule in rules)

    def rule_for(self, layer: int, decode: bool = False) -> Rule | None:
        """The rule of a layer, from 0, for prefill or decoding; None: dense.

        Raises:
            ValueError: a layer that the recipe has not.
        """
        if decode and not self.decodes_sparse:
            return None
        if layer in self.layers:
            return self.layers[layer]
        if self.recipe is None:
            return self.default
        phase = "decode" if decode and self.has_decode_rules else "prefill"
        plan = self.recipe.plan_for(layer, phase)
        return None if all(group.method == DENSE for group in plan.groups) else Rule(plan=plan)

    def check_model(self, config: Any, num_layers: int | None = None) -> None:
        """Raise ValueError unless the recipe and the layers named fit a model.

        Args:
            config: its transformers config.
            num_layers: its number of layers, if known.
        """
        if self.recipe is not None:
            self.recipe.check_model(config, strict=self.strict)
        beyond = [n for n in self.layers if num_layers is not None and n >= num_layers]
        if beyond:
            raise ValueError(
                f"{ENV}: layers names {beyond}; this model's layers are 0 to {(num_layers or 0) - 1}."
            )


def load_settings(text: str | None = None) -> Settings:
    """The settings that a text gives: JSON, or the path of a JSON file or a recipe.

    Args:
        text: default: the environment variable SPARSE_ATTN_VLLM_CONFIG.

    Raises:
        ValueError: nothing given, no such file, bad JSON, or bad settings (all problems at once).

    Example:
        >>> load_settings('{"method": "anchor", "options": {"theta": 12.0}, "layers": {"0": "dense"}}')
    """
    text = os.environ.get(ENV) if text is None else text
    if not text or not text.strip():
        raise ValueError(
            f"{ENV} is not set; set it to JSON "
            '(\'{"method": "anchor", "options": {"theta": 12.0}}\'), to a file with that, or to a recipe.'
        )
    folder = Path()
    if not text.lstrip().startswith("{"):
        path = Path(text)
        if not path.is_file():
            raise ValueError(
                f"{ENV}: there is no file {text!r}, and it is not JSON (which begins with '{{')."
            )
        text, folder = path.read_text(), path.parent
        plain = _parse(text)
        if isinstance(plain, dict) and "schema_version" in plain:
            plain = {"recipe": path.name}
    else:
        plain = _parse(text)
    return _settings(plain, folder)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{ENV}: not JSON: {error}") from None


def _settings(plain: Any, folder: Path) -> Settings:
    if not isinstance(plain, dict):
        raise ValueError(f"{ENV}: is {type(plain).__name__}; expected an object with {', '.join(_KEYS)}.")
    problems = [f"{key}: no such setting; there are {', '.join(_KEYS)}" for key in plain if key not in _KEYS]
    given = {"strict": True, "decode": DENSE, "min_keys": 0, "engine": None, **plain}
    if ("method" in plain) == ("recipe" in plain):
        problems.append("give either method or recipe")
    if "recipe" in plain and "options" in plain:
        problems.append("options: belong to a method, not to a recipe")
    if given["decode"] not in (DENSE, "sparse"):
        problems.append(f"decode: is {given['decode']!r}; use 'dense' or 'sparse'")
    if not isinstance(given["min_keys"], int) or isinstance(given["min_keys"], bool) or given["min_keys"] < 0:
        problems.append(f"min_keys: is {given['min_keys']!r}; it must be an integer of at least 0")
    if not isinstance(given["strict"], bool):
        problems.append(f"strict: is {given['strict']!r}; use true or false")
    problems += _engine_problems(given["engine"])
    default = recipe = None
    if "method" in plain:
        default = _rule(plain["method"], plain.get("options", {}), "method", problems)
    elif "recipe" in plain:
        recipe = _recipe(plain["recipe"], folder, problems)
    layers = _layers(plain.get("layers", {}), problems)
    if problems:
        raise ValueError(f"{ENV}:\n  " + "\n  ".join(problems))
    common = {key: given[key] for key in ("strict", "decode", "min_keys", "engine")}
    return Settings(default, layers, recipe, **common)


def _engine_problems(engine: Any) -> list[str]:
    from sparse_attn.engines import ENGINES

    if engine is None or engine in ENGINES:
        return []
    return [f"engine: unknown engine {engine!r}; choose one of {', '.join(ENGINES)}"]


def _rule(name: Any, options: Any, place: str, problems: list[str]) -> Rule | None:
    if name == DENSE and not options:
        return None
    method = METHODS.get(name) if isinstance(name, str) else None
    fit = [x.name for x in METHODS.values() if x.causal]
    if method is None or not method.causal:
        what = "unknown method" if method is None else "not made for causal language models:"
        problems.append(f"{place}: {what} {name!r}; choose one of {DENSE}, {', '.join(fit)}")
        return None
    if not isinstance(options, dict):
        problems.append(f"{place}: options are {type(options).__name__}; expected an object")
        return None
    try:
        return Rule(method, method.config(**options))
    except (TypeError, ValueError) as error:
        problems.append(f"{place}: {name}: {error}")
        return None


def _layers(plain: Any, problems: list[str]) -> dict[int, Rule | None]:
    if not isinstance(plain, dict):
        problems.append(f"layers: is {type(plain).__name__}; expected an object of layer numbers")
        return {}
    layers: dict[int, Rule | None] = {}
    for number, choice in plain.items():
        place = f"layers.{number}"
        if not number.isdecimal():
            problems.append(f"{place}: {number!r} is no layer number; they count from 0")
            continue
        if isinstance(choice, str):
            choice = {"method": choice}
        if not isinstance(choice, dict) or not {"method"} <= set(choice) <= {"method", "options"}:
            problems.append(f"{place}: expected a method's name, or an object with method and options")
            continue
        layers[int(number)] = _rule(choice["method"], choice.get("options", {}), place, problems)
    return layers


def _recipe(path: Any, folder: Path, problems: list[str]) -> Recipe | None:
    where = folder / path if isinstance(path, str) else None
    if where is None or not where.is_file():
        problems.append(f"recipe: there is no file {path!r}")
        return None
    try:
        recipe = Recipe.load(where)
    except ValueError as error:
        problems.append(f"recipe: {error}")
        return None
    if "prefill" not in recipe.phases:
        problems.append(f"recipe: has plans for {', '.join(recipe.phases) or 'nothing'} but none for prefill")
    groups = [group for plan in recipe.layers for group in plan.groups if plan.phase != "denoising"]
    unfit = sorted({x.method for x in groups if x.method != DENSE and not METHODS[x.method].causal})
    if unfit:
        problems.append(f"recipe: runs {', '.join(unfit)}, not made for causal language models")
    return recipe
