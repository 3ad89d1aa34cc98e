"""Package layout and the compiled part.

`kernels/`, `bench/` and `csrc/` stand at the top level; the first two are imported as
`sparse_attn.kernels` and `sparse_attn.bench`, the third travels as data so that `sparse-attn build` works
from an installed package.

The C++ engine is compiled here where torch is importable at build time (`pip install
--no-build-isolation .`). Under build isolation it is not, and the package installs as pure Python;
`sparse-attn build` compiles it later. See sparse_attn/build.py for the environment variables.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # what `python -m venv` of Python 3.11 brings, seen under --no-build-isolation
    sys.exit('sparse_attn: setuptools is too old; first run: pip install "setuptools>=77"')

HERE = Path(__file__).resolve().parent


def load_builder():
    """sparse_attn/build.py on its own: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("sparse_attn_build", HERE / "sparse_attn/build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


builder = load_builder()


def planned_kinds() -> list[str]:
    """What to compile now: nothing where torch is not importable, unless a kind was asked for by name."""
    asked = os.environ.get("SPARSE_ATTN_BUILD") or "auto"
    if asked == "auto" and importlib.util.find_spec("torch") is None:
        print(
            "sparse_attn: torch is not importable here; installing as pure Python. Run `sparse-attn build`."
        )
        return []
    return builder.wanted_kinds(asked)


KINDS = planned_kinds()


class BuildWithLibraries(build_py):
    """Copies the Python files, then compiles the libraries beside them."""

    def run(self) -> None:
        super().run()
        folder = (HERE if self.editable_mode else Path(self.build_lib)) / "sparse_attn"
        for kind in KINDS:
            try:
                path = builder.build_into_package(kind, folder)
                print(f"sparse_attn: built {path}")
            except builder.BuildError as error:
                if os.environ.get("SPARSE_ATTN_BUILD") == kind:
                    raise
                print(f"sparse_attn: the {kind} library was not built: {error}", file=sys.stderr)


class LibraryWheel(bdist_wheel):
    """A wheel with a library fits one platform but, thanks to the stable ABI, every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class LibraryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return bool(KINDS)


packages = find_packages(include=["sparse_attn", "sparse_attn.*"])
top_level = {f"sparse_attn.{name}": name for name in ("kernels", "bench", "csrc")}
setup(
    packages=[*packages, *top_level],
    package_dir=top_level,
    package_data={
        "sparse_attn": ["recipe_schema.json"],
        "sparse_attn.csrc": ["**/*"],
        "sparse_attn.search": ["cost_tables/*.json", "report_page.*"],
    },
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": LibraryWheel},
    distclass=LibraryDistribution,
)
