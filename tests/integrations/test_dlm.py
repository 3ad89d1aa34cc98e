"""`denoising`: every step of a diffusion language model equals SparseD written out, literally."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from references import sparsed as reference  # noqa: E402
from test_transformers_patch import error, table, tiny_model, tokens  # noqa: E402

import sparse_attn as sa  # noqa: E402
from sparse_attn.methods.blasst import BlasstConfig  # noqa: E402
from sparse_attn.recipe import DenseConfig, Fingerprint, HeadGroup, LayerPlan, Recipe  # noqa: E402

STEPS, LENGTH, PROMPT = 5, 56, 30
HOW = {"block_size": 8, "select_ratio": 0.4, "skip_ratio": 0.4}  # dense at steps 0 and 1


class Literal:
    """SparseD as `references/sparsed.py` spells it out, per step, layer and sequence, under dense masks.

    An attention function of the adapter; `step` is set by hand.
    """

    def __init__(self, prompt_len: list[int], mode: str = "paper", pads: list[int] | None = None) -> None:
        self.prompt_len, self.mode, self.pads = prompt_len, mode, pads or [0] * len(prompt_len)
        self.dense = reference.dense_steps(STEPS, HOW["skip_ratio"], mode)
        self.step = -1
        self.masks: dict[tuple[int, int], torch.Tensor] = {}

    wants_rows = True

    def __call__(self, q, k, v, *, layer, is_causal, scale, row=None, first=0):
        assert not is_causal
        rows = range(q.shape[0]) if row is None else [row]
        outs = [self.one(q[[n]], k[[n]], v[[n]], (layer, b), first, scale) for n, b in enumerate(rows)]
        return torch.cat(outs)

    def one(self, q, k, v, place, first, scale):
        group = q.shape[1] // k.shape[1]
        wide = (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
        logits = q @ wide[0].mT * scale
        if self.step not in self.dense:
            logits = logits.masked_fill(~self.masks[place], -torch.inf)
        elif self.step == self.dense[-1]:
            keep, _, _ = reference.select(
                q, k, prompt_len=[self.prompt_len[place[1] % len(self.prompt_len)] - first], mode=self.mode,
                select_ratio=HOW["select_ratio"], block_size=HOW["block_size"], score_scale=scale,
            )  # fmt: skip
            tokens_of = keep.repeat_interleave(HOW["block_size"], 2).repeat_interleave(HOW["block_size"], 3)
            self.masks[place] = tokens_of[:, :, : q.shape[2], : q.shape[2]]
        return logits.softmax(-1) @ wide[1]


def diffusion_model(**changes):
    return tiny_model(is_causal=False, **changes)


@torch.no_grad()
def generate(forward: Callable, x: torch.Tensor, prompt: int, before: Callable = lambda step: None):
    """A plain sampler: at each step the model's guess replaces one more answer token. Logits of all steps."""
    x, seen = x.clone(), []
    for step in range(STEPS):
        before(step)
        seen.append(forward(x))
        at = prompt + step
        x[:, at] = seen[-1][-x.shape[0] :, at].argmax(-1)
    return seen


def literally(model, forward, x, prompt, literal: Literal):
    with sa.patched(model, literal):
        return generate(forward, x, prompt, lambda step: setattr(literal, "step", step))


def same(ours, expected, real=slice(None)) -> None:
    for step, (mine, other) in enumerate(zip(ours, expected, strict=True)):
        assert error(mine[real], other[real]) < 2e-4 * other.abs().max().item(), f"step {step}"


