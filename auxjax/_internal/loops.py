"""When a loop is written out.

On the CPU a convolution's gradient inside `while_loop`, `scan` or `cond` runs 15 to 30 times slower than the same code
outside, unless the loop is rewritten (`_internal.convolutions`), which only those that are compiled here can be. So
short loops are straight-line code there. They compile longer, and cannot stop early.
"""

import jax

SHORT = 32  # passes of about one gradient each, up to which a loop is short
SHORT_OF_STEPS = 16  # passes that are whole training steps or updates


def write_out(times: int, limit: float = SHORT, choice: bool | int | None = None) -> bool | int:
    """Whether to write out a loop of so many passes: the caller's `choice`, or for `None` if it is short and on a CPU.

    The answer is also what `jax.lax.scan` takes as `unroll`.
    """
    return jax.default_backend() == "cpu" and times <= limit if choice is None else choice
