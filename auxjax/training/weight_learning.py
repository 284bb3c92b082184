"""Task weights by cross-fitted hypergradients: rounds of short trainings that see what each task is worth held out.

    w = total softmax(phi),  phi = 0,  S = 0,  total = K
    in each round:   F fresh networks; network f trains T updates on  L_f + sum_k w_k L_k,  L_f without fold f of the
                     primary task's labels
        at some of these updates    s_fk = -<u_f, g_k>,    (C_f + damping) u_f = d L_held_out_f,    g_k = d L_k
        g = mean of s over folds and times, less its mean over tasks;    S = S + mean(g^2)
        phi = phi - rate * g / sqrt(S)

Every label trains and every label judges. The networks are fresh in every round and their training short, because the
hypergradient tells what helps only as long as the labels are not memorised; one step size for all tasks, with memory of
how large the signal was, so that noise after the signal does not walk on. What is learned is the weights alone: train a
model with them on all labels afterwards (`fixed_weights`), the refit. docs/learn_weights.md derives it and says where
it fails.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from auxjax._internal import checks, convolutions, loops, roles
from auxjax.formulas.losses import masked_mean, weighted_loss
from auxjax.hypergrad import BilevelProblem, implicit
from auxjax.hypergrad.problem import Estimator
from auxjax.interface import Context, Key, PyTree, TaskLosses, TaskModel, TrainState, bind, call
from auxjax.methods._fixed_weights import fixed_weights
from auxjax.methods.shared import evaluation, positive_curvature
from auxjax.solvers import cg
from auxjax.training.options import check_model
from auxjax.training.step import make_updates

STEPS, DAMPING = 10, 1e-2  # of the default solver
_MEASURE = 1  # stream of a network's key at a step, beside the update's


class WeightState(NamedTuple):
    """What is carried from round to round.

    Attributes:
      round: int32 scalar, rounds done.
      key: the key of the whole; round r uses `fold_in(key, r)`.
      logits: `[K]`, phi.
      squares: scalar, S, the sum of the signals' mean squares so far.
      networks: with `restart=False` the networks' training states, stacked `[F, ...]`, otherwise `None`.
    """

    round: jax.Array
    key: Key
    logits: jax.Array
    squares: jax.Array
    networks: Any = None


class RoundInfo(NamedTuple):
    """What a round has seen.

    Attributes:
      weights: `[K]`, after the round.
      signal: `[M, F, K]`, d L_held_out / d w_k at each measurement, of each fold; negative for a task that helps.
      held_out: `[M, F]`, the held-out losses.
      train: `[M, F]`, the primary task's training losses beside them.
      residual: `[M, F]`, `||v - C u|| / ||v||` of the linear solves.
    """

    weights: jax.Array
    signal: jax.Array
    held_out: jax.Array
    train: jax.Array
    residual: jax.Array


class Rounds(NamedTuple):
    """`make_rounds`' functions.

    Attributes:
      init: `(key, data) -> WeightState`.
      round: `(state, data) -> (WeightState, RoundInfo)`.
      weights: `WeightState -> [K]`.
      tasks: `data -> [names]`, of the K auxiliary tasks in the order of all arrays here.
    """

    init: Callable[[Key, PyTree], WeightState]
    round: Callable[[WeightState, PyTree], tuple[WeightState, RoundInfo]]
    weights: Callable[[WeightState], jax.Array]
    tasks: Callable[[PyTree], list[str]]


def make_rounds(
    model: TaskModel,
    optimizer: optax.GradientTransformation,
    init_params: Callable[[Key], Any],
    *,
    draw_inner: Callable[..., PyTree],
    draw_held_out: Callable[..., PyTree],
    draw_measured: Callable[..., PyTree] | None = None,
    folds: int = 4,
    updates: int = 100,
    measure_at: tuple[float, ...] = (0.75, 1.0),
    hypergradient: Estimator | None = None,
    rate: float = 2.0,
    total: float | None = None,
    simplex: bool = True,
    restart: bool = True,
    loop: str | None = None,
    together: bool | None = None,
) -> Rounds:
    """The rounds as functions, to be called one by one, saved in between, or mapped over seeds.

    Args:
      model: a `TaskModel`; its primary task is the one whose labels are held out.
      optimizer: the inner optimiser.
      init_params: `key -> (params, model_state)`.
      draw_inner: `(data, key, fold) -> batch` without the labels of fold `fold`, an int32 scalar that is traced. It may
        name `step` and `run_key` as well, as the draws of `make_step` may.
      draw_held_out: `(data, key, fold) -> batch` of the primary labels of that fold alone.
      draw_measured: as `draw_inner`, the batch of a measurement, which pays by being larger; `draw_inner` by default.
      folds: F, networks that are trained side by side.
      updates: T, inner updates of a round.
      measure_at: shares of T at which hypergradients are taken, ascending.
      hypergradient: an estimator. By default implicit differentiation with ten steps of conjugate gradients, damped
        by 0.01, with the Gauss-Newton matrix of a model that gives its outputs (`TaskModel.output_losses`) and the
        empirical Fisher matrix of any other.
      rate: of the first step of phi; later ones are shorter.
      total: the sum of the weights, K by default. More where few labels of the primary task stand against tasks that
        teach much.
      simplex: `False` for weights that do not share a sum, `w_k = total / K exp(phi_k)`, and a signal whose mean over
        the tasks stays in. For comparison: useless tasks keep weights that add up (docs/results/known_worth.md).
      restart: `False` for networks that train on from round to round, and a state that holds them. For comparison: once
        the labels are memorised the signal is lost.
      loop: how updates repeat, as for `make_step`. With "scan" a round is one program, which `vmap` takes.
      together: whether the folds are one vmapped program, or one after the other with a program for one of them, which
        a loop on the host can do. `None` takes the second way for convolutions on a CPU, where XLA runs those whose
        kernels differ two to three times slower side by side.

    Returns:
      `Rounds`. Cost of a round: F T joint gradients, and F M measurements of about 2 (1 + solver's products) gradients
      on the measured batch.

    Raises:
      TypeError, ValueError: an impossible option; a model with fewer than two auxiliary tasks (from `init`).
    """
    where = "learn_weights"
    check_model(where, model)
    if hypergradient is not None:
        roles.estimator(where, "an estimator such as implicit(cg(damping=0.01))", hypergradient=hypergradient)
    draw_measured = draw_inner if draw_measured is None else draw_measured
    draws = {"draw_inner": draw_inner, "draw_held_out": draw_held_out, "draw_measured": draw_measured}
    checks.function(where, **{"init_params": init_params, **draws})
    checks.count(where, 2, folds=folds)
    checks.count(where, 1, updates=updates)
    checks.number(where, above=0, rate=rate)
    if total is not None:
        checks.number(where, above=0, total=total)
    checks.one_of(where, (True, False), simplex=simplex, restart=restart)
    checks.one_of(where, ("scan", "host", None), loop=loop)
    if not measure_at or list(measure_at) != sorted(set(measure_at)) or not 0 < measure_at[0] <= measure_at[-1] <= 1:
        raise ValueError(f"{where}(measure_at={measure_at}): expected shares of a round, ascending, above 0, up to 1.")
    times = [max(1, round(share * updates)) for share in measure_at]
    checks.one_of(where, (True, False, None), together=together)
    on_host = (loop or ("host" if loops.write_out(updates, np.inf) else "scan")) == "host"
    if together is False and not on_host:
        raise ValueError(f"{where}(together=False, loop={loop!r}): expected loop='host', which calls fold after fold.")
    numbers = jnp.arange(folds, dtype=jnp.int32)

    def updates_of(fold, names):
        method = fixed_weights(weights=dict.fromkeys(names, 1.0))
        return make_updates(model, method, optimizer, draw_inner=partial(_draw, draw_inner, fold))

    def losses_of(data) -> TaskLosses:
        """The losses of fresh params on an inner batch."""
        key = jax.random.key(0)
        params, model_state = init_params(key)
        batch = _draw(draw_inner, jnp.int32(0), data, key, step=jnp.int32(0), run_key=key)
        return evaluation.evaluate(model, params, model_state, batch, key)

    def tasks(data) -> list[str]:
        context = Context(model, optax.with_extra_args_support(optimizer))
        return evaluation.auxiliary_or_raise(where, context, jax.eval_shape(losses_of, data))

    def weights_of(state: WeightState) -> jax.Array:
        count = state.logits.shape[0]
        shares = jax.nn.softmax(state.logits) if simplex else jnp.exp(state.logits) / count
        return (count if total is None else total) * shares

    def init(key, data) -> WeightState:
        checks.key(where, key)
        names = tasks(data)
        if len(names) < 2:
            raise ValueError(
                f"{where} weighs auxiliary tasks against each other: expected at least two, got {names}. For one task "
                "compare a few values, as methods 'grid_search' and 'fixed_weights' do."
            )
        state = WeightState(jnp.int32(0), key, jnp.zeros(len(names)), jnp.zeros(()))
        return state if restart else state._replace(networks=jax.vmap(fresh, (0, None, None))(numbers, state, data))

    def fresh(fold, state: WeightState, data) -> TrainState:
        """A fresh network, with the weights in the place of the method's state."""
        names = tasks(data)
        weights = dict(zip(names, weights_of(state), strict=True))
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.round), fold)
        key_params, key_run = jax.random.split(key)
        params, model_state = init_params(key_params)
        made = updates_of(fold, names).init(key_run, params, data, model_state)
        return weighted(made, weights)

    def start(fold, state: WeightState, data) -> TrainState:
        """The network of a fold at the beginning of a round."""
        if restart:
            return fresh(fold, state, data)
        network = jax.tree.map(lambda leaf: leaf[fold], state.networks)
        return weighted(network, dict(zip(tasks(data), weights_of(state), strict=True)))

    def weighted(network: TrainState, weights) -> TrainState:
        return network._replace(method=jax.tree.map(lambda new, old: new.astype(old.dtype), weights, network.method))

    def train(fold, network: TrainState, data) -> TrainState:
        return updates_of(fold, list(network.method)).inner(network, data, 0)[0]

    def measure(fold, network: TrainState, data):
        """Hypergradients `[K]`, the held-out loss, the training loss and the residual."""
        names = tasks(data)
        key = jax.random.fold_in(jax.random.fold_in(network.key, network.step), _MEASURE)
        key_inner, key_outer, key = jax.random.split(key, 3)
        extras = {"step": network.step, "run_key": network.key}
        inner = _draw(draw_measured, fold, data, key_inner, **extras)
        outer = _draw(draw_held_out, fold, data, key_outer, **extras)
        bound = bind(model, averaged=None, step=network.step)

        def out_of(params, batch):
            return evaluation.evaluate(bound, params, network.model_state, batch, key)

        def inner_loss(params, weights, batch):
            return _weighted(model, out_of(params, batch), weights)

        def held_out_loss(params, weights, batch):
            del weights
            return _primary(model, out_of(params, batch))

        known = (bound, network.model_state, key, lambda meta, out: _weighted(model, out, meta))
        curvature = positive_curvature.of_outputs(*known) or positive_curvature.of_losses(*known)
        how: dict[str, Any] = {"mask": model.trainable, "products": model.products, "curvature": curvature}
        problem = BilevelProblem(inner=inner_loss, outer=held_out_loss, **how)
        estimator = hypergradient or implicit(cg(max_steps=STEPS, damping=DAMPING, rtol=0.0), curvature="problem")
        found, info = estimator(problem, network.params, network.method, inner, outer, key=key)
        signal = jnp.stack([found[name] for name in names])
        train_loss = _primary(model, out_of(network.params, inner))
        return signal, info.outer_loss, train_loss, info.relative_residual

    def conclude(state: WeightState, networks, measured) -> tuple[WeightState, RoundInfo]:
        signal, held_out, trained, residual = measured
        mean = jnp.mean(signal, axis=(0, 1))
        mean = mean - jnp.mean(mean) if simplex else mean
        squares = state.squares + jnp.mean(jnp.square(mean))
        step = rate * mean / jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
        new = WeightState(state.round + 1, state.key, state.logits - step, squares, None if restart else networks)
        return new, RoundInfo(weights_of(new), signal, held_out, trained, residual)

    waits = [time - before for before, time in zip([0, *times], times, strict=False)]

    def one_program(state: WeightState, data) -> tuple[WeightState, RoundInfo]:
        start, train, measure = side_by_side

        def wait_and_measure(networks, wait):
            networks = jax.lax.fori_loop(0, wait, lambda _, networks: train(numbers, networks, data), networks)
            return networks, measure(numbers, networks, data)

        return conclude(state, *jax.lax.scan(wait_and_measure, start(numbers, state, data), jnp.array(waits)))

    def on_the_host(state: WeightState, data) -> tuple[WeightState, RoundInfo]:
        program = jax.make_jaxpr(losses_of)(data).jaxpr
        slow = together is None and jax.default_backend() == "cpu" and convolutions.has_convolution(program)
        alone = slow if together is None else not together
        start, train, measure = one_by_one if alone else compiled
        measured, copies = [], list(numbers) if alone else [numbers]
        networks = [start(copy, state, data) for copy in copies]
        for wait in waits:
            for _ in range(wait):
                networks = [train(*pair, data) for pair in zip(copies, networks, strict=True)]
            found = [measure(*pair, data) for pair in zip(copies, networks, strict=True)]
            measured.append(stacked(found) if alone else found[0])
        return compiled_conclude(state, stacked(networks) if alone else networks[0], stacked(measured))

    def stacked(parts: list):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    # Over folds, networks and data.
    side_by_side = jax.vmap(start, (0, None, None)), jax.vmap(train, (0, 0, None)), jax.vmap(measure, (0, 0, None))

    def jit(function):
        return jax.jit(convolutions.channels_last_in_loops(function))

    compiled = [jit(function) for function in side_by_side]
    one_by_one = [jit(function) for function in (start, train, measure)]
    compiled_conclude = jit(conclude)
    return Rounds(init, on_the_host if on_host else jit(one_program), weights_of, tasks)


