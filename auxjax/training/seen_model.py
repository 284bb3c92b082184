"""The model and the state as a method sees them in an update.

    tasks            those of the run, also where a batch lacks one      `absent_tasks.with_tasks`
    averaged, step   given to the functions that name them               `interface.bind`
    frozen leaves    taken out of params and put into the functions      `trainable.without_frozen`

All three are put right here, before any method is called, so that no method knows of them.
"""

import jax

from auxjax.interface import TaskModel, TrainState, bind
from auxjax.methods.shared.absent_tasks import with_tasks
from auxjax.training.trainable import without_frozen


def as_seen(
    model: TaskModel, state: TrainState, *, others: bool = False, completed: bool = True
) -> tuple[TaskModel, TrainState]:
    """The model and the state of an update.

    Args:
      model: the `TaskModel` of the run.
      state: a training state.
      others: whether the model may return further tasks than the run has. Where the method has learned nothing of any
        task it always may.
      completed: whether tasks that a batch lacks are added, without labels.
    """
    if state.tasks and completed:
        model = with_tasks(model, state.tasks, others=others or not jax.tree.leaves(state.method))
    averaged = None
    if jax.tree.leaves(state.averaged):
        alike = lambda mean, leaf: mean if mean.dtype == leaf.dtype else mean.astype(leaf.dtype)  # noqa: E731
        averaged = jax.tree.map(alike, state.averaged, state.params)  # frozen leaves may be keys
    model = bind(model, averaged=jax.lax.stop_gradient(averaged), step=state.step)
    return without_frozen(model, state)
