"""The patterns of Sparse-vDiT (arXiv 2506.03065, section 3): what a head may read, as data.

The paper names its modes (full, skip, diagonal, multi-diagonal, vertical stripe) without numbers; the
definitions here are ours. Video tokens are numbered frame by frame, v = f * P + h * W + w, with P = H * W
tokens a frame. A pattern says which (query, key) pairs of *video tokens* a head reads; `vdit_blocks.py`
turns that into blocks and adds the text.

Each pattern is a frozen dataclass; it is also accepted as a string or a dict, so that recipes can be
plain JSON, and `str(pattern)` is a string that parses back to it:

    "full"                              "skip"
    "diagonal:0.5"                      half-width 0.5 frames       |vk - vq| < 0.5 P
    "diagonal:192t"                     half-width 192 tokens       |vk - vq| < 192
    "multi_diagonal:0.0625"             all frame lags              |vk - vq - n P| < 0.0625 P, any n
    "multi_diagonal:64t,stride=2"       every 2nd frame             n a multiple of 2
    "multi_diagonal:64t,max_lag=4"      at most 4 frames away       |n| <= 4
    "multi_diagonal:64t,lags=0/1/8"     these frame distances       |n| in {0, 1, 8}
    "vertical_stripe:first_frame"       keys of frame 0
    "vertical_stripe:64"                64 evenly spaced keys
    "vertical_stripe:columns=0/17/90"   these keys
    "vertical_stripe:64,single"         as single keys rather than as the blocks that hold them
    "diagonal:2 + vertical_stripe:first_frame"    all that either reads

Dict form: {"pattern": "multi_diagonal", "width": 64, "unit": "tokens", "stride": 2}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, ClassVar, TypeGuard

_UNITS = {"frames": "", "tokens": "t"}


@dataclass(frozen=True)
class Pattern:
    """Base of all patterns."""

    name: ClassVar[str]

    def __str__(self) -> str:
        return self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `parse_pattern` reads it."""
        return {"pattern": self.name, **asdict(self)}


@dataclass(frozen=True)
class Full(Pattern):
    """Every key."""

    name: ClassVar[str] = "full"


@dataclass(frozen=True)
class Skip(Pattern):
    """No key at all, text included: the head's output is zeros (or the mean of value)."""

    name: ClassVar[str] = "skip"


@dataclass(frozen=True)
class _Banded(Pattern):
    """Bands of half-width w around some diagonals.

    Attributes:
        width: half-width; the band holds the keys at a distance below it, in frames or tokens.
        unit: "frames" (the half-width in tokens is width * P, rounded, at least 1) or "tokens".
    """

    width: float
    unit: str = "frames"

    def __post_init__(self) -> None:
        if not _is_number(self.width) or not isfinite(self.width) or self.width <= 0:
            raise ValueError(f"{self.name}: width is {self.width!r}; it must be a positive number.")
        if self.unit not in _UNITS:
            raise ValueError(f'{self.name}: unit is {self.unit!r}; choose "frames" or "tokens".')
        if self.unit == "tokens" and self.width != int(self.width):
            raise ValueError(f"{self.name}: width is {self.width} tokens; it must be a whole number.")
        # One spelling for one pattern: 64 and 64.0 must share a cache entry and a string.
        object.__setattr__(self, "width", float(self.width))

    def half_width(self, frame_size: int) -> int:
        """In tokens: a key at this distance from the diagonal is just outside."""
        tokens = self.width * frame_size if self.unit == "frames" else self.width
        return max(1, round(tokens))

    def lag_numbers(self, num_frames: int) -> list[int]:
        """The frame lags n of the diagonals vk = vq + n * P, ascending."""
        raise NotImplementedError

    def _width_text(self) -> str:
        number = repr(int(self.width)) if self.width == int(self.width) else repr(self.width)
        return number + _UNITS[self.unit]


@dataclass(frozen=True)
class Diagonal(_Banded):
    """A band around the main diagonal: `|vk - vq| < width`. One frame wide by default, which is the
    query's own frame and parts of its neighbours."""

    name: ClassVar[str] = "diagonal"
    width: float = 1.0

    def lag_numbers(self, num_frames: int) -> list[int]:
        return [0]

    def __str__(self) -> str:
        return f"{self.name}:{self._width_text()}"


