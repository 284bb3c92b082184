"""How far JTDS's hypergradient is off when the weights are held fixed in the Jacobian of its update.

    python -m benchmarks.studies.jtds_jacobian
    python -m benchmarks.studies.jtds_jacobian --seeds 0,1 --hidden 0 --check 0 --out jtds_jacobian.json

JTDS trains theta with d(theta, phi) = sum_k mean_i w_ik(phi, theta) grad l_ik(theta) + decay theta. The weights follow
theta through losses and features. The published form of the hypergradient leaves that out of J = dd/dtheta; the exact
one counts it. Both are computed here by a dense solve, in float64, at a point where d = 0 to 1e-10, so that nothing but
the form of J differs:

    relative error = ||g_fixed - g_exact|| / ||g_exact||      and the cosine, per part of phi and in total

Data: scikit-learn's digits, 40 % of the training labels wrong; primary task: the digit, on clean dev images in the
outer loss; auxiliary task: by how many quarter turns an image was rotated. A softmax-linear model (`--hidden 0`, whose
features do not move) or a perceptron with one tanh layer. phi at its initial values, and after some training by JTDS.
`--check` compares g_exact with central differences of the dev loss, the inner problem solved anew for each.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import rich.table
import scipy.linalg
from jax.flatten_util import ravel_pytree

import auxjax
from auxjax import BilevelProblem, dense, implicit, neumann, one_step
from auxjax.tasks.rotation import rotate_batch
from benchmarks.shared.paths import home_path
from experiments.data import digits
from experiments.evaluation.statistics import mean_and_interval

PARTS = ("importance", "prototype", "slope", "offset")
TASKS = {"digit": 10, "rotation": 4}
PIXELS = 64
INNER_STEPS = 5
DESCENT_STEPS = 20_000


class Case(NamedTuple):
    """One seed's initial params, inner batch (inputs and labels of both tasks) and outer batch."""

    params: Any
    train: dict
    dev: dict


class Lower(NamedTuple):
    """JTDS as a bilevel problem with weight decay, compiled once for all seeds.

    Attributes:
      held_fixed, exact: the two forms of the problem; they have the same fixed points.
      estimate: `{form: (params, schedule, train, dev) -> (hypergradient, info)}`, by a dense solve.
      field: `(flat params, schedule, train) -> [n]`.
      jacobian: its derivative in the params, [n, n].
      outer: `(flat params, schedule, dev) -> scalar`.
      descend: `(flat params, schedule, train) -> flat params`, many steps along the field.
      unravel: flat params -> params.
      init, step: the training step of JTDS as it is used.
    """

    held_fixed: BilevelProblem
    exact: BilevelProblem
    estimate: dict
    field: Callable
    jacobian: Callable
    outer: Callable
    descend: Callable
    unravel: Callable
    init: Callable
    step: Callable


def make_case(seed: int, options: argparse.Namespace) -> Case:
    """Digits with wrong labels, each image also turned by a random number of quarter turns, and initial params."""
    data = digits.load(seed, noise=options.noise, train_size=options.train, dev_size=options.dev)
    key_train, key_dev, key_params = jax.random.split(jax.random.key(seed), 3)

    def batch(part, key):
        images = jnp.asarray(part["image"], jnp.float64)
        turns = jax.random.randint(key, (images.shape[0],), 0, 4, jnp.int32)
        flat = {"digit": images, "rotation": rotate_batch(images, turns)}
        inputs = {task: image.reshape(image.shape[0], -1) for task, image in flat.items()}
        return {"inputs": inputs, "labels": {"digit": jnp.asarray(part["label"]), "rotation": turns}}

    def layer(key, rows, columns):
        kernel = jax.random.normal(key, (rows, columns), jnp.float64) / rows**0.5
        return {"kernel": kernel, "bias": jnp.zeros(columns, jnp.float64)}

    keys = jax.random.split(key_params, 3)
    width = options.hidden or PIXELS
    params = {task: layer(key, width, size) for key, (task, size) in zip(keys[:2], TASKS.items(), strict=True)}
    if options.hidden:
        params["trunk"] = layer(keys[2], PIXELS, width)
    return Case(params, batch(data.pools["train"].arrays, key_train), batch(data.pools["dev"].arrays, key_dev))


