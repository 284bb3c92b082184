"""Running the commands of `experiments`, in this process or in one of their own that can be killed."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np

from experiments import compare, report, run, sweep

MAIN = {"run": run.main, "compare": compare.main, "report": report.main, "sweep": sweep.main}
ROOT = pathlib.Path(__file__).parents[2]
TINY = {"steps": 40, "log_every": 20, "checkpoint_every": 20, "hidden": 16, "batch_size": 32, "outer_batch_size": 32}

# What one process compiles, the next one finds on the disk.
COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(tempfile.gettempdir()) / "auxjax-tests-compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}


def tiny(**changes) -> list[str]:
    """`--set` arguments of a run that takes a moment."""
    return [part for name, value in {**TINY, **changes}.items() for part in ("--set", f"{name}={value}")]


def call(command: str, *arguments) -> int:
    """Runs a command in this process; returns its status."""
    return MAIN[command]([str(argument) for argument in arguments])


def refused(capsys, command: str, *arguments) -> str:
    """Runs a command that must end with status 2 and one line on standard error; returns that line."""
    capsys.readouterr()
    assert call(command, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def start(command: str, *arguments, devices: int = 1, through=()) -> subprocess.Popen:
    """Starts a command in a process of its own (behind `through`)."""
    line = [*through, sys.executable, "-m", f"experiments.{command}", *map(str, arguments)]
    environment = {**COMPILED, **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env=environment, **streams)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """Waits for a process that must end well; returns what it wrote."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def wait_until(process: subprocess.Popen, ready) -> None:
    """Waits for `ready()`, which must come while the process still runs."""
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def checkpoints(directory: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints of a run."""
    folder = directory / "checkpoints"
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.exists() else []


def read(directory: pathlib.Path) -> tuple[dict, list[dict]]:
    """Result and log of a run."""
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return json.loads((directory / "result.json").read_text()), log


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Result, log and weights are the same to the bit."""
    for name in ("result.json", "metrics.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    with np.load(one / "weights.npz") as a, np.load(other / "weights.npz") as b:
        assert a.files == b.files
        for name in a.files:
            assert a[name].tobytes() == b[name].tobytes(), name


def copy_interrupted(whole: pathlib.Path, half: pathlib.Path) -> None:
    """Copies a finished run as it was when its last but one checkpoint was the newest."""
    shutil.copytree(whole, half)
    for name in ("result.json", "weights.npz", "timing.jsonl"):
        (half / name).unlink()
    *left, last = checkpoints(half)
    shutil.rmtree(half / "checkpoints" / str(last))
    assert checkpoints(half) == left != []
