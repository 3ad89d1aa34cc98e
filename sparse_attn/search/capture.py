"""Queries, keys and values on their way through a model: intercepted, sampled, kept on disk.

A search measures candidates on the fly, one layer at a time in memory. Shards on disk are for those who
want to look at the tensors, or to search again without the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sparse_attn.search.measure import Call

# (query, key, value, *, layer, is_causal, scale) -> out, as the transformers adapter calls it.
AttentionFunction = Callable[..., Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float) -> Tensor:
    """PyTorch's dense attention with our conventions: bottom-right causality, key heads not repeated."""
    L, S, mask = q.shape[2], k.shape[2], None
    if is_causal and L != S:
        mask = torch.ones(L, S, dtype=torch.bool, device=q.device).tril(S - L)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=is_causal and L == S,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


# -- any model that calls scaled_dot_product_attention ------------------------------------------------


class _Intercept(TorchFunctionMode):
    """Hands self-attention calls of a pass to `attention`, numbered in the order in which they come."""

    def __init__(
        self, attention: AttentionFunction, num_layers: int | None, num_steps: int | None, branches: int
    ) -> None:
        super().__init__()
        self.attention, self.num_layers, self.count = attention, num_layers, 0
        self.num_steps, self.branches = num_steps, branches

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or not _is_plain(*args, **kwargs):
            return func(*args, **kwargs)
        q, k, v, _, _, is_causal, scale = _arguments(*args, **kwargs)
        number, layer = (0, self.count) if self.num_layers is None else divmod(self.count, self.num_layers)
        where = {} if self.num_steps is None else self._where(number)
        self.count += 1
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        # A mode is off inside its own handler: the function may call scaled_dot_product_attention itself.
        return self.attention(q, k, v, layer=layer, is_causal=is_causal, scale=scale, **where)

    def _where(self, number: int) -> dict[str, int]:
        step, branch = divmod(number, self.branches)
        if step >= (self.num_steps or 0):
            raise ValueError(
                f"intercept_sdpa: pass {number + 1} of {self.num_layers} layers comes after the last of "
                f"{self.num_steps} steps of {self.branches} passes; give as many steps, branches and layers "
                "as there are."
            )
        return {"step": step, "branch": branch}


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    return query, key, value, attn_mask, dropout_p, is_causal, scale


def _is_plain(*args: Any, **kwargs: Any) -> bool:
    """Whether a call is unmasked or causal self-attention of a sequence of more than one token."""
    q, k, _, mask, dropout, _, _ = _arguments(*args, **kwargs)
    return mask is None and not dropout and q.dim() == 4 and q.shape[2] == k.shape[2] > 1


@contextmanager
def intercept_sdpa(
    attention: AttentionFunction,
    num_layers: int | None = None,
    *,
    num_steps: int | None = None,
    branches: int = 1,
) -> Iterator[Any]:
    """Run `attention` in place of `scaled_dot_product_attention` for the length of a `with` block.

    It takes effect however the model got hold of the function. Cross-attention (another key length), masked
    calls, dropout and single tokens are left alone and not counted.

    Args:
        attention: (query [B, Hq, L, D], key, value, *, layer, is_causal, scale) -> out [B, Hq, L, Dv].
        num_layers: calls in a pass: layer numbers start again after so many. None: they never do.
        num_steps: denoising steps of `branches` passes each, which the `with` block runs; `attention` then is
            also told `step` and `branch`, from 0. It takes `num_layers`. Default: passes are not counted.

    Yields:
        An object whose `count` is the number of calls so far.

    Example:
        >>> with intercept_sdpa(lambda q, k, v, *, layer, is_causal, scale: print(layer) or v):
        ...     transformer(x)
    """
    if num_steps is not None and num_layers is None:
        raise ValueError("intercept_sdpa: steps are counted by their layers; pass num_layers with num_steps.")
    mode = _Intercept(attention, num_layers, num_steps, branches)
    with mode:
        yield mode


# -- shards -------------------------------------------------------------------------------------------