def losses(params, batch, key) -> auxjax.TaskLosses:
    """Cross-entropies of both tasks; the features are the pixels, or the outputs of the tanh layer."""
    del key
    values, features = {}, {}
    for task, x in batch["inputs"].items():
        if "trunk" in params:
            x = jnp.tanh(x @ params["trunk"]["kernel"] + params["trunk"]["bias"][None, :])
        logits = x @ params[task]["kernel"] + params[task]["bias"][None, :]
        values[task] = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"][task])
        features[task] = x
    return auxjax.TaskLosses(values, features=features)


def with_decay(problem: BilevelProblem, decay: float) -> BilevelProblem:
    """The problem with `decay / 2 ||params||^2` in its inner loss, or `decay params` in its field."""
    if problem.update_field is not None:

        def update_field(params, meta, batch):
            field = problem.update_field(params, meta, batch)
            return jax.tree.map(lambda f, p: f + decay * p, field, params)

        return BilevelProblem(update_field=update_field, outer=problem.outer)

    def inner(params, meta, batch):
        return problem.inner(params, meta, batch) + decay / 2 * optax.tree.norm(params, squared=True)

    return BilevelProblem(inner=inner, outer=problem.outer)


def make_lower(case: Case, standardise: bool, options: argparse.Namespace) -> Lower:
    """Both forms of JTDS's problem, taken from the method itself through the estimator that it calls."""
    model = auxjax.TaskModel(losses, primary="digit")
    found = {}
    for jacobian in ("held_fixed", "exact"):

        def capture(problem, *arguments, jacobian=jacobian, **named):
            found[jacobian] = with_decay(problem, options.decay)
            return one_step(1.0)(problem, *arguments, **named)

        method = auxjax.methods.get("jtds", jacobian=jacobian, standardise=standardise, hypergradient=capture)
        init, step = auxjax.make_step(model, method, optax.sgd(0.0), donate=False)
        jax.eval_shape(step, init(jax.random.key(0), case.params, case.train), case.train, case.dev)

    unravel = ravel_pytree(case.params)[1]

    def field(flat, schedule, batch):
        return ravel_pytree(found["exact"].update_field(unravel(flat), schedule, batch))[0]

    def descend(flat, schedule, batch):
        def going_on(carry):
            count, _, velocity = carry
            return (count < DESCENT_STEPS) & ((count == 0) | (jnp.linalg.norm(velocity) > 1e-8))

        def step(carry):
            count, flat, velocity = carry
            velocity = 0.9 * velocity - 0.3 * field(flat, schedule, batch)
            return count + 1, flat + velocity, velocity

        return jax.lax.while_loop(going_on, step, (0, flat, jnp.zeros_like(flat)))[1]

    def neumann_estimator(problem, *arguments, **named):
        return implicit(neumann(3))(with_decay(problem, options.decay), *arguments, **named)

    method = auxjax.methods.get(
        "jtds",
        standardise=standardise,
        hypergradient=neumann_estimator,
        outer_optimizer=optax.adam(options.outer_rate),
    )
    optimizer = optax.chain(optax.add_decayed_weights(options.decay), optax.sgd(0.3, momentum=0.9))
    init, step = auxjax.make_step(
        model, method, optimizer, inner_steps=INNER_STEPS, draw_inner=lambda data, key: data, donate=False
    )
    return Lower(
        held_fixed=found["held_fixed"],
        exact=found["exact"],
        estimate={form: jax.jit(partial(implicit(dense()), problem)) for form, problem in found.items()},
        field=jax.jit(field),
        jacobian=jax.jit(jax.jacfwd(field)),
        outer=jax.jit(lambda flat, schedule, batch: found["exact"].outer(unravel(flat), schedule, batch)),
        descend=jax.jit(descend),
        unravel=unravel,
        init=init,
        step=step,
    )


def train(lower: Lower, case: Case, steps: int, key: int):
    """Params and schedule after JTDS as it is used: 5 inner updates and one outer update, `steps` times."""
    state = lower.init(jax.random.key(key), case.params, case.train)
    for _ in range(steps):
        state, _ = lower.step(state, case.train, case.dev)
    return state.params, state.method.meta


