"""One run: its data and its program, what it logs, and its results."""

import dataclasses
import functools
import pathlib
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from auxjax import make_step, task_weights
from auxjax.training.memory import MemoryEstimate, estimate_memory
from auxjax.training.parallel import on_all, replicate, state_shardings
from experiments import configs
from experiments.contract import Experiment
from experiments.data import pools
from experiments.data.checking import check_data
from experiments.data.pools import Column, Data, PoolShape, Shapes
from experiments.evaluation.evaluators import Trained
from experiments.evaluation.metrics import as_plain
from experiments.evaluation.statistics import auroc
from experiments.inputs import feeds
from experiments.inputs.batches import Draw
from experiments.methods import defaults, labels
from experiments.runtime import processes, records
from experiments.settings import check_seed, check_settings
from experiments.training import checks, judging, loop, sources

# Shapes of no data, to try out a method's options before any are read.
STAND_IN = Shapes(
    (PoolShape("train", "train", 1, (("x", (1,), "float32"),)),),
    (("x", Column("input", "real")), ("y", Column("target", "class", size=2))),
    "y",
    (),
)


def check_method(config: str, settings, method: str) -> None:
    """Raises a ValueError for a label no run can have, before any data are read."""
    labels.make(method, defaults.options_of(configs.get(config), settings, STAND_IN))


def describe(config: str, settings, method: str, seed: int) -> dict:
    """What makes two runs the same, as plain values."""
    return {
        "config": configs.label_of(config),
        "method": method,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
    }


def provenance_of(experiment: Experiment, source: str, checksum: int) -> dict:
    """What else run.json says: the data, and the metrics by which the run is judged."""
    about = {"data": source, "data_crc32": checksum, "primary": experiment.model.primary, "metric": experiment.metric}
    return about | {"metrics": as_plain(judging.metrics_of(experiment))}


class Program(NamedTuple):
    """What is compiled for a run: the seeds of one process share it.

    Attributes:
      experiment: the `Experiment`.
      init: `(key, params, data, model_state) -> state`.
      step: `(state, inner data, outer data) -> (state, metrics)`.
      weigh: `(state, examples) -> weights` that the method gives them.
    """

    experiment: Experiment
    init: Any
    step: Any
    weigh: Any


@functools.lru_cache(maxsize=32)
def compiled(config: str, settings, method: str, shapes: Shapes, mesh=None) -> Program:
    """The program of a run, cached."""
    module = configs.get(config)
    experiment = module.build(settings, shapes)
    method = labels.make(method, defaults.options_of(module, settings, shapes))
    init, step = make_step(
        experiment.step_model or experiment.model,
        method,
        experiment.optimizer,
        inner_steps=settings.inner_steps,
        outer_steps=settings.outer_steps,
        draw_inner=None if settings.input == "stream" else experiment.draw_inner,
        draw_outer=None if settings.input == "stream" else experiment.draw_outer,
        average=experiment.average,
        mesh=mesh,
    )

    @partial(jax.jit, out_shardings=None if mesh is None else on_all(mesh))
    def weigh(state, examples):
        batch = completed(experiment, examples)
        return task_weights(experiment.model, method, state, batch, key=jax.random.key(0))

    return Program(experiment, init, step, weigh)


def completed(experiment: Experiment, examples):
    """Examples as the model takes them, without augmentation; views are what `views` make of them."""
    if isinstance(experiment.draw_inner, Draw):
        return experiment.draw_inner.plain(examples)
    return {name: experiment.draw_inner.of[name].plain(found) for name, found in examples.items()}


class Prepared(NamedTuple):
    """Data and program of a run.

    Attributes:
      data: what the loader gave.
      trained_on: the same with dev in train, for a run that trains on both.
      program: what is compiled.
      feed: see `loop.Work`.
    """

    data: Data
    trained_on: Data
    program: Program
    feed: Any


