"""Time of a training step of every method, against single-task training and against the joint gradient.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --models mlp --tasks 1,39 --methods arml,jtds --repeats 10
    python -m benchmarks.train_step --json train_step.json --out plots  # resumes after the last K

A step is 10 inner updates and, where the method has an outer level, one outer update. Timed are the inner update as
`make_step` compiles it, the outer update alone, and from both the time per inner update,

    t = t_inner + t_outer / inner_steps

For each model and each number K of auxiliary tasks all methods are compiled first and then take turns, in this order
and backwards, so that whatever else the machine does falls on all alike. Ratios are formed within a turn; given are
their median and the 95 % interval of the median that order statistics give, which needs 6 turns. A method that has
used up its seconds takes no more turns after its third one.

The heads of all tasks are one dense layer with K + 1 outputs, with a binary cross-entropy each. Their forward pass and
the K + 1 losses grow with K for every method, "stl" included, which reports all losses; "stl, one head" is a model
without any other head. The ratio to "equal", one joint gradient, shows what a method adds to that. The goal: for ARML,
OL_AUX and the sign test of gradient cosine similarity it does not grow with K.

What is left out is said, with the reason: a product grid too large to train, programs so large that compiling them
would take minutes (--equations), and, on the convolutional network, methods that --methods would add.
"""

import argparse
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import auxjax
from auxjax.methods import Context
from benchmarks.shared.machine import describe_machine
from benchmarks.shared.paths import home_path
from benchmarks.shared.timing import median_interval
from benchmarks.train_step.cases import MODELS, REFERENCES, ROWS, TASKS, Case, Row, default_rows, make_case
from experiments.reporting import terminal

GOAL = 1.25  # how much the ratio to "equal" may grow from the smallest K to the largest
BOUNDED = ("arml", "ol_aux", "ol_aux, one step", "cosine_similarity")
NOT_DEFAULT = "to save time; --methods adds it"
LEAST_TURNS = 3
TURN_SECONDS = 0.5  # a turn has fewer inner updates where they would take longer


class Runner:
    """One method on one case: its state, its two compiled updates, and the times measured so far.

    Attributes:
      state: the training state.
      inner, outer: seconds of one update, per turn; `outer` stays empty for a method without an outer level.
      compile_seconds: tracing and compiling both updates.
      programs: `describe_program` of both.
    """

    def __init__(self, traced: dict, state, case: Case, inner_steps: int, seconds: float):
        start = time.perf_counter()
        compiled = {name: program.lower().compile() for name, program in traced.items()}
        self.compile_seconds = seconds + time.perf_counter() - start
        self.programs = {
            name: describe_program(program) | {"equations": equations(traced[name].jaxpr)}
            for name, program in compiled.items()
        }
        self.inner, self.outer = [], []
        self.state, self._compiled, self._case, self._count = state, compiled, case, 2
        self.turn()  # the first calls are slower than the others
        self._count = max(1, min(inner_steps, int(TURN_SECONDS / self.inner.pop())))
        self.outer.clear()

    def turn(self) -> None:
        """Some inner updates and one outer update, timed."""
        state, case = self.state, self._case
        start = time.perf_counter()
        for _ in range(self._count):
            state, metrics = self._compiled["inner"](state, case.inner)
        jax.block_until_ready((state, metrics))
        middle = time.perf_counter()
        self.inner.append((middle - start) / self._count)
        if "outer" in self._compiled:
            state, metrics = self._compiled["outer"](state, case.inner, case.outer)
            jax.block_until_ready((state, metrics))
            self.outer.append(time.perf_counter() - middle)
        self.state = state

    def used(self) -> float:
        """Seconds measured so far."""
        return self._count * sum(self.inner) + sum(self.outer)

    def per_update(self, inner_steps: int) -> np.ndarray:
        """Seconds per inner update, with its share of the outer one, for every turn."""
        return np.array(self.inner) + (np.array(self.outer) / inner_steps if self.outer else 0.0)

    def is_finite(self) -> bool:
        """Whether the params still are."""
        return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(self.state.params))


def make_runner(row: Row, case: Case, options: argparse.Namespace, most: float) -> Runner | str:
    """Compiles a method's updates; or says why not, if their programs have more than `most` equations."""
    method = auxjax.methods.get(row.method, **row.options(case))
    optimizer = optax.with_extra_args_support(optax.sgd(1e-3, momentum=0.9))
    context = Context(case.model, optimizer)
    init, inner_update = auxjax.make_step(case.model, method._replace(outer=None), optimizer)
    init = partial(init, jax.random.key(options.seed))

    def outer_update(state, inner, outer):
        return method.outer(context, state, inner, outer, jax.random.fold_in(state.key, state.step))

    start = time.perf_counter()
    shapes = jax.eval_shape(init, case.params, case.inner)
    traced = {"inner": inner_update.trace(shapes, case.inner)}
    if method.outer is not None:
        traced["outer"] = jax.jit(outer_update, donate_argnums=0).trace(shapes, case.inner, case.outer)
    seconds = time.perf_counter() - start
    size = sum(equations(program.jaxpr) for program in traced.values())
    if size > most:
        return f"its program has {size:,} equations, and more than --equations {most:,.0f} take minutes to compile"
    return Runner(traced, init(case.params, case.inner), case, options.inner_steps, seconds)


