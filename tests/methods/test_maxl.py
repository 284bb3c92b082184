"""MAXL and WAMAL against differences of the look-ahead with the real optimiser, and of the solved inner problem."""

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.formulas.soft_labels import masked_softmax
from tests.helpers.generation_problems import (
    SUB_CLASSES,
    generation_model,
    generation_problem,
    linear_generator,
    primary_class,
)
from tests.helpers.training_problems import state_of

KEY = jax.random.key(0)
OPTIMIZER = optax.chain(optax.add_decayed_weights(0.02), optax.sgd(0.1, momentum=0.9))
ENTROPY, SHARPNESS, WEIGHT = 0.2, 0.1, 0.7


def method_of(name="maxl", **options):
    weights = {"entropy_weight": ENTROPY, "sharpness_weight": SHARPNESS, "auxiliary_weight": WEIGHT}
    options = {"outer_optimizer": optax.sgd(1.0), **weights, **options}
    generator = linear_generator(scores=name == "wamal")
    return auxjax.methods.get(name, generator=generator, labels=primary_class, sub_classes=SUB_CLASSES, **options)


def labels_and_weights(name, meta, batch, **options):
    outputs = batch["x"] @ meta["w"]
    if name == "maxl":
        return masked_softmax(outputs, batch["y"], SUB_CLASSES), jnp.ones(len(batch["y"]))
    weights = 2 ** (2 * 5.0 * jax.nn.sigmoid(outputs[:, -1]) - 5.0)
    weights = weights / jnp.mean(weights) if options.get("normalise") else weights
    return masked_softmax(outputs[:, :-1], batch["y"], SUB_CLASSES), weights


def mean(values, batch):
    if "mask" not in batch:
        return jnp.mean(values)
    return jnp.sum(jnp.where(batch["mask"], values, 0.0)) / jnp.sum(batch["mask"], dtype=values.dtype)


def inner_loss(name, params, meta, batch, **options):
    """Written down again, from the paper."""
    out = generation_model().losses(params, batch, None)
    labels, weights = labels_and_weights(name, meta, batch, **options)
    return mean(out.values["primary"], batch) + WEIGHT * mean(weights * jnp.sum(labels * out.label_losses, 1), batch)


def plogp(values):
    return jnp.where(values > 0, values * jnp.log(jnp.where(values > 0, values, 1.0)), 0.0)


def outer_loss(name, params, meta, batch):
    labels, _ = labels_and_weights(name, meta, batch)
    usage = jnp.array([mean(column, batch) for column in labels.T])
    primary = mean(generation_model().losses(params, batch, None).values["primary"], batch)
    return primary + ENTROPY * jnp.sum(plogp(usage)) - SHARPNESS * mean(jnp.sum(plogp(labels), axis=1), batch)


def differences(function, meta, delta=1e-5):
    """Central differences of a function of the generator's params."""
    flat, unflatten = jax.flatten_util.ravel_pytree(meta)
    steps = np.eye(flat.size) * delta
    return np.array([(function(unflatten(flat + s)) - function(unflatten(flat - s))) / (2 * delta) for s in steps])


def look_ahead(name, state, problem, dev, num_steps=1, optimizer=OPTIMIZER, **options):
    """`meta -> outer loss` after real updates of the params."""

    @jax.jit
    def function(meta):
        params, opt_state = state.params, state.opt_state
        for _ in range(num_steps):
            gradient = jax.grad(lambda p: inner_loss(name, p, meta, problem.batch, **options))(params)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
        return outer_loss(name, params, meta, dev.batch)

    return function


def trained(method, problem, steps=3, own_loss=False):
    context, state = state_of(generation_model(own_loss=own_loss), problem, method=method, optimizer=OPTIMIZER)
    inner = jax.jit(lambda state: method.inner(context, state, problem.batch, KEY)[0])
    for _ in range(steps):
        state = inner(state)
    return context, state


def hypergradient(method, context, state, problem, dev):
    new, metrics = jax.jit(lambda state: method.outer(context, state, problem.batch, dev.batch, KEY))(state)
    return np.ravel(state.method.meta["w"] - new.method.meta["w"]), metrics


CASES = {
    "one step": {},
    "one step, masked": {"masked": True},
    "differences": {"form": "finite_difference", "epsilon": 1e-4},
    "three steps": {"look_ahead_steps": 3},
    "soft_label_loss": {"own_loss": True},
}
QUICK = [
    pytest.param(case, marks=[pytest.mark.slow] * (case in ("one step, masked", "three steps", "differences")))
    for case in CASES
]


