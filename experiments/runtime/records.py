"""The files of a run: its description, its log and its results. Tables and plots are made from these alone.

DIR/run.json         config, method, seed, settings, data, versions: what makes this run this run
DIR/metrics.jsonl    one JSON line per logged step
DIR/result.json      the final metrics, written once, at the end
DIR/weights.npz      the weights the method gave the training examples at the end
DIR/timing.jsonl     seconds per part of the run (not part of the result, which is reproducible to the bit)
DIR/checkpoints/     the newest training states; DIR/checkpoints.json has their checksums
DIR/damaged/         checkpoints that were no longer what was saved
DIR/learning/        for a refit, the run that learns its weights, unless that lies elsewhere (experiments.compare)
DIR/lock             empty; held by the process that works on the run, and free again once that process is gone
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import re
import zlib
from collections.abc import Iterable

import jax
import numpy as np

IDENTITY = ("config", "method", "seed", "settings")
DATA = ("data", "data_crc32", "learned_weights", "learned_crc32")  # the latter two for a refit
LEARNING = "learning"  # within the folder of a refit: the run it learns from, unless that lies elsewhere
FORMAT = 2  # of run.json and the checkpoints; runs of another one are read by reports, and not resumed
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the quota, the largest file allowed
_LEFTOVERS = {"lock", "run.partial"}  # what a process killed while it claimed the folder can leave
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


def find_run(directory: pathlib.Path, description: dict, beside: Iterable[str] = ()) -> dict | None:
    """Looks whether a folder is free for a run, or holds it already; changes nothing.

    Args:
      directory: the run's folder, which need not be there.
      description: `{config, method, seed, settings}`, plain values: what makes two runs the same.
      beside: names of what may lie in the folder before the run begins.

    Returns:
      The result of the run where it is already finished, `None` where there is work to do.

    Raises:
      ValueError: the folder holds a different run, files that are not those of a run, or damaged ones.
    """
    path = directory / "run.json"
    if path.exists():
        _refuse_different(directory, read_json(path), description, IDENTITY)
        result = directory / "result.json"
        return read_json(result) if result.exists() else None
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; --out is the folder of a run. Use another --out.")
    if directory.exists() and {entry.name for entry in directory.iterdir()} - _LEFTOVERS - set(beside):
        raise ValueError(f"{directory} is there already and holds no run.json, so it is not a run. Use another --out.")
    return None


@contextlib.contextmanager
def claim(directory: pathlib.Path, description: dict, beside: dict):
    """Holds a run's folder while the process works in it; writes `run.json` where the run is new.

    Args:
      directory: the run's folder, made if missing.
      description: as for `find_run`.
      beside: more plain values to write down. A run resumes with the data it began with, and a refit with the weights:
        `DATA` must be the same again.

    Raises:
      ValueError: another process works on this run, or the data or the weights have changed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is working on {directory}. Wait for it, or stop it.") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # some network disks have no locks
                raise
        path = directory / "run.json"
        if path.exists():
            _refuse_different(directory, read_json(path), {**description, **beside}, IDENTITY + DATA)
        else:
            write_json(path, {**description, **beside, "format": FORMAT, "versions": versions()})
        yield


def _refuse_different(directory, there: dict, wanted: dict, fields) -> None:
    if there.get("format") != FORMAT:
        version = there.get("versions", {}).get("auxjax", "another version")
        raise ValueError(
            f"{directory} holds a run of auxjax {version} in another format: expected {FORMAT}, got "
            f"{there.get('format', 1)}. Reports still read it. To train, use another --out, or that version."
        )
    different = differences(there, wanted, fields)
    if different:
        raise ValueError(
            f"{directory} holds a different run: {'; '.join(different)}. "
            "Use another --out, repeat the command that made it, or delete the folder."
        )


def differences(there: dict, here: dict, fields=IDENTITY) -> list[str]:
    """What differs between the description in a file and one of this process, in words."""
    here = json.loads(json.dumps(here))  # tuples become lists, as in the file
    rows = []
    for field in fields:
        old, new = there.get(field), here.get(field)
        if field == "settings":
            old, new = old or {}, new or {}
            for name in sorted(set(old) | set(new)):
                if old.get(name) != new.get(name):
                    rows.append(f"{name} is {old.get(name)!r} there and {new.get(name)!r} here")
        elif old != new:
            rows.append(f"{field} is {old!r} there and {new!r} here")
    return rows


def read_json(path: pathlib.Path) -> dict:
    """The dict in a JSON file.

    Raises:
      ValueError: the file holds something else; the message says what to do.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete {path.parent} or use another folder.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object. Delete {path.parent} or use another folder.")
    return found


@contextlib.contextmanager
def full_disk_explained(what, directory: pathlib.Path):
    """Within it, an error that means a full disk is replaced by one line that says so and what is still good.

    Args:
      what: what is being written.
      directory: the run's folder.

    Raises:
      OSError: the disk is full.
    """
    try:
        yield
    except (OSError, ValueError) as error:  # TensorStore raises a ValueError with the number in its text
        found = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number not in _FULL:
            raise
        steps = [int(path.name) for path in (directory / "checkpoints").glob("*") if path.name.isdigit()]
        good = f"The checkpoint of step {max(steps)} is whole" if steps else "There was no checkpoint yet"
        message = (
            f"the disk is full: {what} could not be written ({os.strerror(number)}). {good}, and the log in "
            f"{directory} is good. Free some space; the same command then resumes."
        )
        raise OSError(message) from None


@contextlib.contextmanager
def _whole(path: pathlib.Path, mode: str = "w"):
    """A stream into a file that is there whole or not at all, whenever the process dies."""
    temporary = path.with_suffix(".partial")
    with full_disk_explained(path, path.parent):
        with temporary.open(mode) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a file that is there whole or not at all, whenever the process dies."""
    with _whole(path) as stream:
        stream.write(json.dumps(content, indent=1, sort_keys=True) + "\n")


