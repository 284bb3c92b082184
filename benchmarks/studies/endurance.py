"""Kills training runs at random moments and compares what they end with to a run that nothing interrupted.

    python -m benchmarks.studies.endurance --out out/endurance.json
    python -m benchmarks.studies.endurance --kills 10 --preemptions 2 --jobs 1      # a short one

One run of `digits_noise` with JTDS is left alone. Then a run is killed (SIGKILL) and started again, over and over,
until it ends, and the next one begins, until all kills are used up. A third of the kills falls anywhere within the time
a process needs to its first new checkpoint (imports, data, restoring, compilation), the others are aimed: they wait for
a random number of new checkpoints, and then a random while, or for the temporary folder of the next one. After that:
preemptions (SIGTERM), damaged checkpoints, and a disk that is full. Every run must end with the params, optimiser and
method states, keys, log, result and weights of the one left alone, to the bit. Any difference ends with status 1.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

import numpy as np
from rich.table import Table

from auxjax.training.checkpoint import arrays
from benchmarks.shared.machine import describe_machine
from benchmarks.shared.paths import home_path
from experiments import cli
from experiments.reporting import terminal
from experiments.runtime import interruption

ROOT = pathlib.Path(__file__).parents[2]
STEPS, EVERY = 2000, 40
RUN = ["digits_noise", "--method", "jtds", "--seed", "0", "--steps", str(STEPS)]
RUN += ["--set", f"checkpoint_every={EVERY}", "--set", "log_every=20", "--set", "hidden=32"]
PHASES = ("start-up", "training", "saving a checkpoint", "after the last step")
LARGEST_FILE = 16384  # bytes a process may write to one file, where a full disk is imitated: fewer than a checkpoint's


class Seen(NamedTuple):
    """What a run's folder shows from outside, to tell what a process that works in it is doing."""

    newest: int
    temporary: frozenset
    log: int


def look(run: pathlib.Path) -> Seen:
    """The newest checkpoint, the temporary folders, and which file the log is."""
    newest, temporary = 0, set()
    with contextlib.suppress(FileNotFoundError):  # something is renamed or removed while we look
        for entry in os.scandir(run / "checkpoints"):
            if entry.name.isdigit():
                newest = max(newest, int(entry.name))
            elif "orbax-checkpoint-tmp" in entry.name:
                temporary.add((entry.name, entry.stat().st_ctime_ns))
    log = run / "metrics.jsonl"
    return Seen(newest, frozenset(temporary), log.stat().st_ino if log.exists() else 0)


def logged(run: pathlib.Path) -> int:
    """The last step in the log, a line cut off by a kill left out."""
    log = run / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def phase_of(run: pathlib.Path, before: Seen) -> str:
    """What a process was doing when it died, from what it left; `before` is from before it started."""
    now = look(run)
    if (run / "weights.npz").exists() or (run / "weights.partial").exists():
        return "after the last step"
    noted = run / "checkpoints.json"
    known = json.loads(noted.read_text()) if noted.exists() else {}
    unnoted = now.newest > before.newest and str(now.newest) not in known
    if now.temporary - before.temporary or unnoted:
        return "saving a checkpoint"
    return "training" if now.log != before.log and logged(run) > before.newest else "start-up"


def start(run: pathlib.Path, through=()) -> subprocess.Popen:
    """Starts or resumes a run, in a process of its own (behind `through`)."""
    line = [*through, sys.executable, "-m", "experiments.run", *RUN, "--out", str(run)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=ROOT, **streams)


def finish(run: pathlib.Path) -> str:
    """Goes on with a run to its end; returns what it wrote on standard error."""
    process = start(run)
    _, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{run} ended with status {process.returncode}: {err}")
    return err


