"""`S2Cache`: decoding equals a full cache under the same pattern, and the memory really goes."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import sparse_attn as sa  # noqa: E402

BLOCK = 8
PATTERNS = {
    "plain": {},
    "sinks": {"sink_blocks": 1},
    "dense-head": {"num_dense_heads": 1},
    "dkernel-shift": {"head_shift": "dkernel", "shift_offset": 1},
    "per-query-head": {"per_query_head": True, "head_shift": 1, "vert_stride": 8},
    "all-dense": {"vert_stride": 1},
}


def tiny_model(**changes) -> transformers.PreTrainedModel:
    """Three layers, 8 query heads on 4 key heads, attention sharp enough that a lost key shows."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes))).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 20
            layer.self_attn.k_proj.weight *= 20
    return model


def patch(model, layers=None, decode="sparse", **pattern) -> None:
    pattern = {"block_size": BLOCK, "local_blocks": 2, "vert_stride": 4} | pattern
    sa.patch(model, "s2", **pattern, layers=layers, decode=decode, engine="reference")


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def fed(model, ids, cache, parts: list[int]) -> torch.Tensor:
    """Logits of the last token of each part, fed one after another over one cache."""
    outs, start = [], 0
    for end in [*parts, ids.shape[1]]:
        outs.append(model(ids[:, start:end], past_key_values=cache, use_cache=True).logits[:, -1])
        start = end
    return torch.stack(outs, 1)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.filterwarnings("ignore:s2_attention. no head reads")
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_decoding_equals_a_full_cache(pattern: dict) -> None:
    """Token by token from a ragged prompt, over several block edges: every logit, not only the winner."""
    model, ids = tiny_model(), tokens(2, 90)
    patch(model, **pattern)
    parts = list(range(69, 90))
    expected = fed(model, ids, transformers.DynamicCache(), parts)
    cache = sa.S2Cache(model)
    ours = fed(model, ids, cache, parts)
    assert error(ours, expected) < 1e-4
    assert (cache.report().fraction < 0.95) == ("vert_stride" not in pattern or pattern["vert_stride"] > 1)


