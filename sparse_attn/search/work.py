"""The folder in which a search keeps what it has measured, so that it can be killed at any moment.

Every file appears whole or not at all, and each measured thing has one file of its own: what is there is
never measured again, what is not is measured anew, and nothing can count twice.

    manifest.json               what the measurements depend on; a search with other settings is refused
    measures/sample0-layer00.json       scores of every candidate
    measures/sample0-step003-layer00.json       the same at a denoising step
    maps/layer00.npz            small pictures of attention and patterns, for the report
    maps/phase1-layer00.npz     the same of a denoising phase
    gradients/...               of samples that are being measured; deleted as layers are done
    losses.json                 of recipes that were tried on the model
    summary.json                what the report shows beside the recipe
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attn.recipe_files import write_whole
from sparse_attn.search.measure import Scores
from sparse_attn.search.phases import Moment


class WorkFolder:
    """Files of one search.

    Args:
        path: the folder; made if it is not there.
        manifest: what the measurements depend on, as JSON.
        resume: go on with what is there. False: a folder with measurements is refused.

    Raises:
        ValueError: the folder belongs to a search with other settings, or `resume` was not given.
    """

    def __init__(self, path: str | Path, manifest: dict[str, Any], *, resume: bool) -> None:
        self.path = Path(path)
        known = self.path / "manifest.json"
        if known.is_file():
            before = json.loads(known.read_text())
            if not resume:
                raise ValueError(
                    f"search: {self.path} holds an earlier search; pass --resume to go on, or delete it."
                )
            differ = sorted(k for k in {*before, *manifest} if before.get(k) != manifest.get(k))
            if differ:
                raise ValueError(
                    f"search: {self.path} was made with other settings ({', '.join(differ)}); repeat them, "
                    "or delete it to start anew."
                )
        for name in ("measures", "maps", "gradients"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        write_whole(known, (json.dumps(manifest, indent=1) + "\n").encode())

    # -- measurements -----------------------------------------------------------------------------

    def _measure(self, moment: Moment, layer: int) -> Path:
        return self.path / "measures" / f"{moment.name}-layer{layer:02d}.json"

    def has_measure(self, moment: Moment, layer: int) -> bool:
        return self._measure(moment, layer).is_file()

    def write_measure(self, moment: Moment, layer: int, measure: dict[str, Any]) -> None:
        """`measure`: {"head_dim", "dtype", "length", "scores": [one a candidate]}"""
        write_whole(self._measure(moment, layer), json.dumps(measure).encode())

    def read_measure(self, moment: Moment, layer: int) -> dict[str, Any]:
        return json.loads(self._measure(moment, layer).read_bytes())

    def layers(self, moments: Sequence[Moment], num_layers: int) -> dict[int, list[Moment]]:
        """layer -> those of the moments at which it was measured; without layers that have none."""
        found = {n: [x for x in moments if self.has_measure(x, n)] for n in range(num_layers)}
        return {layer: moments for layer, moments in found.items() if moments}

    # -- gradients --------------------------------------------------------------------------------

    def _gradient(self, sample: int, layer: int) -> Path:
        return self.path / "gradients" / f"sample{sample}-layer{layer:02d}.safetensors"

    def write_gradient(self, sample: int, layer: int, gradient: Tensor) -> None:
        """Kept in bfloat16: the sums that they enter need its range, not more digits."""
        from safetensors.torch import save

        data = save({"gradient": gradient.detach().to("cpu", torch.bfloat16).contiguous()})
        write_whole(self._gradient(sample, layer), data)

    def read_gradient(self, sample: int, layer: int) -> Tensor | None:
        from safetensors.torch import load

        path = self._gradient(sample, layer)
        return load(path.read_bytes())["gradient"] if path.is_file() else None

    def drop_gradient(self, sample: int, layer: int) -> None:
        self._gradient(sample, layer).unlink(missing_ok=True)

    # -- the rest ---------------------------------------------------------------------------------

    def read_losses(self) -> dict[str, float]:
        path = self.path / "losses.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def write_loss(self, key: str, loss: float) -> None:
        losses = self.read_losses() | {key: loss}
        write_whole(self.path / "losses.json", (json.dumps(losses, indent=1) + "\n").encode())

    def map_path(self, layer: int, phase: int | None = None) -> Path:
        """`phase`: None where the model has no steps."""
        return map_path(self.path, layer, phase)

    def read_select_us(self) -> dict[str, tuple[float, float]]:
        """`cost_measure.select_us` of the selections that the cost table lacks."""
        path = self.path / "select_us.json"
        return {k: tuple(x) for k, x in json.loads(path.read_text()).items()} if path.is_file() else {}

    def write_select_us(self, times: dict[str, tuple[float, float]]) -> None:
        write_whole(self.path / "select_us.json", (json.dumps(times, indent=1) + "\n").encode())

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_whole(self.path / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())

    def clean(self) -> None:
        """Drop what only an unfinished search needs."""
        shutil.rmtree(self.path / "gradients", ignore_errors=True)


def map_path(folder: Path, layer: int, phase: int | None) -> Path:
    return folder / "maps" / f"{'' if phase is None else f'phase{phase}-'}layer{layer:02d}.npz"


def as_lists(scores: Scores) -> Scores:
    """Scores as JSON gives them back, so that a resumed search computes with the same numbers."""
    return json.loads(json.dumps(scores))