@dataclass(frozen=True)
class MultiDiagonal(_Banded):
    """A narrow band around the same place in other frames: `|vk - vq - n * P| < width` for a lag n.

    Attributes:
        stride: n runs over the multiples of it.
        max_lag: |n| at most this; None: no limit.
        lags: the values of |n| instead of stride and max_lag.
    """

    name: ClassVar[str] = "multi_diagonal"
    width: float = 0.0625
    stride: int = 1
    max_lag: int | None = None
    lags: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_int(self.stride) or self.stride < 1:
            raise ValueError(f"{self.name}: stride is {self.stride!r}; it must be an integer of at least 1.")
        if self.max_lag is not None and (not _is_int(self.max_lag) or self.max_lag < 0):
            raise ValueError(
                f"{self.name}: max_lag is {self.max_lag!r}; it must be an integer of at least 0."
            )
        if self.lags is None:
            return
        if self.stride != 1 or self.max_lag is not None:
            raise ValueError(f"{self.name}: pass either lags or stride and max_lag, not both.")
        object.__setattr__(self, "lags", _ascending(self.name, "lags", self.lags))

    def lag_numbers(self, num_frames: int) -> list[int]:
        last = num_frames - 1 if self.max_lag is None else min(self.max_lag, num_frames - 1)
        ahead = range(0, last + 1, self.stride) if self.lags is None else self.lags
        return sorted({n for lag in ahead if lag < num_frames for n in (lag, -lag)})

    def __str__(self) -> str:
        text = f"{self.name}:{self._width_text()}"
        if self.lags is not None:
            return f"{text},lags={_join(self.lags)}"
        text += f",stride={self.stride}" if self.stride != 1 else ""
        return text + (f",max_lag={self.max_lag}" if self.max_lag is not None else "")


@dataclass(frozen=True)
class VerticalStripe(Pattern):
    """The same keys for every query.

    Attributes:
        columns: "first_frame"; or a count c of evenly spaced keys, number i being
            floor((2 i + 1) * V / (2 c)) of the V video tokens; or the video-token numbers themselves.
        single: False: the whole blocks that hold these keys are read. True: these keys alone are
            (layout columns): less to compute where they lie scattered.
    """

    name: ClassVar[str] = "vertical_stripe"
    columns: str | int | tuple[int, ...] = "first_frame"
    single: bool = False

    def __post_init__(self) -> None:
        columns = self.columns
        if not isinstance(self.single, bool):
            raise ValueError(f"{self.name}: single is {self.single!r}; it must be True or False.")
        if isinstance(columns, (list, tuple)):
            object.__setattr__(self, "columns", _ascending(self.name, "columns", columns))
        elif columns != "first_frame" and not (_is_int(columns) and columns >= 1):
            raise ValueError(
                f'{self.name}: columns is {columns!r}; pass "first_frame", a count of at least 1, or a list '
                "of video-token numbers."
            )

    def column_numbers(self, num_frames: int, frame_size: int) -> list[int] | range:
        """The video-token numbers of the stripe, ascending.

        Raises:
            ValueError: a column outside the video.
        """
        num_video, columns = num_frames * frame_size, self.columns
        if isinstance(columns, str):
            return range(frame_size)
        if isinstance(columns, int):
            return sorted({(2 * i + 1) * num_video // (2 * columns) for i in range(columns)})
        if columns[-1] >= num_video:
            raise ValueError(
                f"{self.name}: column {columns[-1]} lies outside the {num_video} video tokens; "
                f"columns must lie in [0, {num_video - 1}]."
            )
        return list(columns)

    def __str__(self) -> str:
        text = f"columns={_join(self.columns)}" if isinstance(self.columns, tuple) else str(self.columns)
        return f"{self.name}:{text}" + (",single" if self.single else "")


@dataclass(frozen=True)
class Union(Pattern):
    """All that any of its parts reads; parts are diagonals, multi-diagonals and stripes."""

    name: ClassVar[str] = "union"
    parts: tuple[Pattern, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(parse_pattern(x) for x in self.parts))
        if len(self.parts) < 2 or any(isinstance(x, (Full, Skip, Union)) for x in self.parts):
            raise ValueError(
                f"union: {' + '.join(map(str, self.parts)) or 'nothing'} is not a union; join two or more "
                "of diagonal, multi_diagonal and vertical_stripe."
            )

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))

    def to_dict(self) -> dict[str, Any]:
        return {"pattern": self.name, "parts": [x.to_dict() for x in self.parts]}


