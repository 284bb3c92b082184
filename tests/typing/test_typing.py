"""The type checker finds a wrong solver, estimator or loss function, and takes what is right."""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("pyright", reason="the type checker is in the extra `test`")
HERE = pathlib.Path(__file__).parent
MARK = "# wrong"


def reported(name: str) -> dict[int, str]:
    """Line numbers of one of the files here, and what the checker says of them."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(HERE / name)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent.parent)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    return {one["range"]["start"]["line"] + 1: one["message"] for one in found["generalDiagnostics"]}


def test_right_uses_are_taken():
    assert reported("right_uses.py") == {}


def test_wrong_uses_are_found_and_nothing_else():
    lines = (HERE / "wrong_uses.py").read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if line.endswith(MARK)}
    found = reported("wrong_uses.py")
    assert set(found) == wrong, found
