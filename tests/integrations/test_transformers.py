"""The transformers adapter: exact where it is dense, never silently wrong under a mask, reversible."""

from __future__ import annotations

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import sparse_attn as sa  # noqa: E402
import sparse_attn.integrations.transformers as sparse_hf  # noqa: E402
from sparse_attn import Plan, SparseLayout, attend  # noqa: E402
from sparse_attn.methods import METHODS  # noqa: E402

BLOCK = 16


def tiny_model(**changes) -> transformers.PreTrainedModel:
    """A two-layer Llama with random weights and grouped-query attention (4 heads on 2)."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    config = transformers.LlamaConfig(**(settings | changes))
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # sharper attention than the initialiser's, so that a wrong mask shows
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 20
            layer.self_attn.k_proj.weight *= 20
    return model


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(1))


class Recorder:
    """Attention through a full layout or a window, noting each call's shapes."""

    def __init__(self, left: int | None = None) -> None:
        self.left = left
        self.calls: list[tuple[int, int, int, bool]] = []

    def __call__(self, q, k, v, *, layer, is_causal, scale):
        L, S = q.shape[2], k.shape[2]
        self.calls.append((layer, L, S, is_causal))
        layout = SparseLayout.full(L, S, block_m=BLOCK, block_n=BLOCK)
        if self.left is not None:
            layout = SparseLayout.window(L, S, block_m=BLOCK, block_n=BLOCK, left=self.left)
        plan = Plan(layout)
        return attend(
            q, k, v, plan, is_causal=is_causal, scale=scale, enable_gqa=True, engine="reference"
        ).out


@torch.no_grad()
def logits(model, ids, **inputs) -> torch.Tensor:
    return model(ids, **inputs).logits


