"""The learning run of `cross_fit`: `auxjax.learn_weights` on train and dev, a round at a time, which resumes.

It holds back no labels but those of a fold, so that train and dev are one set here. A folder of it has run.json,
metrics.jsonl with a line per round, rounds.json (the state after the last round, to the bit) and result.json, as other
runs do, and no trained params: there is nothing to judge before the refit.
"""

import dataclasses
import functools
import inspect
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from auxjax import TaskModel, learn_weights, make_rounds
from auxjax.training.folds import fold_rows
from auxjax.training.weight_learning import Rounds, WeightState
from experiments import configs
from experiments.contract import Experiment
from experiments.data import pools
from experiments.data.checking import check_data
from experiments.data.pools import Data, Shapes
from experiments.inputs.batches import Draw, Draws
from experiments.methods.labels import Label, text_of
from experiments.runtime import interruption, records
from experiments.training import sources

MEASURED = 4  # a measurement sees so many times the examples of an inner batch


def check(label: Label) -> None:
    """Raises a ValueError for options that the rounds cannot have."""
    options = _options(label)
    rounds = options.pop("rounds")
    if rounds < 1:
        raise ValueError(f"method {text_of(label)!r}: expected rounds >= 1.")
    if not options.get("restart", True):
        raise ValueError(
            f"method {text_of(label)!r}: expected restart=true; a run's folder keeps no networks between rounds. "
            "auxjax.make_rounds(restart=False) does."
        )
    unused = dict.fromkeys(("init_params", "draw_inner", "draw_held_out"), check)
    make_rounds(TaskModel(losses=check, primary=""), optax.identity(), **unused, **options)


def _options(label: Label) -> dict:
    """The options with the defaults of those that a run has to know."""
    signatures = {"rounds": learn_weights, "updates": make_rounds, "folds": make_rounds}
    known = {name: inspect.signature(function).parameters[name].default for name, function in signatures.items()}
    return known | dict(label.options)


class Task(NamedTuple):
    """A run's data and program: `data` is what the draws of `rounds` draw from."""

    experiment: Experiment
    source: Data
    rounds: Rounds
    data: dict
    folds: int


def learn(config, settings, label: Label, seed, directory, description, *, data_dir, on_step, place) -> dict:
    """Learns, or resumes, and returns the result: `{"step": updates, "learned_weights": {task: weight}}`.

    Args:
      config, settings, seed, directory, data_dir: as for `single.train`.
      label: of `cross_fit`, with its options.
      description: what the run is, see `records.claim`.
      on_step: called with the number of inner updates of a network so far.
      place: `arrays -> arrays on the device`.
    """
    directory, started = pathlib.Path(directory), time.perf_counter()
    if jax.process_count() > 1:
        raise ValueError("cross_fit: expected one process; the folds are one program on one device.")
    options = _options(label)
    rounds, updates = options.pop("rounds"), options["updates"]
    task = prepare(config, settings, options, seed, data_dir, place)
    provenance = {"data": task.source.source, "data_crc32": pools.checksum(task.source), "learning_only": True}
    provenance |= {"primary": task.experiment.model.primary, "metric": task.experiment.metric, "metrics": {}}
    with records.claim(directory, description, provenance):
        names = task.rounds.tasks(task.data)
        state = _resume(directory, task, seed)
        while int(state.round) < rounds:
            interruption.check()
            state, info = task.rounds.round(state, task.data)
            if not np.isfinite(np.asarray(info.signal)).all():
                raise FloatingPointError(
                    f"a hypergradient of round {int(state.round)} is not finite, so learning stopped. What is in "
                    f"{directory} is from before. Try a smaller learning rate, in another --out."
                )
            _log(directory, task, names, state, info, updates)
            on_step(int(state.round) * updates)
            if interruption.preemption_requested(int(state.round)):
                raise interruption.Preempted(int(state.round) * updates)
        weights = dict(zip(names, map(float, task.rounds.weights(state)), strict=True))
        result = {"step": rounds * updates * task.folds, "learned_weights": weights}
        records.save_arrays(directory / "weights.npz", **sources.hidden_arrays(task.experiment, task.source))
        records.write_json(directory / "result.json", result)
    records.append_line(directory / "timing.jsonl", {"step": result["step"], "seconds": time.perf_counter() - started})
    return result


def prepare(config, settings, options: dict, seed: int, data_dir, place) -> Task:
    """Reads the data, divides the labelled examples into folds and builds the program; nothing is computed or written.

    Args:
      config, settings, seed, data_dir: as for `single.train`.
      options: of `auxjax.make_rounds`, hashable values, `folds` among them.
      place: `arrays -> arrays on the device`.
    """
    data = configs.get(config).load(settings, seed, data_dir)
    check_data(data)
    trained_on = pools.with_dev(data)
    folds = options["folds"]
    shapes = pools.shapes(trained_on)
    experiment, rounds = _rounds(config, settings, shapes, tuple(sorted(options.items())))
    pool = sources.primary_part(experiment, trained_on)[1]
    kept, held_out = _rows(sources.labelled(experiment, trained_on), trained_on, pool, folds, seed)
    drawn = {
        "inner": place(sources.inner_arrays(experiment, trained_on)),
        "outer": place(sources.outer_arrays(experiment, trained_on, dev="train")),
        "kept": kept,
        "held_out": held_out,
    }
    return Task(experiment, data, rounds, drawn, folds)


