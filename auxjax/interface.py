"""The seam between a model and a method: neither knows the other.

A user gives per-task, per-example losses (`TaskModel`). A method is three pure functions on the training state
(`Method`), as an optax transformation is two on the optimiser state. `make_step` puts them together.

    init (context, state, batch, key)                     -> method state
    inner(context, state, batch, key)                     -> (state, metrics)      one update of params
    outer(context, state, inner_batch, outer_batch, key)  -> (state, metrics)      one update of meta

Whole states go in and come out because methods differ in what they touch: a weighted loss changes the gradient,
Langevin sampling replaces the optimiser, a look-ahead runs the optimiser on a copy, a policy samples labels.

Nothing about a run lives outside its `TrainState` (no global counter, no hidden generator), so a checkpoint of the
state is a checkpoint of the run, and `vmap` over states is a sweep over runs.

Metrics have common names: `loss/<task>` and `weight/<task>` (means over the labelled examples of the batch),
`labelled/<task>` (their share, of a task with a mask; 0 says that the loss beside it, 0, is that of no example),
`outer_loss`, `hypergradient/<field of HypergradInfo>`, `skipped` (what was not finite and so left out of the method's
state: losses, products, or 1 for an update).
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import optax

PyTree: TypeAlias = Any  # a nest of dicts, lists, tuples and registered classes with arrays in it
Key: TypeAlias = jax.Array  # one typed PRNG key, as `jax.random.key` makes it
Scalar: TypeAlias = jax.Array | float  # an array of shape (), or a Python number


class TrainState(NamedTuple):
    """State of one run.

    Attributes:
      step: int32 scalar, the number of inner updates done.
      key: one typed PRNG key; the key of an update is `fold_in(key, step)`, so the key itself never changes.
      params: inner variables, any pytree of floating arrays.
      opt_state: state of the inner optimiser.
      model_state: what the model updates besides gradients (BatchNorm statistics); `None` without any.
      method: state of the method: its weights or scheduler, their optimiser, its counters; `()` where it has none.
      averaged: running mean of the params, a pytree like them in at least float32; `()` without `make_step(average=)`.
      tasks: `{task: ()}`, the tasks that `init` has seen: a batch that lacks one is taken for one without labels of it.
        No arrays; `()` where nothing is known of them.
    """

    step: jax.Array
    key: Key
    params: PyTree
    opt_state: PyTree
    model_state: PyTree = None
    method: PyTree = ()
    averaged: PyTree = ()
    tasks: PyTree = ()


class TaskLosses(NamedTuple):
    """What a model's loss function returns for one batch.

    Attributes:
      values: `{task: [n_task]}`, one loss per example and task. Tasks may have batches of different sizes, and an
        auxiliary task may be missing from a batch: it is taken for one without labels there.
      masks: `{task: bool [n_task]}`, True where the example has a label for the task; tasks left out are
        fully labelled.
      features: `[n, d]` output of the shared trunk, or `{task: [n_task, d]}`, for methods that look at it (JTDS).
      state: the model's new state (BatchNorm statistics), `None` for a model without any.
      maps: `{task: [n_task, height, width]}`, losses per pixel whose means over pixels are `values`, for methods that
        look at where in an image a loss is (AuxiLearn's convolutional form).
      label_losses: `[n, classes]`, what the auxiliary head would lose if class c were its label, for methods that
        generate labels, where the loss is linear in the label, as cross-entropy and focal loss are. They then need no
        `TaskModel.soft_label_loss`, and one forward and backward pass serves the primary and the generated task.
    """

    values: Mapping[str, jax.Array]
    masks: Mapping[str, jax.Array] | None = None
    features: Any = None
    state: Any = None
    maps: Mapping[str, jax.Array] | None = None
    label_losses: jax.Array | None = None


class LossFunction(Protocol):
    """`(params, batch, key) -> TaskLosses`, and by keyword what else of the run the function names (`EXTRAS`).

    To a type checker `*args, **kwargs` leave the rest of the signature open: it asks for the three arguments and for
    what is returned, and takes `losses(params, batch, key, *, state)`.
    """

    def __call__(self, params: PyTree, batch: PyTree, key: Key, /, *args: Any, **kwargs: Any) -> TaskLosses:
        """The losses of a batch: one number per example and task, before any mean."""
        ...


class SoftLabelLoss(Protocol):
    """`(params, batch, labels, key) -> [n]`, and by keyword what else of the run the function names."""

    def __call__(
        self, params: PyTree, batch: PyTree, labels: jax.Array, key: Key, /, *args: Any, **kwargs: Any
    ) -> jax.Array:
        """The auxiliary head's loss of every example against soft labels `[n, classes]`."""
        ...


class FeatureLoss(Protocol):
    """`(params, features, labels) -> [n]`, and by keyword what else of the run the function names."""

    def __call__(
        self, params: PyTree, features: jax.Array, labels: jax.Array, /, *args: Any, **kwargs: Any
    ) -> jax.Array:
        """The auxiliary head's loss of given features and labels."""
        ...


class TaskModel(NamedTuple):
    """A model as a method sees it.

    Its functions have one form, whether the run has model state or not. What a function needs of the run besides its
    arguments it names as a keyword, as in `losses(params, batch, key, *, state, averaged)`, and gets it:

        state       the model's state (BatchNorm statistics), as `init(model_state=)` gave it; `None` in a run without
        averaged    the running mean of the params, for a teacher; `None` without `make_step(average=)`
        step        int32 scalar, the number of inner updates done, for weights that ramp up

    Attributes:
      losses: `(params, batch, key) -> TaskLosses`.
      primary: name of the task that counts.
      trunk: which leaves of `params` the tasks share: a predicate on the path of a leaf, such as
        `lambda path: "trunk" in path`, a pytree of bools like `params`, or `None` for all of them.
      soft_label_loss: `(params, batch, labels, key) -> [n]`, the auxiliary head's loss against given soft labels
        `[n, classes]`, for methods that generate labels.
      feature_loss: `(params, features, labels) -> [n]`, the loss of given features and labels, for methods that
        generate both.
      outputs: `(params, batch, key) -> z`, what the losses are computed from, such as the logits, all floats. With
        `output_losses` it gives `learn_weights` and the default hypergradients of `jtds`, `n_jtds`, `auxilearn` and
        `auxinash` the Gauss-Newton matrix; `losses` has to be the two after each other.
      output_losses: `(z, batch, key) -> TaskLosses`, every loss convex in z, as cross-entropy and squared error are.
      trainable: which leaves of `params` are trained: a predicate on the path of a leaf, a pytree of bools, or
        `None` for all. The others are frozen: they may have any dtype, and no method, linear system or optimiser sees
        them.
      products: "forward", or "reverse" for losses with `jax.custom_vjp` operations (attention kernels, quantisers),
        which have no forward mode: products with gradients and Jacobians are then taken by reverse passes alone.
    """

    losses: LossFunction
    primary: str
    trunk: Callable[[str], object] | PyTree = None
    soft_label_loss: SoftLabelLoss | None = None
    feature_loss: FeatureLoss | None = None
    outputs: Callable[..., PyTree] | None = None
    output_losses: Callable[..., TaskLosses] | None = None
    trainable: Callable[[str], object] | PyTree = None
    products: str = "forward"


EXTRAS = ("state", "averaged", "step")


def takes(function: Callable, name: str) -> bool:
    """Whether a function has an argument of that name, or takes any keyword."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(about.kind is about.VAR_KEYWORD for about in parameters.values())


def call(function: Callable, *arguments, **extras):
    """`function(*arguments)`, with those of the extras that it names as keywords."""
    return function(*arguments, **{name: value for name, value in extras.items() if takes(function, name)})


def bind(model: TaskModel, **extras) -> TaskModel:
    """The model with these extras of the run given to those of its functions that name them."""

    def give(function):
        if function is None:
            return None
        named = {name: value for name, value in extras.items() if takes(function, name)}
        return partial(function, **named) if named else function

    functions = ("losses", "soft_label_loss", "feature_loss", "outputs", "output_losses")
    return model._replace(**{name: give(getattr(model, name)) for name in functions})


def no_reduction(tree: PyTree) -> PyTree:
    """The reduction where there are neither replicas nor copies: `tree` itself."""
    return tree


class Context(NamedTuple):
    """What stays fixed over a run: the model, the inner optimiser, how replicas and how copies average.

    Attributes:
      model: a `TaskModel`.
      optimizer: the inner optimiser, an optax transformation; methods may call it on copies (look-ahead).
      reduce: pytree -> pytree, applied to every gradient and inside every matrix-vector product. The identity under
        jit and sharding; a mean over replicas inside a pmapped step.
      share: pytree of floats -> pytree, applied to what the outer variables are updated by (a hypergradient, after
        the linear solve) right before their optimiser. The identity, except in `make_step(folds=)`: the mean over the
        copies, which have params and data of their own and the outer variables in common.
    """

    model: TaskModel
    optimizer: optax.GradientTransformationExtraArgs
    reduce: Callable[[PyTree], PyTree] = no_reduction
    share: Callable[[PyTree], PyTree] = no_reduction


class InitState(Protocol):
    """`init` of a `Method`."""

    def __call__(self, context: Context, state: TrainState, batch: PyTree, key: Key, /) -> PyTree:
        """The method's state before the first step; `state.method` is still `()`."""
        ...


class InnerUpdate(Protocol):
    """`inner` of a `Method`."""

    def __call__(
        self, context: Context, state: TrainState, batch: PyTree, key: Key, /
    ) -> tuple[TrainState, Mapping[str, jax.Array]]:
        """One update of `state.params`, and its metrics."""
        ...


class OuterUpdate(Protocol):
    """`outer` of a `Method`."""

    def __call__(
        self, context: Context, state: TrainState, inner_batch: PyTree, outer_batch: PyTree, key: Key, /
    ) -> tuple[TrainState, Mapping[str, jax.Array]]:
        """One update of `state.method`, and its metrics."""
        ...


class TaskWeights(Protocol):
    """`weights` of a `Method`."""

    def __call__(self, context: Context, state: TrainState, batch: PyTree, key: Key, /) -> Mapping[str, jax.Array]:
        """`{task: scalar or [n_task]}`, the weights that the method gives this batch."""
        ...


class Method(NamedTuple):
    """A method of auxiliary learning.

    Attributes:
      init: `(context, state, batch, key) -> method state`; `state.method` is still `()`.
      inner: `(context, state, batch, key) -> (state, metrics)`, one update of `state.params`. The step counter and
        the PRNG key of the state are managed by the caller.
      outer: `(context, state, inner_batch, outer_batch, key) -> (state, metrics)`, one update of `state.method`, or
        `None` for methods without an outer level. It leaves `state.model_state` alone.
      weights: `(context, state, batch, key) -> {task: scalar or [n_task]}`, the weights the method gives this batch,
        to look at; `None` for methods that have none.
      whole_batch: the method looks at the batch as a whole (at pairs of its examples, at rows of a table), where a mean
        over replicas is not enough. Inside `pmap` every replica then gets all of it, and does the same work; a batch
        that is sharded under jit is divided all the same.
      shared: which leaves of the method's state the copies of `make_step(folds=)` have in common, the outer variables
        and their optimiser's state: a predicate on the path of a leaf, such as `lambda path: path != "products"`. The
        updates change these leaves by nothing but what went through `context.share`, or by one another. `None` for
        methods that cannot be trained in folds.
      outer_data: whether `outer` looks at the outer batch, which `step` then asks for; False for methods that learn on
        inner batches alone.
      all_params: whether `outer` takes all params for trained, as a linear system over them does, whatever the
        optimiser makes of their gradients: a run whose optimiser freezes some leaves is then warned.
    """

    init: InitState
    inner: InnerUpdate
    outer: OuterUpdate | None = None
    weights: TaskWeights | None = None
    whole_batch: bool = False
    shared: Callable[[str], object] | None = None
    outer_data: bool = True
    all_params: bool = False
