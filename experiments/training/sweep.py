"""The training loop of a sweep: as `training.single.train`, with all runs in one program.

Every run has its own split, label noise, params and draws, those that `experiments.run` gives its seed, and ends with
the same numbers up to the rounding of batched matrix products. The data of all runs lie on the device side by side.

DIR/run.json         config, method, settings, what is swept, seeds, data, versions
DIR/metrics.jsonl    one JSON line per logged step and run
DIR/sweep.json       the final metrics of every run, written once, at the end
DIR/timing.jsonl     seconds per part of the sweep
DIR/checkpoints/     the newest training states, all runs in one
"""

import contextlib
import pathlib
import time
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from auxjax import task_weights
from auxjax.training.parallel import shard_batch
from auxjax.training.sweep import make_sweep, run_of
from experiments import configs
from experiments.contract import Experiment
from experiments.data import pools
from experiments.data.checking import check_data
from experiments.data.pools import Data, Shapes
from experiments.evaluation.evaluators import Trained
from experiments.inputs import feeds
from experiments.methods import labels
from experiments.runtime import records
from experiments.training import grid, judging, loop, sources
from experiments.training.single import (
    Program,
    completed,
    on_device,
    provenance_of,
    told_apart,
    training_weights,
)


def train(sweep: grid.Sweep, directory, *, data_dir=None, mesh=None, on_step=lambda step: None) -> dict:
    """Trains all runs of a sweep, or resumes them, and returns what is in sweep.json.

    A run whose loss or params stop being finite is noted and logged no further; the others continue.

    Args:
      sweep: what to train.
      directory: its folder.
      data_dir: where the data set lies, for configs that need one.
      mesh: a device mesh over which the runs are split; not part of what the sweep is, which may resume with another.
      on_step: called with the step number at every logged step, and a few times a second in between.

    Raises:
      ValueError: anything wrong with the names, the settings, the data, the devices or the folder, before training.
      FloatingPointError: all runs stopped being finite.
      OSError: the disk is full, and the like; what was logged and saved stays.
      interruption.Preempted: the process was asked to stop; all is saved.
    """
    directory = pathlib.Path(directory)
    grid.check(sweep)
    description = grid.describe(sweep)
    records.find_run(directory, description)
    if (directory / "sweep.json").exists():
        on_step(sweep.settings.steps)
        return records.read_json(directory / "sweep.json")
    started = time.perf_counter()

    loaded = load(sweep, data_dir)
    with _open_numbers(sweep):
        prepared = prepare(sweep, loaded, mesh)
        state = prepared.init()
    provenance = provenance_of(prepared.experiment, loaded.data[0].source, _checksum(loaded.data))
    checkpointed = {"state": state, "best": jax.tree.map(jnp.copy, judging.trained_of(state))}
    note = {name: [None] * len(sweep.runs()) for name in ("last", "best", "best_step", "broken")} | {"lines": 0}

    def advance(state, data):
        with _open_numbers(sweep):
            return prepared.step(state, *data)

    work = loop.Work(
        feed=feeds.resident(prepared.inner_data, prepared.outer_data),
        advance=advance,
        check=partial(_note_broken, sweep, directory),
        log=partial(_log, sweep, directory, prepared.experiment, loaded.data),
        finish=partial(_finish, sweep, directory, prepared, loaded, description | provenance),
    )
    beginning = {"started": started, "on_step": on_step}
    return loop.run(work, sweep.settings, directory, description, provenance, checkpointed, note, **beginning)


@contextlib.contextmanager
def _open_numbers(sweep):
    """Says what to do where the method or the config asks for the value of a swept number."""
    try:
        yield
    except ValueError as error:
        if not isinstance(error.__cause__, jax.errors.ConcretizationTypeError):
            raise
        raise ValueError(
            f"--over {', '.join(over.name for over in sweep.over)}: {sweep.method} on {sweep.config} asks for the "
            "value of such a number, and in one program for all runs it has none. Train them one by one: "
            "experiments.compare takes a method per value."
        ) from error


class Loaded(NamedTuple):
    """The data of all runs.

    Attributes:
      data: of every run, what the loader gave; one object for all that share a seed and all settings.
      trained_on: the same, with dev in train where runs train on both.
      shapes: of all of them.
    """

    data: list[Data]
    trained_on: list[Data]
    shapes: Shapes


