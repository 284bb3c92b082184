"""Options that a sweep traces: numbers known only when the compiled program runs, so that no check can see them."""

import jax
import jax.core


def is_traced(*values) -> bool:
    """Whether any of these values is a tracer, which has no truth value: an option of a run of a sweep under `vmap`."""
    return any(isinstance(value, jax.core.Tracer) for value in values)
