"""`sparse-attn`: the command line. Each command is a function of its own module."""

from __future__ import annotations

import importlib

import typer

# command -> "module:function"; a typer-style function with annotated options.
COMMANDS = {
    "info": "sparse_attn.info:info_command",
    "build": "sparse_attn.build:build_command",
    "demo": "sparse_attn.demo.command:demo_command",
    "bench": "sparse_attn.bench.run:bench_command",
    "recipe": "sparse_attn.recipe_command:recipe_command",
    "search": "sparse_attn.search.commands:search_command",
    "report": "sparse_attn.search.report:report_command",
    "frontier": "sparse_attn.search.frontier_command:frontier_command",
    "calibrate": "sparse_attn.search.calibrate_command:calibrate_command",
}


def make_app() -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, add_completion=False, help="Sparse attention for PyTorch.")
    for name, target in COMMANDS.items():
        module, function = target.split(":")
        app.command(name)(getattr(importlib.import_module(module), function))
    return app


def main() -> None:
    make_app()()