def load(sweep, data_dir) -> Loaded:
    """The data of every run.

    Raises:
      ValueError: data that cannot be, or that differ in shape from run to run.
    """
    found = {}
    for point, seed in sweep.runs():
        key = (seed, *sweep.split(point)[1].values())
        if key not in found:
            found[key] = configs.get(sweep.config).load(sweep.settings_of(point), seed, data_dir)
            check_data(found[key])
    data = [found[seed, *sweep.split(point)[1].values()] for point, seed in sweep.runs()]
    label = labels.parse(sweep.method)
    joins = label.with_dev or sweep.settings.dev == "train"
    trained_on = [pools.with_dev(one) for one in data] if joins else data
    trained_on = [pools.dev_only(one) for one in data] if label.dev_only else trained_on
    shapes = {pools.shapes(one) for one in trained_on}
    if len(shapes) > 1:
        sizes = {tuple((pool.name, pool.num_examples) for pool in one.pools) for one in shapes}
        raise ValueError(
            f"The runs have data of different shapes, {' and '.join(map(str, sorted(sizes)))}; a sweep is one program "
            "for all of them. Train them one by one, with experiments.compare."
        )
    return Loaded(data, trained_on, shapes.pop())


class Prepared(NamedTuple):
    """What trains a sweep.

    Attributes:
      experiment: of the first point, to evaluate any of them.
      inner_data: training data of all runs, on the device.
      outer_data: dev data of all runs, on the device.
      init: `() -> state` of all runs.
      step: `(state, inner_data, outer_data) -> (state, metrics)`.
      weigh: `(index, state, examples) -> weights` of the run at that index, its state and examples given alone.
    """

    experiment: Experiment
    inner_data: Any
    outer_data: Any
    init: Callable
    step: Callable
    weigh: Callable


def prepare(sweep, loaded: Loaded, mesh) -> Prepared:
    """Puts the data of all runs on the device, or the devices, and makes the program that trains them.

    Raises:
      ValueError: a swept number that the method or the config wants to know, or runs that the devices cannot share.
    """
    runs, settings = sweep.runs(), sweep.settings
    experiment, _ = grid.build(sweep, runs[0][0], loaded.shapes)
    points = {name: np.array([point[name] for point, _ in runs], np.float32) for name in runs[0][0]}
    shared = all(one is loaded.data[0] for one in loaded.data)

    def make(point):
        one, method = grid.build(sweep, point, loaded.shapes)
        return one.step_model or one.model, method, one.optimizer

    init, step = make_sweep(
        make,
        points,
        inner_steps=settings.inner_steps,
        outer_steps=settings.outer_steps,
        draw_inner=experiment.draw_inner,
        draw_outer=experiment.draw_outer,
        average=experiment.average,
        batches="shared" if shared else "stacked",
        mesh=mesh,
    )

    @jax.jit
    def weigh(points, index, state, examples):
        one, method = grid.build(sweep, run_of(points, index), loaded.shapes)
        return task_weights(one.model, method, state, completed(experiment, examples), key=jax.random.key(0))

    inner_data = outer_data = _side_by_side(
        [sources.inner_arrays(experiment, one) for one in loaded.trained_on], shared, mesh
    )
    outer = [sources.outer_arrays(experiment, one, dev=settings.dev) for one in loaded.trained_on]
    if settings.dev != "train":
        outer_data = _side_by_side(outer, shared, mesh)

    def start():
        keys, params, model_state = _starts(experiment, [seed for _, seed in runs])
        return init(keys, params, inner_data, model_state)

    return Prepared(experiment, inner_data, outer_data, start, step, partial(weigh, points))


def _checksum(data: list[Data]) -> int:
    """`pools.checksum` of all runs' data."""
    distinct = {id(one): pools.checksum(one) for one in data}
    return zlib.crc32(repr([distinct[id(one)] for one in data]).encode())


def _side_by_side(arrays: list, shared: bool, mesh):
    """Data of all runs on the device: a leading axis of runs, or, where all have the same, none."""
    if shared:
        return on_device(arrays[0], mesh)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *(on_device(one) for one in arrays))
    return stacked if mesh is None else shard_batch(stacked, mesh)


