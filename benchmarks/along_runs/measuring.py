"""Hypergradients along a run, taken again at its own params and weights."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from auxjax.methods.shared.outer_level import OuterState
from auxjax.training.step import make_updates
from benchmarks.along_runs.estimators import estimators, of_losses_too
from experiments import configs
from experiments.data import pools
from experiments.evaluation.statistics import auroc
from experiments.methods import defaults, labels
from experiments.training import sources
from experiments.training.single import on_device

INNER_STEPS = 5  # per outer one


def catch() -> optax.GradientTransformation:
    """An optimiser that moves nothing and has the last gradient as its state."""

    def update(gradient, state, params=None):
        del state, params
        return jax.tree.map(jnp.zeros_like, gradient), gradient

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def outer_state(state) -> OuterState:
    """The outer level's part of a training state."""
    return state.method if isinstance(state.method, OuterState) else state.method.outer


def with_outer(state, outer: OuterState):
    """The training state with another one."""
    return state._replace(method=outer if isinstance(state.method, OuterState) else state.method._replace(outer=outer))


def by_task(method: str, gradient, tasks) -> dict[str, jax.Array] | None:
    """`{auxiliary task: d L_dev / d (its weight)}`, `None` for weights that are the examples' alone."""
    if method == "jtds":
        return {task: gradient[task].importance for task in tasks[1:]}
    if method == "auxilearn":
        return {task: gradient[task] for task in tasks[1:]}
    if method == "n_jtds":
        return None
    names = sorted(tasks[1:])
    values = jnp.sum(gradient, axis=0) if method == "maoal" else gradient[1:]
    return dict(zip(names, values, strict=True))


def measure(config_name: str, method_name: str, seed: int, moments, draws: int, turns: int = 15) -> list[dict]:
    """A row per moment and estimator; how long an outer update takes is measured once, after the run."""
    config = configs.get(config_name)
    settings = config.Settings()
    data = config.load(settings, seed, None)
    shapes = pools.shapes(data)
    experiment = config.build(settings, shapes)
    inner, outer = (
        on_device(arrays)
        for arrays in (
            sources.inner_arrays(experiment, data),
            sources.outer_arrays(experiment, data, dev="held_out"),
        )
    )
    options = defaults.options_of(config, settings, shapes)
    own = {name: value for name, value in options.get(method_name, {}).items() if name != "outer_optimizer"}
    model = of_losses_too(experiment.model)

    def updates_of(**more):
        made = labels.make(method_name, {**options, method_name: {**own, **more}})
        return make_updates(
            model,
            made,
            experiment.optimizer,
            inner_steps=INNER_STEPS,
            draw_inner=experiment.draw_inner,
            draw_outer=experiment.draw_outer,
        )

    known = estimators(model, method_name)
    run = updates_of(hypergradient=known["neumann(3)"])
    key_params, key_run = jax.random.split(jax.random.key(seed))
    state = run.init(key_run, experiment.init_params(key_params)[0], inner)
    inner_update, outer_update = jax.jit(run.inner), jax.jit(run.outer)
    caught, carried = {}, {}
    for name, estimator in known.items():
        probe = updates_of(outer_optimizer=catch(), hypergradient=estimator)
        start = probe.init(key_run, state.params, inner)
        carried[name] = outer_state(start).hypergradient
        caught[name] = jax.jit(probe.outer)

    def probed(name, state):
        """Gradient and metrics of an estimator; what it carries from one outer update to the next goes on."""
        meta = outer_state(state).meta
        zero = jax.tree.map(jnp.zeros_like, meta)
        new, metrics = caught[name](with_outer(state, OuterState(meta, zero, carried[name])), inner, outer, 0)
        return outer_state(new), metrics

    stateful = [name for name in known if jax.tree.leaves(carried[name])]
    rows = []
    for count in range(1, moments[-1] + 1):
        for index in range(INNER_STEPS):
            state, _ = inner_update(state, inner, index)
        if count in moments:
            keys = [jax.random.fold_in(state.key, 1000 + draw) for draw in range(draws)]
            found = {name: [probed(name, state._replace(key=key)) for key in keys] for name in known}
            about = {"config": config_name, "method": method_name, "seed": seed, "moment": count}
            rows += [about | row for row in compare(method_name, found, shapes.tasks)]
        for name in stateful:
            carried[name] = probed(name, state)[0].hypergradient
        state, _ = outer_update(state, inner, outer, 0)
    times = milliseconds({name: partial(probed, name, state) for name in known}, turns)
    return [row | {"milliseconds": round(times[row["estimator"]], 3)} for row in rows]


def milliseconds(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Median time of each call, in turns that have all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(values)) for name, values in times.items()}


def compare(method: str, found: dict[str, list], tasks) -> list[dict]:
    """The rows of one moment, from `{estimator: [(outer state with the gradient, metrics)]}`."""
    gradients = {
        name: np.stack([np.asarray(ravel_pytree(state.opt_state)[0], np.float64) for state, _ in draws])
        for name, draws in found.items()
    }
    exact = {name: values for name, values in gradients.items() if name.startswith("exact")}
    judge = exact.get("exact, Gauss-Newton", exact["exact, Hessian"])
    mean, spread = judge.mean(axis=0), judge.std(axis=0, ddof=1)
    clear = np.abs(mean) > spread
    rows = []
    for name, draws in found.items():
        row: dict[str, Any] = {"estimator": name}
        for reference, values in exact.items():
            row[f"cosine, {reference.removeprefix('exact, ')}"] = [
                round(cosine(*pair), 4) for pair in zip(gradients[name], values, strict=True)
            ]
        wrong = np.sign(gradients[name][:, clear]) != np.sign(mean[clear])
        row |= {"wrong": int(wrong.sum()), "clear": int(wrong.size), "all": int(judge.size)}
        signals = [by_task(method, state.opt_state, tasks) for state, _ in draws]
        if signals[0] is not None and any(task.startswith("helpful") for task in signals[0]):
            helpful = np.array([task.startswith("helpful") for task in signals[0]])
            row["auroc"] = [round(auroc(-np.array(list(one.values())), helpful), 4) for one in signals]
            total = sum(np.array(list(one.values()), np.float64) for one in signals)
            row["auroc of the mean"] = round(auroc(-total, helpful), 4)
        for key in ("relative_residual", "converged", "min_curvature", "num_matvecs"):
            row[key] = round(float(np.mean([metrics[f"hypergradient/{key}"] for _, metrics in draws])), 5)
        rows.append(row)
    return rows


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """0 where one of them is 0."""
    size = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / size) if size > 0 else 0.0
