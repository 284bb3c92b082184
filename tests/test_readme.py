"""The programs of the README and of the recipes run as they stand."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def programs(page):
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


CASES = {f"README {number}": text for number, text in enumerate(programs("README.md"))}
CASES["recipes"] = "\n".join(programs("docs/guide.md"))
CASES["hypergradients"] = "\n".join(programs("docs/hypergradients.md"))


@pytest.mark.parametrize("name", list(CASES))
def test_program_runs(name):
    done = subprocess.run([sys.executable, "-c", CASES[name]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_example_on_ones_own_model_is_about_forty_lines():
    assert len(CASES) == 4
    assert len([line for line in CASES["README 0"].splitlines() if line.strip()]) <= 42
