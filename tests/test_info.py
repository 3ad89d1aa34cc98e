"""`sparse-attn info`: true, complete, and at home on a bare machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from sparse_attn.engines import ENGINES, get_engine
from sparse_attn.info import (
    NEEDS,
    cell_text,
    collect,
    markdown_table,
    method_table,
    render,
    representative_call,
)
from sparse_attn.methods import METHODS

# Modules that may be missing: the command must not need them.
OPTIONAL = ("triton", "typer", "rich", "transformers", "matplotlib", "gguf")


# As if those were not installed: the finder of installed packages does not see them.
HIDE = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def hide(name, path=None, target=None):
    return None if name.split(".")[0] in {OPTIONAL!r} else find(name, path, target)
PathFinder.find_spec = staticmethod(hide)  # some call it on an instance
"""


def run_info(*arguments: str, prelude: str = "", **environment: str) -> str:
    run = f"import sys\nsys.argv = ['info', *{arguments!r}]\nfrom sparse_attn.info import main\nmain()"
    command = [sys.executable, "-c", f"{prelude}\n{run}"]
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_every_engine_and_why_it_is_off():
    text = render(collect())
    for name, engine in ENGINES.items():
        for reason in engine.why_off():
            assert f"{name}: off: " in text and reason in text
        if not engine.why_off():
            assert f"{name}: on" in text


def test_bare_machine(tmp_path):
    """No optional package can be imported and no library is built: it still says so and ends well."""
    facts = json.loads(run_info("--json", prelude=HIDE, SPARSE_ATTN_CACHE=str(tmp_path)))
    assert facts["engines"]["reference"] == []
    assert facts["engines"]["triton"], "triton is on although it cannot be imported"
    assert all(cell["forward"] for cell in (row["reference"] for row in facts["methods"].values()))


def test_json_is_what_collect_gives():
    facts = json.loads(run_info("--json", SPARSE_ATTN_ENGINE="reference", MAX_JOBS="3"))
    assert facts["environment"]["SPARSE_ATTN_ENGINE"] == "reference"
    assert facts["environment"]["MAX_JOBS"] == "3"
    assert facts["packages"]["torch"] == torch.__version__
    assert list(facts["engines"]) == list(ENGINES)


def test_unknown_variables_of_ours_are_shown():
    assert "SPARSE_ATTN_TYPO=1" in run_info(SPARSE_ATTN_TYPO="1")


def test_every_method_has_a_row():
    assert set(METHODS) <= set(NEEDS)
    assert list(method_table(["cpu"])) == list(NEEDS)


@pytest.mark.parametrize("method", list(NEEDS))
def test_table_agrees_with_what_runs(method):
    """Where the table says forward, the engine runs the very call; where it says nothing, it refuses."""
    for name, cell in method_table(["cpu"])[method].items():
        call = representative_call(NEEDS[method], "cpu", needs_grad=False)
        if cell["forward"]:
            call.q.normal_(), call.k.normal_()
            out, lse, _ = get_engine(name).forward(call)
            assert torch.isfinite(out).all() and torch.isfinite(lse).all()
        else:
            assert cell["why_not"] == list(dict.fromkeys(cell["why_not"])) != []


def test_representative_call_has_the_features():
    call = representative_call(NEEDS["anchor"], "cpu", needs_grad=True)
    call.layout.check()
    assert call.layout.columns is not None and call.needs_grad and call.is_causal
    assert representative_call(NEEDS["blasst"], "cpu", False).skip_below is not None


def test_cells():
    cell = {"forward": [], "backward": [], "why_not": ["x"]}
    assert cell_text(cell) == "-"
    assert cell_text(cell | {"forward": ["cuda"]}) == "forward (cuda)"
    assert cell_text(cell | {"forward": ["cuda"], "backward": ["cuda"]}) == "forward and backward (cuda)"
    both = {"forward": ["cpu", "cuda"], "backward": ["cuda"], "why_not": []}
    assert cell_text(both) == "forward (cpu, cuda), backward (cuda)"


def test_markdown_has_a_line_a_method():
    lines = markdown_table().splitlines()
    assert len(lines) == len(NEEDS) + 2
    assert {line.count("|") for line in lines} == {len(ENGINES) + 2}
