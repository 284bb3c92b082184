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
from auxjax.training.checkpoint import open_checkpoints, save
from auxjax.training.parallel import shard_batch
from auxjax.training.sweep import make_sweep, run_of
from experiments import configs
from experiments.contract import Experiment, on_device
from experiments.data.splits import check_splits, input_of, merge
from experiments.evaluation.metrics import goodness
from experiments.evaluation.statistics import auroc
from experiments.methods import labels
from experiments.runtime import interruption, records
from experiments.training import grid
from experiments.training.resuming import resume
from experiments.training.single import Shapes, crc32, training_weights


def train(sweep: grid.Sweep, directory, *, data_dir=None, mesh=None, on_step=lambda step: None) -> dict:
    """Trains all runs of a sweep, or goes on with them, and returns what is in sweep.json.

    A run whose loss or params stop being finite is noted and logged no further; the others go on.

    Args:
      sweep: what to train.
      directory: its folder.
      data_dir: where the data set lies, for configs that need one.
      mesh: a device mesh over which the runs are split; no part of what the sweep is, which may go on with another one.
      on_step: called with the step number at every logged step.

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

    runs = sweep.runs()
    splits, train_splits, shapes = load(sweep, data_dir)
    with _open_numbers(sweep):
        experiment, inner_data, outer_data, init, step, weigh = prepare(sweep, splits, train_splits, shapes, mesh)
        state = init()
    carried = {"state": state, "best": jax.tree.map(jnp.copy, (state.params, state.model_state))}
    note = {name: [None] * len(runs) for name in ("last", "best", "best_step", "broken")} | {"lines": 0}

    beside = {"data": splits[0].source, "data_crc32": _crc32(splits)}
    beside |= {"primary": experiment.model.primary, "metric": experiment.metric}
    with (
        records.claim(directory, description, beside),
        open_checkpoints(directory / "checkpoints") as manager,
    ):
        carried, note = resume(manager, directory, carried, note)
        at = int(carried["state"].step[0])
        on_step(at)
        while at < sweep.settings.steps:
            interruption.check()
            with _open_numbers(sweep):
                carried["state"], metrics = step(carried["state"], inner_data, outer_data)
            at += experiment.inner_steps
            last, stop = at >= sweep.settings.steps, interruption.stop_asked(at // experiment.inner_steps)
            log = last or at % sweep.settings.log_every < experiment.inner_steps
            keep = last or stop or at % sweep.settings.checkpoint_every < experiment.inner_steps
            if log or keep:
                metrics = jax.device_get(metrics)
                _note_broken(carried["state"], metrics, note, at, runs, directory)
            if log:
                _log(directory, experiment, sweep, splits, carried, note, at, metrics)
                on_step(at)
            if keep:
                with interruption.held(), records.full_disk_explained(f"the checkpoint of step {at}", directory):
                    records.to_disk(directory / "metrics.jsonl")
                    save(manager, at, carried, note)
                    records.note_checkpoints(directory, manager.all_steps(), at)
            if stop:
                raise interruption.Preempted(at)
        results = _finish(experiment, weigh, splits, train_splits, carried, note, at)
        found = [
            {"point": point, "method": sweep.label_of(point), "seed": seed, "result": result, "broken_at": broken}
            for (point, seed), result, broken in zip(runs, results, note["broken"], strict=True)
        ]
        records.write_json(directory / "sweep.json", description | beside | {"runs": found})
    records.append_line(directory / "timing.jsonl", {"step": at, "seconds": time.perf_counter() - started})
    return records.read_json(directory / "sweep.json")


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


def load(sweep, data_dir) -> tuple[list, list, Shapes]:
    """The splits of every run, what each trains on, and the shapes that all have.

    Raises:
      ValueError: data that cannot be, or that differ in shape from run to run.
    """
    splits = _load(sweep, data_dir)
    with_dev = labels.parse(sweep.method).with_dev or sweep.settings.dev == "train"
    train_splits = [merge(one.train, one.dev) if with_dev else one.train for one in splits]
    return splits, train_splits, _shapes(splits, train_splits)


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


def prepare(sweep, splits, train_splits, shapes: Shapes, mesh) -> Prepared:
    """Puts the data of all runs on the device, or the devices, and makes the program that trains them.

    Raises:
      ValueError: a swept number that the method or the config wants to know, or runs that the devices cannot share.
    """
    runs = sweep.runs()
    experiment = grid.build(sweep, runs[0][0], shapes)
    points = {name: np.array([point[name] for point, _ in runs], np.float32) for name in runs[0][0]}
    shared = all(one is splits[0] for one in splits)

    def make(point):
        one = grid.build(sweep, point, shapes)
        return one.step_model or one.model, one.method, one.optimizer

    init, step = make_sweep(
        make,
        points,
        inner_steps=experiment.inner_steps,
        outer_steps=experiment.outer_steps,
        draw_inner=experiment.draw_inner,
        draw_outer=experiment.draw_outer,
        batches="shared" if shared else "stacked",
        mesh=mesh,
    )

    @jax.jit
    def weigh(points, index, state, examples):
        one = grid.build(sweep, run_of(points, index), shapes)
        batch = experiment.draw_inner.complete(examples)
        return task_weights(one.model, one.method, state, batch, key=jax.random.key(0))

    inner_data = outer_data = _side_by_side(train_splits, shared, mesh)
    if sweep.settings.dev != "train":
        outer_data = _side_by_side([one.dev for one in splits], shared, mesh)

    def start():
        keys, params, model_state = _starts(experiment, [seed for _, seed in runs])
        return init(keys, params, inner_data, model_state)

    return Prepared(experiment, inner_data, outer_data, start, step, partial(weigh, points))


def _load(sweep, data_dir) -> list:
    """The splits of every run, one object for all that share a seed and all settings."""
    loaded = {}
    for point, seed in sweep.runs():
        _, settings = sweep.split(point)
        if (seed, *settings.values()) not in loaded:
            splits = configs.get(sweep.config).load(sweep.settings_of(point), seed, data_dir)
            check_splits(splits)
            loaded[seed, *settings.values()] = splits
    return [loaded[seed, *sweep.split(point)[1].values()] for point, seed in sweep.runs()]


def _shapes(splits, train_splits) -> Shapes:
    found = {
        Shapes(input_of(train).shape[1:], one.num_classes, len(train["label"]), one.tasks)
        for one, train in zip(splits, train_splits, strict=True)
    }
    if len(found) > 1:
        raise ValueError(
            f"The runs have data of different shapes, {' and '.join(map(str, found))}; a sweep is one program for all "
            "of them. Train them one by one, with experiments.compare."
        )
    return found.pop()


def _crc32(splits) -> int:
    """`training.single.crc32` of all runs' data."""
    distinct = {id(one): crc32(one) for one in splits}
    return zlib.crc32(repr([distinct[id(one)] for one in splits]).encode())