def wait(process: subprocess.Popen, ready) -> bool:
    """Waits for `ready()`; whether it came while the process ran."""
    while process.poll() is None:
        if ready():
            return True
        time.sleep(0.005)
    return False


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """What is not the same to the bit in two finished runs."""
    found = [
        name for name in ("result.json", "metrics.jsonl") if (one / name).read_bytes() != (other / name).read_bytes()
    ]
    with np.load(one / "weights.npz") as a, np.load(other / "weights.npz") as b:
        same = a.files == b.files and all(a[name].tobytes() == b[name].tobytes() for name in a.files)
        found += [] if same else ["weights.npz"]
    a, b = (arrays(run / "checkpoints", STEPS) for run in (one, other))
    found += ["paths of the state"] if a.keys() != b.keys() else []
    return found + [name for name in a.keys() & b.keys() if a[name].tobytes() != b[name].tobytes()]


def attempt(run: pathlib.Path, chance: random.Random, first: float) -> dict | None:
    """Starts or resumes a run and kills it; what became of it, or `None` if it ended before the kill.

    Args:
      run: its folder.
      chance: draws the aim and the moment.
      first: seconds from a start to the first checkpoint.
    """
    before, aim = look(run), chance.choice(("any moment", "after checkpoints", "at a save"))
    began, process = time.perf_counter(), start(run)
    if aim == "any moment":
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0.0, first))
    else:
        count = chance.randint(1, 12)
        wait(process, lambda: look(run).newest >= before.newest + EVERY * count)
        if aim == "at a save":
            old = look(run).temporary
            wait(process, lambda: look(run).temporary - old)
        time.sleep(chance.uniform(0.0, 0.1 if aim == "at a save" else 0.5))
    process.kill()
    _, err = process.communicate()
    if process.returncode != -signal.SIGKILL:
        if process.returncode or "Traceback" in err:
            raise RuntimeError(f"{run} ended with status {process.returncode}: {err}")
        return None
    now = look(run)
    return {
        "aim": aim,
        "phase": phase_of(run, before),
        "seconds": time.perf_counter() - began,
        "checkpoint_before": before.newest,
        "checkpoint": now.newest,
        "logged": logged(run),
        "temporary_left": bool(now.temporary),
    }


def kills(folder: pathlib.Path, count: int, seed: int, first: float, whole: pathlib.Path, tell) -> list[dict]:
    """Kills runs until `count` kills are used up, and lets the last one end; one dict per run."""
    chance, runs, used = random.Random(seed), [], 0
    while used < count:
        run, found = folder / f"run_{len(runs)}", []
        while used < count and (row := attempt(run, chance, first)) is not None:
            found.append(row)
            used += 1
            tell()
        finish(run)
        runs.append({"seed": seed, "kills": found, "differences": differences(whole, run)})
        shutil.rmtree(run)
    return runs


def preemptions(folder: pathlib.Path, count: int, seed: int, whole: pathlib.Path, tell) -> list[dict]:
    """Asks runs to leave (SIGTERM) while they train until `count` requests are used up; one dict per run."""
    chance, runs, used = random.Random(seed), [], 0
    while used < count:
        run, found = folder / f"preempted_{len(runs)}", []
        while used < count:
            before, process = look(run), start(run)
            training = lambda before=before, run=run: phase_of(run, before) != "start-up"  # noqa: E731
            wait(process, training)
            time.sleep(chance.uniform(0.0, 1.0))
            process.terminate()
            asked = time.perf_counter()
            _, err = process.communicate()
            if process.returncode == 0:  # it ended before it was asked
                break
            step = look(run).newest
            if process.returncode != interruption.PREEMPTED or f"preempted at step {step}, saved" not in err:
                raise RuntimeError(f"{run} ended with status {process.returncode}: {err}")
            found.append({"step": step, "seconds_to_leave": time.perf_counter() - asked})
            used += 1
            tell()
        finish(run)
        runs.append({"seed": seed, "preemptions": found, "differences": differences(whole, run)})
        shutil.rmtree(run)
    return runs


