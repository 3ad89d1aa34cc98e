"""What importing needs, costs and touches: optional parts may be missing, and nothing imports upward."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_attn

ROOT = Path(sparse_attn.__file__).parent
KERNELS = Path(sparse_attn.__file__).parents[1] / "kernels"

# Hide some packages from the import system, as on a machine where they are not installed.
HIDE = """
import sys
class Others:
    def __init__(self, finders):
        self.finders = finders
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)
sys.meta_path[:] = [Others(list(sys.meta_path))]
"""
ATTEND = """
import torch, sparse_attn as sa
q = torch.randn(1, 2, 40, 16)
layout = sa.SparseLayout.full(40, 40, block_m=16, block_n=16)
out = sa.sparse_attention(q, q, q, layout, is_causal=True)
expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
assert (out - expected).abs().max() < 1e-5
"""


def run(code: str, hidden: tuple[str, ...] = (), **environment: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    code = HIDE.format(hidden=set(hidden)) + code if hidden else code
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SPARSE_ATTN_ENGINE")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env | environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- optional parts -------------------------------------------------------------------------------


def test_works_without_any_optional_package():
    """No Triton, transformers, plotting or benchmark package: everything else runs, and says why not."""
    hidden = ("triton", "transformers", "diffusers", "matplotlib", "gguf", "safetensors", "scipy", "pytest")
    code = ATTEND + (
        "from sparse_attn.engines import ENGINES\n"
        "print('; '.join(ENGINES['triton'].why_off()))\n"
        "try: sa.sparse_attention(q, q, q, layout, engine='triton')\n"
        "except NotImplementedError as e: print(e)\n"
    )
    printed = run(code, hidden)
    assert "engine 'triton' cannot run this call" in printed
    assert printed.lower().count("triton is not installed") == 2, printed


WITHOUT_LIBRARY = """
import pathlib
from sparse_attn import library
library.packaged_path = lambda kind: pathlib.Path({path!r})
from sparse_attn.engines import ENGINES
print("; ".join(ENGINES["cpu"].why_off()))
try: sa.sparse_attention(q, q, q, layout, engine="cpu")
except NotImplementedError as e: print(e)
"""


def test_works_without_the_compiled_library(tmp_path):
    code = WITHOUT_LIBRARY.format(path=str(tmp_path / "absent.so"))
    printed = run("import torch\n" + code_before_use(code), SPARSE_ATTN_CACHE=str(tmp_path))
    assert printed.count("run `sparse-attn build`") == 2 and "engine 'cpu' cannot run" in printed


def test_works_with_a_damaged_compiled_library(tmp_path):
    """The loader's own words reach the user, with the remedy."""
    path = tmp_path / "_cpu.so"
    path.write_bytes(b"\x7fELF no library at all")
    code = "from sparse_attn import build\nbuild.source_hash = lambda kind: ''\n"
    code += WITHOUT_LIBRARY.format(path=str(path))
    printed = run("import torch\n" + code_before_use(code), SPARSE_ATTN_CACHE=str(tmp_path))
    assert "does not load" in printed and "sparse-attn build" in printed


def code_before_use(code: str) -> str:
    """Hide the library before the first call, then attend twice: by default and by name."""
    patch, _, rest = code.partition("from sparse_attn.engines")
    return patch + ATTEND + "from sparse_attn.engines" + rest


LAZY = ("triton", "transformers", "diffusers", "matplotlib", "scipy", "typer", "rich", "numba")


def test_import_is_light():
    """Optional and heavy packages are imported when used, and beyond torch the import takes little."""
    code = (
        "import sys, time, torch\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import sparse_attn\n"
        "took = time.process_time() - start\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        f"print(took, *sorted(new & set({LAZY!r})))\n"
    )
    took, *heavy = run(code).split()
    assert heavy == [], f"`import sparse_attn` imports {heavy}"
    assert float(took) < 3, f"`import sparse_attn` takes {took} s of processor time beyond torch"


def test_import_leaves_torch_alone():
    """No global state moves: threads, default dtype, gradient mode, random state, deterministic mode."""
    code = (
        "import torch\n"
        "def state():\n"
        "    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "            torch.initial_seed(), torch.get_rng_state().sum().item(),\n"
        "            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())\n"
        "torch.manual_seed(3)\n"
        "before = state()\n"
        "import sparse_attn\n"
        "assert state() == before, (before, state())\n"
    )
    run(code)