def equations(jaxpr) -> int:
    """How many equations a traced program has, with those inside of others."""
    count = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inside = [value for value in equation.params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
        count += 1 + sum(equations(value) for value in inside)
    return count


def describe_program(program) -> dict:
    """Size of a compiled program: kernels started, operations and temporary memory as XLA counts them."""
    entry = program.as_text().split("ENTRY", 1)[1]
    free = (" parameter(", " constant(", " get-tuple-element(", " tuple(", " bitcast(")
    lines = [line for line in entry.splitlines() if " = " in line and not any(word in line for word in free)]
    cost, memory = program.cost_analysis() or {}, program.memory_analysis()
    return {
        "kernels": len(lines),
        "flops": float(cost.get("flops", 0.0)),
        "temporary_bytes": None if memory is None else int(memory.temp_size_in_bytes),
    }


def measure(kind: str, tasks: int, options: argparse.Namespace, follow) -> tuple[list[dict], list[dict]]:
    """Times all methods at one K: rows of the table, and what was left out with the reason."""
    wanted = options.methods or default_rows(kind)
    labels = [label for label in ROWS if label in REFERENCES or label in wanted]
    cases = {False: make_case(kind, tasks, options), True: make_case(kind, 0, options)}
    others = [] if options.methods else [label for label in ROWS if label not in labels]
    left_out = [{"model": kind, "tasks": tasks, "row": label, "reason": NOT_DEFAULT} for label in others]
    runners = {}
    on_step = follow(f"{MODELS[kind]}, K = {tasks}", len(labels) + options.repeats)
    for place, label in enumerate(labels):
        on_step(place)
        row = ROWS[label]
        most = float("inf") if label in REFERENCES else options.equations
        found = row.why_not(tasks) or make_runner(row, cases[row.one_head], options, most)
        if isinstance(found, str):
            left_out.append({"model": kind, "tasks": tasks, "row": label, "reason": found})
        else:
            runners[label] = found
    for turn in range(options.repeats):
        on_step(len(labels) + turn)
        for label in list(runners)[:: 1 if turn % 2 == 0 else -1]:
            runner = runners[label]
            if label in REFERENCES or turn < LEAST_TURNS or runner.used() < options.seconds:
                runner.turn()
    on_step(len(labels) + options.repeats)
    for label, runner in runners.items():
        if not runner.is_finite():
            raise SystemExit(f"{kind}, K = {tasks}: the params of {label!r} are not finite; no times are reported.")
    rows = [summarise(kind, tasks, label, runners, options.inner_steps) for label in runners]
    jax.clear_caches()
    return rows, left_out


def summarise(kind: str, tasks: int, label: str, runners: dict[str, Runner], inner_steps: int) -> dict:
    """One row: times in milliseconds, ratios to both references, programs."""
    runner = runners[label]
    found = {"model": kind, "tasks": tasks, "row": label, "family": ROWS[label].family}
    per_update, inner, outer = runner.per_update(inner_steps), np.array(runner.inner), np.array(runner.outer)
    for name, values in (("inner_ms", inner), ("outer_ms", outer), ("update_ms", per_update)):
        found[name] = median_interval(1e3 * values) if values.size else None
    for name in REFERENCES:
        reference = runners[name].per_update(inner_steps)[: per_update.size]
        found[f"to_{name}"] = median_interval(per_update / reference)
    joint = np.array(runners["equal"].inner)[: inner.size]
    found["inner_to_equal"] = median_interval(inner / joint)
    found["outer_to_equal"] = median_interval(outer / joint) if outer.size else None
    return found | {"compile_s": runner.compile_seconds, "programs": runner.programs}


def growth(rows: list[dict]) -> list[dict]:
    """How the ratio to "equal" changes from the smallest K to the largest, for the methods it should not grow for."""
    found = []
    for kind in dict.fromkeys(row["model"] for row in rows):
        for label in BOUNDED:
            same = sorted((r for r in rows if r["model"] == kind and r["row"] == label), key=lambda r: r["tasks"])
            if len(same) > 1:
                factor = same[-1]["to_equal"]["median"] / same[0]["to_equal"]["median"]
                span = {"from": same[0]["tasks"], "to": same[-1]["tasks"], "growth": factor, "met": factor <= GOAL}
                found.append({"model": kind, "row": label} | span)
    return found


def read(options: argparse.Namespace) -> dict:
    """What the file has from a run before with the same settings on the same machine; or an empty result."""
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "out", "models", "tasks")}
    settings, machine = json.loads(json.dumps(settings)), describe_machine()
    empty = {"settings": settings, "goal": GOAL, "machine": machine, "rows": [], "left_out": [], "growth": []}
    if options.json is None or not options.json.exists():
        return empty | {"seconds": 0.0}
    found = json.loads(options.json.read_text(encoding="utf-8"))
    for name in ("settings", "machine"):
        different = [key for key, value in empty[name].items() if found[name].get(key) != value]
        if different:
            raise SystemExit(
                f"{options.json} has times with another {name}: "
                + ", ".join(f"{key} {found[name].get(key)} instead of {empty[name][key]}" for key in different)
                + ". Give another --json."
            )
    return found