def half_done(run: pathlib.Path) -> None:
    """Makes a run that was preempted when it had two checkpoints."""
    process = start(run)
    wait(process, lambda: look(run).newest >= 4 * EVERY)
    process.terminate()
    process.communicate()


def damaged(folder: pathlib.Path, whole: pathlib.Path) -> list[dict]:
    """One bit of the newest checkpoint changed, then a file of each one gone; what a run does about it."""
    cases, rows = {"one bit of the newest checkpoint changed": "from step", "both checkpoints cut": "again"}, []
    for name, ending in cases.items():
        run = folder / f"damaged_{len(rows)}"
        half_done(run)
        steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
        if not rows:
            path = max((run / "checkpoints" / str(steps[-1]) / "tree").rglob("*"), key=lambda path: path.stat().st_size)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        else:
            for step in steps:
                (run / "checkpoints" / str(step) / "tree" / "manifest.ocdbt").write_bytes(b"")
        err = finish(run)
        if ending not in next(line for line in err.splitlines() if line.startswith("warning: ")):
            raise RuntimeError(f"{name}: {err}")
        rows.append({"case": name, "differences": differences(whole, run)})
    return rows


def full_disk(folder: pathlib.Path, whole: pathlib.Path) -> list[dict]:
    """A run whose disk is full, and the same command when it is not: on a file system of its own where that is allowed.

    Where it is not, a process that may write files of 16 kB at most stands for it; that is measured in any case.
    """
    rows, messages = [], []
    run = folder / "limited"
    half_done(run)
    process = start(run, through=("sh", "-c", f'ulimit -f {LARGEST_FILE // 512} && exec "$@"', "sh"))
    messages.append(process.communicate()[1])
    rows.append({"case": "files of 16 kB at most", "status": process.returncode})
    finish(run)
    rows[-1]["differences"] = differences(whole, run)

    small = sum(path.stat().st_blocks * 512 for path in (whole / "checkpoints").rglob("*")) * 5 // 4
    place, kept = folder / "small", folder / "from_small"
    place.mkdir()
    line = [sys.executable, "-m", "experiments.run", *RUN, "--out", str(place / "run")]
    script = """mount -t tmpfs -o size="$1" none "$2" || exit; echo mounted
        place="$2"; kept="$3"; shift 3; "$@" > /dev/null; status=$?
        mount -o remount,size=1g "$place"; "$@" > /dev/null 2>&1 || exit 98
        cp -r "$place/run" "$kept"; exit $status"""
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(small), str(place), str(kept)]
    if shutil.which("unshare"):
        done = subprocess.run([*command, *line], cwd=ROOT, capture_output=True, text=True)
        if done.stdout.startswith("mounted"):  # else this user may not
            messages.append(done.stderr)
            found = {"case": f"a file system of {small >> 10} kB", "status": done.returncode}
            rows.append({**found, "differences": differences(whole, kept)})
    for row, message in zip(rows, messages, strict=True):
        last = message.strip().splitlines()[-1]
        if row["status"] != 2 or not last.startswith("error: the disk is full: ") or "Traceback" in message:
            raise RuntimeError(f"{row['case']}: {message}")
    return rows


