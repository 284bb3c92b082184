"""The programs of the README and of the recipes run as they stand."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


BLOCK = r"```python\n(.*?)```"
FILE = rf"^`(\S+\.py)`[^\n]*:\n\n{BLOCK}"  # a block with the path of a file above it


def programs(page):
    """The Python blocks of a page."""
    return re.findall(BLOCK, (ROOT / page).read_text(), flags=re.DOTALL)


CASES = {f"README {number}": text for number, text in enumerate(programs("README.md"))}
CASES["recipes"] = "\n".join(programs("docs/guide.md"))
CASES["dtg_auxl"] = "\n".join(programs("docs/dtg_auxl.md"))
CASES["learn_weights"] = "\n".join(programs("docs/learn_weights.md"))
CASES["hypergradients"] = "\n".join(programs("docs/hypergradients.md"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (not name.startswith("README"))) for name in CASES]
)
def test_program_runs(name):
    done = subprocess.run([sys.executable, "-c", CASES[name]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_example_on_ones_own_model_is_about_forty_lines():
    assert len(CASES) == 6
    assert len([line for line in CASES["README 0"].splitlines() if line.strip()]) <= 42


@pytest.fixture
def library_with_new_method(tmp_path):
    """A copy of the library and of the tests that all methods share, with what docs/new_method.md adds to them."""
    shutil.copytree(ROOT / "auxjax", tmp_path / "auxjax", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("tests/methods", "tests/helpers"):
        (tmp_path / folder).mkdir(parents=True)
    shared = (
        "pyproject.toml",
        "tests/conftest.py",
        "tests/helpers/every_method.py",
        "tests/helpers/training_problems.py",
        "tests/methods/test_contract.py",
    )
    for name in shared:
        shutil.copy(ROOT / name, tmp_path / name)
    files = dict(re.findall(FILE, (ROOT / "docs/new_method.md").read_text(), flags=re.DOTALL | re.MULTILINE))
    line = files.pop("auxjax/methods/__init__.py")
    assert len(files) == 2
    assert line.count("\n") == 1
    known = tmp_path / "auxjax/methods/__init__.py"
    known.write_text(re.sub(r"(?=^from auxjax\.methods\.)", line, known.read_text(), count=1, flags=re.MULTILINE))
    for name, text in files.items():
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_new_method_is_one_file_and_one_line(library_with_new_method):
    page = (ROOT / "docs/new_method.md").read_text()
    program = "\n".join(re.findall(BLOCK, re.sub(FILE, "", page, flags=re.DOTALL | re.MULTILINE), flags=re.DOTALL))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=library_with_new_method, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "weight of the auxiliary task" in done.stdout


@pytest.mark.slow
def test_the_new_method_keeps_the_contract_and_its_formula(library_with_new_method):
    command = [sys.executable, "-m", "pytest", "-q", "-k", "inverse_gradient_norm"]
    done = subprocess.run(command, cwd=library_with_new_method, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 13