def integers(text: str) -> tuple[int, ...]:
    """Numbers of at least 1, separated by commas."""
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
    return values


def methods(text: str) -> tuple[str, ...]:
    """The rows of the methods of these names."""
    known = sorted({row.method for row in ROWS.values()})
    for name in text.split(","):
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no method {name!r}; there are {', '.join(known)}")
    return tuple(label for label, row in ROWS.items() if row.method in text.split(","))


def models(text: str) -> tuple[str, ...]:
    """Names of models."""
    if set(text.split(",")) - set(MODELS):
        raise argparse.ArgumentTypeError(f"{text!r}: the models are {' and '.join(MODELS)}")
    return tuple(dict.fromkeys(text.split(",")))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", type=models, default=tuple(MODELS), metavar="M,M", help="mlp, convnet or mlp,convnet (default)")
    add(
        "--tasks",
        type=integers,
        metavar="K,K,...",
        help="numbers of auxiliary tasks (default 1,13,39,312; for the convnet 1,39,312). CelebA has 39 beside "
        "one, and CUB's attributes are 312",
    )
    add(
        "--methods",
        type=methods,
        metavar="M,M,...",
        help="methods, each in all its forms; stl and equal always run (default: all; fewer for the convnet)",
    )
    add("--repeats", type=int, default=21, metavar="N", help="turns (default 21)")
    add("--inner-steps", type=int, default=10, metavar="N", help="inner updates per outer update (default 10)")
    add("--seconds", type=float, default=3.0, metavar="S", help="of measurement per method and K (default 3)")
    add("--equations", type=int, default=16_000, metavar="N", help="largest program that is compiled (default 16000)")
    add("--batch", type=int, default=128, help="examples per batch (default 128)")
    add("--inputs", type=int, default=64, help="inputs of the mlp (default 64)")
    add("--hidden", type=integers, default=(256, 256), metavar="H,H", help="layers of the mlp (default 256,256)")
    add("--image", type=int, default=16, help="height and width of the convnet's images (default 16)")
    add("--channels", type=integers, default=(16, 32, 64), metavar="C,C", help="of the convnet (default 16,32,64)")
    add("--seed", type=int, default=0, help="seed of data and parameters (default 0)")
    add(
        "--json",
        type=home_path,
        metavar="FILE",
        help="also write all numbers, versions and hardware to this file, after every K; those it has are not measured "
        "again, so that a run that was stopped resumes",
    )
    add("--out", metavar="DIR", type=home_path, help="also put a plot and tables in Markdown here")
    options = parser.parse_args(arguments)
    for name in ("repeats", "inner_steps", "equations", "batch", "inputs", "image"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    options.tasks = None if options.tasks is None else tuple(sorted(set(options.tasks)))
    return options


def main(arguments: list[str] | None = None) -> dict:
    """Runs the benchmark; returns what it writes to the JSON file."""
    options = parse(arguments)
    result = read(options)
    with terminal.progress() as follow:
        for kind in options.models:
            for tasks in options.tasks or TASKS[kind]:
                if any((row["model"], row["tasks"]) == (kind, tasks) for row in result["rows"]):
                    terminal.line(f"{options.json} has the times of the {MODELS[kind]} at K = {tasks}.")
                    continue
                start = time.perf_counter()
                rows, left_out = measure(kind, tasks, options, follow)
                result["rows"] += rows
                result["left_out"] += left_out
                result |= {"growth": growth(result["rows"]), "seconds": result["seconds"] + time.perf_counter() - start}
                if options.json:
                    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    # Here and not above: this import sets up matplotlib, which `--help` and the timing need not wait for.
    from benchmarks.train_step import report

    report.show(result)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report.draw(result["rows"], options.out / "train_step.png")
        report.write_markdown(result["rows"], options.out / "train_step_tables.md")
        terminal.show_files("Files", [options.out / "train_step.png", options.out / "train_step_tables.md"])
    return result


if __name__ == "__main__":
    main()
