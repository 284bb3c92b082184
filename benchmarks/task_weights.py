"""What the gradient in K task weights costs, against one joint gradient and against K + 1 separate gradients.

    python -m benchmarks.task_weights
    python -m benchmarks.task_weights --tasks 2,39 --repeats 10 --json task_weights.json

Three ways are timed on one convolutional network with K + 1 binary tasks, in one process. The first two take turns
(A B A B ...), so that whatever else the machine does falls on both alike; the third comes after them, and less often
as K grows:

- score matching: `auxjax.formulas.score_matching.score_matching_gradient`, every dD/dw_k;
- joint gradient: one gradient of the weighted sum of all K + 1 losses, what a training step costs anyway;
- separate gradients: the K + 1 gradients one after another, by one compiled function of a traced task number. From
  these the same dD/dw_k follow. This is the usual way, and its cost grows with K.

Before it is timed, the three are checked against each other. The goal is a ratio of score matching to joint gradient
of at most 1.6 at every K.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import rich.table

from auxjax.formulas.score_matching import score_matching_gradient
from auxjax.models import ConvNet
from benchmarks.shared.machine import describe_machine
from benchmarks.shared.paths import home_path

GOAL = 1.6


class Case(NamedTuple):
    """One network with its data and weights, and the three compiled functions of (params, ...) to be timed."""

    params: dict
    weights: jax.Array
    score: Callable  # (params, weights) -> [K]
    joint: Callable  # (params, weights) -> pytree like params
    single: Callable  # (params, task number) -> pytree like params


def make_case(num_tasks: int, *, batch: int, image: int, channels: tuple[int, ...], seed: int) -> Case:
    """Builds the problem: random images, random binary labels, one dense layer for all K + 1 heads."""
    keys = jax.random.split(jax.random.key(seed), 4)
    model = ConvNet(channels=channels, heads={"all": num_tasks + 1})
    images = jax.random.normal(keys[0], (batch, image, image, 3), jnp.float32)
    labels = jax.random.bernoulli(keys[1], 0.5, (batch, num_tasks + 1)).astype(jnp.float32)
    weights = jax.random.uniform(keys[2], (num_tasks,), jnp.float32)

    def losses(params):
        logits = model.apply(params, images).heads["all"]
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels), axis=0)

    def joint(params, weights):
        values = losses(params)
        return values[0] + values[1:] @ weights

    return Case(
        params=model.init(keys[3], images),
        weights=weights,
        score=jax.jit(lambda params, weights: score_matching_gradient(losses, params, weights)),
        joint=jax.jit(jax.grad(joint)),
        single=jax.jit(jax.grad(lambda params, task: losses(params)[task])),
    )


def separate_gradients(case: Case) -> list:
    """The K + 1 gradients, one call each."""
    return [case.single(case.params, jnp.int32(task)) for task in range(case.weights.shape[0] + 1)]


def disagreement(case: Case) -> float:
    """Largest relative difference between the three ways, in the sup norm; compiles all of them on the way."""

    def flatten(tree):
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])

    def relative(value, reference):
        return float(np.max(np.abs(value - reference)) / np.max(np.abs(reference)))

    gradients = np.stack([flatten(gradient) for gradient in separate_gradients(case)])
    weights = np.asarray(case.weights, np.float64)
    residual = gradients[0] - weights @ gradients[1:]
    score = np.asarray(case.score(case.params, case.weights), np.float64)
    joint = flatten(case.joint(case.params, case.weights))
    return max(
        relative(score, -2 * gradients[1:] @ residual),
        relative(joint, gradients[0] + weights @ gradients[1:]),
    )


def time_in_turn(functions: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, the functions taking turns; they must be compiled already."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(num_tasks: int, options: argparse.Namespace) -> dict:
    """Checks and times one number of tasks; returns a row of the table."""
    case = make_case(num_tasks, batch=options.batch, image=options.image, channels=options.channels, seed=options.seed)
    error = disagreement(case)
    if not error <= options.tolerance:
        raise SystemExit(
            f"K = {num_tasks}: the three ways differ by {error:.1e} relative; {options.tolerance:.0e} is allowed. "
            "No times are reported for wrong results."
        )
    fast = {
        "score_matching": lambda: case.score(case.params, case.weights),
        "joint_gradient": lambda: case.joint(case.params, case.weights),
    }
    seconds = time_in_turn(fast, options.repeats)
    slow_repeats = max(1, min(options.repeats, math.ceil(options.repeats * 3 / (num_tasks + 1))))
    seconds |= time_in_turn({"separate_gradients": lambda: separate_gradients(case)}, slow_repeats)
    row = {"tasks": num_tasks, "disagreement": error}
    for name, values in seconds.items():
        row[name] = {"median_s": statistics.median(values), "min_s": min(values), "repeats": len(values)}
    for statistic in ("median", "min"):
        base = row["joint_gradient"][f"{statistic}_s"]
        for name in ("score_matching", "separate_gradients"):
            row[name][f"ratio_of_{statistic}"] = row[name][f"{statistic}_s"] / base
    row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(case.params))
    return row


def show(rows: list[dict], machine: dict) -> None:
    """Prints the table."""
    table = rich.table.Table(
        title=f"Gradient in K task weights: milliseconds, median (minimum); {machine['device']}, "
        f"{machine['cpu_count']} CPU cores, jax {machine['jax']}"
    )
    for heading in ("K", "score matching", "joint gradient", "ratio", "separate gradients", "ratio ", "differ by"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = [
            f"{1e3 * row[name]['median_s']:.1f} ({1e3 * row[name]['min_s']:.1f})"
            for name in ("score_matching", "joint_gradient", "separate_gradients")
        ]
        ratios = [
            f"{row[name]['ratio_of_median']:.2f} ({row[name]['ratio_of_min']:.2f})"
            for name in ("score_matching", "separate_gradients")
        ]
        table.add_row(
            str(row["tasks"]), times[0], times[1], ratios[0], times[2], ratios[1], f"{row['disagreement']:.0e}"
        )
    rich.print(table)
    worst = max(row["score_matching"]["ratio_of_median"] for row in rows)
    verdict = "met" if worst <= GOAL else "missed"
    rich.print(f"Goal of at most {GOAL} joint gradients: {verdict}; the worst median ratio is {worst:.2f}.")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""

    def integers(text: str) -> tuple[int, ...]:
        values = tuple(int(part) for part in text.split(","))
        if min(values) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
        return values

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.task_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tasks",
        type=integers,
        default=(2, 39, 312),
        metavar="K,K,...",
        help="numbers of auxiliary tasks (default 2,39,312: S4L, CelebA, CUB attributes)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=20,
        metavar="N",
        help="timed calls of each fast way; the separate gradients get fewer as K grows (default 20)",
    )
    parser.add_argument("--batch", type=int, default=64, help="images per batch (default 64)")
    parser.add_argument("--image", type=int, default=32, help="height and width of the images (default 32)")
    parser.add_argument(
        "--channels",
        type=integers,
        default=(32, 64, 128),
        metavar="C,C,...",
        help="channels of the network's stages (default 32,64,128)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data and parameters (default 0)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="largest relative difference allowed between the three ways, in float32 (default 1e-3)",
    )
    parser.add_argument(
        "--json", type=home_path, metavar="FILE", help="also write times, versions and hardware to this file"
    )
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> dict:
    """Runs the benchmark; returns what it writes to the JSON file."""
    options = parse(arguments)
    rows = [measure(num_tasks, options) for num_tasks in options.tasks]
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    result = {"settings": settings, "goal": GOAL, "machine": describe_machine(), "rows": rows}
    show(rows, result["machine"])
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    return result


if __name__ == "__main__":
    main()
