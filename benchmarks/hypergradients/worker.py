"""One process per library, which is told what to measure: `Worker` on the benchmark's side, `main` on the other.

    worker = Worker("jaxopt", "benchmarks.hypergradients.peers.jaxopt", log="out/logs/jaxopt.log")
    worker.ask("open")                          {"version", "unavailable": None or why}
    worker.ask("load", path)                    reads a problem
    worker.ask("labels")                        what the library's module offers for it
    worker.ask("make", "cg K=20", options)      prepares and compiles, runs once: result, time, memory
    worker.ask("time", "cg K=20")               one timed run, in seconds
    worker.ask("double", "cg K=20", options)    the result of the same in float64
    worker.ask("follow", "cg tol=1e-3 warm", options, limit)     along a sequence of points

A library's module has `NAME`, `VERSION`, `available() -> None or why not` and `entries(kind) -> {label: make}`, where
`make(problem, options) -> (run, num_products)`, or `(run, num_products, report)`. `run(problem=None, restart=False)`
returns the hypergradient as NumPy arrays, at the point of another problem if one is given; `num_products` is a number,
`None`, or a function that tells it after a run; `report()` is a dictionary of numbers, what the library itself says
about its result. `options` are `{"seed": ..., "report": whether it is wanted}`. `make` may raise `LeftOut`.

The process reads problems as NumPy arrays and imports what the library's module imports, so that its memory is the
library's. What it prints goes to the log. Linux counts the memory; elsewhere it is not known.
"""

import ctypes
import gc
import importlib
import multiprocessing.connection
import os
import pathlib
import subprocess
import sys
import time
import traceback

import numpy as np

from benchmarks.hypergradients.problems import exchange


class WorkerFailed(Exception):  # noqa: N818 (says what happened, of which an error is one case)
    """The library raised, its process ended, or it did not answer in time."""