@pytest.mark.parametrize("mode", ["paper", "repo"])
def test_every_step_equals_the_literal_algorithm(mode: str) -> None:
    """A batch whose rows have prompts of different lengths."""
    model, x, prompts = diffusion_model(), tokens(2, LENGTH), [PROMPT, 17]

    def forward(x):
        return model(x).logits

    expected = literally(model, forward, x, PROMPT, Literal(prompts, mode))
    with sa.denoising(model, num_steps=STEPS, prompt_len=prompts, mode=mode, **HOW) as run:
        assert table(model)["0-1"][0].endswith("by step")
        ours = generate(forward, x, PROMPT)
        assert run.step == STEPS - 1
    same(ours, expected)
    dense = generate(forward, x, PROMPT)
    assert error(dense[0], ours[0]) < 2e-4 * dense[0].abs().max().item(), "the first step is dense"
    assert error(dense[-1], ours[-1]) > 1e-2, "and the last is not"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(side: str) -> None:
    """Each row has its own pattern on its own tokens; a padded row equals that row alone."""
    model, x, pad = diffusion_model(), tokens(2, LENGTH), 11
    mask = torch.ones_like(x)
    mask[1, :pad] = 0
    mask = mask if side == "left" else mask.flip(1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)

    def forward(x):
        return model(x, attention_mask=mask, position_ids=places).logits

    expected = literally(model, forward, x, PROMPT, Literal([PROMPT, PROMPT]))
    with sa.denoising(model, num_steps=STEPS, prompt_len=PROMPT, **HOW):
        ours = generate(forward, x, PROMPT)
    same(ours, expected, mask.bool())
    own = slice(pad, None) if side == "left" else slice(None, LENGTH - pad)
    prompt = PROMPT - pad if side == "left" else PROMPT
    with sa.denoising(model, num_steps=STEPS, prompt_len=prompt, **HOW):
        alone = generate(lambda x: model(x).logits, x[1:, own], prompt)
    for mine, other in zip(ours, alone, strict=True):
        assert error(mine[1:, own], other) < 2e-4 * other.abs().max().item()


@pytest.mark.parametrize("how", ["two passes", "one batch"])
def test_classifier_free_guidance(how: str) -> None:
    """The unconditional pass sees another prompt, and finds its own pattern."""
    model, x, prompts, scale = diffusion_model(), tokens(2, LENGTH), [PROMPT, 17], 1.5
    blank = torch.arange(LENGTH)[None] < torch.tensor(prompts)[:, None]

    def masked(x):
        return torch.where(blank, torch.ones_like(x), x)

    literals = [Literal(prompts), Literal(prompts)]

    def expected_forward(x):
        out = []
        for each, literal in zip((x, masked(x)), literals, strict=True):
            with sa.patched(model, literal):
                out.append(model(each).logits)
        return out[1] + scale * (out[0] - out[1])

    def forward(x):
        if how == "two passes":
            with_prompt, without = model(x).logits, model(masked(x)).logits
        else:
            with_prompt, without = model(torch.cat([x, masked(x)])).logits.chunk(2)
        return without + scale * (with_prompt - without)

    expected = generate(
        expected_forward, x, PROMPT, lambda step: [setattr(each, "step", step) for each in literals]
    )
    branches = 2 if how == "two passes" else 1
    with sa.denoising(model, num_steps=STEPS, prompt_len=prompts, branches=branches, **HOW):
        ours = generate(forward, x, PROMPT)
    same(ours, expected)
    assert all(not torch.equal(literals[0].masks[p], literals[1].masks[p]) for p in literals[0].masks)


# -- remote code --------------------------------------------------------------------------------------


