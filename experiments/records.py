"""The files of a run: what it was, what it logged, what came out. Tables and plots are made from these alone.

DIR/run.json         config, method, seed, settings, versions: what makes this run this run
DIR/metrics.jsonl    one JSON line per logged step
DIR/result.json      the final metrics, written once, at the end
DIR/weights.npz      the weights the method gave the training examples at the end
DIR/timing.jsonl     seconds per part of the run (not part of the result, which is reproducible to the bit)
DIR/checkpoints/     the newest training states
"""

import importlib.metadata
import json
import os
import pathlib
import platform

import jax
import numpy as np

IDENTITY = ("config", "method", "seed", "settings")
_PACKAGES = ("auxjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of what can change a number."""
    found = {"python": platform.python_version(), "backend": jax.default_backend()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def open_run(directory: pathlib.Path, description: dict, beside: dict) -> dict | None:
    """Claims a folder for a run, or finds the same run there.

    Args:
      directory: the run's folder, made if missing.
      description: `{config, method, seed, settings}`, plain values: what makes two runs the same.
      beside: plain values to write down that do not.

    Returns:
      The result of the run where it is already finished, `None` where there is work to do.

    Raises:
      ValueError: the folder holds a different run, or files that are no run's.
    """
    path = directory / "run.json"
    if path.exists():
        try:
            there = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} cannot be read ({error}). Delete {directory} or use another folder.") from None
        different = _differences(there, json.loads(json.dumps(description)))
        if different:
            raise ValueError(
                f"{directory} holds a different run: {'; '.join(different)}. "
                "Use another --out, repeat the command that made it, or delete the folder."
            )
        result = directory / "result.json"
        return json.loads(result.read_text()) if result.exists() else None
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} is there already and holds no run.json, so it is no run. Use another --out.")
    directory.mkdir(parents=True, exist_ok=True)
    write_json(path, {**description, **beside, "versions": versions()})
    return None


def _differences(there: dict, wanted: dict) -> list[str]:
    rows = []
    for field in IDENTITY:
        old, new = there.get(field), wanted.get(field)
        if field == "settings":
            for name in sorted(set(old or {}) | set(new or {})):
                if (old or {}).get(name) != (new or {}).get(name):
                    rows.append(f"{name} is {(old or {}).get(name)!r} there and {(new or {}).get(name)!r} here")
        elif old != new:
            rows.append(f"{field} is {old!r} there and {new!r} here")
    return rows


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a file that is there whole or not at all, whenever the process dies."""
    temporary = path.with_suffix(".partial")
    with temporary.open("w") as stream:
        stream.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def append_line(path: pathlib.Path, row: dict) -> None:
    """Appends one JSON line. Numbers keep every digit, so equal lines mean equal runs."""
    with path.open("a") as stream:
        stream.write(json.dumps(row, sort_keys=True) + "\n")


def keep_lines_until(path: pathlib.Path, step: int) -> None:
    """Drops lines past `step` and a half-written last one: what a killed run had logged after its last checkpoint."""
    if not path.exists():
        return
    kept = [row for row in read_lines(path) if row["step"] <= step]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in kept))
    os.replace(temporary, path)


def read_lines(path: pathlib.Path) -> list[dict]:
    """The lines of a log; a last line cut off by a kill is left out."""
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 != len(lines):
                raise ValueError(f"{path}, line {number + 1}, is no JSON: {line[:60]!r}. The log is damaged.") from None
    return rows


def save_arrays(path: pathlib.Path, **arrays) -> None:
    """An npz that is there whole or not at all."""
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as stream:
        np.savez(stream, **arrays)
    os.replace(temporary, path)


def plain(metrics: dict) -> dict[str, float]:
    """Device metrics as Python numbers, in one transfer."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
