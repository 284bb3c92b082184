"""Which methods find the helpful task: a linear regression with two params, of which everything is known.

    python -m benchmarks.studies.two_parameters --out out/two_parameters
    python -m benchmarks.studies.two_parameters --seeds 0,1 --methods arml,auxinash --epochs 200 --out out/quick

Every method trains w in R^2 on three tasks, y_k = w_k . x + noise_k, with the same 1,000 inputs x ~ N(0, I):

    primary    w* = ( 1,  1)    noise 5        its own data leave an error of about 0.2
    helpful    w* = ( 1,  1)    noise 0.25     the same answer, 400 times more precise
    harmful    w* = (-1, -4)    noise 0.25     as precise, and wrong

Losses are half squared errors. Adam at 0.01, batches of 256, 1,000 epochs of four batches, an outer update after every
inner one. Outer batches of 256 are of another draw of the primary task, 1,000 points with the same noise and no labels
of the other tasks; `stl+dev` trains on both draws. Every seed draws data and initial params anew and is run from two
starts: params near 0, and near the harmful optimum, where a method has to let go of the harmful task. Seeds and starts
are one vectorised program. All methods have their default options; the exceptions are listed with the table. With
`--harmful-tasks 2` there are two harmful tasks with that optimum: two precise tasks that agree against one.

    distance    || w - (1, 1) || after the last update
    weights     mean of the logged weights over the last tenth of the updates
    share       |harmful| / (|helpful| + |harmful|), of these weights
    follows     correlation over seeds of the harmful weight with what noise does to the primary optimum (JSON file)
    right       seeds where helpful has a tenth of the primary weight or more, and the share is at most 10 %

Reference: the problem is that of Shamsian, Navon, Glazer, Kawaguchi, Chechik, Fetaya, 2023, Auxiliary Learning as an
Asymmetric Bargaining Game, ICML, section 4; that the tasks share their inputs and the two starts are choices made here.
"""

import argparse
import json
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

import auxjax
from benchmarks.shared.paths import home_path
from benchmarks.studies.two_parameters import plots
from experiments.evaluation.statistics import mean_and_interval
from experiments.reporting import terminal

# The optimum and the noise of each kind of task; a task is of the kind that its name begins with.
KINDS = {"primary": ((1.0, 1.0), 5.0), "helpful": ((1.0, 1.0), 0.25), "harmful": ((-1.0, -4.0), 0.25)}
STARTS = {"origin": (0.0, 0.0), "harmful": KINDS["harmful"][0]}
SPREAD = 0.5  # standard deviation of the initial params around the start
RATE = 1e-2
BLOCKS = 20  # parts of a run; the bar moves after each
LARGEST_SHARE, LEAST_HELPFUL = 0.1, 0.1
ENOUGH = 0.9  # of the seeds
# Further rows: the method's name, its options, and why.
STL_DEV = "stl+dev"
VARIANTS = {
    STL_DEV: ("stl", {}, "trains on the held-out points as well"),
    "auto_lambda+adam": (
        "auto_lambda",
        {"outer_optimizer": optax.adam(1e-2)},
        "Adam at 0.01 in place of 0.0001",
    ),
}


class Data(NamedTuple):
    """Training and held-out points of all seeds, each leaf with a leading axis of seeds."""

    train: dict
    held_out: dict


class Runs(NamedTuple):
    """What is kept of a method's runs.

    Attributes:
      path: `[seeds, starts, points, 2]`, the params, thinned, from the initial to the last.
      weights: `{task: [seeds, starts]}`, means over the last tenth of the updates.
      powers: the same of bargaining powers; empty for methods without them.
      held_out: whether the method looked at held-out points.
    """

    path: np.ndarray
    weights: dict[str, np.ndarray]
    powers: dict[str, np.ndarray]
    held_out: bool


def task_names(num_harmful: int) -> list[str]:
    """The tasks, the harmful ones numbered where there are several."""
    return ["primary", "helpful", "harmful", *(f"harmful_{k + 2}" for k in range(num_harmful - 1))]


def draw_points(seed: int, points: int, num_harmful: int = 1) -> tuple[dict, dict]:
    """Training points with the labels of all tasks, and as many others with the primary task's alone."""
    rng = np.random.default_rng(seed)

    def draw(tasks):
        x = rng.normal(size=(points, 2))
        kinds = {task: KINDS[task.split("_")[0]] for task in tasks}
        y = {task: x @ np.array(w) + noise * rng.normal(size=points) for task, (w, noise) in kinds.items()}
        return {"x": x.astype(np.float32), "y": {task: value.astype(np.float32) for task, value in y.items()}}

    return draw(task_names(num_harmful)), draw(["primary"])