# -- the direction of imports ---------------------------------------------------------------------

# Floors from the ground up. A module may import its own floor and those below.
FLOORS = (
    (
        "version",
        "index_list",
        "layout",
        "layout_bounds",
        "layout_stats",
        "layout_convert",
        "plan",
        "schedule",
    ),
    ("build", "library", "kernel_resources", "kernels", "engines"),
    ("checks", "ops", "attend"),
    ("testing", "testing_inputs", "testing_data", "scoring", "reuse"),
    ("methods",),
    ("functional", "varlen", "varlen_batch", "varlen_checks", "varlen_join", "varlen_pages"),
    ("recipe_check", "recipe_files", "recipe_model", "recipe_paged", "recipe_plan", "recipe_run"),
    ("recipe", "recipe_command", "search", "integrations", "info", "bench", "demo"),
    ("cli",),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def modules() -> list[Path]:
    return sorted([*ROOT.rglob("*.py"), *KERNELS.glob("*.py")])


def name_of(path: Path) -> str:
    """ "methods.s2" for sparse_attn/methods/s2.py; kernels/ is imported as sparse_attn.kernels."""
    if path.is_relative_to(ROOT):
        parts = path.relative_to(ROOT).with_suffix("").parts
    else:
        parts = ("kernels", *path.relative_to(KERNELS).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


def imports_of(source: str) -> list[tuple[int, str]]:
    """(line, module below sparse_attn) of every import, also inside functions; none of those that only
    type checkers see."""
    tree = ast.parse(source)
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from sparse_attn import layout` names a module, `from sparse_attn import attend` both.
            whole = [f"{node.module}.{a.name}" for a in node.names] if node.module == "sparse_attn" else []
            found += [(node.lineno, name) for name in whole or [node.module]]
    prefix = "sparse_attn."
    return [(line, name.removeprefix(prefix)) for line, name in found if name.startswith(prefix)]


def upward(module: str, source: str) -> list[str]:
    """A sentence for each import of a higher floor."""
    own = FLOOR_OF[module.split(".")[0]]
    return [
        f"{module}:{line} imports {target}"
        for line, target in imports_of(source)
        if FLOOR_OF.get(target.split(".")[0], -1) > own
    ]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_nothing_imports_upward(path):
    module = name_of(path)
    if module == "":  # the package itself gathers the public names
        return
    assert module.split(".")[0] in FLOOR_OF, f"{module} has no floor yet: add it to FLOORS"
    assert upward(module, path.read_text()) == []


def test_the_check_sees_an_upward_import():
    source = "def f():\n    from sparse_attn.methods.s2 import select\n"
    assert upward("engines.cpu", source) == ["engines.cpu:2 imports methods.s2"]
    assert upward("layout", "import sparse_attn.attend\n") == ["layout:1 imports attend"]
    assert upward("layout", "from sparse_attn import attend\n") == ["layout:1 imports attend"]
    assert upward("integrations.transformers", source) == []
    hidden = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sparse_attn.attend\n"
    assert upward("layout", hidden) == []


def test_engines_never_name_a_method():
    """Selectors and engines meet in the plan alone."""
    from sparse_attn.methods import METHODS

    assert METHODS
    for path in (ROOT / "engines").glob("*.py"):
        code = ast.unparse(ast.parse(path.read_text()))
        names = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
        assert not names & set(METHODS), f"{path.name} branches on a method's name"


def test_no_stray_top_level_package():
    """`kernels` and `bench` must not shadow other projects' packages of these names."""
    code = (
        "import importlib.util, os, sys\n"
        "sys.path = [p for p in sys.path if p not in ('', os.getcwd())]\n"
        "import sparse_attn.kernels, sparse_attn.bench\n"
        "for name in ('kernels', 'bench', 'csrc'):\n"
        "    spec = importlib.util.find_spec(name)\n"
        "    print(name, spec and spec.origin)\n"
    )
    for line in run(code).splitlines():
        name, origin = line.split(" ", 1)
        assert "sparse" not in origin and str(KERNELS.parent) not in origin, f"{name} is {origin}"