@pytest.mark.parametrize("name", ["maxl", pytest.param("wamal", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", QUICK)
def test_the_gradient_is_that_of_the_look_ahead(name, case):
    """The entropy is part of it in every form; momentum, weight decay and the optimiser's state are the real ones."""
    options = dict(CASES[case])
    masked, own_loss = options.pop("masked", False), options.pop("own_loss", False)
    problem, dev = (generation_problem(seed, masked=masked) for seed in (0, 1))
    method = method_of(name, **options)
    context, state = trained(method, problem, own_loss=own_loss)
    found, metrics = hypergradient(method, context, state, problem, dev)
    steps = options.get("look_ahead_steps", 1)
    wanted = differences(look_ahead(name, state, problem, dev, steps), state.method.meta)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)
    ahead = look_ahead(name, state, problem, dev, steps)(state.method.meta)
    np.testing.assert_allclose(metrics["outer_loss"], ahead, rtol=1e-10)


def test_the_batch_may_be_the_inner_one():
    problem, dev = (generation_problem(seed) for seed in (0, 1))
    method = method_of(reuse_batch=True)
    context, state = trained(method, problem)
    found, _ = hypergradient(method, context, state, problem, dev)
    wanted = differences(look_ahead("maxl", state, problem, problem), state.method.meta)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)


def test_normalised_weights():
    problem, dev = (generation_problem(seed) for seed in (0, 1))
    method = method_of("wamal", normalise=True)
    context, state = trained(method, problem)
    found, _ = hypergradient(method, context, state, problem, dev)
    wanted = differences(look_ahead("wamal", state, problem, dev, normalise=True), state.method.meta)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)
    weights = auxjax.task_weights(generation_model(), method, state, problem.batch, key=KEY)["generated"]
    np.testing.assert_allclose(jnp.mean(weights), WEIGHT, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maxl", "wamal"])
def test_the_implicit_form_is_the_derivative_of_the_solved_problem(name):
    problem, dev = (generation_problem(seed) for seed in (0, 1))
    method = method_of(name, hypergradient=auxjax.implicit(auxjax.dense()))
    context, state = trained(method, problem, steps=0)
    hessian_of = jax.jit(jax.hessian(lambda flat, meta: loss_of(flat, meta)))
    start, unflatten = jax.flatten_util.ravel_pytree(state.params)

    def loss_of(flat, meta):
        return inner_loss(name, unflatten(flat), meta, problem.batch)

    descent = jax.jit(lambda flat, meta: flat - 0.3 * jax.grad(loss_of)(flat, meta))
    newton = jax.jit(lambda flat, meta: flat - jnp.linalg.solve(hessian_of(flat, meta), jax.grad(loss_of)(flat, meta)))
    for _ in range(1500):
        start = descent(start, state.method.meta)

    def solved(meta):
        flat = start
        for _ in range(6):
            flat = newton(flat, meta)
        return unflatten(flat)

    assert (
        np.linalg.norm(
            jax.grad(loss_of)(jax.flatten_util.ravel_pytree(solved(state.method.meta))[0], state.method.meta)
        )
        < 1e-12
    )
    found, metrics = hypergradient(method, context, state._replace(params=solved(state.method.meta)), problem, dev)
    wanted = differences(lambda meta: outer_loss(name, solved(meta), meta, dev.batch), state.method.meta, 1e-4)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)
    assert metrics["hypergradient/converged"]


def test_the_inner_update_is_a_gradient_step_on_both_losses():
    problem = generation_problem(0)
    method = method_of("wamal")
    context, state = state_of(generation_model(), problem, method=method)
    new, metrics = jax.jit(lambda state: method.inner(context, state, problem.batch, KEY))(state)
    gradient = jax.grad(lambda p: inner_loss("wamal", p, state.method.meta, problem.batch))(state.params)
    chex.assert_trees_all_close(new.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient), rtol=1e-12)
    labels, weights = labels_and_weights("wamal", state.method.meta, problem.batch)
    np.testing.assert_allclose(metrics["weight/generated"], WEIGHT * jnp.mean(weights), rtol=1e-12)
    np.testing.assert_allclose(metrics["label_entropy"], -jnp.mean(jnp.sum(plogp(labels), axis=1)), rtol=1e-12)
    assert 0 < metrics["label_usage"] <= np.log(6)