def make_data(seeds: tuple[int, ...], points: int, num_harmful: int = 1) -> Data:
    """The points of all seeds, with their ids."""
    pairs = [draw_points(seed, points, num_harmful) for seed in seeds]
    train, held_out = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *part) for part in zip(*pairs, strict=True))
    ids = jnp.tile(jnp.arange(points, dtype=jnp.int32), (len(seeds), 1))
    return Data({**train, "id": ids}, held_out)


def with_held_out(data: Data) -> Data:
    """Training points of the primary task from both draws: what `stl+dev` trains on."""
    parts = [{"x": part["x"], "y": {"primary": part["y"]["primary"]}} for part in data]
    return data._replace(train=jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts))


def losses(params, batch, key) -> auxjax.TaskLosses:
    """Half squared errors of the tasks that the batch has labels of; the inputs are the features."""
    del key
    prediction = batch["x"] @ params["w"]
    values = {task: 0.5 * (prediction - label) ** 2 for task, label in batch["y"].items()}
    return auxjax.TaskLosses(values, features=batch["x"])


def options_of(name: str, points: int) -> dict:
    """Options of the methods that cannot be made without any."""
    return {
        "fixed_weights": {"weights": {"helpful": 1.0, "harmful": 0.0}},
        "n_jtds": {"num_examples": points, "ids": lambda batch: batch["id"]},
    }.get(name, {})


EXPLAINED = {
    "fixed_weights": "the right answer: helpful 1, harmful 0",
    "n_jtds": "the number of training points and where their ids are",
}