def left_padding(batch: int, length: int, pads: list[int]) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return mask


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.fixture(autouse=True)
def no_surprise_fallback():
    """A dense fallback that a test does not expect is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", sparse_hf.DenseFallbackWarning)
        yield


def test_full_layout_equals_stock() -> None:
    model, ids, record = tiny_model(), tokens(2, 70), Recorder()
    stock = logits(model, ids)
    with sa.patched(model, record):
        ours = logits(model, ids)
    assert error(ours, stock) < 1e-4
    assert record.calls == [(0, 70, 70, True), (1, 70, 70, True)]


def test_a_window_changes_the_result() -> None:
    """The equality above is not an accident of an attention function that is never called."""
    model, ids = tiny_model(), tokens(1, 70)
    stock = logits(model, ids)
    with sa.patched(model, Recorder(left=0)):
        ours = logits(model, ids)
    assert error(ours[:, :BLOCK], stock[:, :BLOCK]) < 1e-4
    assert error(ours, stock) > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_stock_on_real_tokens(side: str) -> None:
    model, ids, record = tiny_model(), tokens(3, 50), Recorder()
    mask = left_padding(3, 50, [0, 7, 33])
    mask = mask if side == "left" else mask.flip(1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    stock = logits(model, ids, attention_mask=mask, position_ids=positions)
    with sa.patched(model, record):
        ours = logits(model, ids, attention_mask=mask, position_ids=positions)
    real = mask.bool()
    assert error(ours[real], stock[real]) < 1e-4
    assert [call[1] for call in record.calls[:3]] == [50, 43, 17], "each sequence runs at its own length"


def test_padding_does_not_move_a_sparse_pattern() -> None:
    """A padded sequence gives what the same sequence gives alone, blocks and all."""
    model, ids = tiny_model(), tokens(1, 60)
    padded = torch.cat([torch.zeros(1, 11, dtype=torch.long), ids], 1)
    mask = left_padding(1, 71, [11])
    with sa.patched(model, Recorder(left=0)):
        alone = logits(model, ids)
        ours = logits(model, padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    assert error(ours[:, 11:], alone) < 1e-4


def test_an_all_ones_mask_is_no_mask() -> None:
    model, ids, record = tiny_model(), tokens(2, 40), Recorder()
    with sa.patched(model, record):
        logits(model, ids, attention_mask=torch.ones(2, 40, dtype=torch.long))
    assert record.calls[0] == (0, 40, 40, True)


@pytest.mark.parametrize("pads", [[0, 0], [0, 9]], ids=["no-padding", "left-padding"])
def test_generation_equals_stock(pads: list[int]) -> None:
    model, ids, record = tiny_model(), tokens(2, 30), Recorder()
    mask = left_padding(2, 30, pads)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    stock = model.generate(ids, **options)
    with sa.patched(model, record):
        ours = model.generate(ids, **options)
    assert torch.equal(ours, stock)
    assert all(call[1] > 1 for call in record.calls), "decode steps are dense by default"


def test_sparse_decode_follows_the_method() -> None:
    model, ids, record = tiny_model(), tokens(1, 40), Recorder()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(ids, **options)
    with sa.patched(model, record, decode="sparse"):
        ours = model.generate(ids, **options)
    assert torch.equal(ours, stock)
    assert (0, 1, 42, True) in record.calls


def test_chunked_prefill_equals_stock() -> None:
    """Queries are the last L of S positions, also where the first chunk was padded."""
    model, ids, record = tiny_model(), tokens(2, 48), Recorder()
    mask = left_padding(2, 48, [0, 5])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def in_two_chunks() -> torch.Tensor:
        cache = transformers.DynamicCache()
        parts = []
        for part in (slice(0, 32), slice(32, 48)):
            seen = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            parts.append(logits(model, ids[:, part], past_key_values=cache, use_cache=True, **seen))
        return torch.cat(parts, 1)

    stock = in_two_chunks()
    with sa.patched(model, record):
        ours = in_two_chunks()
    assert error(ours[mask.bool()], stock[mask.bool()]) < 1e-4
    assert (0, 16, 48, True) in record.calls and (0, 16, 43, True) in record.calls


OTHER_MASKS = {
    "packed": {"position_ids": torch.tensor([[*range(20), *range(20)]]), "use_cache": False},
    "holes": {"attention_mask": (torch.arange(40) % 7 != 3).long()[None]},
    "4d": {"attention_mask": torch.ones(1, 1, 40, 40, dtype=torch.bool).tril().triu(-5)},
}


@pytest.mark.parametrize("inputs", OTHER_MASKS.values(), ids=OTHER_MASKS)
def test_other_masks_are_honoured_loudly(inputs: dict) -> None:
    model, ids, record = tiny_model(), tokens(1, 40), Recorder(left=0)
    stock = logits(model, ids, **inputs)
    with sa.patched(model, record), pytest.warns(sparse_hf.DenseFallbackWarning):
        ours = logits(model, ids, **inputs)
    mask = inputs.get("attention_mask")
    real = mask[0].bool() if mask is not None and mask.dim() == 2 else slice(None)
    assert error(ours[0, real], stock[0, real]) < 1e-4
    assert not record.calls


def test_on_mask_error_refuses() -> None:
    model, ids = tiny_model(), tokens(1, 40)
    with (
        sa.patched(model, Recorder(), on_mask="error"),
        pytest.raises(ValueError, match="packed sequences"),
    ):
        logits(model, ids, **OTHER_MASKS["packed"])


@pytest.mark.parametrize("pads", [[0, 0], [0, 9]], ids=["no-padding", "left-padding"])
def test_static_cache_equals_stock(pads: list[int]) -> None:
    """The first prefill into a static cache is cut to the keys that are there."""
    model, ids, record = tiny_model(), tokens(2, 24), Recorder()
    mask = left_padding(2, 24, pads)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    stock = model.generate(ids, **options)
    with sa.patched(model, record):
        ours = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(ours, stock)
    assert record.calls[0] == (0, 24, 24, True)
    assert [call[1] for call in record.calls] == ([24, 15, 24, 15] if pads[1] else [24, 24])


def test_later_calls_on_a_static_cache_are_dense_and_loud() -> None:
    model, ids, record = tiny_model(), tokens(1, 24), Recorder(left=0)

    def second_half() -> torch.Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        logits(model, ids[:, :12], past_key_values=cache)
        return logits(model, ids[:, 12:], past_key_values=cache)

    stock = second_half()
    with sa.patched(model, record, layers={1: "dense"}), pytest.warns(sparse_hf.DenseFallbackWarning):
        ours = second_half()
    assert error(ours, stock) < 1e-4
    assert record.calls == [(0, 12, 12, True)]


def test_bidirectional_equals_stock() -> None:
    model, ids, record = tiny_model(is_causal=False), tokens(2, 40), Recorder()
    stock = logits(model, ids)
    with sa.patched(model, record):
        ours = logits(model, ids)
    assert error(ours, stock) < 1e-4
    assert record.calls[0] == (0, 40, 40, False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_bidirectional_padding_is_cut(side: str) -> None:
    model, ids, record = tiny_model(is_causal=False), tokens(2, 40), Recorder()
    mask = left_padding(2, 40, [0, 6])
    mask = mask if side == "left" else mask.flip(1)
    stock = logits(model, ids, attention_mask=mask)
    with sa.patched(model, record):
        ours = logits(model, ids, attention_mask=mask)
    assert error(ours[mask.bool()], stock[mask.bool()]) < 1e-4
    assert record.calls[:2] == [(0, 40, 40, False), (0, 34, 34, False)]


def test_bidirectional_padding_with_holes_falls_back_loudly() -> None:
    model, ids = tiny_model(is_causal=False), tokens(1, 40)
    mask = (torch.arange(40) % 7 != 3).long()[None]
    stock = logits(model, ids, attention_mask=mask)
    with sa.patched(model, Recorder(left=0)), pytest.warns(sparse_hf.DenseFallbackWarning):
        ours = logits(model, ids, attention_mask=mask)
    assert error(ours[mask.bool()], stock[mask.bool()]) < 1e-4


@pytest.mark.parametrize("window", [16, 64], ids=["window-shorter", "window-longer"])
def test_sliding_window_model(window: int) -> None:
    """A window longer than the input is plain causal attention; a shorter one is not ours."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=window,
    )  # fmt: skip
    model, ids, record = transformers.MistralForCausalLM(config).eval(), tokens(1, 40), Recorder()
    stock = logits(model, ids)
    with sa.patched(model, record):
        ours = logits(model, ids)  # quiet: `explain` names the window
    assert error(ours, stock) < 1e-4
    assert bool(record.calls) == (window > 40)