def train(config, settings, method, seed, directory, *, data_dir=None, mesh=None, on_step=lambda step: None) -> dict:
    """Runs, or resumes, one run and returns its result.

    Args:
      config: name of a config, or the path of one.
      settings: its `Settings`.
      method: label of a method, see `methods.labels`; with the suffix "+dev" it trains on the dev examples, too.
      seed: seed of the split, the label noise, the initial params and every later draw.
      directory: folder of the run.
      data_dir: where the data set lies, for configs that need one.
      mesh: a device mesh over which every batch is split, see `auxjax.training.parallel`; it is not part of the run's
        identity: a run may resume with another. With several processes, `directory` is one folder that all of them see.
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

    prepared = prepare(config, settings, label, seed, data_dir, mesh)
    experiment, init, step, _ = prepared.program
    provenance = provenance_of(experiment, prepared.data.source, pools.checksum(prepared.data))
    provenance |= {"method_options": dict(label.options)}
    key_params, key_run = jax.random.split(jax.random.key(seed))
    params, model_state = experiment.init_params(key_params)
    inner, outer = next(prepared.feed(0))
    state = init(key_run, params, inner, model_state)
    jax.eval_shape(step, state, inner, outer)  # shape errors surface here, before the output folder is claimed
    checkpointed = {"state": state, "best": _copy(judging.trained_of(state))}
    work = loop.Work(
        feed=prepared.feed,
        advance=lambda state, batch: step(state, *batch),
        check=partial(_check, directory),
        log=partial(_log, directory, prepared),
        finish=partial(_finish, directory, prepared, mesh),
    )
    note = {"best": {}, "best_step": 0, "lines": 0}
    beginning = {"started": started, "on_step": on_step}
    return loop.run(work, settings, directory, description, provenance, checkpointed, note, **beginning)


def estimate(config, settings, method, seed, *, data_dir=None, mesh=None) -> MemoryEstimate:
    """The memory that `train` would need on the device, from the compiled step; nothing is trained or written.

    Raises:
      ValueError: anything wrong with the names, the settings or the data.
    """
    check_settings(settings)
    check_seed(seed)
    check_method(config, settings, method)
    prepared = prepare(config, settings, labels.parse(method), seed, data_dir, mesh)
    experiment, init, step, _ = prepared.program
    key = jax.random.key(seed)
    params, model_state = jax.eval_shape(experiment.init_params, key)
    inner, outer = next(prepared.feed(0))
    state = jax.eval_shape(init, key, params, inner, model_state)
    if mesh is not None:

        def placed(leaf, sharding):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        state = jax.tree.map(placed, state, state_shardings(state, mesh))
    return estimate_memory(step, state, inner, outer)


def prepare(config, settings, label, seed, data_dir, mesh) -> Prepared:
    """Reads the data and builds the program; nothing is computed or written."""
    data = configs.get(config).load(settings, seed, data_dir)
    check_data(data)
    trained_on = pools.with_dev(data) if label.with_dev or settings.dev == "train" else data
    bare = labels.text_of(label._replace(with_dev=False))
    program = compiled(config, settings, bare, pools.shapes(trained_on), mesh)
    experiment = program.experiment
    inner = sources.inner_arrays(experiment, trained_on)
    outer = sources.outer_arrays(experiment, trained_on, dev=settings.dev)
    if settings.input == "stream":
        feed = feeds.streamed(experiment, inner, outer, settings, seed, mesh)
    else:
        inner = on_device(inner, mesh)
        feed = feeds.resident(inner, inner if settings.dev == "train" else on_device(outer, mesh))
    return Prepared(data, trained_on, program, feed)


def on_device(arrays, mesh=None):
    """Arrays, of one pool or by pool, on the device, or on every device of a mesh."""

    def read(array):
        return jnp.asarray(array if isinstance(array, np.ndarray) else pools.rows(array, 0, array.shape[0]))

    found = {key: on_device(array) if isinstance(array, dict) else read(array) for key, array in arrays.items()}
    return found if mesh is None else replicate(found, mesh)


def _check(directory, state, metrics, note, step) -> dict:
    del note
    metrics = records.plain(metrics)
    checks.check_finite(state.params, metrics, step, directory)
    return metrics


def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def _log(directory, prepared: Prepared, checkpointed, note, step, metrics) -> None:
    """Writes one line of metrics, with those on validation; keeps the params that did best there."""
    experiment, trained = prepared.program.experiment, judging.trained_of(checkpointed["state"])
    found = judging.judge(experiment, processes.local_copy(trained), prepared.data, "validation")
    if judging.is_better(experiment.metric, found, note["best"]):
        note.update(best=found, best_step=step)
        checkpointed["best"] = _copy(trained)
    judged = {f"validation_{name}": value for name, value in found.items()}
    if processes.is_first():
        records.append_line(directory / "metrics.jsonl", {"step": step, **judged, **metrics})
    note["lines"] += 1


def _finish(directory, prepared: Prepared, mesh, checkpointed, note) -> dict:
    """Looks at the test pools, once: with the last params, and with those that validation chose."""
    experiment, data, state = prepared.program.experiment, prepared.data, checkpointed["state"]
    found = {
        "test": judging.judge(experiment, processes.local_copy(judging.trained_of(state)), data, "test"),
        "selected_test": judging.judge(experiment, processes.local_copy(Trained(*checkpointed["best"])), data, "test"),
        "selected_validation": note["best"],
    }
    result = {"step": int(state.step), "selected_step": note["best_step"]}
    result |= {f"{place}_{name}": value for place, values in found.items() for name, value in values.items()}
    weights = training_weights(prepared.program, state, prepared.trained_on, mesh)
    result |= told_apart(weights, experiment, prepared.trained_on)
    named = {f"weight/{task}": value for task, value in weights.items()}
    if processes.is_first():
        hidden = sources.hidden_arrays(experiment, prepared.trained_on)
        records.save_arrays(directory / "weights.npz", **hidden, **named)
        records.write_json(directory / "result.json", result)
    return result


def told_apart(weights: dict[str, np.ndarray], experiment: Experiment, data: Data) -> dict[str, float]:
    """`{"corrupted_auroc": ...}`: how well the primary weights tell wrong labels, where some are known to be wrong."""
    corrupted = sources.corrupted(experiment, data)
    of_primary = weights.get(experiment.model.primary)
    if corrupted is None or of_primary is None or corrupted.all() or not corrupted.any():
        return {}
    return {"corrupted_auroc": auroc(of_primary, ~corrupted)}


def training_weights(program: Program, state, data: Data, mesh=None, chunk: int = 1000) -> dict[str, np.ndarray]:
    """The weights of all training examples of the primary pool, `{task: [n]}`, in parts of about `chunk`.

    Tasks whose examples come from other parts of the batch are left out. Those parts hold the same few examples every
    time, for the model wants a whole batch.
    """
    experiment = program.experiment
    part, pool = sources.primary_part(experiment, data)
    arrays = pools.visible(data, pool)
    total = pools.count(data.pools[pool])
    parts = np.array_split(np.arange(total, dtype=np.int32), -(-total // chunk))
    found = []
    for indices in parts:
        examples = feeds.read(arrays, indices)
        if part is not None:
            examples = {part: examples, **sources.others(experiment, data, part, avoid=len(indices))}
        weights = jax.device_get(program.weigh(state, on_device(examples, mesh)))
        found.append({task: values for task, values in weights.items() if len(values) == len(indices)})
    kept = set.intersection(*(set(part) for part in found))
    return {task: np.concatenate([part[task] for part in found]) for task in found[0] if task in kept}