PATTERNS: dict[str, type[Pattern]] = {
    cls.name: cls for cls in (Full, Skip, Diagonal, MultiDiagonal, VerticalStripe, Union)
}

_SETTINGS = {name: [f.name for f in fields(cls)] for name, cls in PATTERNS.items()}


def parse_pattern(spec: Pattern | str | Mapping[str, Any]) -> Pattern:
    """The pattern that a string, a dict or a pattern stands for (see the top of this file).

    Raises:
        ValueError: unknown pattern, unknown setting or a value out of range.

    Example:
        >>> parse_pattern("multi_diagonal:64t,stride=2")
        MultiDiagonal(width=64.0, unit='tokens', stride=2, max_lag=None, lags=None)
    """
    if isinstance(spec, Pattern):
        return spec
    if isinstance(spec, Mapping):
        settings = dict(spec)
        name = settings.pop("pattern", None)
        return _make(_plain(name) if isinstance(name, str) else name, settings, spec)
    if not isinstance(spec, str):
        raise ValueError(
            f"vdit_attention: pattern {spec!r} is {type(spec).__name__}; pass a Pattern, a string or a dict."
        )
    if "+" in spec:
        return Union(tuple(parse_pattern(part) for part in spec.split("+")))
    name, _, rest = spec.strip().partition(":")
    name = _plain(name)
    return _make(name, _read_settings(name, rest, spec) if name in PATTERNS else {}, spec)


def _plain(name: str) -> str:
    """The paper writes "multi-diagonal"; so may a user."""
    return name.replace("-", "_")


def _make(name: Any, settings: dict[str, Any], spec: Any) -> Pattern:
    cls = PATTERNS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(
            f"vdit_attention: unknown pattern {name!r} in {spec!r}; choose one of {', '.join(PATTERNS)}."
        )
    known = _SETTINGS[name]
    unknown = [x for x in settings if x not in known]
    if unknown:
        raise ValueError(
            f"vdit_attention: {name} has no setting {unknown[0]!r} (in {spec!r}); "
            f"it has {', '.join(known) or 'none'}."
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})


def _read_settings(name: str, text: str, spec: str) -> dict[str, Any]:
    """The settings after the colon: an optional leading value, then `key=value` or a bare flag."""
    settings: dict[str, Any] = {}
    parts = [x.strip() for x in text.split(",")] if text else []
    for n, part in enumerate(parts):
        key, equals, value = part.partition("=")
        try:
            if equals:
                settings[key] = (
                    tuple(map(int, value.split("/"))) if key in ("lags", "columns") else int(value)
                )
            elif part == "single":
                settings["single"] = True
            elif n == 0 and name == "vertical_stripe":
                settings["columns"] = part if part == "first_frame" else int(part)
            elif n == 0 and name in ("diagonal", "multi_diagonal"):
                settings["unit"] = "tokens" if part.endswith("t") else "frames"
                settings["width"] = float(part.removesuffix("t"))
            else:
                raise ValueError(part)
        except ValueError:
            raise ValueError(
                f"vdit_attention: cannot read {part!r} in pattern {spec!r}; the forms are e.g. "
                '"diagonal:0.5", "multi_diagonal:64t,stride=2", "vertical_stripe:first_frame".'
            ) from None
    return settings


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _ascending(name: str, what: str, numbers: Any) -> tuple[int, ...]:
    if (
        not isinstance(numbers, (list, tuple))
        or not numbers
        or not all(_is_int(x) and x >= 0 for x in numbers)
    ):
        raise ValueError(f"{name}: {what} is {numbers!r}; it must be a list of integers of at least 0.")
    return tuple(sorted(set(numbers)))


def _join(numbers: tuple[int, ...]) -> str:
    return "/".join(map(str, numbers))