@pytest.mark.slow
def test_epochs_in_turn_are_as_many_inner_as_outer_updates(ordinary_promotion):
    problem, dev = generation_problem(0), generation_problem(1)
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1], leaf]), problem.batch)
    init, step = auxjax.make_step(
        generation_model(), method_of(), OPTIMIZER, inner_steps=3, outer_steps=3, donate=False
    )
    state = init(KEY, problem.params, batches)
    state, _ = step(state, batches, jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), dev.batch))
    method = method_of()
    context, by_hand = state_of(generation_model(), problem, method=method, optimizer=OPTIMIZER)
    by_hand = by_hand._replace(method=init(KEY, problem.params, batches).method)
    inner = jax.jit(lambda state, batch: method.inner(context, state, batch, KEY)[0])
    outer = jax.jit(lambda state, batch: method.outer(context, state, batch, dev.batch, KEY)[0])
    for update, order in ((inner, (0, 1, 2)), (outer, (2, 1, 0))):
        for index in order:
            by_hand = update(by_hand, jax.tree.map(lambda leaf, i=index: leaf[i], batches))
    chex.assert_trees_all_close(state.params, by_hand.params, rtol=1e-10)
    chex.assert_trees_all_close(state.method.meta, by_hand.method.meta, rtol=1e-10)


@pytest.mark.slow
def test_the_entropy_weight_spreads_the_labels(ordinary_promotion):
    """With its weight at 0 the same training leaves the labels less evenly used."""
    usage = {}
    for entropy in (0.0, 2.0):
        options = {"entropy_weight": entropy, "sharpness_weight": 0.0, "reuse_batch": True}
        method = method_of(outer_optimizer=optax.adam(0.05), **options)
        init, step = auxjax.make_step(generation_model(), method, optax.sgd(0.1))
        problem, dev = generation_problem(0, num_examples=24), generation_problem(1, num_examples=24)
        state = init(KEY, problem.params, problem.batch)
        for _ in range(60):
            state, metrics = step(state, problem.batch, dev.batch)
        usage[entropy] = float(metrics["label_usage"])
    shares = np.bincount(problem.batch["y"]) / 24
    largest = -np.sum(shares * np.log(shares)) + np.log(SUB_CLASSES)
    assert usage[2.0] > largest - 1e-3
    assert usage[0.0] < largest - 0.04


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"form": "second_order"}, ValueError, "form='second_order'"),
        ({"entropy_weight": -1.0}, ValueError, "entropy_weight=-1.0"),
        ({"sharpness_weight": float("inf")}, ValueError, "sharpness_weight=inf"),
        ({"sub_classes": 0}, ValueError, "sub_classes=0"),
        ({"look_ahead_steps": 2, "form": "finite_difference"}, ValueError, "one step ahead"),
        ({"form": "finite_difference", "hypergradient": auxjax.implicit(auxjax.cg())}, ValueError, "instead of"),
        ({"hypergradient": "cg"}, TypeError, "expected an estimator"),
        ({"generator": lambda meta: meta}, TypeError, "Generator"),
        ({"labels": "y"}, TypeError, "a function of the batch"),
        ({"epsilon": 0.0}, ValueError, "epsilon=0.0"),
    ],
)
def test_mistakes_are_named(options, error, match):
    defaults = {"generator": linear_generator(), "labels": primary_class}
    with pytest.raises(error, match=match):
        auxjax.methods.get("maxl", **{**defaults, **options})


@pytest.mark.parametrize(
    ("model", "name", "options", "match"),
    [
        (
            auxjax.TaskModel(lambda p, b, k: auxjax.TaskLosses({"primary": b["x"][:, 0]}), "primary"),
            "maxl",
            {},
            "no loss",
        ),
        (generation_model(), "maxl", {"sub_classes": 4}, "whole number of blocks"),
        (generation_model(), "maxl", {"labels": lambda batch: batch["x"]}, "one class per example"),
        (generation_model(), "wamal", {"generator": linear_generator()}, "a pair"),
        (generation_model(), "maxl", {"generator": linear_generator(scores=True)}, "for method 'wamal'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_training(model, name, options, match):
    problem = generation_problem(0)
    options = {"generator": linear_generator(scores=name == "wamal"), "labels": primary_class, **options}
    method = auxjax.methods.get(name, **{"sub_classes": SUB_CLASSES, **options})
    with pytest.raises((ValueError, TypeError), match=match):
        state_of(model, problem, method=method)
