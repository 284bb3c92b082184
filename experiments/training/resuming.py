"""Resumption from the newest good checkpoint; a damaged one is set aside."""

import sys

import jax

from auxjax.training.checkpoint import restore
from experiments.runtime import interruption, processes, records


def resume(manager, directory, checkpointed: dict, note: dict) -> tuple[dict, dict]:
    """The newest checkpoint that is as it was saved, or the given state where there is none; the log is cut back to it.

    Args:
      manager: from `open_checkpoints`.
      directory: the run's folder.
      checkpointed: the pytree of a run that begins.
      note: the note of a run that begins; `lines` counts those of the log.

    Returns:
      The pytree and the note to continue with. Every damaged checkpoint is reported on standard error.

    Raises:
      ValueError: a checkpoint is whole and of another program, or the log is damaged; the message says what to do.
    """
    aside, at = [], 0
    while (step := processes.from_first(lambda: _newest_intact(manager, directory, aside))) >= 0:
        failure = None
        try:
            with interruption.defer_interrupts():
                found = restore(manager, checkpointed, step)
        except Exception as error:  # Orbax raises almost anything for files that are cut or gone
            failure = error
        if processes.agree(failure is None):
            checkpointed, note, at = found.tree, found.note, step
            break
        failure = failure or ValueError(f"Another process could not read the checkpoint of step {step} in {directory}.")
        if records.is_noted(directory, step) or isinstance(failure, jax.errors.JaxRuntimeError):
            raise failure
        if processes.is_first():
            damage = f"it cannot be read ({str(failure).splitlines()[0][:200]})"
            aside.append((step, damage, records.set_aside(directory, step)))
        manager.reload()
    if processes.is_first():
        for damaged, damage, path in aside:
            then = (
                f"The run resumes from step {at}."
                if at
                else "No earlier one is available; the run starts again, from step 0."
            )
            where = f"the checkpoint of step {damaged} in {directory} is damaged: {damage}. It is now {path}."
            print(f"warning: {where} {then}", file=sys.stderr)
        records.keep_lines(directory / "metrics.jsonl", at, note["lines"])
    manager.reload()
    return checkpointed, note


def _newest_intact(manager, directory, aside: list) -> int:
    """Step of the newest checkpoint whose files are those that were saved, -1 for none; sets the others aside."""
    for step in sorted(manager.all_steps(), reverse=True):
        damage = records.damage_of(directory, step)
        if damage is None:
            return step
        aside.append((step, damage, records.set_aside(directory, step)))
    return -1