def begin(task: Task, seed: int) -> WeightState:
    """Equal weights, and the key of a seed's rounds, which is none that its runs have."""
    return task.rounds.init(jax.random.fold_in(jax.random.key(seed), 1), task.data)


def _rows(labelled: np.ndarray, data: Data, pool: str, folds: int, seed: int):
    """Rows `[F, n]` of the primary pool that each fold leaves, and `[F, m]` that it holds out; labelled ones alone."""
    known = np.flatnonzero(labelled)
    column = data.columns[data.primary]
    target = pools.at_rows(data.pools[pool].arrays[data.primary], known)
    of_class = column.kind in ("class", "binary", "ordinal") and target.ndim == 1
    held_out = known[np.asarray(fold_rows(target if of_class else known.size, folds, seed).held_out)]
    kept = np.stack([np.setdiff1d(np.arange(labelled.size), rows) for rows in held_out])
    return jnp.asarray(kept, jnp.int32), jnp.asarray(held_out, jnp.int32)


@functools.lru_cache(maxsize=32)
def _rounds(config: str, settings, shapes: Shapes, options: tuple) -> tuple[Experiment, Rounds]:
    """The program, which the seeds of one process share."""
    experiment = configs.get(config).build(settings, shapes)
    of_primary = _primary_pools(experiment, shapes)
    inner, outer = experiment.draw_inner, experiment.draw_outer
    made = make_rounds(
        experiment.step_model or experiment.model,
        experiment.optimizer,
        experiment.init_params,
        draw_inner=_of_fold(inner, "inner", "kept", of_primary["inner"]),
        draw_held_out=_of_fold(outer, "outer", "held_out", of_primary["outer"]),
        draw_measured=_of_fold(_larger(inner), "inner", "kept", of_primary["inner"]),
        **dict(options),
    )
    return experiment, made


def _primary_pools(experiment: Experiment, shapes: Shapes) -> dict[str, tuple[str, ...]]:
    """The parts of an inner and of an outer batch that come from the pool of the primary target, dev being in it."""
    arrays = {pool.name: {name for name, *_ in pool.arrays} for pool in shapes.pools}
    found = {}
    for level, draws in (("inner", experiment.draw_inner), ("outer", experiment.draw_outer)):
        of = {} if isinstance(draws, Draw) else draws.of
        found[level] = tuple(part for part, draw in of.items() if shapes.primary in arrays.get(draw.pool or part, ()))
    return found


def _larger(draws: Draw | Draws) -> Draw | Draws:
    if isinstance(draws, Draw):
        return dataclasses.replace(draws, batch_size=MEASURED * draws.batch_size)
    return Draws({part: _larger(draw) for part, draw in draws.of.items()})


def _of_fold(draws: Draw | Draws, level: str, rows: str, parts: tuple[str, ...]):
    """`(data, key, fold) -> batch`: the primary pool's examples are those of `data[rows][fold]`."""

    def draw(data, key, *, fold, step, run_key):
        chosen = data[rows][fold]
        given = chosen if isinstance(draws, Draw) else dict.fromkeys(parts, chosen)
        return draws(data[level], key, step=step, run_key=run_key, rows=given)

    return draw


def _resume(directory: pathlib.Path, task: Task, seed: int) -> WeightState:
    """The state after the last round that is written down, or equal weights; the log is cut back to it."""
    state = begin(task, seed)
    path = directory / "rounds.json"
    if not path.exists():
        (directory / "metrics.jsonl").unlink(missing_ok=True)
        return state
    saved = records.read_json(path)
    records.keep_lines(directory / "metrics.jsonl", saved["step"], saved["round"])
    return state._replace(
        round=jnp.int32(saved["round"]),
        logits=jnp.asarray(saved["logits"], state.logits.dtype),
        squares=jnp.asarray(saved["squares"], state.squares.dtype),
    )


def _log(directory, task: Task, names, state: WeightState, info, updates: int) -> None:
    """A line of the round, and its state, whose float32 numbers a JSON file keeps to the bit."""
    step = int(state.round) * updates
    mean = np.asarray(info.signal).mean(axis=(0, 1))
    line = {"step": step, f"weight/{task.experiment.model.primary}": 1.0}
    line |= {"outer_loss": float(np.mean(info.held_out)), "residual": float(np.mean(info.residual))}
    for place, name in enumerate(names):
        line |= {f"weight/{name}": float(info.weights[place]), f"signal/{name}": float(mean[place])}
    records.append_line(directory / "metrics.jsonl", line)
    records.to_disk(directory / "metrics.jsonl")
    logits, squares = np.asarray(state.logits).tolist(), float(state.squares)
    saved = {"round": int(state.round), "step": step, "logits": logits, "squares": squares}
    records.write_json(directory / "rounds.json", saved)
