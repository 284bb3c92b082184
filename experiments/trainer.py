"""The training loop of one run: data, step, log, checkpoints, and one look at the test set.

Read it from top to bottom: it does what every run does, and nothing here depends on the method or the data set.
"""

import dataclasses
import functools
import math
import pathlib
import time
from typing import NamedTuple

import jax
import numpy as np

from auxjax import make_step, methods, task_weights
from auxjax.training.checkpoint import open_checkpoints, restore, save
from experiments import configs, records
from experiments.data.splits import check_splits, merge
from experiments.experiment import on_device
from experiments.statistics import auroc

WITH_DEV = "+dev"
DEV_MODES = ("held_out", "train")


class Shapes(NamedTuple):
    """What a config's `build` may know of the data.

    Attributes:
      image: shape of one image.
      num_classes: classes of the primary task.
      num_train: training examples.
    """

    image: tuple[int, ...]
    num_classes: int
    num_train: int


def parse_method(name: str) -> tuple[str, bool]:
    """`("stl", True)` from "stl+dev": the method, and whether it trains on the dev examples as well.

    Raises:
      ValueError: an unknown method; the message lists the nearest ones.
    """
    base = name.removesuffix(WITH_DEV)
    if base not in methods.names():
        methods.get(base)
    return base, name.endswith(WITH_DEV)


def check_settings(settings) -> None:
    """Raises a ValueError for settings no run can have; what concerns data is for the loader to say."""
    for name in ("steps", "log_every", "checkpoint_every", "inner_steps", "batch_size", "outer_batch_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)}: wanted a whole number of at least 1.")
    if settings.dev not in DEV_MODES:
        raise ValueError(f"dev={settings.dev!r}: wanted one of {', '.join(DEV_MODES)}.")


@functools.lru_cache(maxsize=32)
def compiled(config: str, settings, method: str, shapes: Shapes):
    """The experiment and its step. Cached, so that all seeds of one process share what was compiled."""
    experiment = configs.get(config).build(settings, method, shapes)
    init, step = make_step(
        experiment.model,
        experiment.method,
        experiment.optimizer,
        inner_steps=experiment.inner_steps,
        draw_inner=experiment.draw_inner,
        draw_outer=experiment.draw_outer,
    )
    return experiment, init, step


def train(config, settings, method, seed, directory, *, data_dir=None, on_step=lambda step: None) -> dict:
    """Runs, or goes on with, one run and returns its result.

    Args:
      config: name of a config.
      settings: its `Settings`.
      method: name of a method; with the suffix "+dev" it trains on the dev examples, too.
      seed: seed of the split, the label noise, the initial params and every later draw.
      directory: folder of the run.
      data_dir: where the data set lies, for configs that need one.
      on_step: called with the step number at every logged step, for progress bars.

    Raises:
      ValueError: anything wrong with the names, the settings, the data or the folder, before training starts.
      FloatingPointError: a loss stopped being finite; what was logged and saved stays.
    """
    directory = pathlib.Path(directory)
    base, with_dev = parse_method(method)
    check_settings(settings)
    description = {"config": config, "method": method, "seed": seed, "settings": dataclasses.asdict(settings)}
    splits = configs.get(config).load(settings, seed, data_dir)
    check_splits(splits)
    train_split = merge(splits.train, splits.dev) if with_dev or settings.dev == "train" else splits.train
    shapes = Shapes(splits.train["image"].shape[1:], splits.num_classes, len(train_split["label"]))
    experiment, init, step = compiled(config, settings, base, shapes)
    finished = records.open_run(directory, description, {"data": splits.source, "primary": experiment.model.primary})
    if finished is not None:
        return finished
    started = time.perf_counter()

    inner_data = on_device(train_split)
    outer_data = inner_data if settings.dev == "train" else on_device(splits.dev)
    key_params, key_run = jax.random.split(jax.random.key(seed))
    params, model_state = experiment.init_params(key_params)
    state = init(key_run, params, inner_data, model_state)
    carried = {"state": state, "best": _copy((state.params, state.model_state))}
    note = {"best_accuracy": -1.0, "best_step": 0}

    with open_checkpoints(directory / "checkpoints") as manager:
        found = restore(manager, carried)
        if found is not None:
            carried, note = found.tree, found.note
        at = int(carried["state"].step)
        records.keep_lines_until(directory / "metrics.jsonl", at)
        while at < settings.steps:
            carried["state"], metrics = step(carried["state"], inner_data, outer_data)
            at += experiment.inner_steps
            last = at >= settings.steps
            if last or at % settings.log_every < experiment.inner_steps:
                _log(directory, experiment, splits, carried, note, at, metrics)
                on_step(at)
            if last or at % settings.checkpoint_every < experiment.inner_steps:
                save(manager, at, carried, note)
    result = _finish(directory, experiment, splits, train_split, carried, note)
    records.append_line(directory / "timing.jsonl", {"step": at, "seconds": time.perf_counter() - started})
    return result


def _copy(tree):
    return jax.tree.map(jax.numpy.copy, tree)


def _log(directory, experiment, splits, carried, note, at, metrics) -> None:
    """Writes one line of metrics, with the accuracy on validation; keeps the params that did best there."""
    state, metrics = carried["state"], records.plain(metrics)
    broken = sorted(name for name, value in metrics.items() if name.startswith("loss/") and not math.isfinite(value))
    if broken:
        raise FloatingPointError(
            f"{broken[0]} is {metrics[broken[0]]} at step {at}. The log and the checkpoints in {directory} are from "
            "before. Try a smaller learning rate, or look for bad values in the data."
        )
    validation = splits.validation
    accuracy = experiment.evaluate(state.params, state.model_state, validation["image"], validation["label"])
    if accuracy > note["best_accuracy"]:
        note.update(best_accuracy=accuracy, best_step=at)
        carried["best"] = _copy((state.params, state.model_state))
    records.append_line(directory / "metrics.jsonl", {"step": at, "validation_accuracy": accuracy, **metrics})


def _finish(directory, experiment, splits, train_split, carried, note) -> dict:
    """Looks at the test set, once: with the last params, and with those that validation chose."""
    state, test = carried["state"], splits.test
    result = {
        "step": int(state.step),
        "test_accuracy": experiment.evaluate(state.params, state.model_state, test["image"], test["label"]),
        "selected_test_accuracy": experiment.evaluate(*carried["best"], test["image"], test["label"]),
        "selected_step": note["best_step"],
        "selected_validation_accuracy": note["best_accuracy"],
    }
    weights = _training_weights(experiment, state, train_split)
    corrupted = train_split["corrupted"]
    if corrupted.any() and not corrupted.all():
        result["corrupted_auroc"] = auroc(weights[experiment.model.primary], ~corrupted)
    named = {f"weight/{task}": value for task, value in weights.items()}
    records.save_arrays(directory / "weights.npz", corrupted=corrupted, example_id=train_split["example_id"], **named)
    records.write_json(directory / "result.json", result)
    return result


def _training_weights(experiment, state, train_split, chunk: int = 1000) -> dict[str, np.ndarray]:
    """The weights of all training examples, in parts of about `chunk`: a whole data set need not fit in one batch."""
    data, count = on_device(train_split), len(train_split["label"])
    parts = []
    for indices in np.array_split(np.arange(count, dtype=np.int32), -(-count // chunk)):
        batch = experiment.batch_of(data, jax.numpy.asarray(indices))
        parts.append(task_weights(experiment.model, experiment.method, state, batch, key=jax.random.key(0)))
    return {task: np.concatenate([np.asarray(part[task]) for part in parts]) for task in parts[0]}