class ShardWriter:
    """An attention function that is dense and writes each layer's q, k, v and output to a shard.

    One safetensors file a call, FOLDER/sample0000-layer000.safetensors, written whole or not at all; files
    that are there already are left as they are, so that a pass that was cut short can be run again.

    Args:
        folder: made if it is not there.
        layers: which layers to write; default all.
        heads: which key heads (with their query heads) to write; default all.
        dtype: to store; default: that of the model.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        layers: set[int] | None = None,
        heads: list[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.folder, self.layers, self.heads, self.dtype = Path(folder), layers, heads, dtype
        self.sample = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool, scale: float
    ) -> Tensor:
        out = sdpa(q, k, v, is_causal=is_causal, scale=scale)
        if self.layers is None or layer in self.layers:
            self._write(layer, q, k, v, out, is_causal, scale)
        return out

    def _write(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, is_causal: bool, scale: float
    ) -> None:
        from safetensors.torch import save

        from sparse_attn.recipe_files import write_whole

        path = self.folder / shard_name(self.sample, layer)
        if path.is_file():
            return
        if self.heads is not None:
            group = q.shape[1] // k.shape[1]
            query_heads = [h * group + n for h in self.heads for n in range(group)]
            q, out, k, v = q[:, query_heads], out[:, query_heads], k[:, self.heads], v[:, self.heads]
        tensors = {"q": q, "k": k, "v": v, "out": out}
        tensors = {
            name: x.detach().to("cpu", self.dtype or x.dtype).contiguous() for name, x in tensors.items()
        }
        meta = {"layer": str(layer), "is_causal": str(int(is_causal)), "scale": repr(float(scale))}
        write_whole(path, save(tensors, metadata=meta))


def shard_name(sample: int, layer: int) -> str:
    return f"sample{sample:04d}-layer{layer:03d}.safetensors"


@dataclass(frozen=True, eq=False)
class Shard:
    """What one file holds: a call, and the dense output [B, Hq, L, Dv]."""

    call: Call
    out: Tensor


def read_shards(folder: str | Path) -> Iterator[tuple[int, Shard]]:
    """(sample, shard) of every file of a folder, in order, one in memory at a time.

    Raises:
        ValueError: no shards there.
    """
    from safetensors import safe_open

    paths = sorted(Path(folder).glob("sample*-layer*.safetensors"))
    if not paths:
        raise ValueError(f"read_shards: {folder} holds no sample*-layer*.safetensors.")
    for path in paths:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata()
            q, k, v, out = (file.get_tensor(name) for name in ("q", "k", "v", "out"))
        call = Call(int(meta["layer"]), q, k, v, meta["is_causal"] == "1", float(meta["scale"]))
        yield int(path.name[6:10]), Shard(call, out)


# -- sampling of queries ------------------------------------------------------------------------------


def query_runs(call: Call, num_queries: int | None, run: int = 1024) -> list[Call]:
    """A few stretches of a long call's queries, each with the keys up to its end.

    Causal attention of a stretch is a chunk of a prefill, which every causal method covers; stretches begin
    at multiples of `run`, so that blocks, tiles and superblocks of up to `run` queries are those of the
    whole. Stretches are spread evenly and include the last one. Other attention is left whole: methods for
    it choose keys by all queries.

    Args:
        num_queries: queries to keep, rounded up to whole stretches; None: all.
        run: queries in a stretch.
    """
    L, S = call.q.shape[2], call.k.shape[2]
    if num_queries is None or num_queries >= L or not call.is_causal or L != S:
        return [call]
    total = -(-L // run)
    wanted = min(max(-(-num_queries // run), 1), total)
    numbers = [total - 1 - n * total // wanted for n in range(wanted)][::-1]
    parts = []
    for n in numbers:
        rows, end = slice(n * run, min((n + 1) * run, L)), min((n + 1) * run, S)
        grad = None if call.grad is None else call.grad[:, :, rows]
        parts.append(
            Call(
                call.layer, call.q[:, :, rows], call.k[:, :, :end], call.v[:, :, :end], True, call.scale,
                grad, call.prompt_len,
            )
        )  # fmt: skip
    return parts
