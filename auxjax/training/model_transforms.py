"""Large models: three transformations `TaskModel -> TaskModel` that trade time or digits for memory.

    mixed_precision   forward and backward passes in bfloat16; params, optimiser and linear algebra stay as they are
    accumulate        the batch in parts, one after the other: a derivative needs the activations of one part
    remat             activations are computed again in the backward pass, except for those that a policy saves

A method sees a model only through its losses, one number per example. These transformations keep that: what comes out
is one function from params to per-example losses again, with gradients, Jacobian- and Hessian-vector products of any
weighting. Every method and every hypergradient therefore has them without knowing. They compose, as in
`accumulate(mixed_precision(model), 4)`.

Not for: spreading a batch over devices (`training.parallel`), or params over devices.
"""

from collections.abc import Callable
from functools import wraps

import jax
import jax.numpy as jnp

from auxjax._internal import checks
from auxjax._internal.precision import accumulation_dtype
from auxjax.interface import TaskLosses, TaskModel, bind
from auxjax.methods.shared.evaluation import evaluate


def mixed_precision(model: TaskModel, dtype=jnp.bfloat16) -> TaskModel:
    """The model with its losses computed in half precision.

    Floating leaves of params, batch, features and labels are cast to `dtype` on the way in. Losses and features come
    back in float32 (float64 where params are), before any mean over examples. Model state goes in as it is and comes
    out in the dtypes it had; integers, bools and keys are left alone. The cast's derivative is a cast, so gradients and
    Hessian-vector products have the dtype of the params, and optimisers and linear solvers run in it. They are as exact
    as `dtype`: about two digits with bfloat16, which a solver's tolerance should not go below.

    What the model itself converts to float32 (images from bytes) pulls what follows back to float32: convert to the
    dtype of the params. A Flax model whose modules carry `dtype=jnp.bfloat16` does all this itself and needs no
    transformation. float16 lacks bfloat16's range, and nothing here scales losses.

    Args:
      model: a `TaskModel`.
      dtype: a floating dtype.

    Returns:
      A `TaskModel`, without `outputs` and `output_losses`: hypergradients take the curvature of models that do not give
      them. Cost: a copy of the params in `dtype` per evaluation; activations take half the memory.

    Raises:
      TypeError: a dtype that is not floating.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"mixed_precision(dtype={dtype.name}): expected a floating dtype, such as jnp.bfloat16.")

    @wraps(model.losses)
    def losses(params, batch, key, *given, **extras):
        out = model.losses(*_cast((params, batch), dtype), key, *given, **_cast_teacher(extras, dtype))
        if not isinstance(out, TaskLosses):
            return out  # `evaluate` says what is wrong with it
        state, (before, *_) = out.state, (*given, extras.get("state"))
        if state is not None and before is not None:
            state = jax.tree.map(lambda new, old: _cast(new, jnp.result_type(old)), state, before)
        return _cast(out._replace(state=None), accumulation_dtype(params))._replace(state=state)

    def rounded(function):
        @wraps(function)
        def wrapped(params, inputs, labels, *key, **extras):
            values = function(*_cast((params, inputs, labels), dtype), *key, **_cast_teacher(extras, dtype))
            return _cast(values, accumulation_dtype(params))

        return wrapped

    return _wrap(model, losses, rounded, rounded)


def accumulate(model: TaskModel, num_parts: int, *, unroll: bool = False) -> TaskModel:
    """The model with the losses of `num_parts` parts of the batch computed one after the other.

    Part i holds the rows `i::num_parts` of every leaf of the batch, and its losses are checkpointed: nothing is kept
    but what came in. Losses, masks, features and label losses come back in the order of the whole batch, so nobody who
    weighs or normalises them sees a difference, and the derivative of any weighting needs the activations of one part.

        time: one more forward pass per derivative       activations: 1 / num_parts

    What parts change: a part's key is `fold_in(key, i)`. Model state passes through the parts in turn, so BatchNorm
    normalises by each part's statistics and moves its running ones `num_parts` times; no derivative passes from part to
    part through it. The rows of the batch must be its examples: a loss that compares rows sees those of one part, and a
    task with several losses per row gets them back in another order.

    On a mesh every part is spread over all devices and no example changes its device, if the batch size is a multiple
    of `num_parts` times the number of devices.

    Args:
      model: a `TaskModel`.
      num_parts: number of parts; it divides the leading axis of every leaf of the batch (tasks with loaders of their
        own may have different ones). Scalars and single keys stay whole. Arrays that belong to no example, such as
        class weights, have no place in the batch: let the loss function close over them. 1 gives the model back.
      unroll: write the parts out instead of looping over them. The compiler may then hold all of them at once, and on
        the CPU it does. There a convolution's gradient is 15 to 20 times slower in a loop than outside, unless the
        program is `make_step`'s, which brings such loops into a form that is not.

    Returns:
      A `TaskModel`, without `outputs` and `output_losses`: hypergradients take the curvature of models that do not give
      them.

    Raises:
      TypeError: not a whole number of parts.
      ValueError: fewer parts than one; and, when the losses are called, a leading axis that does not divide.
    """
    checks.count("accumulate", 1, num_parts=num_parts)
    if num_parts == 1:
        return model

    def in_parts(function, carry, *inputs):
        """`(carry, outputs)` of `function(carry, index, *inputs of a part)`."""
        body = jax.checkpoint(function, prevent_cse=unroll)  # a loop keeps the two forward passes apart by itself
        parts = (jnp.arange(num_parts, dtype=jnp.int32), *_split(inputs, num_parts))
        carry, outputs = jax.lax.scan(lambda c, part: body(c, *part), carry, parts, unroll=num_parts if unroll else 1)
        return carry, _join(outputs)

    @wraps(model.losses)
    def losses(params, batch, key, state=None, **extras):
        bound = bind(model, **extras)

        def part(state, index, batch):
            out = evaluate(bound, params, state, batch, jax.random.fold_in(key, index))
            return jax.lax.stop_gradient(out.state), out._replace(state=None)

        state, out = in_parts(part, state, batch)
        return out._replace(state=state)

    def soft_label_loss(function):
        @wraps(function)
        def wrapped(params, batch, labels, key, **extras):
            def part(carry, index, batch, labels):
                return carry, function(params, batch, labels, jax.random.fold_in(key, index), **extras)

            return in_parts(part, None, batch, labels)[1]

        return wrapped

    def feature_loss(function):
        @wraps(function)
        def wrapped(params, features, labels, **extras):
            def part(carry, index, features, labels):
                del index
                return carry, function(params, features, labels, **extras)

            return in_parts(part, None, features, labels)[1]

        return wrapped

    return _wrap(model, losses, soft_label_loss, feature_loss)


def remat(model: TaskModel, policy: Callable | None = None) -> TaskModel:
    """The model with its losses under `jax.checkpoint`.

    Without a policy nothing is kept between a forward and a backward pass. What gets smaller is then everything that
    holds several passes at once: an unrolled hypergradient's steps, a Hessian linearised for many products. The peak of
    a single gradient is as high as before, since all activations are there again when the backward pass begins. To
    lower that, save some of them by a policy, as `jax.checkpoint_policies.dots_saveable`, put `nn.remat` around the
    network's layers, or `accumulate`.

    Args:
      model: a `TaskModel`.
      policy: one of `jax.checkpoint_policies`: what is saved, instead of nothing.

    Returns:
      A `TaskModel`. Cost: up to one more forward pass per derivative; values are the same.

    Raises:
      TypeError: a policy that is not a function.
    """
    if policy is not None and not callable(policy):
        raise TypeError(
            f"remat(policy={policy!r}): expected a function, such as jax.checkpoint_policies.dots_saveable, or None."
        )

    def wrap(function):
        return jax.checkpoint(function, policy=policy)

    return _wrap(model, wrap(model.losses), wrap, wrap)._replace(
        outputs=model.outputs and wrap(model.outputs), output_losses=model.output_losses
    )


def _wrap(model: TaskModel, losses, soft_label_loss, feature_loss) -> TaskModel:
    """The model with these losses, and with its other two loss functions, where it has them, transformed.

    Without its outputs, from which the losses would come in another precision, or all at once.
    """
    own = model.soft_label_loss and soft_label_loss(model.soft_label_loss)
    return model._replace(
        losses=losses,
        soft_label_loss=own,
        feature_loss=model.feature_loss and feature_loss(model.feature_loss),
        outputs=None,
        output_losses=None,
    )


def _cast_teacher(extras, dtype):
    """The extras with the averaged params cast as the params are; the model's state as it is."""
    return {name: _cast(value, dtype) if name == "averaged" else value for name, value in extras.items()}