def fixed_point(lower: Lower, case: Case, params, schedule, tolerance: float = 1e-10, most: int = 200):
    """Flat params with `||field|| <= tolerance`: descent with momentum, then a damped Newton method.

    `theta <- theta - (J + mu I)^{-1} d`,  mu = c ||d||: along the flow of the update when far away, which ends in its
    stable points, and Newton's own step when near. A step that makes the field twice as large is taken back.
    """
    flat = np.asarray(lower.descend(ravel_pytree(params)[0], schedule, case.train))
    value, factor = np.asarray(lower.field(flat, schedule, case.train)), 1.0
    for _ in range(most):
        size = np.linalg.norm(value)
        if size <= tolerance:
            return flat
        damped = np.asarray(lower.jacobian(flat, schedule, case.train)) + factor * size * np.eye(flat.size)
        candidate = flat - np.linalg.solve(damped, value)
        new = np.asarray(lower.field(candidate, schedule, case.train))
        if np.linalg.norm(new) <= 2 * size:
            flat, value, factor = candidate, new, max(factor / 2, 1e-3)
        else:
            factor *= 8
    raise SystemExit(f"The inner problem was not solved: ||field|| = {np.linalg.norm(value):.1e} after {most} steps.")


def compare(fixed, exact) -> dict:
    """Relative error and cosine per part of the schedule, over all tasks, and in total."""

    def vectors(schedule):
        found = {part: [np.ravel(getattr(task, part)) for task in schedule.values()] for part in PARTS}
        found = {part: np.concatenate(leaves) for part, leaves in found.items()}
        return found | {"total": np.concatenate(list(found.values()))}

    fixed, exact = vectors(fixed), vectors(exact)
    norm = np.linalg.norm
    return {
        part: {
            "relative_error": float(norm(fixed[part] - exact[part]) / norm(exact[part])),
            "cosine": float(fixed[part] @ exact[part] / (norm(fixed[part]) * norm(exact[part]))),
            "norm_ratio": float(norm(fixed[part]) / norm(exact[part])),
        }
        for part in exact
    }


def difference_error(case: Case, lower: Lower, flat, schedule, exact, step: float = 1e-3) -> float:
    """Relative distance of g_exact from five-point differences of phi -> dev loss at the re-solved params.

    The params move little, so that Newton's method with the factorised Jacobian of the middle finds them.
    """
    middle, restore = ravel_pytree(schedule)
    factors = scipy.linalg.lu_factor(np.asarray(lower.jacobian(flat, schedule, case.train)))

    def value(phi):
        phi, theta = restore(jnp.asarray(phi)), flat
        for _ in range(50):
            left = np.asarray(lower.field(theta, phi, case.train))
            if np.linalg.norm(left) < 1e-13:
                break
            theta = theta - scipy.linalg.lu_solve(factors, left)
        return float(lower.outer(theta, phi, case.dev))

    slopes = []
    for e in step * np.eye(middle.size):
        near, far = (value(middle + k * e) - value(middle - k * e) for k in (1, 2))
        slopes.append((8 * near - far) / (12 * step))
    wanted = np.asarray(ravel_pytree(exact)[0])
    return float(np.linalg.norm(np.asarray(slopes) - wanted) / np.linalg.norm(wanted))


def measure(lower: Lower, case: Case, steps: int, options: argparse.Namespace, check: bool) -> dict:
    """Trains phi for that many steps, solves the inner problem there, and compares the two forms."""
    params, schedule = train(lower, case, steps, options.key)
    flat = fixed_point(lower, case, params, schedule)
    arguments = (lower.unravel(jnp.asarray(flat)), schedule, case.train, case.dev)
    (fixed, _), (exact, info) = (lower.estimate[form](*arguments) for form in ("held_fixed", "exact"))
    jacobian = np.asarray(lower.jacobian(flat, schedule, case.train))
    row = {
        "parts": compare(fixed, exact),
        "inner_grad_norm": float(info.inner_grad_norm),
        "relative_residual": float(info.relative_residual),
        "least_real_part": float(np.min(np.linalg.eigvals(jacobian).real)),
        "asymmetry": float(np.linalg.norm(jacobian - jacobian.T) / np.linalg.norm(jacobian)),
        "slopes": {task: float(part.slope) for task, part in schedule.items()},
    }
    return row | ({"difference_error": difference_error(case, lower, flat, schedule, exact)} if check else {})


