"""The options every config gives the methods of `auxjax.methods` that cannot do with their defaults.

What is common to the configs is here, so that each method's name works in each of them: what a method must know of the
data (tasks, examples, updates per epoch), and optimisers for the outer variables: Adam, at rates that were chosen on
validation, and that a sweep can take as numbers. `python -m benchmarks.outer_rates` compares the methods' own defaults
with such rates.
"""

import optax

# Candidates of the grid search, and its one scalar for all auxiliary tasks: their product would be 5^13 for yeast.
GRID = (0.0, 0.1, 0.3, 1.0, 3.0)


def common_options(
    settings, shapes, auxiliary: tuple[str, ...], *, max_updates: int, fixed_weight: float
) -> dict[str, dict]:
    """`{method: options}`.

    Args:
      settings: a config's `Settings`; `outer_learning_rate` is the scheduler's of JTDS, `weight_learning_rate` that of
        weights.
      shapes: `data.pools.Shapes` of the data.
      auxiliary: names of the auxiliary tasks.
      max_updates: outer updates after which ARML's sampling ends.
      fixed_weight: weight of every auxiliary task with `fixed_weights`.
    """
    weights = {"outer_optimizer": optax.adam(settings.weight_learning_rate)}
    return {
        "arml": {
            "form": "two_stage",
            "outer_optimizer": optax.adam(1e-2),
            "step_size": 0.1,
            "temperature": settings.temperature / shapes.num_train,
            "max_updates": max_updates,
        },
        "auto_lambda": weights,
        "auxilearn": weights,
        "auxinash": weights,
        "dwa": {"window": -(-shapes.num_train // settings.batch_size)},
        "fixed_weights": {"weights": {task: fixed_weight for task in auxiliary}},
        "grid_search": {"candidates": [{task: weight for task in auxiliary} for weight in GRID]},
        "jtds": {"outer_optimizer": optax.adam(settings.outer_learning_rate)},
        "maoal": weights,
        "n_jtds": {"num_examples": shapes.num_train, "ids": _index, "outer_optimizer": optax.adam(0.1)},
        "ol_aux": weights,
    }


def options_of(config, settings, shapes) -> dict[str, dict]:
    """`{method: options}` of a config module: its own `method_options`, or common ones for the tasks of the data."""
    if hasattr(config, "method_options"):
        return config.method_options(settings, shapes)
    updates = max(100, settings.steps // settings.inner_steps // 2)  # ARML samples for at least 100 outer updates
    return common_options(settings, shapes, shapes.tasks[1:], max_updates=updates, fixed_weight=1.0)


def _index(batch):
    return batch["index"]
