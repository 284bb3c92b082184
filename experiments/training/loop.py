"""The training loop, of one run and of a sweep: step, log, checkpoints, resumption, and one look at the test pools.

Read it from top to bottom: it does what every run does, and nothing here depends on the method or the data set.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from auxjax.training.checkpoint import open_checkpoints, save
from experiments.runtime import interruption, processes, records
from experiments.training.resuming import resume

_SHOWN_EVERY = 0.25  # seconds


class Work(NamedTuple):
    """What the loop does not know of a run: what a step is, and what is worth writing down.

    Attributes:
      feed: `call -> iterator` over the batches, or the data, of every call of `advance` from the given one on.
      advance: `(state, batch) -> (state, metrics)`, `inner_steps` updates.
      check: `(state, metrics, note, step) -> metrics` on the host; raises FloatingPointError.
      log: `(checkpointed, note, step, metrics) -> None`, appends lines and counts them in `note["lines"]`.
      finish: `(checkpointed, note) -> result`, writes the results and returns them.
    """

    feed: Callable[[int], Iterator]
    advance: Callable[[Any, Any], tuple[Any, dict]]
    check: Callable[..., dict]
    log: Callable[..., None]
    finish: Callable[..., dict]


def run(work: Work, settings, directory, description, provenance, checkpointed, note, *, started, on_step) -> dict:
    """Trains from the newest checkpoint, or from the start, to the end.

    Args:
      work: what is trained.
      settings: `RunSettings`.
      directory: folder of the run.
      description: what the run is, see `records.find_run`.
      provenance: what its data are, see `records.claim`.
      checkpointed: `{"state": ..., "best": ...}` of a run that begins.
      note: the rest of what a checkpoint holds, plain values; `lines` counts those of the log.
      started: `time.perf_counter()` before the data were read.
      on_step: called with the step number at every logged step, and a few times a second in between.

    Raises:
      ValueError: the folder is another run's, or another process works on it.
      FloatingPointError: from `check`; what was logged and saved stays.
      OSError: the disk is full, and the like; what was logged and saved stays.
      interruption.Preempted: the process was asked to stop; all is saved.
    """
    with (
        processes.by_first(records.claim(directory, description, provenance), f"claiming {directory}"),
        open_checkpoints(directory / "checkpoints") as manager,
    ):
        _check_shared(directory)
        checkpointed, note = resume(manager, directory, checkpointed, note)
        step = int(np.ravel(jax.device_get(checkpointed["state"].step))[0])
        on_step(step)
        shown = time.perf_counter()
        if interruption.preemption_requested(step // settings.inner_steps):
            raise interruption.Preempted(step)
        batches = work.feed(step // settings.inner_steps)
        while step < settings.steps:
            interruption.check()
            checkpointed["state"], metrics = work.advance(checkpointed["state"], next(batches))
            step += settings.inner_steps
            last, stop = step >= settings.steps, interruption.preemption_requested(step // settings.inner_steps)
            log = last or step % settings.log_every < settings.inner_steps
            keep = last or stop or step % settings.checkpoint_every < settings.inner_steps
            if log or keep:
                metrics = work.check(checkpointed["state"], metrics, note, step)
            if log:
                work.log(checkpointed, note, step, metrics)
            if log or time.perf_counter() - shown > _SHOWN_EVERY:
                on_step(step)
                shown = time.perf_counter()
            if keep:
                _save(manager, directory, step, checkpointed, note)
            if stop:
                raise interruption.Preempted(step)
        result = work.finish(checkpointed, note)
    if processes.is_first():
        records.append_line(directory / "timing.jsonl", {"step": step, "seconds": time.perf_counter() - started})
    return result


def _save(manager, directory, step, checkpointed, note) -> None:
    with interruption.defer_interrupts(), records.full_disk_explained(f"the checkpoint of step {step}", directory):
        if processes.is_first():
            records.to_disk(directory / "metrics.jsonl")
        save(manager, step, checkpointed, note)
        if processes.is_first():
            records.note_checkpoints(directory, manager.all_steps(), step)


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