def _cast(tree, dtype):
    """Floating leaves in `dtype`; all others as they are."""

    def cast(leaf):
        kind = getattr(leaf, "dtype", None)
        kind = jnp.result_type(leaf) if kind is None else kind
        return jnp.asarray(leaf).astype(dtype) if jnp.issubdtype(kind, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _split(tree, num_parts: int):
    """Leaves `[n, ...]` as `[num_parts, n / num_parts, ...]`, rows i, i + num_parts, ... in part i; scalars repeated.

    With strides every device's block of rows, in a batch that is split over devices, has its share of every part.
    """

    def split(path, leaf):
        shape = jnp.shape(leaf)
        if not shape:
            return jnp.broadcast_to(leaf, (num_parts,))
        if shape[0] % num_parts:
            name = jax.tree_util.keystr(path[1:])  # the first entry tells which argument it is
            raise ValueError(
                f"accumulate(num_parts={num_parts}): the batch leaf {name or '(the batch)'} has {shape[0]} examples, "
                f"which {num_parts} parts cannot share evenly. Use a batch size that is a multiple of {num_parts}; an "
                "array that belongs to no example is better closed over by the loss function."
            )
        return jnp.swapaxes(jnp.reshape(leaf, (shape[0] // num_parts, num_parts, *shape[1:])), 0, 1)

    return jax.tree_util.tree_map_with_path(split, tree)


def _join(outputs):
    """What `_split` did, undone: leaves `[num_parts, m, ...]` as `[num_parts m, ...]` in the old order."""

    def join(path, leaf):
        if leaf.ndim < 2:
            raise ValueError(
                f"accumulate: the model returned {jax.tree_util.keystr(path)} without an axis of examples; expected "
                "one row per example, which the parts of a batch can be put together from."
            )
        return jnp.reshape(jnp.swapaxes(leaf, 0, 1), (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]))

    return jax.tree_util.tree_map_with_path(join, outputs)