def test_gradients_flow() -> None:
    model, ids = tiny_model(), tokens(1, 40)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    stock = gradient()
    with sa.patched(model, Recorder()):
        ours = gradient()
    assert error(ours, stock) < 1e-5 + 1e-4 * stock.abs().max().item()


def test_unpatch_restores() -> None:
    model, ids, record = tiny_model(), tokens(1, 40), Recorder(left=0)
    before = model.config._attn_implementation
    stock = logits(model, ids)
    with pytest.raises(RuntimeError, match="inside"), sa.patched(model, record):
        assert model.config._attn_implementation == sparse_hf.NAME
        raise RuntimeError("inside")
    assert model.config._attn_implementation == before
    assert torch.equal(logits(model, ids), stock)
    assert not record.calls


def test_two_models_keep_apart() -> None:
    a, b, ids = tiny_model(), tiny_model(), tokens(1, 20)
    first, second = Recorder(), Recorder()
    sa.patch(a, first)
    sa.patch(b, second)
    logits(a, ids)
    sa.unpatch(a)
    logits(a, ids)
    logits(b, ids)
    assert (len(first.calls), len(second.calls)) == (2, 2)


@pytest.mark.skipif("blasst" not in METHODS, reason="BLASST is not registered")
def test_a_method_by_name() -> None:
    """BLASST at lambda = 0 skips nothing; at 1 it skips, and both see the model's own layers."""
    model, ids = tiny_model(), tokens(1, 200)
    stock = logits(model, ids)
    blocks = {"block_m": 32, "block_n": 32, "engine": "reference"}
    with sa.patched(model, "blasst", threshold=0.0, **blocks):
        assert error(logits(model, ids), stock) < 1e-4
    with sa.patched(model, "blasst", threshold=1.0, **blocks):
        assert error(logits(model, ids), stock) > 1e-3


BAD = {
    "unknown method": (("nonsense",), {}, "unknown method"),
    "unknown option": (("s2",), {"nonsense": 1}, "nonsense"),
    "options of a function": ((Recorder(),), {"threshold": 0.1}, "belong to"),
    "bad decode": ((Recorder(),), {"decode": "maybe"}, "decode is 'maybe'"),
    "bad on_mask": ((Recorder(),), {"on_mask": "hide"}, "on_mask is 'hide'"),
    "wrong config": (("s2", object()), {}, "config is object"),
}


@pytest.mark.parametrize(("args", "options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(args, options, message) -> None:
    model = tiny_model()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        sa.patch(model, *args, **options)
    assert model.config._attn_implementation == before


def test_not_a_transformers_model() -> None:
    with pytest.raises(ValueError, match="PreTrainedModel"):
        sa.patch(torch.nn.Linear(2, 2), Recorder())


def test_dropout_is_refused() -> None:
    model = tiny_model(attention_dropout=0.5).train()
    with sa.patched(model, Recorder()), pytest.raises(ValueError, match="dropout is 0"):
        logits(model, tokens(1, 20))