def test_the_pattern_matters_here() -> None:
    """The equality above is not one of dense attention: a full dense decode differs."""
    model, ids = tiny_model(), tokens(1, 90)
    patch(model)
    ours = fed(model, ids, sa.S2Cache(model), [45, *range(46, 90)])
    sa.unpatch(model)
    assert error(ours, fed(model, ids, transformers.DynamicCache(), [45, *range(46, 90)])) > 1e-2


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beam-search"])
def test_generate_equals_a_full_cache(beams: int) -> None:
    model, ids = tiny_model(), tokens(2, 50)
    patch(model)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": beams}
    options |= {"pad_token_id": 0}
    expected = model.generate(ids, **options)
    cache = sa.S2Cache(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    assert cache.get_seq_length() == 50 + 12 - 1


def test_a_prompt_in_aligned_chunks_equals_a_full_cache() -> None:
    model, ids = tiny_model(), tokens(2, 80)
    patch(model)
    parts = [24, 40, 64]  # multiples of the block: there the layout is the definition to the token
    expected = fed(model, ids, transformers.DynamicCache(), parts)
    assert error(fed(model, ids, sa.S2Cache(model), parts), expected) < 1e-4


def test_mixed_layers_drop_only_where_s2_runs() -> None:
    model, ids = tiny_model(), tokens(1, 90)
    patch(model, layers={1: "dense"})
    parts = list(range(60, 90))
    expected = fed(model, ids, transformers.DynamicCache(), parts)
    cache = sa.S2Cache(model)
    assert error(fed(model, ids, cache, parts), expected) < 1e-4
    report = cache.report()
    assert report.dropping == (True, False, True)
    assert report.held_bytes[1] == report.full_bytes[1] > report.held_bytes[0]
    assert [line.rsplit(", ")[-1] for line in str(report).splitlines()[1:]] == ["drops", "keeps all", "drops"]


def kept_by_definition(length: int, shift: int, local: int = 2, stride: int = 4) -> list[int]:
    """Positions that the query at position `length` or a later one reads, from the formula, one by one."""
    kept = []
    for position in range(length):
        block = position // BLOCK
        later = range(length // BLOCK, length // BLOCK + 3 * stride)
        if any(c - block < local or (block + shift) % stride == 0 for c in later):
            kept.append(position)
    return kept


def test_exactly_the_readable_keys_are_kept_and_the_rest_is_freed() -> None:
    """Positions against the definition, bytes against the tensors alive in the process."""
    model, length = tiny_model(num_hidden_layers=1), 320
    patch(model)
    with torch.no_grad():  # so that the layout, which all calls share, is there already
        model.model(tokens(1, length), use_cache=False)
    gc.collect()
    before = alive()
    cache = sa.S2Cache(model)
    with torch.no_grad():
        model.model(tokens(1, length), past_key_values=cache, use_cache=True)
    layer = cache.layers[0]
    expected = [kept_by_definition(length, shift) for shift in range(4)]
    got = {c.kv_heads.item(): c.positions.tolist() for c in layer.classes}
    assert [got[head] for head in range(4)] == expected
    gc.collect()
    grown = sum(size for storage, size in alive().items() if storage not in before and size >= 64)
    report = cache.report()
    row = 2 * 8 * 4  # keys and values of one head, head size 8, fp32
    positions = sum(map(len, expected))
    assert report.held_bytes == (positions * (row + 8),)
    assert report.full_bytes == (length * 4 * row,)
    slack = report.full_bytes[0] // 8  # rotary tables and the like
    assert report.held_bytes[0] <= grown <= report.held_bytes[0] + slack, "something else holds on to keys"
    assert report.fraction < 0.4


def alive() -> dict[int, int]:
    """Bytes of every tensor storage that Python still reaches; a compiler's fake tensors have none."""
    found = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    found = [x for x in found if not torch._is_functional_tensor(x)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}


def test_reset_starts_anew() -> None:
    model, ids = tiny_model(), tokens(1, 60)
    patch(model)
    cache = sa.S2Cache(model)
    first = fed(model, ids, cache, [50])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.report().fraction == 1.0
    assert torch.equal(fed(model, ids, cache, [50]), first)


# -- refusals -----------------------------------------------------------------------------------------


def test_refused_where_nothing_could_be_freed() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="patch the model first"):
        sa.S2Cache(model)
    sa.patch(model, "dense")
    with pytest.raises(ValueError, match="none could be freed"):
        sa.S2Cache(model)
    sa.unpatch(model)
    patch(model, decode="dense")
    with pytest.raises(ValueError, match='decode="sparse"'):
        sa.S2Cache(model)


def test_refused_once_the_model_changes() -> None:
    """A cache with holes must never meet an attention that reads all keys."""
    model, ids = tiny_model(), tokens(1, 40)
    patch(model)
    cache = sa.S2Cache(model)
    fed(model, ids, cache, [])
    sa.unpatch(model)
    with pytest.raises(ValueError, match="unpatched or patched anew"):
        fed(model, ids, cache, [])
    patch(model, local_blocks=3)
    with pytest.raises(ValueError, match="unpatched or patched anew"):
        fed(model, ids, cache, [])


def test_padding_and_cropping_are_refused() -> None:
    model, ids = tiny_model(), tokens(2, 40)
    patch(model)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad(), pytest.raises(ValueError, match="without padding"):
        model(ids, attention_mask=mask, past_key_values=sa.S2Cache(model), use_cache=True)
    cache = sa.S2Cache(model)
    fed(model, ids, cache, [])
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-3)


def test_keys_changed_on_the_way_are_refused() -> None:
    model, ids = tiny_model(), tokens(1, 40)
    patch(model)
    cache = sa.S2Cache(model)
    layer, update = cache.layers[0], cache.layers[0].update
    layer.update = lambda *args, **kwargs: tuple(x * 1 for x in update(*args, **kwargs))
    with pytest.raises(ValueError, match="between cache and attention"):
        fed(model, ids, cache, [])


def test_without_transformers_the_remedy_is_named() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import sparse_attn as sa\n"
        "try: sa.S2Cache\n"
        "except ImportError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pip install 'transformers>=5'" in done.stdout
