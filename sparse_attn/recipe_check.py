"""Recipes as plain data: the schema's check, and method configs to JSON and back.

Every complaint names the place, e.g. "layers[3].groups[1].config.theta: ...". The schema is
`recipe_schema.json`; `schema_problems` reads the part of JSON Schema that it uses, so that no package for
that is needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attn.attend import attend
from sparse_attn.index_list import IndexList
from sparse_attn.layout import SparseLayout
from sparse_attn.methods import METHODS, Context, Method
from sparse_attn.methods.blasst import full_layout
from sparse_attn.methods.vdit_patterns import Pattern
from sparse_attn.plan import Plan

SCHEMA_VERSION = 1

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
    "integer": (int,), "number": (int, float),
}  # fmt: skip


# -- the method that every recipe has ---------------------------------------------------------------


@dataclass(frozen=True)
class DenseConfig:
    """Dense attention, run by the same engines over a full layout.

    Attributes:
        block_size: queries and keys in a tile; default 128.
    """

    block_size: int = 128

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"dense: block_size is {self.block_size}; it must be at least 1.")


def _select_dense(
    query: Tensor, key: Tensor, config: DenseConfig, *, is_causal: bool, scale: float, context: Context
) -> Plan:
    size = config.block_size
    return Plan(full_layout(query.shape[2], key.shape[2], size, size, query.device))


_DENSE = Method("dense", DenseConfig, _select_dense, attend, causal=True)


def methods() -> dict[str, Method]:
    """What a recipe may name: the registry, and "dense"."""
    return {_DENSE.name: _DENSE, **METHODS}


# -- the schema -------------------------------------------------------------------------------------


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, as shipped."""
    return json.loads(Path(__file__).with_name("recipe_schema.json").read_text())


def schema_problems(value: Any, rule: Mapping[str, Any], path: str = "") -> list[str]:
    """ "path: what is wrong" for everything in `value` that breaks `rule`."""
    if "enum" in rule and value not in rule["enum"]:
        return [f"{path}: {value!r} is not one of {', '.join(map(str, rule['enum']))}"]
    wanted = rule.get("type")
    names = [wanted] if isinstance(wanted, str) else wanted or []
    if names and not any(_is_type(value, name) for name in names):
        return [f"{path or 'recipe'}: expected {' or '.join(names)}, got {_name_of(value)}"]
    if isinstance(value, dict):
        return _object_problems(value, rule, path)
    if isinstance(value, list):
        return _array_problems(value, rule, path)
    if isinstance(value, str) and "pattern" in rule and not re.search(rule["pattern"], value):
        return [f"{path}: {value!r} does not have the form {rule['pattern']}"]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            return [f"{path}: {value} is not finite"]
        if value < rule.get("minimum", value) or value > rule.get("maximum", value):
            bounds = [f"at {end} {rule[name]}" for name, end in _BOUNDS if name in rule]
            return [f"{path}: {value} is out of range; it must be {' and '.join(bounds)}"]
    return []


_BOUNDS = (("minimum", "least"), ("maximum", "most"))


def _object_problems(value: dict[str, Any], rule: Mapping[str, Any], path: str) -> list[str]:
    known = rule.get("properties", {})
    problems = [
        f"{_at(path, key)}: required, but absent" for key in rule.get("required", []) if key not in value
    ]
    for key, inner in value.items():
        if key in known:
            problems += schema_problems(inner, known[key], _at(path, key))
        elif rule.get("additionalProperties") is False:
            problems.append(f"{_at(path, key)}: unknown key; known are {', '.join(known)}")
    return problems


def _array_problems(value: list[Any], rule: Mapping[str, Any], path: str) -> list[str]:
    least, most = rule.get("minItems", 0), rule.get("maxItems", len(value))
    if not least <= len(value) <= most:
        wanted = f"{least}" if least == rule.get("maxItems") else f"at least {least}"
        return [f"{path}: has {len(value)} entries; expected {wanted}"]
    item = rule.get("items", {})
    return [x for n, inner in enumerate(value) for x in schema_problems(inner, item, f"{path}[{n}]")]


