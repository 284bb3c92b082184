"""The training loop of one run: data, step, log, checkpoints, and one look at the test set.

Read it from top to bottom: it does what every run does, and nothing here depends on the method or the data set.
"""

import dataclasses
import functools
import math
import pathlib
import time
import zlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from auxjax import make_step, task_weights
from auxjax.training.checkpoint import open_checkpoints, save
from auxjax.training.memory import MemoryEstimate, estimate_memory
from auxjax.training.parallel import on_all, state_shardings
from experiments import configs
from experiments.contract import on_device, visible
from experiments.data.splits import INPUTS, check_splits, input_of, merge
from experiments.evaluation.metrics import goodness
from experiments.evaluation.statistics import auroc
from experiments.inputs import feeds
from experiments.inputs.batches import take
from experiments.methods import labels
from experiments.runtime import interruption, processes, records
from experiments.training.resuming import resume

DEV_MODES = ("held_out", "train")
AT_LEAST_ONE = {"steps", "log_every", "checkpoint_every", "inner_steps", "batch_size", "outer_batch_size", "hidden"}
AT_LEAST_ONE |= {"outer_steps", "channels", "label_channels", "sub_classes", "accumulate"}


class Shapes(NamedTuple):
    """What a config's `build` may know of the data.

    Attributes:
      inputs: shape of one example's input, such as that of an image.
      num_classes: classes of the primary task.
      num_train: training examples.
      tasks: names of the primary and the auxiliary tasks where the data have them, see `Splits`.
    """

    inputs: tuple[int, ...]
    num_classes: int
    num_train: int
    tasks: tuple[str, ...] = ()


def check_method(config: str, settings, method: str) -> None:
    """Raises a ValueError for a label no run can have, before any data are read."""
    stand_in = Shapes((1,), 2, 1)
    labels.make(method, configs.get(config).method_options(settings, stand_in))


def check_settings(settings) -> None:
    """Raises a ValueError for settings no run can have; what concerns data is for the loader to say."""
    for name, value in dataclasses.asdict(settings).items():
        numbers = [part for part in (value if isinstance(value, tuple) else (value,)) if not isinstance(part, str)]
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError(f"{name}={value}: expected a finite number of at least 0.")
        if name in AT_LEAST_ONE and not all(1 <= number < 2**31 for number in numbers):
            raise ValueError(f"{name}={value}: expected a whole number of at least 1 (and below 2^31).")
    for name, choices in (("dev", DEV_MODES), ("input", feeds.INPUTS)):
        if getattr(settings, name) not in choices:
            raise ValueError(f"{name}={getattr(settings, name)!r}: expected one of {', '.join(choices)}.")


def check_seed(seed: int) -> None:
    """Raises a ValueError for a seed that not every random generator takes."""
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed {seed}: expected a whole number from 0 to 2^31 - 1.")


def describe(config: str, settings, method: str, seed: int) -> dict:
    """What makes two runs the same, as plain values."""
    return {
        "config": configs.label_of(config),
        "method": method,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
    }


@functools.lru_cache(maxsize=32)
def compiled(config: str, settings, method: str, shapes: Shapes, mesh=None):
    """The experiment, `init`, `step` and the weights, cached: the seeds of one process share what was compiled."""
    experiment = configs.get(config).build(settings, method, shapes)
    init, step = make_step(
        experiment.step_model or experiment.model,
        experiment.method,
        experiment.optimizer,
        inner_steps=experiment.inner_steps,
        outer_steps=experiment.outer_steps,
        draw_inner=None if settings.input == "stream" else experiment.draw_inner,
        draw_outer=None if settings.input == "stream" else experiment.draw_outer,
        mesh=mesh,
    )

    @partial(jax.jit, out_shardings=None if mesh is None else on_all(mesh))
    def weigh(state, examples):
        batch = experiment.draw_inner.complete(examples)
        return task_weights(experiment.model, experiment.method, state, batch, key=jax.random.key(0))

    return experiment, init, step, weigh