def append_line(path: pathlib.Path, *rows: dict) -> None:
    """Appends a JSON line per row. Numbers keep every digit, so equal lines mean equal runs.

    It is safe from the death of the process, and from that of the machine after `to_disk`, which takes milliseconds.
    """
    with full_disk_explained(path, path.parent), path.open("a") as stream:
        stream.write("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def copy_timing(learning: pathlib.Path, directory: pathlib.Path) -> None:
    """Puts the seconds of the run that a refit learns from at the head of its own, once: they are part of its cost."""
    source, path = learning / "timing.jsonl", directory / "timing.jsonl"
    if source.exists() and not path.exists():
        append_line(path, *({**line, "of": "learning"} for line in read_lines(source)))


def to_disk(path: pathlib.Path) -> None:
    """Syncs a log to the disk: a checkpoint must never be there before the lines that led to it."""
    with full_disk_explained(path, path.parent), path.open("a") as stream:
        os.fsync(stream.fileno())


def keep_lines(path: pathlib.Path, step: int, count: int) -> None:
    """Drops lines past `step` and a half-written last one: what a killed run had logged after its last checkpoint.

    Args:
      path: the log.
      step: the checkpoint's step.
      count: lines there were when the checkpoint was saved.

    Raises:
      ValueError: lines from before the checkpoint are missing or damaged.
    """
    kept = [row for row in read_lines(path) if row["step"] <= step] if step and path.exists() else []
    if len(kept) != count:
        raise ValueError(
            f"{path} has {len(kept)} lines up to step {step}, and there were {count} when the checkpoint was saved: "
            f"the log was cut or changed. Delete {path.parent} to start again, or use another folder."
        )
    with _whole(path) as stream:
        stream.write("".join(json.dumps(row, sort_keys=True) + "\n" for row in kept))


def note_checkpoints(directory: pathlib.Path, steps: list[int], saved: int) -> None:
    """Writes down the checksum of the checkpoint just saved, beside those of the other `steps` that are still there."""
    known = _noted_checksums(directory)
    kept = {str(step): known[str(step)] for step in steps if str(step) in known}
    write_json(directory / "checkpoints.json", {**kept, str(saved): _checksum(directory / "checkpoints" / str(saved))})


def is_noted(directory: pathlib.Path, step: int) -> bool:
    """Whether the checksum of a checkpoint was written down; a process killed right after saving one has not."""
    return str(step) in _noted_checksums(directory)


def damage_of(directory: pathlib.Path, step: int) -> str | None:
    """What is wrong with a checkpoint, or `None`; Orbax reads some damaged files as if nothing had happened.

    One without a checksum, saved by a process that was killed a moment later, is taken as it is: it was renamed to its
    name when it was whole.
    """
    found = _checksum(directory / "checkpoints" / str(step))
    same = _noted_checksums(directory).get(str(step), found) == found
    return None if same else "its files are not those that were saved"


def set_aside(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Moves a checkpoint to where no run looks for one, and returns its new path."""
    (directory / "damaged").mkdir(exist_ok=True)
    names = itertools.chain([str(step)], (f"{step}-{count}" for count in itertools.count(2)))
    path = next(path for name in names if not (path := directory / "damaged" / name).exists())
    os.replace(directory / "checkpoints" / str(step), path)
    kept = {name: value for name, value in _noted_checksums(directory).items() if name != str(step)}
    write_json(directory / "checkpoints.json", kept)
    return path


def _noted_checksums(directory: pathlib.Path) -> dict[str, int]:
    """Checksums by step. The file only helps to judge checkpoints, so a damaged one is as good as none."""
    path = directory / "checkpoints.json"
    try:
        return read_json(path) if path.exists() else {}
    except ValueError:
        return {}


def _checksum(folder: pathlib.Path) -> int:
    found = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found = zlib.crc32(str(path.relative_to(folder)).encode(), found)
        found = zlib.crc32(path.read_bytes(), found)
    return found


def read_lines(path: pathlib.Path) -> list[dict]:
    """The lines of a log; a last line cut off by a kill is left out.

    Raises:
      ValueError: any other line is no JSON object with a step.
    """
    rows = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no step in it")
        except ValueError:
            if number + 1 == len(lines):
                break
            raise ValueError(
                f"{path}, line {number + 1}, is damaged: {line[:60]!r}. "
                f"Delete {path.parent} and run it again, or use another folder."
            ) from None
        rows.append(row)
    return rows


def save_arrays(path: pathlib.Path, **arrays) -> None:
    """An npz that is there whole or not at all."""
    with _whole(path, "wb") as stream:
        np.savez(stream, **arrays)


def plain(metrics: dict) -> dict[str, float]:
    """Device metrics as Python numbers, in one transfer."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
