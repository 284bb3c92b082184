"""One run: its data and its program, what it logs, and its results; for a refit, both of its runs."""

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
from experiments.training import checks, cross_fit, judging, loop, refit, sources

# Shapes of no data, to try out a method's options before any are read.
STAND_IN = Shapes(
    (PoolShape("train", "train", 1, (("x", (1,), "float32"),)),),
    (("x", Column("input", "real")), ("y", Column("target", "class", size=2))),
    "y",
    (),
)


def check_method(config: str, settings, method: str) -> None:
    """Raises a ValueError for a label no run can have, before any data are read."""
    label = labels.parse(method)
    settings = labels.settings_of(label, settings)
    check_settings(settings)
    if label.name == labels.CROSS_FIT:
        cross_fit.check(label)
        return
    made = labels.make(method, defaults.options_of(configs.get(config), settings, STAND_IN))
    if label.then:
        refit.check(label, made)


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
    made = labels.make(method, defaults.options_of(module, settings, shapes))
    return _program(module.build(settings, shapes), made, settings, mesh)


@functools.lru_cache(maxsize=32)
def compiled_refit(config: str, settings, tasks: tuple[str, ...], place: tuple, shapes: Shapes, mesh=None) -> Program:
    """The program of a refit, cached: one for all methods, whose weights lie in the state.

    Args:
      config, settings, shapes, mesh: as for `compiled`; dev is part of train in the shapes.
      tasks: names of the auxiliary tasks.
      place: the part of the batch that shows the primary target, and the examples of its pool, see `refit.method_of`.
    """
    experiment = configs.get(config).build(settings, shapes)
    return _program(experiment, refit.method_of(experiment.model.primary, tasks, *place), settings, mesh)


