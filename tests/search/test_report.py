"""The report of a recipe: what the page holds, with and without the search's folder, and in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from test_search_run import run_search  # noqa: E402

from sparse_attn.recipe import Recipe  # noqa: E402
from sparse_attn.search.report import draw_png, layer_errors, layer_speedups, load  # noqa: E402
from sparse_attn.search.report_page import page  # noqa: E402

CHROMIUM = next((x for x in ("chromium", "chromium-browser", "google-chrome") if shutil.which(x)), None)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """(recipe's path, what the search found)"""
    folder = tmp_path_factory.mktemp("report")
    _, found = run_search(folder / "r.search")
    found.recipe.save(folder / "r.json")
    return folder / "r.json", found


def test_the_page_holds_every_head_and_nothing_from_outside(searched):
    path, found = searched
    report = load(path)
    text = page(report)
    assert text.count("<button") == 12
    assert not re.search(r'(src|href)="?(http|//|\.)', text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))
    for n, layer in enumerate(data["layers"]):
        own = found.choice[4 * n : 4 * n + 4]
        labels = [data["settings"][h["setting"]][0] for h in layer["heads"]]
        assert labels == [found.candidates[c].label for c in own]
        errors = [h["error"] for h in layer["heads"]]
        np.testing.assert_allclose(
            errors, found.measured.relative[np.arange(4 * n, 4 * n + 4), own], rtol=1e-5
        )
    assert set(data["truth"]) == {"0", "1", "2"}


def test_numbers_of_layers(searched):
    path, found = searched
    report = load(path)
    rows = np.arange(12)
    errors = found.measured.relative[rows, found.choice].reshape(3, 4)
    np.testing.assert_allclose(layer_errors(report), np.sqrt((errors**2).mean(1)), rtol=1e-5)
    times = found.measured.time[rows, found.choice].reshape(3, 4).sum(1)
    np.testing.assert_allclose(
        layer_speedups(report), found.measured.time[:, 0].reshape(3, 4).sum(1) / times, rtol=1e-5
    )


def test_a_recipe_alone_makes_a_page(searched, tmp_path):
    path, _ = searched
    alone = tmp_path / "alone.json"
    Recipe.load(path).save(alone)
    report = load(alone)
    assert not report.summary and not report.maps
    assert page(report).count("<button") == 12
    with pytest.raises(ValueError, match="belongs to another recipe"):
        other = Recipe.load(path)
        load(_changed(other, tmp_path / "other.json"), path.with_name("r.search"))


def _changed(recipe: Recipe, path):
    from dataclasses import replace

    from sparse_attn.recipe import DenseConfig, HeadGroup, LayerPlan
    from sparse_attn.recipe_check import methods

    used = {g.method for g in recipe.layers[0].groups}
    method = next(name for name in ("dense", "s2", "anchor") if name not in used)
    config = DenseConfig() if method == "dense" else methods()[method].config()
    layers = (LayerPlan(0, (HeadGroup((0, 1, 2, 3), method, config),)), *recipe.layers[1:])
    replace(recipe, layers=layers).save(path)
    return path


def test_the_picture_is_drawn(searched, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    draw_png(load(searched[0]), tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_runs_the_page_without_sideways_scrolling(searched, tmp_path, width):
    """The script fills the detail of the first head; the body is not wider than the window."""
    path, found = searched
    wide = "document.documentElement.scrollWidth - innerWidth"
    probe = f"<script>document.body.dataset.wide = {wide}</script></body>"
    (tmp_path / "r.html").write_text(page(load(path)).replace("</body>", probe))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'r.html'}",
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    label = found.candidates[found.choice[0]].label
    assert f'<h2 id="what">Layer 0, head 0: {label}</h2>' in dom
    assert int(re.search(r'data-wide="(-?\d+)"', dom).group(1)) <= 0
    assert 'aria-pressed="true"' in dom