def order(key, points: int, batch: int, updates: int):
    """`[updates, batch]`, every epoch in a new order; its last batch is filled up with its first points."""
    batches = -(-points // batch)
    epochs = -(-updates // batches)

    def epoch(key):
        rows = jax.random.permutation(key, points)
        return jnp.concatenate([rows, rows[: batches * batch - points]]).reshape(batches, batch)

    return jax.vmap(epoch)(jax.random.split(key, epochs)).reshape(-1, batch)[:updates]


def train(name: str, data: Data, options: argparse.Namespace, on_block) -> Runs:
    """Runs one method from all starts with all seeds.

    Raises:
      TypeError, ValueError: the method cannot be made, or not for this problem.
    """
    data = with_held_out(data) if name == STL_DEV else data
    base, changed, _ = VARIANTS.get(name, (name, {}, ""))
    method = auxjax.methods.get(base, **options_of(base, options.points), **changed)
    model = auxjax.TaskModel(losses, primary="primary")
    init, step = auxjax.make_step(
        model, method, optax.adam(RATE), inner_steps=options.outer_every, loop="scan", donate=False
    )
    every, size = options.outer_every, options.batch
    steps = options.updates // BLOCKS // every  # of one block

    def one_step(points, state, rows):
        inner, outer = (jax.tree.map(lambda leaf, at=at: leaf[at], part) for part, at in zip(points, rows, strict=True))
        state, metrics = step(state, inner, outer)
        weights = {task: metrics.get(f"weight/{task}", jnp.zeros(())) for task in task_names(options.harmful_tasks)}
        powers = {task: metrics[f"power/{task}"] for task in weights if f"power/{task}" in metrics}
        return state, (state.params["w"], (weights, powers), "outer_loss" in metrics)

    def block(state, points, key):
        key_inner, key_outer = jax.random.split(key)
        inner = order(key_inner, points.train["x"].shape[0], size, steps * every)
        outer = order(key_outer, points.held_out["x"].shape[0], size, steps)
        inner = inner if every == 1 else inner.reshape(steps, every, size)
        return jax.lax.scan(partial(one_step, points), state, (inner, outer))

    def begin(start, points, key):
        key_start, key_run = jax.random.split(key)
        params = {"w": start + SPREAD * jax.random.normal(key_start, (2,), jnp.float32)}
        first = order(key_run, points.train["x"].shape[0], size, every)
        batch = jax.tree.map(lambda leaf: leaf[first if every > 1 else first[0]], points.train)
        return init(key_run, params, batch)

    keys = jnp.stack([jax.random.key(seed) for seed in options.seeds])
    starts = jnp.array([STARTS[start] for start in options.starts], jnp.float32)
    # Over starts first: they share a seed's points and batches.
    states = jax.jit(jax.vmap(jax.vmap(begin, (0, None, None)), (None, 0, 0)))(starts, data, keys)
    advance = jax.jit(jax.vmap(jax.vmap(block, (0, None, None))))
    path, logged = [np.asarray(states.params["w"])[:, :, None]], []
    for number in range(BLOCKS):
        block_keys = jax.vmap(lambda key, n=number: jax.random.fold_in(key, n))(keys)
        states, (params, found, held_out) = advance(states, data, block_keys)
        kept = np.arange(steps - 1, -1, -max(1, steps // 5))[::-1]  # the last one always
        path.append(np.asarray(params)[:, :, kept])
        logged.append(jax.tree.map(lambda values: np.asarray(values).mean(axis=-1), found))
        on_block(number + 1)
    means = jax.tree.map(lambda *parts: np.mean(parts, axis=0), *logged[-(BLOCKS // 10) :])
    return Runs(np.concatenate(path, axis=2), *means, bool(np.any(held_out)))


def harmful_share(weights: dict[str, float]) -> float | None:
    """Of the auxiliary weights, by size; `None` where all are 0."""
    harmful = sum(abs(weight) for task, weight in weights.items() if task.startswith("harmful"))
    both = abs(weights["helpful"]) + harmful
    return harmful / both if both > 0 else None


def rows_of(name: str, runs: Runs, options: argparse.Namespace) -> list[dict]:
    """A row per seed and start."""
    rows = []
    for s, seed in enumerate(options.seeds):
        for t, start in enumerate(options.starts):
            weights, powers = (
                {task: float(values[s, t]) for task, values in found.items()} for found in (runs.weights, runs.powers)
            )
            path = runs.path[s, t]
            rows.append(
                {
                    "method": name,
                    "start": start,
                    "seed": seed,
                    "distance": float(np.linalg.norm(path[-1] - np.array(KINDS["primary"][0]))),
                    **weights,
                    "share": harmful_share(weights),
                    "power_share": harmful_share(powers) if powers else None,
                    "path": np.round(path.astype(float), 3).tolist(),
                }
            )
    return rows


def pulls(seeds: tuple[int, ...], points: int) -> dict[str, np.ndarray]:
    """How far noise moves the primary task's least-squares optimum towards the harmful one, per seed, on both draws."""
    good, bad = (np.array(KINDS[kind][0]) for kind in ("primary", "harmful"))
    found = {"train": [], "held_out": []}
    for seed in seeds:
        for name, part in zip(found, draw_points(seed, points), strict=True):
            optimum = np.linalg.lstsq(part["x"], part["y"]["primary"], rcond=None)[0]
            found[name].append((optimum - good) @ (bad - good) / np.linalg.norm(bad - good))
    return {name: np.array(values) for name, values in found.items()}


def correlations(rows: list[dict], options: argparse.Namespace) -> dict[str, float | None]:
    """Over the rows' seeds: of the harmful weight, relative to all, with `pulls`; `None` for one that is the same."""
    tasks = task_names(options.harmful_tasks)
    part = [sum(row[t] for t in tasks[2:]) / max(sum(abs(row[t]) for t in tasks), 1e-30) for row in rows]
    usable = len(rows) > 2 and np.ptp(part) > 1e-6
    found = pulls(options.seeds, options.points)
    return {name: float(np.corrcoef(part, pull)[0, 1]) if usable else None for name, pull in found.items()}


def summarise(rows: list[dict], options: argparse.Namespace) -> list[dict]:
    """Means and half widths of 95 % intervals over seeds, per method and start, and how many seeds have it right."""
    found = []
    for name in dict.fromkeys(row["method"] for row in rows):
        for start in options.starts:
            same = [row for row in rows if row["method"] == name and row["start"] == start]
            entry = {"method": name, "start": start, "seeds": len(same)}
            for key in ("distance", *task_names(options.harmful_tasks), "share", "power_share"):
                values = [row[key] for row in same if row[key] is not None]
                mean, half = mean_and_interval(values) if values else (None, None)
                entry[key] = {"mean": mean, "half_width": half if len(values) > 1 else None}
            weighed = [row for row in same if row["share"] is not None]
            used = [row for row in weighed if row["helpful"] >= LEAST_HELPFUL * abs(row["primary"])]
            right = [row for row in used if row["helpful"] > 0 and row["share"] <= LARGEST_SHARE]
            entry["right"] = len(right) if weighed else None
            entry["follows_noise"] = correlations(same, options)
            found.append(entry)
    return found


def show(summary: list[dict], left_out: dict[str, str], options: argparse.Namespace) -> None:
    """Prints the table, the exceptions to the default options, and the methods by how they fared."""

    def cell(value):
        if value["mean"] is None:
            return "-"
        digits = max(0, 2 - int(np.log10(max(1.0, abs(value["mean"])))))
        half = "" if value["half_width"] is None else f" ± {value['half_width']:.{digits}f}"
        return f"{value['mean']:.{digits}f}{half}"

    problem = f"{options.harmful_tasks} harmful task" + "s" * (options.harmful_tasks > 1)
    table = Table(title=f"Two params, {problem}, {len(options.seeds)} seeds, {options.updates} updates")
    for heading in ("method", "start", "distance", "helpful", "harmful", "share", "right"):
        table.add_column(heading, no_wrap=heading == "method")
    for entry in summary:
        cells = [cell(entry[key]) for key in ("distance", "helpful", "harmful", "share")]
        right = "-" if entry["right"] is None else f"{entry['right']} of {entry['seeds']}"
        last = entry["start"] == options.starts[-1]
        table.add_row(entry["method"], entry["start"], *cells, right, end_section=last)
    terminal.show(table)
    terminal.line("Means over seeds ± half a 95 % confidence interval; see --help for the columns.")
    for entry in summary:
        if entry["power_share"]["mean"] is not None:
            of = f"{entry['method']} from {entry['start']}"
            terminal.line(f"The harmful share of the bargaining powers, {of}: {cell(entry['power_share'])}")
    shown = {entry["method"] for entry in summary}
    for name in sorted(shown & set(EXPLAINED)):
        terminal.line(f"Options of {name}: {EXPLAINED[name]}; it cannot be made without.")
    for name in sorted(shown & set(VARIANTS)):
        terminal.line(f"{name}: {VARIANTS[name][0]}, {VARIANTS[name][2]}.")
    for name, why in left_out.items():
        terminal.line(f"Left out, {name}: {why}")
    for label, names in by_verdict(summary).items():
        terminal.line(f"Right weights from {label}: {', '.join(names) or 'none'}")


def by_verdict(summary: list[dict]) -> dict[str, list[str]]:
    """The methods that weigh auxiliary tasks, by the starts from which they were right with 9 in 10 seeds."""
    found = {"every start": [], "some starts": [], "no start": []}
    for name in dict.fromkeys(entry["method"] for entry in summary):
        same = [entry for entry in summary if entry["method"] == name]
        right = [entry["right"] >= ENOUGH * entry["seeds"] for entry in same if entry["right"] is not None]
        if right:
            found["every start" if all(right) else "some starts" if any(right) else "no start"].append(name)
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    known = sorted([*auxjax.methods.names(), *VARIANTS])

    def integers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    def words(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.two_parameters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=integers, default=tuple(range(10)), metavar="S,S,...", help="default 0,...,9")
    parser.add_argument("--methods", type=words, default=tuple(known), metavar="M,M,...", help="default all of them")
    parser.add_argument("--starts", type=words, default=tuple(STARTS), metavar="S,S", help="origin, harmful or both")
    parser.add_argument("--epochs", type=int, default=1000, help="default 1000; of the training points")
    parser.add_argument("--points", type=int, default=1000, help="training and held-out points (default 1000 each)")
    parser.add_argument("--batch", type=int, default=256, help="points of a batch (default 256)")
    parser.add_argument("--outer-every", type=int, default=1, help="inner updates per outer update (default 1)")
    parser.add_argument("--harmful-tasks", type=int, default=1, metavar="N", help="that agree (default 1)")
    parser.add_argument("--out", type=home_path, metavar="DIR", help="folder of the JSON file and the plots")
    options = parser.parse_args(arguments)
    for name, allowed in (("methods", known), ("starts", STARTS)):
        unknown = [value for value in getattr(options, name) if value not in allowed]
        if unknown:
            parser.error(f"--{name}: no {unknown[0]!r}; known are {', '.join(allowed)}")
    if not 1 <= options.batch <= options.points or min(options.outer_every, options.harmful_tasks) < 1:
        parser.error("--batch must be from 1 to --points, --outer-every and --harmful-tasks at least 1")
    options.updates = options.epochs * -(-options.points // options.batch)
    if options.updates < 1 or options.updates % (BLOCKS * options.outer_every):
        parser.error(f"epochs times batches, {options.updates}, must be a multiple of {BLOCKS} times --outer-every")
    return options


def main(arguments: list[str] | None = None) -> dict:
    """Runs everything; returns what it writes to the JSON file."""
    options = parse(arguments)
    data, rows, left_out, held_out = make_data(options.seeds, options.points, options.harmful_tasks), [], {}, []
    with terminal.progress() as follow:
        for name in options.methods:
            try:
                runs = train(name, data, options, follow(name, BLOCKS))
            except (TypeError, ValueError) as error:  # a method that this problem has nothing for
                left_out[name] = str(error)
                continue
            rows += rows_of(name, runs, options)
            held_out += [name] if runs.held_out else []
    summary = summarise(rows, options)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    result = {"settings": settings, "jax": jax.__version__, "summary": summary, "left_out": left_out}
    result |= {"use_held_out": held_out, "rows": rows}
    show(summary, left_out, options)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "two_parameters.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
        terminal.show_files("Plots", plots.draw_all(result, options.out))
    return result


if __name__ == "__main__":
    main()