def measure(options: argparse.Namespace, folder: pathlib.Path, save) -> None:
    """All of it; `save(result)` is called after every part with what was done and found so far."""
    whole, began = folder / "whole", time.perf_counter()
    finish(whole)  # compiles; the next one finds it compiled
    shutil.rmtree(whole)
    began, process = time.perf_counter(), start(whole)
    wait(process, lambda: look(whole).newest)
    first = time.perf_counter() - began
    if process.communicate() and process.returncode:
        raise RuntimeError("the run that is left alone did not end well")
    about = {**vars(options), "out": None}
    result = {"machine": describe_machine(), "options": about, "run": RUN, "seconds_to_first_checkpoint": first}
    result["seconds_alone"] = time.perf_counter() - began
    shares = [len(range(lane, options.kills, options.jobs)) for lane in range(options.jobs)]
    done, lock = [0], threading.Lock()
    with terminal.progress() as follow:
        on_step = follow("kills and preemptions:", options.kills + options.preemptions)
        on_step(0)

        def tell():
            with lock:
                done[0] += 1
                on_step(done[0])

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as lanes:
            parts = {
                "kills": [
                    lanes.submit(kills, folder / f"lane_{lane}", share, options.seed + lane, first, whole, tell)
                    for lane, share in enumerate(shares)
                ],
                "preemptions": [lanes.submit(preemptions, folder, options.preemptions, options.seed, whole, tell)],
                "damaged": [lanes.submit(damaged, folder, whole)],
                "full_disk": [lanes.submit(full_disk, folder, whole)],
            }
            for name, waiting in parts.items():
                result[name] = [row for part in waiting for row in part.result()]
                save(result)


def rows_of(result: dict) -> list[tuple[str, str, str]]:
    """The trials, how many there were, and their outcomes."""
    rows, killed = [], [kill for run in result["kills"] for kill in run["kills"]]

    def ended(runs) -> str:
        return f"{sum(not run['differences'] for run in runs)} of {len(runs)} runs equal"

    for phase in PHASES:
        of = [kill for kill in killed if kill["phase"] == phase]
        lost = max((0, *(kill["logged"] - kill["checkpoint"] for kill in of)))
        left = sum(kill["temporary_left"] for kill in of)
        rows.append((f"killed in: {phase}", f"{len(of)}", f"at most {lost} steps to repeat, {left} half-written"))
    rows.append(("killed, in all", f"{len(killed)}", ended(result["kills"])))
    asked = [row for run in result["preemptions"] for row in run["preemptions"]]
    slowest = max((row["seconds_to_leave"] for row in asked), default=0.0)
    rows.append(("preempted", f"{len(asked)}", f"{ended(result['preemptions'])}; left within {slowest:.1f} s"))
    for row in result["damaged"] + result["full_disk"]:
        rows.append((row["case"], "1", ended([row])))
    return rows


def show(result: dict) -> None:
    """The table, in the terminal."""
    table = Table(title=f"Runs of {STEPS} steps, a checkpoint every {EVERY}; equal: to the bit, to the run left alone")
    for name, side in (("tried", "left"), ("times", "right"), ("came out", "left")):
        table.add_column(name, justify=side)
    for row in rows_of(result):
        table.add_row(*row)
    terminal.show(table)


def failures(result: dict) -> list[str]:
    """Runs that ended otherwise, in words."""
    runs = [run for part in ("kills", "preemptions", "damaged", "full_disk") for run in result.get(part, ())]
    return [f"{run.get('case', 'a run')}: {', '.join(run['differences'][:5])}" for run in runs if run["differences"]]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = cli.bare_parser("python -m benchmarks.studies.endurance", __doc__)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="SIGKILLs (default 100)")
    parser.add_argument("--preemptions", type=int, default=10, metavar="N", help="SIGTERMs (default 10)")
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="runs that are killed side by side (default 2)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the moments (default 0)")
    parser.add_argument("--out", type=home_path, metavar="FILE", help="write all numbers to this JSON file")
    options = parser.parse_args(arguments)
    if min(options.kills, options.preemptions) < 0 or options.jobs < 1:
        parser.error("--kills and --preemptions must be at least 0, --jobs at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 if every run ended as the one left alone."""
    options, found = parse(arguments), {}

    def save(result):
        found.update(result)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")

    def work():
        with tempfile.TemporaryDirectory(prefix="auxjax-endurance-") as folder:
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(folder) / "compiled"))
            os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
            measure(options, pathlib.Path(folder), save)
        show(found)

    status = cli.guarded(work)
    for text in failures(found):
        print(f"error: not as the run left alone: {text}", file=sys.stderr)
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