def measure_all(options: argparse.Namespace) -> list[dict]:
    """The rows of all seeds: standardised losses or not, phi at its start or trained."""
    cases, rows = {seed: make_case(seed, options) for seed in options.seeds}, []
    for standardise in (True, False):
        lower = make_lower(cases[options.seeds[0]], standardise, options)
        for seed, case in cases.items():
            for phase, steps in (("initial", 0), ("trained", options.steps)):
                found = measure(lower, case, steps, options, seed == options.check)
                rows.append({"seed": seed, "standardise": standardise, "phase": phase} | found)
    return rows


def summarise(rows: list[dict]) -> list[dict]:
    """Means and half widths of 95 % intervals over seeds."""
    found = []
    for standardise in (True, False):
        for phase in ("initial", "trained"):
            same = [row for row in rows if row["standardise"] == standardise and row["phase"] == phase]
            for part in (*PARTS, "total"):
                entry = {"standardise": standardise, "phase": phase, "part": part, "seeds": len(same)}
                for name in ("relative_error", "cosine", "norm_ratio"):
                    mean, half = mean_and_interval([row["parts"][part][name] for row in same])
                    entry[name] = {"mean": mean, "half_width": half if len(same) > 1 else None}
                found.append(entry)
    return found


def show(summary: list[dict], rows: list[dict], options: argparse.Namespace) -> None:
    """Prints the table."""

    def cell(entry):
        half = "" if entry["half_width"] is None else f" ± {entry['half_width']:.3f}"
        return f"{entry['mean']:.3f}{half}"

    model = f"perceptron, {options.hidden} tanh units" if options.hidden else "softmax-linear"
    table = rich.table.Table(title=f"JTDS: weights held fixed in the Jacobian against the exact one ({model})")
    for heading in ("losses", "phi", "part", "relative error", "cosine", "norm, fixed / exact"):
        table.add_column(heading)
    for entry in summary:
        losses = "standardised" if entry["standardise"] else "as they are"
        cells = [cell(entry[name]) for name in ("relative_error", "cosine", "norm_ratio")]
        table.add_row(losses, entry["phase"], entry["part"], *cells, end_section=entry["part"] == "total")
    rich.print(table)
    checked = [row["difference_error"] for row in rows if "difference_error" in row]
    if checked:
        rich.print(f"g_exact against differences of the re-solved inner problem, worst of all: {max(checked):.1e}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""

    def integers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.jtds_jacobian",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=integers, default=(0, 1, 2, 3, 4), metavar="S,S,...", help="default 0,1,2,3,4")
    parser.add_argument("--hidden", type=int, default=8, help="tanh units; 0 for softmax-linear (default 8)")
    parser.add_argument("--train", type=int, default=500, help="training images (default 500)")
    parser.add_argument("--dev", type=int, default=200, help="clean images of the outer loss (default 200)")
    parser.add_argument("--noise", type=float, default=0.4, help="share of wrong training labels (default 0.4)")
    parser.add_argument("--decay", type=float, default=3e-3, help="L2 of the inner problem (default 0.003)")
    parser.add_argument("--steps", type=int, default=150, help="outer updates that train phi (default 150)")
    parser.add_argument("--outer-rate", type=float, default=1e-2, help="Adam's rate for phi (default 0.01)")
    parser.add_argument("--key", type=int, default=0, help="seed of phi's initial values (default 0)")
    parser.add_argument("--check", type=int, metavar="SEED", help="seed to check against differences (default none)")
    parser.add_argument("--out", type=home_path, metavar="FILE", help="also write everything to this JSON file")
    options = parser.parse_args(arguments)
    for name, least in (("hidden", 0), ("train", 10), ("dev", 10), ("steps", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if not options.decay > 0:
        parser.error("--decay must be positive: without it the inner problem need not have a solution")
    return options


def main(arguments: list[str] | None = None) -> dict:
    """Runs the comparison; returns what it writes to the JSON file."""
    options = parse(arguments)
    with jax.enable_x64(True):
        rows = measure_all(options)
    summary = summarise(rows)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    result = {"settings": settings, "jax": jax.__version__, "summary": summary, "rows": rows}
    show(summary, rows, options)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    return result


if __name__ == "__main__":
    main()