def _side_by_side(splits, shared: bool, mesh):
    """Data of all runs on the device: a leading axis of runs, or, where all have the same, none."""
    if shared:
        return on_device(splits[0], mesh)
    stacked = on_device({name: np.stack([split[name] for split in splits]) for name in splits[0]})
    return stacked if mesh is None else shard_batch(stacked, mesh)


def _starts(experiment, seeds):
    """Keys, params and model state of every run, those that a run of its seed begins with."""
    starts = {}
    for seed in dict.fromkeys(seeds):
        key_params, key_run = jax.random.split(jax.random.key(seed))
        starts[seed] = (key_run, *experiment.init_params(key_params))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(starts[seed] for seed in seeds))


def _note_broken(state, metrics, note, at, runs, directory) -> None:
    good = np.ones(len(runs), bool)
    for name, values in metrics.items():
        if name.startswith("loss/"):
            good &= np.isfinite(values)
    for leaf in jax.tree.leaves(state.params):
        good &= np.asarray(jnp.isfinite(leaf).reshape(len(runs), -1).all(axis=1))
    note["broken"] = [
        at if before is None and not ok else before for before, ok in zip(note["broken"], good, strict=True)
    ]
    if None not in note["broken"]:
        raise FloatingPointError(
            f"At step {at} the loss or a parameter of every run is not finite, so training stopped. The log and the "
            f"checkpoints in {directory} are from before. Try smaller learning rates, in another --out."
        )


@jax.jit
def _better(improved, new, old):
    def choose(a, b):
        return jnp.where(improved.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


def _log(directory, experiment, sweep, splits, carried, note, at, metrics) -> None:
    """Writes a line of metrics per run, with those on validation; keeps the params of each that did best there."""
    state = carried["state"]
    new = jax.device_get((state.params, state.model_state))
    lines, improved = [], np.zeros(len(splits), bool)
    for index, (point, seed) in enumerate(sweep.runs()):
        if note["broken"][index] is not None:
            continue
        found = experiment.evaluate(*run_of(new, index), splits[index].validation)
        best = note["best"][index]
        good = partial(goodness, experiment.metric)
        if best is None or good(found[experiment.metric]) > good(best[experiment.metric]):
            note["best"][index], note["best_step"][index], improved[index] = found, at, True
        note["last"][index] = found
        judged = {f"validation_{name}": value for name, value in found.items()}
        numbers = {name: float(values[index]) for name, values in metrics.items()}
        lines.append({"step": at, "run": grid.text_of(point), "seed": seed, **judged, **numbers})
    carried["best"] = _better(improved, (state.params, state.model_state), carried["best"])
    records.append_line(directory / "metrics.jsonl", *lines)
    note["lines"] += len(lines)


def _on_host(tree):
    """The arrays of all devices on the host, keys as keys of the first device."""

    def fetch(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jax.device_get(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return jax.device_get(leaf)

    return jax.tree.map(fetch, tree)


def _finish(experiment, weigh, splits, train_splits, carried, note, at) -> list[dict | None]:
    """Looks at the test set, once: with the last params of every run, and with those that validation chose."""
    results = []
    states, best = _on_host((carried["state"], carried["best"]))
    for index, (one, train_split) in enumerate(zip(splits, train_splits, strict=True)):
        if note["broken"][index] is not None:
            results.append(None)
            continue
        state = run_of(states, index)
        found = {
            "validation": note["last"][index],
            "test": experiment.evaluate(state.params, state.model_state, one.test),
            "selected_test": experiment.evaluate(*run_of(best, index), one.test),
            "selected_validation": note["best"][index],
        }
        result = {"step": at, "selected_step": note["best_step"][index]}
        result |= {f"{place}_{name}": value for place, values in found.items() for name, value in values.items()}
        corrupted = train_split["corrupted"]
        if corrupted.any() and not corrupted.all():
            weights = training_weights(partial(weigh, index), state, train_split)
            result["corrupted_auroc"] = auroc(weights[experiment.model.primary], ~corrupted)
        results.append(result)
    return results
