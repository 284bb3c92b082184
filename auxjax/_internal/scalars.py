"""Scalars that XLA keeps as numbers and not as formulas.

The CPU compiler puts a scalar's formula into every loop over a vector that uses the scalar. In a recurrence that is
written out, the formula contains those of all steps before; the flag that all of many arrays are finite contains one
of each, in every loop that selects by it. Compilation then takes minutes.
"""

import jax
import jax.numpy as jnp


def computed_once(*scalars) -> list[jax.Array]:
    """The same scalars, of one floating dtype. A sort is something that the compiler does not look into."""
    # It leaves out the sort of a single number.
    padded = (*scalars, scalars[0]) if len(scalars) == 1 else scalars
    order = jnp.arange(len(padded), dtype=jnp.int32)
    packed = jax.lax.sort((order, jnp.stack(padded)), num_keys=1)[1]
    return [packed[place] for place in range(len(scalars))]