def _starts(experiment, seeds):
    """Keys, params and model state of every run, those that a run of its seed begins with."""
    starts = {}
    for seed in dict.fromkeys(seeds):
        key_params, key_run = jax.random.split(jax.random.key(seed))
        starts[seed] = (key_run, *experiment.init_params(key_params))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(starts[seed] for seed in seeds))


def _note_broken(sweep, directory, state, metrics, note, step) -> dict:
    metrics, count = jax.device_get(metrics), len(sweep.runs())
    good = np.ones(count, bool)
    for name, values in metrics.items():
        if name.startswith("loss/"):
            good &= np.isfinite(values)
    for leaf in jax.tree.leaves(state.params):
        good &= np.asarray(jnp.isfinite(leaf).reshape(count, -1).all(axis=1))
    note["broken"] = [
        step if before is None and not ok else before for before, ok in zip(note["broken"], good, strict=True)
    ]
    if None not in note["broken"]:
        raise FloatingPointError(
            f"At step {step} the loss or a parameter of every run is not finite, so training stopped. The log and the "
            f"checkpoints in {directory} are from before. Try smaller learning rates, in another --out."
        )
    return metrics


@jax.jit
def _better(improved, new, old):
    def choose(a, b):
        return jnp.where(improved.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


def _log(sweep, directory, experiment, data, checkpointed, note, step, metrics) -> None:
    """Writes a line of metrics per run, with those on validation; keeps the params of each that did best there."""
    trained = judging.trained_of(checkpointed["state"])
    on_host = jax.device_get(trained)
    lines, improved = [], np.zeros(len(data), bool)
    for index, (point, seed) in enumerate(sweep.runs()):
        if note["broken"][index] is not None:
            continue
        found = judging.judge(experiment, run_of(on_host, index), data[index], "validation")
        if judging.is_better(experiment.metric, found, note["best"][index]):
            note["best"][index], note["best_step"][index], improved[index] = found, step, True
        note["last"][index] = found
        judged = {f"validation_{name}": value for name, value in found.items()}
        numbers = {name: float(values[index]) for name, values in metrics.items()}
        lines.append({"step": step, "run": grid.text_of(point), "seed": seed, **judged, **numbers})
    checkpointed["best"] = _better(improved, trained, checkpointed["best"])
    records.append_line(directory / "metrics.jsonl", *lines)
    note["lines"] += len(lines)


def _on_host(tree):
    """The arrays of all devices on the host, keys as keys of the first device."""

    def fetch(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jax.device_get(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return jax.device_get(leaf)

    return jax.tree.map(fetch, tree)


def _finish(sweep, directory, prepared: Prepared, loaded: Loaded, about, checkpointed, note) -> dict:
    """Looks at the test pools, once: with the last params of every run, and with those that validation chose."""
    states, best = _on_host((checkpointed["state"], checkpointed["best"]))
    results = [
        _result(prepared, loaded, run_of(states, index), best, note, index) if broken is None else None
        for index, broken in enumerate(note["broken"])
    ]
    found = [
        {"point": point, "method": sweep.label_of(point), "seed": seed, "result": result, "broken_at": broken}
        for (point, seed), result, broken in zip(sweep.runs(), results, note["broken"], strict=True)
    ]
    records.write_json(directory / "sweep.json", about | {"runs": found})
    return records.read_json(directory / "sweep.json")


def _result(prepared: Prepared, loaded: Loaded, state, best, note, index: int) -> dict:
    experiment, data = prepared.experiment, loaded.data[index]
    found = {
        "validation": note["last"][index],
        "test": judging.judge(experiment, judging.trained_of(state), data, "test"),
        "selected_test": judging.judge(experiment, Trained(*run_of(best, index)), data, "test"),
        "selected_validation": note["best"][index],
    }
    result = {"step": int(state.step), "selected_step": note["best_step"][index]}
    result |= {f"{place}_{name}": value for place, values in found.items() for name, value in values.items()}
    corrupted = sources.corrupted(experiment, loaded.trained_on[index])
    if corrupted is not None and corrupted.any():
        program = Program(experiment, None, None, partial(prepared.weigh, index))
        weights = training_weights(program, state, loaded.trained_on[index])
        result |= told_apart(weights, experiment, loaded.trained_on[index])
    return result