def _is_type(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _name_of(value: Any) -> str:
    return next((name for name in _TYPES if _is_type(value, name)), type(value).__name__)


def _at(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


# -- configs ----------------------------------------------------------------------------------------


def encode_config(config: Any, tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """A method's config as plain JSON, every field written out, so that a later change of a default does
    not change a recipe.

    Args:
        tensors: gets the config's tensors, under names that start with `prefix`; the JSON refers to
            them as {"tensor": name}.

    Raises:
        ValueError: a value that has no form in a recipe.
    """
    plain = {
        f.name: _encode(getattr(config, f.name), tensors, f"{prefix}.{f.name}")
        for f in fields(config)
        if f.init
    }
    if getattr(config, "for_all_heads", False):  # one pattern, not a list of one
        plain["patterns"] = plain["patterns"][0]
    return plain


def _encode(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity; decoded below
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Pattern):
        return {k: list(v) if isinstance(v, tuple) else v for k, v in value.to_dict().items()}
    if isinstance(value, (tuple, list)):
        return [_encode(x, tensors, f"{name}.{n}") for n, x in enumerate(value)]
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, SparseLayout):
        return _encode_layout(value, tensors, name)
    raise ValueError(f"{name}: a {type(value).__name__} cannot be written into a recipe.")


_LIST_RULE = {
    "type": "object",
    "required": ["tensors", "group"],
    "properties": {"tensors": {"type": "string"}, "group": {"type": "integer", "minimum": 1}},
}
_LAYOUT_FIELDS = ("block_m", "block_n", "L", "S", "batch", "heads", "neighbours_alike")
_LAYOUT_RULE = {
    "type": "object",
    "required": ["blocks", *_LAYOUT_FIELDS],
    "additionalProperties": False,
    "properties": {
        **{name: {"type": "integer", "minimum": 1} for name in _LAYOUT_FIELDS[:-1]},
        "neighbours_alike": {"type": "boolean"},
        "blocks": _LIST_RULE,
        "columns": _LIST_RULE,
    },
}


def _encode_layout(layout: SparseLayout, tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    plain: dict[str, Any] = {x: getattr(layout, x) for x in _LAYOUT_FIELDS}
    for part, rows in (("blocks", layout.blocks), ("columns", layout.columns)):
        if rows is not None:
            used = int(rows.offsets[-1])
            tensors[f"{name}.{part}.offsets"] = rows.offsets.detach().cpu().contiguous()
            tensors[f"{name}.{part}.indices"] = rows.indices[:used].detach().cpu().clone()
            plain[part] = {"tensors": f"{name}.{part}", "group": rows.group}
    return {"layout": plain}


def decode_config(
    method: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str
) -> tuple[Any, list[str]]:
    """The config object of a method, or None and "path: what is wrong" for each problem."""
    cls = methods()[method].config
    known = {f.name: f for f in fields(cls) if f.init}
    problems, given = [], {}
    for key, value in plain.items():
        where = f"{path}.{key}"
        if key not in known:
            problems.append(f"{where}: {method} has no such setting; it has {', '.join(known)}")
            continue
        try:
            given[key] = _decode(value, tensors)
        except ValueError as error:
            problems.append(f"{where}: {error}")
        else:
            problems += _type_problems(given[key], known[key].type, where)
    for key, field in known.items():
        if key not in plain and field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"{path}.{key}: required by {method}, but absent")
    if problems:
        return None, problems
    try:
        return cls(**given), []
    except (ValueError, TypeError) as error:
        return None, [f"{path}{_guilty(cls, given, str(error))}: {error}"]


_VALUE_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "None": (type(None),),
    "tuple": (tuple,), "Tensor": (Tensor,), "SparseLayout": (SparseLayout,),
}  # fmt: skip


def _type_problems(value: Any, annotation: Any, where: str) -> list[str]:
    """A complaint if a setting is of none of the types that its field names.

    A field with a type of its own (patterns) is left to its constructor, but for plain numbers, which
    no constructor reads as such a type.
    """
    if not isinstance(annotation, str):
        return []
    names = [x.strip() for x in re.sub(r"\[.*?\]", "", annotation).split("|")]
    allowed = tuple(cls for name in names for cls in _VALUE_TYPES.get(name, ()))
    named = set(re.findall(r"[A-Za-z]\w*", annotation))
    if not named <= set(_VALUE_TYPES):
        allowed += (tuple, str, dict)
    is_bool = isinstance(value, bool)
    if (bool in allowed) if is_bool else isinstance(value, allowed):
        return []
    return [f"{where}: expected {annotation}, got {value!r}"]


def _guilty(cls: type, given: dict[str, Any], message: str) -> str:
    """ ".key" of the setting that a constructor's complaint is about, or "" if that is not one alone."""

    def is_fine(settings: dict[str, Any]) -> bool:
        try:
            cls(**settings)
        except (ValueError, TypeError):
            return False
        return True

    tests = (
        lambda key: is_fine({k: v for k, v in given.items() if k != key}),
        # Where the setting cannot be left out, the complaint names it or quotes it.
        lambda key: re.search(rf"\b{key}(\[.*?\])? (is|has)\b", message),
        lambda key: any(repr(x) in message for x in _quotable(given[key])),
    )
    for test in tests:
        found = [key for key in given if test(key)]
        if len(found) == 1:
            return f".{found[0]}"
    return ""


def _quotable(value: Any) -> list[Any]:
    parts = value if isinstance(value, tuple) else (value,)
    return [x for x in parts if isinstance(x, (str, dict))]


def by_head_problems(config: Any, num_heads: int) -> list[str]:
    """ "config.KEY: what is wrong" where a config holds settings for other than `num_heads` heads."""
    problems = []
    for name in (f.name for f in fields(config) if f.init):
        value, path = getattr(config, name), f"config.{name}"
        if isinstance(value, Tensor) and (value.dim() != 1 or len(value) != num_heads):
            problems.append(
                f"{path}: has shape {tuple(value.shape)}; a group of this size needs [{num_heads}]"
            )
        elif isinstance(value, SparseLayout):
            if value.batch != 1 or value.heads not in (1, num_heads):
                problems.append(
                    f"{path}: is a layout for batch {value.batch} and {value.heads} heads; it must be for "
                    f"batch 1 and {num_heads} heads, or 1"
                )
        elif name == "patterns" and not config.for_all_heads and len(value) != num_heads:
            problems.append(
                f"{path}: has {len(value)} patterns for {num_heads} heads; give one a head, or one"
            )
    return problems


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if value in ("inf", "-inf"):
        return float(value)
    if isinstance(value, list):
        return tuple(_decode(x, tensors) for x in value)
    if isinstance(value, Mapping) and "tensor" in value:
        return _tensor(value["tensor"], tensors)
    if isinstance(value, Mapping) and "layout" in value:
        return _decode_layout(value["layout"], tensors)
    return value


def _tensor(name: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    if not isinstance(name, str) or name not in tensors:
        raise ValueError(f"tensor {name!r} is not in the recipe's tensor file")
    return tensors[name]


def _decode_layout(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SparseLayout:
    lists = {}
    problems = schema_problems(plain, _LAYOUT_RULE, "layout")
    if problems:
        raise ValueError("; ".join(problems))
    for part in ("blocks", "columns"):
        if part in plain:
            name = plain[part]["tensors"]
            offsets, indices = (_tensor(f"{name}.{x}", tensors) for x in ("offsets", "indices"))
            if offsets.dtype != torch.int64 or indices.dtype != torch.int32:
                raise ValueError(
                    f"{name} holds {offsets.dtype} and {indices.dtype}; int64 and int32 expected"
                )
            if indices.numel() == 0:  # a list has room for one entry at least
                indices = torch.zeros(1, dtype=torch.int32)
            lists[part] = IndexList(offsets, indices, plain[part]["group"])
    settings = {x: plain[x] for x in _LAYOUT_FIELDS}
    return SparseLayout(lists["blocks"], columns=lists.get("columns"), **settings).check()