def train(config, settings, method, seed, directory, *, data_dir=None, mesh=None, on_step=lambda step: None) -> dict:
    """Runs, or goes on with, one run and returns its result.

    Args:
      config: name of a config.
      settings: its `Settings`.
      method: label of a method, see `methods.labels`; with the suffix "+dev" it trains on the dev examples, too.
      seed: seed of the split, the label noise, the initial params and every later draw.
      directory: folder of the run.
      data_dir: where the data set lies, for configs that need one.
      mesh: a device mesh over which every batch is split, see `auxjax.training.parallel`; it is no part of what the run
        is, which may go on with another one. With several processes, `directory` is one folder that all of them see.
      on_step: called with the step number at every logged step, for progress bars.

    Raises:
      ValueError: anything wrong with the names, the settings, the data or the folder, before training starts.
      FloatingPointError: a loss or a parameter stopped being finite; what was logged and saved stays.
      OSError: the disk is full, and the like; what was logged and saved stays.
      interruption.Preempted: the process was asked to stop; all is saved.
    """
    directory = pathlib.Path(directory)
    check_settings(settings)
    check_seed(seed)
    check_method(config, settings, method)
    label = labels.parse(method)
    description = describe(config, settings, labels.text_of(label), seed)
    finished = records.find_run(directory, description)
    if finished is not None:
        on_step(finished["step"])
        return finished
    started = time.perf_counter()

    ready = _prepare(config, settings, label, seed, data_dir, mesh)
    experiment, splits = ready.experiment, ready.splits
    key_params, key_run = jax.random.split(jax.random.key(seed))
    params, model_state = experiment.init_params(key_params)
    inner, outer = next(ready.feed(0))
    state = ready.init(key_run, params, inner, model_state)
    jax.eval_shape(ready.step, state, inner, outer)  # what does not fit is said here, before the folder is taken
    carried = {"state": state, "best": _copy((state.params, state.model_state))}
    note = {"best": {}, "best_step": 0, "lines": 0}

    beside = {"data": splits.source, "data_crc32": crc32(splits), "method_options": dict(label.options)}
    beside |= {"primary": experiment.model.primary, "metric": experiment.metric}
    with (
        processes.by_first(records.claim(directory, description, beside), f"claiming {directory}"),
        open_checkpoints(directory / "checkpoints") as manager,
    ):
        _check_shared(directory)
        carried, note = resume(manager, directory, carried, note)
        at = int(carried["state"].step)
        on_step(at)
        if interruption.stop_asked(at // experiment.inner_steps):
            raise interruption.Preempted(at)
        batches = ready.feed(at // experiment.inner_steps)
        while at < settings.steps:
            interruption.check()
            carried["state"], metrics = ready.step(carried["state"], *next(batches))
            at += experiment.inner_steps
            last, stop = at >= settings.steps, interruption.stop_asked(at // experiment.inner_steps)
            log = last or at % settings.log_every < experiment.inner_steps
            keep = last or stop or at % settings.checkpoint_every < experiment.inner_steps
            if log or keep:
                metrics = records.plain(metrics)
                _check_finite(carried["state"], metrics, at, directory)
            if log:
                _log(directory, experiment, splits, carried, note, at, metrics)
                on_step(at)
            if keep:
                with interruption.held(), records.full_disk_explained(f"the checkpoint of step {at}", directory):
                    if processes.is_first():
                        records.to_disk(directory / "metrics.jsonl")
                    save(manager, at, carried, note)
                    if processes.is_first():
                        records.note_checkpoints(directory, manager.all_steps(), at)
            if stop:
                raise interruption.Preempted(at)
        result = _finish(directory, ready, carried, note, mesh)
    if processes.is_first():
        records.append_line(directory / "timing.jsonl", {"step": at, "seconds": time.perf_counter() - started})
    return result


def _check_shared(directory) -> None:
    """Every process must see what the first one has just written.

    Raises:
      ValueError: some do not.
    """
    if not processes.agree((directory / "run.json").exists()):
        raise ValueError(
            f"{directory} is not one folder for all {jax.process_count()} processes: some do not see the run.json that "
            "the first has just written there. --out must lie on a disk or in a bucket that all of them share."
        )


def estimate(config, settings, method, seed, *, data_dir=None, mesh=None) -> MemoryEstimate:
    """The memory that `train` would need on the device, from the compiled step; nothing is trained or written.

    Raises:
      ValueError: anything wrong with the names, the settings or the data.
    """
    check_settings(settings)
    check_seed(seed)
    check_method(config, settings, method)
    ready = _prepare(config, settings, labels.parse(method), seed, data_dir, mesh)
    key = jax.random.key(seed)
    params, model_state = jax.eval_shape(ready.experiment.init_params, key)
    inner, outer = next(ready.feed(0))
    state = jax.eval_shape(ready.init, key, params, inner, model_state)
    if mesh is not None:

        def placed(leaf, sharding):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        state = jax.tree.map(placed, state, state_shardings(state, mesh))
    return estimate_memory(ready.step, state, inner, outer)


class _Ready(NamedTuple):
    """Data and program of a run."""

    splits: Any
    train_split: dict
    experiment: Any
    init: Any
    step: Any
    weigh: Any
    feed: Any


def _prepare(config, settings, label, seed, data_dir, mesh) -> _Ready:
    """Reads the data and builds the program; nothing is computed or written."""
    splits = configs.get(config).load(settings, seed, data_dir)
    check_splits(splits)
    train_split = merge(splits.train, splits.dev) if label.with_dev or settings.dev == "train" else splits.train
    shapes = Shapes(input_of(train_split).shape[1:], splits.num_classes, len(train_split["label"]), splits.tasks)
    program = compiled(config, settings, labels.text_of(label._replace(with_dev=False)), shapes, mesh)
    dev_split = train_split if settings.dev == "train" else splits.dev
    if settings.input == "stream":
        feed = feeds.streamed(program[0], visible(train_split), visible(dev_split), seed, mesh)
    else:
        inner_data = on_device(train_split, mesh)
        feed = feeds.resident(inner_data, inner_data if settings.dev == "train" else on_device(dev_split, mesh))
    return _Ready(splits, train_split, *program, feed)


def crc32(splits) -> int:
    """A number that changes with any input, label or split: a run must go on with the data it began with."""
    found = 0
    for split in (splits.train, splits.dev, splits.validation, splits.test):
        first = ("label", "example_id")
        others = sorted(set(split) - {*first, "true_label", "corrupted"} - set(INPUTS))
        for array in (input_of(split), *(split[name] for name in (*first, *others))):
            found = zlib.crc32(np.ascontiguousarray(array), found)
    return found


def _check_finite(state, metrics, at, directory) -> None:
    broken = sorted(name for name, value in metrics.items() if name.startswith("loss/") and not math.isfinite(value))
    if not broken and bool(_is_finite(state.params)):
        return
    what = f"{broken[0]} is {metrics[broken[0]]}" if broken else "a parameter is not finite"
    raise FloatingPointError(
        f"{what} at step {at}, so training stopped. The log and the checkpoints in {directory} are from before. "
        "Try a smaller learning rate (in another --out), or look for bad values in the data."
    )


@jax.jit
def _is_finite(params):
    """In one program and not leaf by leaf from the host, which takes five times as long."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def _log(directory, experiment, splits, carried, note, at, metrics) -> None:
    """Writes one line of metrics, with those on validation; keeps the params that did best there."""
    state = carried["state"]
    found = experiment.evaluate(*processes.here((state.params, state.model_state)), splits.validation)
    good = partial(goodness, experiment.metric)
    if not note["best"] or good(found[experiment.metric]) > good(note["best"][experiment.metric]):
        note.update(best=found, best_step=at)
        carried["best"] = _copy((state.params, state.model_state))
    judged = {f"validation_{name}": value for name, value in found.items()}
    if processes.is_first():
        records.append_line(directory / "metrics.jsonl", {"step": at, **judged, **metrics})
    note["lines"] += 1


def _finish(directory, ready, carried, note, mesh) -> dict:
    """Looks at the test set, once: with the last params, and with those that validation chose."""
    splits, train_split, experiment, state = ready.splits, ready.train_split, ready.experiment, carried["state"]
    found = {
        "test": experiment.evaluate(*processes.here((state.params, state.model_state)), splits.test),
        "selected_test": experiment.evaluate(*processes.here(carried["best"]), splits.test),
        "selected_validation": note["best"],
    }
    result = {"step": int(state.step), "selected_step": note["best_step"]}
    result |= {f"{place}_{name}": value for place, values in found.items() for name, value in values.items()}
    weights = training_weights(ready.weigh, state, train_split, mesh)
    corrupted = train_split["corrupted"]
    if corrupted.any() and not corrupted.all():
        result["corrupted_auroc"] = auroc(weights[experiment.model.primary], ~corrupted)
    named = {f"weight/{task}": value for task, value in weights.items()}
    if processes.is_first():
        example_id = train_split["example_id"]
        records.save_arrays(directory / "weights.npz", corrupted=corrupted, example_id=example_id, **named)
        records.write_json(directory / "result.json", result)
    return result


def training_weights(weigh, state, train_split, mesh=None, chunk: int = 1000) -> dict[str, np.ndarray]:
    """The weights of all training examples, in parts of about `chunk`: a whole data set need not fit in one batch."""
    data, count = visible(train_split), len(train_split["label"])
    parts = np.array_split(np.arange(count, dtype=np.int32), -(-count // chunk))
    found = [jax.device_get(weigh(state, on_device(take(data, indices), mesh))) for indices in parts]
    return {task: np.concatenate([part[task] for part in found]) for task in found[0]}
