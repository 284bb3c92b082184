"""One run on several processes: how they find each other, and what they must agree on.

Every process runs the same command and the same program. The devices of all of them make one mesh; what is computed is
what one device computes. Files are written by the first process, except for checkpoints, which all write together.
"""

import contextlib

import jax
import numpy as np

AUTOMATIC = "auto"


def start(how: str | None) -> None:
    """Joins the processes of a run, before anything else asks JAX for its devices.

    Args:
      how: `None` for a run of one process; "auto" where JAX finds the others itself (TPU slices, Slurm, Open MPI,
        Kubernetes); "HOST:PORT,COUNT,INDEX" elsewhere: the first process's address, how many there are, which this is.

    Raises:
      ValueError: another text, an index out of range, or nothing to find the other processes by.
    """
    if how is None:
        return
    address = {} if how == AUTOMATIC else _address(how)
    try:
        jax.distributed.initialize(**address)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed {how}: {error} Give HOST:PORT,COUNT,INDEX where JAX cannot find the processes itself."
        ) from error


def _address(how: str) -> dict:
    """Arguments of `jax.distributed.initialize`."""
    try:
        address, count, index = how.split(",")
        count, index = int(count), int(index)
        host, port = address.rsplit(":", 1)
        good = bool(host) and 0 < int(port) < 2**16 and 0 <= index < count
    except ValueError:
        good = False
    if not good:
        raise ValueError(
            f"--distributed {how}: expected auto, or HOST:PORT,COUNT,INDEX with an index from 0 to COUNT - 1, such as "
            "10.0.0.2:8476,4,0."
        )
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def is_first() -> bool:
    """Whether this process writes the files that are written once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def by_first(manager, what: str):
    """Enters a context manager in the first process only; all continue once it is entered, or none does.

    Args:
      manager: the context manager.
      what: said by the others where the first cannot enter it.
    """
    with contextlib.ExitStack() as stack:
        failure = None
        if is_first():
            try:
                stack.enter_context(manager)
            except Exception as error:
                failure = error
        if not agree(failure is None):
            raise failure or ValueError(f"{what}: failed in the first process; see its error.")
        yield


def from_first(number) -> int:
    """What `number()`, called in the first process alone, is there: a whole number below 2^31, for all."""
    found = number() if is_first() else 0
    if jax.process_count() == 1:
        return found
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(found)))


def agree(good: bool) -> bool:
    """Whether all processes say so; waits for all of them."""
    if jax.process_count() == 1:
        return good
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array(good))))


def local_copy(tree):
    """This process's copy of arrays that lie whole on every device, to evaluate or to write down."""
    return jax.tree.map(lambda leaf: leaf if leaf.is_fully_addressable else leaf.addressable_data(0), tree)