class Worker:
    """A library's process, started when it is first asked."""

    def __init__(self, name: str, module: str, log=os.devnull, limit: float = 600.0):
        self.name, self.module, self.limit = name, module, limit
        self._log, self._process, self._connection = pathlib.Path(log), None, None
        self.loaded, self.made = None, set()  # what the process knows

    def ask(self, command: str, *arguments, limit: float | None = None):
        """The answer to a command.

        Raises:
          LeftOut: the library's module says that it does not apply.
          WorkerFailed: no answer: the library raised, or the process ended or was ended after `limit` seconds.
        """
        if self._process is None:
            self._start()
        limit = self.limit if limit is None else limit
        try:
            self._connection.send((command, *arguments))
            if not self._connection.poll(limit):
                self.close(at_once=True)
                raise WorkerFailed(f"no answer after {limit:.0f} s")
            kind, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            process, self._process, self.loaded, self.made = self._process, None, None, set()
            raise WorkerFailed(f"its process ended with exit code {process.wait()}; see its log") from error
        if kind == "left out":
            raise exchange.LeftOut(answer)
        if kind == "failed":
            raise WorkerFailed(answer)
        if command == "load":
            self.loaded, self.made = arguments[0], set()
        elif command == "make":
            self.made.add(arguments[0])
        return answer

    def twin(self) -> "Worker":
        """Another process for the same library, not started yet."""
        return Worker(self.name, self.module, self._log, self.limit)

    def close(self, *, at_once: bool = False) -> None:
        """Ends the process."""
        process, self._process, self.loaded, self.made = self._process, None, None, set()
        if process is None:
            return
        if at_once:
            process.kill()
        else:
            self._connection.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self) -> None:
        self.loaded, self.made = None, set()
        self._connection, theirs = multiprocessing.connection.Pipe()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.hypergradients.worker", self.module, str(theirs.fileno())]
        with open(self._log, "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        theirs.close()


class _Server:
    """What the process knows: the library's module, the problem at hand, and the entries made for it."""

    def __init__(self, module: str):
        self.module = importlib.import_module(module)
        self.problem, self.sequence, self.base = None, None, None
        self.made = {}

    def open(self):
        unavailable = self.module.available()
        version = self.module.VERSION
        return {"version": version() if callable(version) else version, "unavailable": unavailable}

    def load(self, path: str):
        """Reads a problem or a sequence. Everything made before is dropped."""
        self.made.clear()
        if "jax" in sys.modules:
            sys.modules["jax"].clear_caches()
        self.sequence = None
        if exchange.is_sequence(path):
            sequence = exchange.load_sequence(path)
            self.sequence = [sequence.at(t) for t in range(len(sequence))]
            self.problem = self.sequence[0]
        else:
            self.problem = exchange.load(path)
        _trim()
        self.base = memory()[0]
        return {"base_mb": self.base}

    def labels(self):
        return list(self.module.entries(self.problem.kind))

    def make(self, label: str, options: dict):
        """Prepares an entry and runs it once; then measures the memory of a second run."""
        _trim()
        before = memory()[0]
        start = time.perf_counter()
        run, num_products, report = self._prepare(label, options, self.problem)
        result = run()
        seconds = time.perf_counter() - start
        told = num_products() if callable(num_products) else num_products
        _trim()
        ready = memory()[0] if _reset_peak() else None
        result = run()
        peak = memory()[1] if ready is not None else None
        reported = report() if report is not None and options.get("report") else {}
        self.made[label] = (run, num_products)
        return {
            "result": _arrays(result),
            "first_s": seconds,
            "num_products": None if told is None else int(told),
            "report": {key: float(value) for key, value in reported.items()},
            "memory": {"base_mb": self.base, "before_mb": before, "ready_mb": ready, "peak_mb": peak},
        }

    def time(self, label: str):
        run, _ = self.made[label]
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def double(self, label: str, options: dict):
        run, _, _ = self._prepare(label, options, self.problem.cast("float64"))
        result = run()
        _precision(self.problem.precision)
        return _arrays(result)

    def follow(self, label: str, options: dict, largest_error: float | None, seconds: float):
        """Hypergradients along the sequence: times, errors and products.

        Ends at the first error above `largest_error`, and when it has taken `seconds`. Two points are run before, with
        and without a start to resume from: compiling belongs to none of them.
        """
        if label not in self.made:
            self.made[label] = self._prepare(label, options, self.problem)[:2]
            for t in (0, 1):
                self.made[label][0](self.sequence[t], restart=t == 0)
        run, num_products = self.made[label]
        times, errors, products = [], [], []
        for t, point in enumerate(self.sequence):
            start = time.perf_counter()
            result = run(point, restart=t == 0)
            times.append(time.perf_counter() - start)
            errors.append(relative_error(result, point.reference))
            told = num_products() if callable(num_products) else num_products
            products.append(None if told is None else int(told))
            if sum(times) > seconds or (largest_error is not None and not errors[-1] <= largest_error):
                break
        return {"times": times, "errors": errors, "products": products, "complete": len(times) == len(self.sequence)}

    def drop(self, label: str):
        self.made.pop(label, None)

    def _prepare(self, label: str, options: dict, problem):
        _precision(problem.precision)
        make = self.module.entries(problem.kind)[label]
        run, num_products, *rest = make(problem, options)
        return run, num_products, rest[0] if rest else None


def _arrays(result: dict) -> dict:
    return {key: np.asarray(leaf) for key, leaf in result.items()}


def relative_error(result: dict, reference: dict) -> float:
    """`||result - reference|| / ||reference||` over all arrays; infinite where the result is not finite."""
    result, reference = flat(result), flat(reference)
    error = np.linalg.norm(result - reference) / np.linalg.norm(reference)
    return float(error) if np.isfinite(error) else float("inf")


def flat(tree: dict) -> np.ndarray:
    """All arrays, in the order of their names, as one float64 vector."""
    return np.concatenate([np.ravel(np.asarray(tree[key], np.float64)) for key in sorted(tree)])


def memory() -> tuple[float | None, float | None]:
    """Resident memory of this process in MB, now and at its peak; `None` where there is no /proc."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None, None
    found = {line.split(":")[0]: float(line.split()[1]) / 1024 for line in lines if line.startswith("Vm")}
    return found.get("VmRSS"), found.get("VmHWM")


def _reset_peak() -> bool:
    """Makes the peak start again from what is used now; whether that is possible here."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _trim() -> None:
    """Gives back what is no longer used, so that it does not hide what comes."""
    gc.collect()
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            return  # another C library: the memory measured is then what it is


def _precision(precision: str) -> None:
    """Float64 for JAX, where the library has imported it, is one setting per process."""
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_enable_x64", precision == "float64")


def main(arguments: list[str]) -> None:
    """The loop of a library's process: `module file-descriptor`."""
    module, descriptor = arguments
    connection = multiprocessing.connection.Connection(int(descriptor))
    server = None
    while True:
        try:
            command, *rest = connection.recv()
        except EOFError:
            return
        try:
            server = _Server(module) if server is None else server
            answer = ("done", getattr(server, command)(*rest))
        except exchange.LeftOut as reason:
            answer = ("left out", str(reason))
        except Exception as error:  # the library's failure is a result of the benchmark
            traceback.print_exc()
            answer = ("failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
        connection.send(answer)


if __name__ == "__main__":
    main(sys.argv[1:])