def _weighted(model: TaskModel, out: TaskLosses, weights) -> jax.Array:
    return weighted_loss(out.values, _of_batch(model, out.values, weights), masks=out.masks)


def _of_batch(model: TaskModel, losses: Mapping, weights: Mapping) -> dict:
    """The weights of the tasks that a batch has."""
    return {model.primary: 1.0, **{task: weight for task, weight in weights.items() if task in losses}}


def _primary(model: TaskModel, out: TaskLosses) -> jax.Array:
    return masked_mean(out.values[model.primary], evaluation.mask_of(out, model.primary))


def _draw(draw: Callable, fold, data, key, *, step=None, run_key=None):
    return call(draw, data, key, fold=fold, step=step, run_key=run_key)


class LearnedWeights(NamedTuple):
    """What `learn_weights` returns.

    Attributes:
      weights: `{task: number}`, of the auxiliary tasks; the primary task has 1. What `fixed_weights(weights=)` takes.
      history: `[R + 1, K]`, the weights before each round and at the end, tasks in the order of `weights`.
      rounds: `RoundInfo` of every round.
      state: the `WeightState`, to go on from.
    """

    weights: dict[str, float]
    history: np.ndarray
    rounds: list[RoundInfo]
    state: WeightState


def learn_weights(
    model: TaskModel,
    optimizer: optax.GradientTransformation,
    init_params: Callable[[Key], Any],
    data: PyTree,
    key: Key,
    *,
    draw_inner: Callable[..., PyTree],
    draw_held_out: Callable[..., PyTree],
    rounds: int = 10,
    state: WeightState | None = None,
    on_round: Callable[[int, WeightState, RoundInfo], Any] | None = None,
    **options: Any,
) -> LearnedWeights:
    """Learns the weights of a model's auxiliary tasks from nothing but its training data.

    Short trainings and a few exact hypergradients tell what each task is worth on labels that were held out; see
    `make_rounds`, and docs/learn_weights.md for the derivation. Train with the weights afterwards, on all labels:

        learned = auxjax.learn_weights(model, optimizer, init_params, data, key, draw_inner=..., draw_held_out=...)
        method = auxjax.methods.get("fixed_weights", weights=learned.weights)

    Args:
      model: a `TaskModel`.
      optimizer: the inner optimiser.
      init_params: `key -> (params, model_state)`.
      data: any pytree, what the draws draw from.
      key: one typed PRNG key.
      draw_inner: `(data, key, fold) -> batch` without the primary labels of that fold.
      draw_held_out: `(data, key, fold) -> batch` of these labels alone.
      rounds: R, steps of the weights.
      state: to go on from, instead of equal weights; `rounds` counts from the first one.
      on_round: called with the number of rounds done, the state and what the round has seen: for progress, and to save.
      **options: of `make_rounds`: `folds`, `updates`, `hypergradient`, `rate` and others.

    Returns:
      `LearnedWeights`. Cost: R F T joint gradients (with the defaults 4,000, as much as two ordinary runs of 2,000
      updates), and R F M hypergradients of about 20 gradients each.

    Raises:
      TypeError, ValueError: an impossible option; a model with fewer than two auxiliary tasks.
      FloatingPointError: a hypergradient that is not finite; `on_round` has seen the states before it.
    """
    checks.count("learn_weights", 1, rounds=rounds)
    made = make_rounds(model, optimizer, init_params, draw_inner=draw_inner, draw_held_out=draw_held_out, **options)
    state = made.init(key, data) if state is None else state
    names, seen, history = made.tasks(data), [], [made.weights(state)]
    for number in range(int(state.round), rounds):
        state, info = made.round(state, data)
        if not np.isfinite(np.asarray(info.signal)).all():
            raise FloatingPointError(
                f"learn_weights: a hypergradient of round {number + 1} is not finite. Try a smaller learning rate of "
                "the params or more damping, with hypergradient=implicit(cg(damping=0.1), curvature=...)."
            )
        seen.append(info)
        history.append(info.weights)
        if on_round is not None:
            on_round(number + 1, state, info)
    table = np.stack([np.asarray(weights) for weights in history])
    weights = {name: float(value) for name, value in zip(names, table[-1], strict=True)}
    return LearnedWeights(weights, table, seen, state)