def _program(experiment: Experiment, method, settings, mesh) -> Program:
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
      learned: the weights of a refit, `None` for any other run.
    """

    data: Data
    trained_on: Data
    program: Program
    feed: Any
    learned: refit.Learned | None = None


def train(
    config, settings, method, seed, directory, *, learning=None, data_dir=None, mesh=None, on_step=lambda step: None
) -> dict:
    """Runs, or resumes, one run and returns its result.

    A label with "+refit" or "+keep" is two runs: the plain one, which learns weights, and one from scratch with them.

    Args:
      config: name of a config, or the path of one.
      settings: its `Settings`.
      method: label of a method, see `methods.labels`.
      seed: seed of the split, the label noise, the initial params and every later draw.
      directory: folder of the run.
      learning: folder of the plain run of a refit, which is trained where it is not finished; `directory/learning` if
        `None`.
      data_dir: where the data set lies, for configs that need one.
      mesh: a device mesh over which every batch is split, see `auxjax.training.parallel`; it is not part of the run's
        identity: a run may resume with another. With several processes, `directory` is one folder that all of them see.
      on_step: called with the number of updates done, in both runs of a refit together, at every logged step,
        and a few times a second in between.

    Raises:
      ValueError: anything wrong with the names, the settings, the data or the folder, before training starts.
      FloatingPointError: a loss or a parameter stopped being finite, or no weights to train with were learned; what was
        logged and saved stays.
      OSError: the disk is full, and the like; what was logged and saved stays.
      interruption.Preempted: the process was asked to stop; all is saved.
    """
    directory = pathlib.Path(directory)
    check_settings(settings)
    check_seed(seed)
    check_method(config, settings, method)
    label = labels.parse(method)
    description = describe(config, settings, labels.text_of(label), seed)
    beside = {records.LEARNING} if label.then and learning is None else set()
    finished = records.find_run(directory, description, beside)
    if finished is not None:
        on_step(finished.get("updates", finished["step"]))
        return finished
    options = {"data_dir": data_dir, "mesh": mesh, "on_step": on_step}
    if not label.then and label.name == labels.CROSS_FIT:
        if mesh is not None or settings.input == "stream":
            raise ValueError(
                f"{method}: its folds are one program on one device; leave --devices and input=stream out."
            )
        options |= {"place": on_device}
        del options["mesh"]
        return cross_fit.learn(config, settings, label, seed, directory, description, **options)
    if not label.then:
        return _train(config, settings, label, seed, directory, description, **options)
    learning = directory / records.LEARNING if learning is None else pathlib.Path(learning)
    processes.agree(True)  # the first process may still be writing the result that the others are to read
    if not (learning / "result.json").exists():
        _check_joined(config, labels.settings_of(label, settings), seed, data_dir)
    first = train(config, settings, labels.text_of(labels.learning(label)), seed, learning, **options)
    processes.agree(True)
    options["on_step"] = lambda step: on_step(first["step"] + step)
    return _train(config, settings, label, seed, directory, description, (learning, first), **options)


def _check_joined(config, settings, seed, data_dir) -> None:
    """Raises a ValueError for data whose dev examples cannot join train, before the first run of a refit."""
    data = configs.get(config).load(settings, seed, data_dir)
    check_data(data)
    pools.with_dev(data)


def _train(config, settings, label, seed, directory, description, learned=None, *, data_dir, mesh, on_step) -> dict:
    """One run; `learned` are the folder and the result of the run whose weights it takes."""
    settings = labels.settings_of(label, settings)
    started = time.perf_counter()
    prepared = prepare(config, settings, label, seed, data_dir, mesh, None if learned is None else learned[0])
    experiment, init, step, _ = prepared.program
    provenance = provenance_of(experiment, prepared.data.source, pools.checksum(prepared.data))
    provenance |= {"method_options": dict(label.options)}
    key_params, key_run = jax.random.split(jax.random.key(seed))
    params, model_state = experiment.init_params(key_params)
    inner, outer = next(prepared.feed(0))
    state = init(key_run, params, inner, model_state)
    result = {}
    if prepared.learned is not None:
        state = refit.put_in(state, prepared.learned, experiment.model.primary, mesh)
        result = {"learned_weights": prepared.learned.weights}
        provenance |= result | {"learned_crc32": prepared.learned.checksum()}
    jax.eval_shape(step, state, inner, outer)  # shape errors surface here, before the output folder is claimed
    checkpointed = {"state": state, "best": _copy(judging.trained_of(state))}

    def finish(checkpointed, note):
        if learned is not None:
            folder, first = learned
            result["updates"] = first["step"] + int(checkpointed["state"].step)
            if processes.is_first():
                records.copy_timing(folder, directory)
        return _finish(directory, prepared, mesh, result, checkpointed, note)

    work = loop.Work(
        feed=prepared.feed,
        advance=lambda state, batch: step(state, *batch),
        check=partial(_check, directory),
        log=partial(_log, directory, prepared),
        finish=finish,
    )
    note = {"best": {}, "best_step": 0, "lines": 0}
    beginning = {"started": started, "on_step": on_step}
    return loop.run(work, settings, directory, description, provenance, checkpointed, note, **beginning)


def estimate(config, settings, method, seed, *, data_dir=None, mesh=None) -> MemoryEstimate:
    """The memory that `train` would need on the device, from the compiled step; nothing is trained or written.

    For a refit, that of the run which learns the weights: the other one needs less.

    Raises:
      ValueError: anything wrong with the names, the settings or the data.
    """
    check_settings(settings)
    check_seed(seed)
    check_method(config, settings, method)
    label = labels.parse(method)
    settings = labels.settings_of(label, settings)
    if label.name == labels.CROSS_FIT:
        raise ValueError(f"{method}: the memory of its rounds is not estimated; leave --dry-run out.")
    prepared = prepare(config, settings, labels.learning(label) or label, seed, data_dir, mesh)
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


def prepare(config, settings, label, seed, data_dir, mesh, learning=None) -> Prepared:
    """Reads the data and builds the program; nothing is computed or written.

    `learning` is the folder of the finished run whose weights a refit takes.

    Raises:
      FloatingPointError: it has learned no weights to train with.
    """
    data = configs.get(config).load(settings, seed, data_dir)
    check_data(data)
    joins = label.with_dev or settings.dev == "train" or learning is not None
    trained_on = pools.dev_only(data) if label.dev_only else pools.with_dev(data) if joins else data
    shapes, learned = pools.shapes(trained_on), None
    if learning is None:
        program = compiled(config, settings, labels.text_of(labels.plain(label)), shapes, mesh)
    else:
        experiment = configs.get(config).build(settings, shapes)
        primary, (part, pool) = experiment.model.primary, sources.primary_part(experiment, trained_on)
        known, size = sources.labelled(experiment, data), pools.count(trained_on.pools[pool])
        learned = refit.learned(learning, label.then, primary, known, size - known.size)
        tasks = tuple(sorted(set(learned.weights) - {primary}))
        place = (part, None if learned.examples is None else size)
        program = compiled_refit(config, settings, tasks, place, shapes, mesh)
    experiment = program.experiment
    inner = sources.inner_arrays(experiment, trained_on)
    outer = sources.outer_arrays(experiment, trained_on, dev=settings.dev)
    if settings.input == "stream":
        feed = feeds.streamed(experiment, inner, outer, settings, seed, mesh)
    else:
        inner = on_device(inner, mesh)
        feed = feeds.resident(inner, inner if settings.dev == "train" else on_device(outer, mesh))
    return Prepared(data, trained_on, program, feed, learned)


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


def _finish(directory, prepared: Prepared, mesh, further: dict, checkpointed, note) -> dict:
    """Looks at the test pools, once: with the last params, and with those that validation chose.

    `further` is what else the result holds.
    """
    experiment, data, state = prepared.program.experiment, prepared.data, checkpointed["state"]
    found = {
        "test": judging.judge(experiment, processes.local_copy(judging.trained_of(state)), data, "test"),
        "selected_test": judging.judge(experiment, processes.local_copy(Trained(*checkpointed["best"])), data, "test"),
        "selected_validation": note["best"],
    }
    result = {"step": int(state.step), "selected_step": note["best_step"], **further}
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
    """`{"corrupted_auroc": ...}`: how well the primary weights tell wrong labels, where some are known to be wrong.

    Nothing of a method that gives all examples the same weight: it says nothing of them.
    """
    corrupted = sources.corrupted(experiment, data)
    of_primary = weights.get(experiment.model.primary)
    if corrupted is None or of_primary is None or corrupted.all() or not corrupted.any() or np.ptp(of_primary) == 0:
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