class RemoteBlock(nn.Module):
    """A block in the manner of LLaDA's or Dream's own modelling files: it calls the function itself."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 8 * h, bias=False) for h in (heads, kv_heads, kv_heads))
        self.out = nn.Linear(8 * heads, 32)

    def forward(self, x, attn_mask):
        q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        out = nn.functional.scaled_dot_product_attention(
            q * 6, k, v, attn_mask, dropout_p=0.0, is_causal=False
        )
        return x + self.out(out.transpose(1, 2).flatten(2))


class RemoteModel(nn.Module):
    def __init__(self, heads: int = 4, kv_heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(128, 32)
        self.blocks = nn.ModuleList(RemoteBlock(heads, kv_heads) for _ in range(2))
        self.head = nn.Linear(32, 128)

    def forward(self, x, attn_mask=None):
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden, attn_mask)
        return self.head(hidden)


def by_hand(model, forward, x, prompt, literal: Literal, spans):
    """The same model with the literal algorithm in place of the function, sequence by sequence."""
    calls = [0]

    def attention(q, k, v, *rest, **kwargs):
        layer, out = calls[0] % 2, torch.zeros_like(q)
        calls[0] += 1
        for b, (first, end) in enumerate(spans):
            cut = [t[b : b + 1, :, first:end] for t in (q, k, v)]
            out[b : b + 1, :, first:end] = literal.one(*cut, (layer, b), first, 8**-0.5)
        return out

    original = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = attention
    try:
        return generate(forward, x, prompt, lambda step: setattr(literal, "step", step))
    finally:
        nn.functional.scaled_dot_product_attention = original


@pytest.mark.parametrize("mask", ["none", "outer", "keys", "additive"])
@pytest.mark.parametrize("kind", ["name", "list"])
def test_remote_code(mask: str, kind: str) -> None:
    """Reached by class or by module; with the masks of padding that such code makes."""
    model, x, pad = RemoteModel(4, 2).eval(), tokens(2, LENGTH), 11
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    if mask != "none":
        real[1, :pad] = False
    given = None if mask == "none" else real[:, None, None, :]
    if mask == "outer":
        given = given & real[:, None, :, None]
    if mask == "additive":
        given = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)

    def forward(x):
        return model(x, given)

    spans = [(0, LENGTH), (0 if mask == "none" else pad, LENGTH)]
    expected = by_hand(model, forward, x, PROMPT, Literal([PROMPT, PROMPT]), spans)
    modules = "RemoteBlock" if kind == "name" else list(model.blocks)
    with sa.denoising(model, num_steps=STEPS, prompt_len=PROMPT, modules=modules, **HOW) as run:
        ours = generate(forward, x, PROMPT)
    same(ours, expected, real)
    held = 2 if mask == "none" else 4  # one a layer, and row of a padded batch
    assert not run.reasons and f"{held} patterns held" in repr(run)
    assert "forward" not in model.blocks[0].__dict__


def test_remote_code_falls_through_and_restores() -> None:
    model, x = RemoteModel().eval(), tokens(1, LENGTH)
    band = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(-9).tril(9)[None, None]
    stock = model(x, band)
    with (
        pytest.raises(RuntimeError, match="inside"),
        sa.denoising(model, num_steps=STEPS, prompt_len=PROMPT, modules="RemoteBlock", **HOW) as run,
    ):
        assert torch.equal(model(x, band), stock)
        assert run.reasons == {"its mask is not one of padding": 2}
        with (
            pytest.raises(ValueError, match="another denoising block"),
            sa.denoising(model, num_steps=2, prompt_len=0, modules="RemoteBlock"),
        ):
            pass
        raise RuntimeError("inside")
    assert torch.equal(model(x, band), stock)
    assert not model._forward_pre_hooks
    with (
        pytest.raises(ValueError, match="no module of class 'Nonsense'"),
        sa.denoising(model, num_steps=2, prompt_len=0, modules="Nonsense"),
    ):
        pass


# -- steps, other methods, recipes ----------------------------------------------------------------------


def test_steps_by_hand_and_restart() -> None:
    """A sampler that repeats a step, and a second generation of another length in the same block."""
    model, x = diffusion_model(), tokens(1, LENGTH)
    with torch.no_grad(), sa.denoising(model, num_steps=STEPS, prompt_len=PROMPT, **HOW) as run:
        counted = [model(x).logits for _ in range(STEPS)]
        with pytest.raises(ValueError, match="comes after the last of 5 steps"):
            model(x)
        run.restart(20)
        assert run.step == -1
        model(x[:, :40])
        run.restart(PROMPT)
        for step in (0, 1, 1, 3, 4):
            run.set_step(step)
            again = model(x).logits
            assert torch.equal(again, counted[step])
        with pytest.raises(ValueError, match="step 5, branch 0 is outside 5 steps"):
            run.set_step(5)
        with pytest.raises(ValueError, match="changed in the middle of a generation"):
            model(x[:, :40])


def test_a_stateless_method_and_dense_layers() -> None:
    model, x = diffusion_model(), tokens(1, LENGTH)
    how = {"threshold": 0.5, "block_m": 16, "block_n": 16}
    with torch.no_grad():
        with sa.patched(model, "blasst", **how, layers={0: "dense"}):
            expected = model(x).logits
        with sa.denoising(model, "blasst", num_steps=2, prompt_len=PROMPT, dense_layers=[0], **how):
            assert error(model(x).logits, expected) < 1e-4


def test_a_recipe_by_step() -> None:
    """Dense for two steps, then SparseD in some heads and BLASST in others, at the recipe's steps."""
    model, x = diffusion_model(), tokens(1, LENGTH)
    sparsed = sa.SparseDConfig(**HOW)
    groups = (
        HeadGroup((0, 1), "sparsed", sparsed),
        HeadGroup((2, 3), "blasst", BlasstConfig(threshold=0.5, block_m=16, block_n=16)),
    )
    dense = (HeadGroup((0, 1, 2, 3), "dense", DenseConfig(8)),)
    plans = [LayerPlan(0, groups, "denoising")]
    plans += [
        LayerPlan(1, dense, "denoising", (0, 2)),
        LayerPlan(1, groups[1:] + groups[:1], "denoising", (2, 5)),
    ]
    recipe = Recipe(Fingerprint.of(model), tuple(plans[:2]), num_steps=STEPS, partial=True)
    caches = [sa.LayoutCache(), sa.LayoutCache()]
    now = [0]

    def expected(q, k, v, *, layer, is_causal, scale):
        how = {"scale": scale, "enable_gqa": True}
        if layer == 1:
            return sa.sparse_attention(q, k, v, sa.SparseLayout.full(LENGTH, LENGTH), **how)
        first = sa.sparsed_attention(
            q[:, :2], k[:, :1], v[:, :1], cache=caches[0], step=now[0], num_steps=STEPS, prompt_len=PROMPT,
            **HOW, **how,
        )  # fmt: skip
        rest = sa.blasst_attention(q[:, 2:], k[:, 1:], v[:, 1:], 0.5, block_m=16, block_n=16, **how)
        return torch.cat([first, rest], 1)

    def forward(x):
        return model(x).logits

    with sa.patched(model, expected):
        wanted = generate(forward, x, PROMPT, lambda step: now.__setitem__(0, step))
    with sa.denoising(model, recipe, num_steps=STEPS, prompt_len=PROMPT) as run:
        same(generate(forward, x, PROMPT), wanted)
        assert "recipe by step" in repr(run)
    with (
        pytest.raises(ValueError, match="num_steps is 9, but the recipe was made for 5"),
        sa.denoising(model, recipe, num_steps=9, prompt_len=PROMPT),
    ):
        pass
    with (
        pytest.raises(ValueError, match="made for another model"),
        sa.denoising(diffusion_model(num_hidden_layers=3), recipe, num_steps=5, prompt_len=1),
    ):
        pass


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((), {"num_steps": 0}, "num_steps is 0"),
        ((), {"branches": 0}, "branches is 0"),
        ((), {"prompt_len": 1.5}, "prompt_len is 1.5"),
        ((), {"prompt_len": []}, r"prompt_len is \[\]"),
        ((), {"select_ratio": 2.0}, "select_ratio is 2.0"),
        (("nonsense",), {}, "unknown method 'nonsense'"),
        (("dense",), {}, "method is 'dense'"),
    ],
)
def test_bad_arguments_change_nothing(args, options, message) -> None:
    model, x = diffusion_model(), tokens(2, LENGTH)
    with torch.no_grad():
        stock = model(x).logits
        with (
            pytest.raises(ValueError, match=message),
            sa.denoising(model, *args, **({"num_steps": STEPS, "prompt_len": PROMPT} | options)),
        ):
            pass
        assert torch.equal(model(x).logits, stock)
        with (
            sa.denoising(model, num_steps=STEPS, prompt_len=[1, 2, 3], **HOW),
            pytest.raises(ValueError, match="prompt_len has 3 entries, but the batch has 2 rows"),
        ):
            model(x)
        with (
            sa.denoising(model, num_steps=STEPS, prompt_len=PROMPT, **HOW),
            pytest.raises(ValueError, match="no step has begun"),
        ):
            model.model(x)
        assert torch.equal(model(x).logits, stock)


def test_the_example_of_the_page_runs(capsys) -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations_dlm.md").read_text()
    names: dict = {"__name__": "page"}
    exec(compile(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], "example", "exec"), names)
    assert capsys.readouterr().out.strip() in page
    assert not (names["answer"] == names["MASK"]).any()
