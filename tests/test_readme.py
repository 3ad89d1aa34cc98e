"""Every Python example of the README runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_readme_example_runs(number: int) -> None:
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {"__name__": "readme"})


def test_readme_has_examples() -> None:
    assert len(EXAMPLES) >= 3
