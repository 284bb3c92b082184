"""DTG-AuxL: its hypergradient against differences of the solved lower level, and what each part of it is good for."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import auxjax
from auxjax import dense, identity, implicit, one_step, unrolled
from auxjax.formulas import joint_generator
from auxjax.interface import TaskLosses, TaskModel
from auxjax.methods._dtg_auxl import dtg_auxl
from auxjax.methods.shared import pairs as pairing
from auxjax.training.parallel import data_mesh, replicate
from tests.helpers.training_problems import LinearTasks, state_of

KEY = jax.random.key(0)
CLASSES, GENERATED, WIDTH = 2, 3, 4


def make(seed, *, count=8, masked=False):
    """Primary classes, an auxiliary task with inputs of its own and random labels; params of a small network."""
    rng = np.random.default_rng(seed)
    batch = {
        "x": jnp.array(rng.normal(size=(count, 3))),
        "y": jnp.array(rng.integers(0, CLASSES, count), jnp.int32),
        "other_x": jnp.array(rng.normal(size=(count - 2, 3))),
        "other_y": jnp.array(rng.normal(size=count - 2)),
    }
    if masked:
        batch["mask"] = {"primary": jnp.arange(count) % 4 != 1, "aux": jnp.arange(count - 2) % 3 != 0}
    shapes = {"trunk": (3, WIDTH), "primary": (WIDTH, CLASSES), "made": (WIDTH, GENERATED), "aux": (WIDTH,)}
    return LinearTasks(batch, {name: jnp.array(rng.normal(size=shape)) for name, shape in shapes.items()})


def model_of(task="classification"):
    """Cross-entropies or squared errors with some weight decay."""

    def losses(params, batch, key):
        del key
        features = {"primary": jnp.tanh(batch["x"] @ params["trunk"])}
        features["aux"] = jnp.tanh(batch["other_x"] @ params["trunk"])
        primary = optax.softmax_cross_entropy_with_integer_labels(features["primary"] @ params["primary"], batch["y"])
        decay = 0.15 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        other = 0.5 * (features["aux"] @ params["aux"] - batch["other_y"]) ** 2
        return TaskLosses({"primary": primary + decay, "aux": other}, batch.get("mask"), features)

    def feature_loss(params, features, labels):
        outputs = features @ params["made"]
        if task == "classification":
            return -jnp.sum(labels * jax.nn.log_softmax(outputs), axis=1)
        return 0.5 * jnp.sum((outputs - labels) ** 2, axis=1)

    return TaskModel(losses, "primary", feature_loss=feature_loss)


def make_method(**options):
    """With the estimator that compiles fastest, where it does not matter."""
    known = {"num_generated": GENERATED, "labels": lambda batch: batch["y"], "num_classes": CLASSES, "hidden": (3,)}
    return dtg_auxl(
        **{**known, "outer_optimizer": optax.sgd(1.0), "hypergradient": implicit(identity(scale=0.1)), **options}
    )


def moved(meta, seed=5):
    """The generators' params away from their start, where many are 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.array(0.5 * rng.normal(size=leaf.shape)), meta)


class Reference:
    """The two levels written down again: pairs, generators, inner field and outer loss."""

    def __init__(self, task, batch, dev, *, source=False, g=0.7, b=0.6):
        self.task, self.batch, self.dev, self.source, self.g, self.b = task, batch, dev, source, g, b
        self.model = model_of(task)
        self.rows = pairing.cycle(jax.random.fold_in(KEY, pairing._PARTNERS), 8)

    def generate(self, features, meta, batch):
        scale = jnp.sqrt(jnp.mean(features**2) + 1e-12)
        p, a = features / scale, features[self.rows] / scale
        c = jnp.stack([batch["y"] == 0, batch["y"] == 1], axis=1).astype(p.dtype)

        def perceptron(layers, values):
            for layer in layers[:-1]:
                values = jnp.tanh(values @ layer["kernel"] + layer["bias"][None])
            return values @ layers[-1]["kernel"] + layers[-1]["bias"][None]

        x = p
        if not self.source:
            gate = jax.nn.sigmoid(perceptron([meta["features"]["gate"]], jnp.hstack([p, a])))
            extra = jnp.tanh(perceptron(meta["features"]["interaction"], jnp.hstack([p, a, p * a])))
            x = gate * p + (1 - gate) * a + extra
        y = perceptron(meta["targets"], jnp.hstack([x, a, c, c[self.rows]]))
        y = jnp.exp(y) / jnp.sum(jnp.exp(y), 1, keepdims=True) if self.task == "classification" else jnp.tanh(y)
        return x, y, p, a, scale

    def loss(self, params, meta, targets):
        out = self.model.losses(params, self.batch, None)
        x, _, _, _, scale = self.generate(out.features["primary"], meta, self.batch)
        made = self.model.feature_loss(params, scale * x, targets)
        return jnp.mean(out.values["primary"]) + 0.9 * jnp.mean(made) + 0.3 * jnp.mean(out.values["aux"])

    def targets(self, params, meta):
        return self.generate(jnp.tanh(self.batch["x"] @ params["trunk"]), meta, self.batch)[1]

    def field(self, params, meta, held=None):
        """The gradient with the targets of `held`, or of the params themselves, held fixed."""
        return jax.grad(self.loss)(params, meta, self.targets(params if held is None else held, meta))

    def penalty(self, params, meta):
        x, y, p, a, _ = self.generate(jnp.tanh(self.dev["x"] @ params["trunk"]), meta, self.dev)
        x, p, a = (rows - jnp.mean(rows, 0)[None] for rows in (x, p, a))
        cosines = [jnp.sum(x * s, 1) ** 2 / jnp.sum(x * x, 1) / jnp.sum(s * s, 1) for s in (p, a)]
        floor = jnp.var(p, 0) / 2
        spread = jnp.sum(jnp.maximum(floor - jnp.var(x, 0), 0.0)) / jnp.sum(floor)
        if self.task == "regression":
            same = jnp.mean(jnp.maximum(1 - 3 * jnp.var(y, 0), 0.0))
        else:
            u = jnp.mean(y, 0)
            information = jnp.mean(jnp.sum(y * jnp.log(y), 1)) - jnp.sum(u * jnp.log(u))
            same = jnp.maximum(1 - 2 * information / np.log(GENERATED), 0.0)
        return self.g * (jnp.mean(jnp.maximum(*cosines)) + spread + self.b * same)

    def outer(self, params, meta, held):
        """L_dev at the params, R at params that are held fixed."""
        return jnp.mean(self.model.losses(params, self.dev, None).values["primary"]) + self.penalty(held, meta)


def solver(field, start):
    """`arguments -> params` where `field(params, *arguments)` is 0, by Newton's method from `start`."""
    flat, unravel = ravel_pytree(start)

    @jax.jit
    def step(theta, *arguments):
        def residual(vector):
            return ravel_pytree(field(unravel(vector), *arguments))[0]

        return theta - jnp.linalg.solve(jax.jacfwd(residual)(theta), residual(theta)), jnp.max(jnp.abs(residual(theta)))

    def solve(*arguments, theta=flat):
        for _ in range(40):
            theta, size = step(theta, *arguments)
            if size < 1e-14:
                break
        assert size < 1e-13
        return unravel(theta)

    return solve


def settled(reference, meta, params):
    """Gradient descent to a minimum, from where Newton's method goes on."""
    descend = jax.jit(
        lambda start: jax.lax.fori_loop(
            0, 2000, lambda _, p: jax.tree.map(lambda a, b: a - 0.2 * b, p, reference.field(p, meta)), start
        )
    )
    return descend(params)


def directions(meta, seed=3):
    """One random direction in each of the leaves."""
    rng = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(meta)
    for index, leaf in enumerate(leaves):
        parts = [jnp.zeros_like(other) for other in leaves]
        parts[index] = jnp.array(rng.normal(size=leaf.shape))
        yield jax.tree.unflatten(structure, parts)


def check_slopes(found, function, meta, step, rtol):
    """`<found, d>` for every direction against a central difference of `function`."""
    for direction in directions(meta):
        ends = [function(jax.tree.map(lambda m, d, s=s: m + s * step * d, meta, direction)) for s in (1, -1)]
        slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(direction), strict=True))
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=rtol, atol=1e-9)


WEIGHTS = {"auxiliary_weight": 0.9, "manual_weight": 0.3, "regularisation_weight": 0.7, "target_weight": 0.6}


def hypergradient(method, state, context, problem, dev):
    new, metrics = jax.jit(partial(method.outer, context))(state, problem.batch, dev.batch, KEY)
    return jax.tree.map(lambda a, b: a - b, state.method.meta, new.method.meta), metrics  # sgd(1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "jacobian"),
    [
        ("classification", "held_fixed"),
        pytest.param("regression", "exact", marks=pytest.mark.slow),
        pytest.param("classification", "exact", marks=pytest.mark.slow),
        pytest.param("regression", "held_fixed", marks=pytest.mark.slow),
    ],
)
def test_hypergradient_is_that_of_the_solved_lower_level(task, jacobian):
    """Exact: targets follow the params to the new solution. Held fixed: they stay those of the old one."""
    problem, dev = make(0), make(1)
    method = make_method(task=task, jacobian=jacobian, hypergradient=implicit(dense()), **WEIGHTS)
    context, state = state_of(model_of(task), problem, method=method)
    meta, reference = moved(state.method.meta), Reference(task, problem.batch, dev.batch)
    params = solver(reference.field, settled(reference, meta, problem.params))(meta)
    state = state._replace(params=params, method=state.method._replace(meta=meta))
    found, metrics = hypergradient(method, state, context, problem, dev)
    assert metrics["hypergradient/inner_grad_norm"] < 1e-12
    assert metrics["hypergradient/implicit_norm"] > 1e-3
    assert metrics["hypergradient/direct_norm"] > 1e-3
    solve = solver(reference.field, params)
    held = (params,) if jacobian == "held_fixed" else ()
    outer = jax.jit(reference.outer)
    np.testing.assert_allclose(metrics["outer_loss"], outer(params, meta, params), rtol=1e-9)
    check_slopes(found, lambda meta: outer(solve(meta, *held), meta, params), meta, 1e-5, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", pytest.param("regression", marks=pytest.mark.slow)])
def test_explicit_part_is_the_regularisation_at_fixed_params(task):
    problem, dev = make(0), make(1)
    method = make_method(task=task, **{**WEIGHTS, "auxiliary_weight": 0.0})
    context, state = state_of(model_of(task), problem, method=method)
    meta, reference = moved(state.method.meta), Reference(task, problem.batch, dev.batch)
    state = state._replace(method=state.method._replace(meta=meta))
    found, metrics = hypergradient(method, state, context, problem, dev)
    assert metrics["hypergradient/implicit_norm"] == 0
    penalty = jax.jit(partial(reference.penalty, problem.params))
    check_slopes(found, penalty, meta, 1e-6, 1e-6)
    without, _ = hypergradient(
        make_method(task=task, auxiliary_weight=0.0, regularisation_weight=0.0), state, context, problem, dev
    )
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(without))


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["classification", pytest.param("regression", marks=pytest.mark.slow)])
def test_look_aheads_are_the_derivative_of_the_training_loop(task, steps):
    problem, dev = make(0), make(1)
    estimator = one_step(0.1) if steps == 1 else unrolled(steps, 0.1)
    method = make_method(task=task, jacobian="exact", hypergradient=estimator, **WEIGHTS)
    context, state = state_of(model_of(task), problem, method=method)
    meta, reference = moved(state.method.meta), Reference(task, problem.batch, dev.batch)
    state = state._replace(method=state.method._replace(meta=meta))

    @jax.jit
    def run(meta):
        params = problem.params
        for _ in range(steps):
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, reference.field(params, meta))
        return params

    found, _ = hypergradient(method, state, context, problem, dev)
    end, outer = run(meta), jax.jit(reference.outer)
    check_slopes(found, lambda meta: outer(run(meta), meta, end), meta, 1e-5, 1e-6)


@pytest.mark.parametrize("task", ["classification", pytest.param("regression", marks=pytest.mark.slow)])
def test_the_inner_update_is_a_gradient_step_with_targets_held_fixed(task):
    problem = make(0)
    method = make_method(task=task, **WEIGHTS)
    context, state = state_of(model_of(task), problem, method=method)
    meta, reference = moved(state.method.meta), Reference(task, problem.batch, None)
    state = state._replace(method=state.method._replace(meta=meta))
    new, metrics = jax.jit(partial(method.inner, context))(state, problem.batch, KEY)
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, problem.params, jax.jit(reference.field)(problem.params, meta))
    chex.assert_trees_all_close(new.params, wanted, rtol=1e-10)
    assert metrics["weight/primary"] == 1.0
    np.testing.assert_allclose((metrics["weight/aux"], metrics["weight/generated"]), (0.3, 0.9), rtol=1e-12)
    names = {"collapse/copying", "collapse/spread", "collapse/targets", "loss/generated", "loss/primary", "loss/aux"}
    assert names <= set(metrics)
    assert ("label_usage" in metrics) == (task == "classification")
    weights = method.weights(context, state, problem.batch, KEY)
    assert {name: float(weight[0]) for name, weight in weights.items()} == {"primary": 1, "aux": 0.3, "generated": 0.9}


@pytest.mark.slow
def test_source_features_are_the_primary_ones_and_random_targets_stay():
    problem, dev = make(0), make(1)
    method = make_method(
        features="source", targets="random", outer_optimizer=optax.adamw(0.1, weight_decay=0.1), **WEIGHTS
    )
    with jax.numpy_dtype_promotion("standard"):
        context, state = state_of(model_of(), problem, method=method)
        new, _ = jax.jit(partial(method.outer, context))(state, problem.batch, dev.batch, KEY)
    chex.assert_trees_all_equal(new.method.meta["targets"], state.method.meta["targets"])
    reference = Reference("classification", problem.batch, dev.batch, source=True)
    updated, metrics = jax.jit(partial(method.inner, context))(state, problem.batch, KEY)
    field = jax.jit(reference.field)(problem.params, state.method.meta)
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, problem.params, field)
    chex.assert_trees_all_close(updated.params, wanted, rtol=1e-10)
    np.testing.assert_allclose(metrics["collapse/copying"], 1.0, rtol=1e-9)


def test_a_cycle_pairs_every_labelled_row_with_another_one():
    mask = jnp.arange(9) % 3 != 1
    labelled, keys = np.flatnonzero(mask), jax.random.split(KEY, 20)
    partly, whole = (
        np.asarray(jax.jit(jax.vmap(lambda key, m=m: pairing.cycle(key, 9, m)))(keys)) for m in (mask, None)
    )
    for rows, expected in ((partly[:, labelled], labelled), (whole, np.arange(9))):
        assert np.all(rows != expected[None])
        assert np.all(np.sort(rows, axis=1) == expected[None])
        assert len(set(map(tuple, rows))) > 10
    for rows in whole:  # one cycle through all of them
        place = 0
        for _ in range(8):
            place = rows[place]
            assert place != 0
    assert pairing.cycle(KEY, 3, jnp.arange(3) == 1)[1] == 1  # alone


@pytest.mark.slow
def test_partners_of_another_task_are_its_labelled_instances():
    """In random order, again from the first where they are fewer."""
    problem = make(0, masked=True)
    out = model_of().losses(problem.params, problem.batch, KEY)
    pairs = pairing.pairs_of("test", out, "primary", problem.batch, KEY, partner="aux")
    rows = np.asarray(out.features["aux"])[np.asarray(problem.batch["mask"]["aux"])] / float(pairs.scale)
    found = [int(np.argmin(np.abs(rows - row).sum(1))) for row in np.asarray(pairs.partner)]
    np.testing.assert_allclose(pairs.partner, rows[found], rtol=1e-12)
    assert sorted(found[: len(rows)]) == list(range(len(rows)))
    assert found[len(rows) :] == found[: 8 - len(rows)]
    assert pairs.labels.shape == (8, 0)


def hidden_nan(problem, value):
    """The batch with `value` wherever there is no label: in inputs, features and labels."""
    batch = dict(problem.batch)
    for task, name in (("primary", "x"), ("aux", "other_x")):
        mask = batch["mask"][task]
        batch[name] = jnp.where(mask[:, None], batch[name], value)
    batch["score"] = jnp.where(batch["mask"]["primary"], 0.3, value)
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("partner", [None, "aux"])
@pytest.mark.parametrize("case", ["some", "none"])
def test_unlabelled_examples_generate_nothing_and_may_be_nan(partner, case):
    """Whatever their features and labels are: training is the same to the last bit."""
    problem, dev = make(0, masked=True), make(1, masked=True)
    if case == "none":
        problem.batch["mask"]["primary"] = jnp.zeros(8, bool)
        problem.batch["mask"]["aux"] = jnp.zeros(6, bool)

    def losses(params, batch, key):
        # Harmless before the trunk's parameters, hidden behind them, as a loss that looks at its labels has to be.
        clean = {**batch, **{name: jnp.nan_to_num(batch[name]) for name in ("x", "other_x")}}
        out = model_of().losses(params, clean, key)
        features = {
            task: jnp.where(batch["mask"][task][:, None], rows, batch[name][:, :1])
            for (task, rows), name in zip(out.features.items(), ("x", "other_x"), strict=True)
        }
        return out._replace(features=features)

    method = make_method(partner=partner, labels=lambda batch: batch["score"], outer_optimizer=optax.sgd(0.1))
    init, step = auxjax.make_step(model_of()._replace(losses=losses), method, optax.sgd(0.05), donate=False)
    found = []
    for value in (0.0, jnp.nan):
        batch, outer = hidden_nan(problem, value), hidden_nan(dev, value)
        state = init(KEY, problem.params, batch)
        for _ in range(2):
            state, metrics = step(state, batch, outer)
        found.append((state._replace(key=0), metrics))
    chex.assert_trees_all_equal(found[0], found[1])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
    if case == "none":
        assert found[0][1]["loss/generated"] == 0


def with_state(model):
    """The model with a counter, and a factor of the generated head's loss, as model state."""

    def losses(params, batch, key, state):
        out = model.losses(params, batch, key)
        return out._replace(state={**state, "count": state["count"] + jnp.int32(1)})

    def feature_loss(params, features, labels, state):
        return state["factor"] * model.feature_loss(params, features, labels)

    return model._replace(losses=losses, feature_loss=feature_loss)


def train(model, method, steps, *, state=None, model_state=None, problem=None, optimizer=None):
    problem, dev = problem or make(0), make(1)
    init, step = auxjax.make_step(model, method, optimizer or optax.sgd(0.05), donate=False)
    state = init(KEY, problem.params, problem.batch, model_state) if state is None else state
    metrics = {}
    for _ in range(steps):
        state, metrics = step(state, problem.batch, dev.batch)
    return state, metrics


@pytest.mark.slow
def test_model_state_reaches_the_feature_loss_and_belongs_to_inner_updates():
    start = {"count": jnp.zeros((), jnp.int32), "factor": jnp.asarray(2.0)}
    state, metrics = train(with_state(model_of()), make_method(**WEIGHTS), 2, model_state=start)
    assert state.model_state["count"] == 2
    double, others = train(model_of(), make_method(**{**WEIGHTS, "auxiliary_weight": 1.8}), 2)
    chex.assert_trees_all_close((state.params, state.method), (double.params, double.method), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(metrics["loss/generated"], 2 * others["loss/generated"], rtol=1e-9)


@pytest.mark.slow
def test_a_run_cut_in_two_is_the_same_run():
    """With adam outside, a warm start, and partners of another task."""
    method = make_method(partner="aux", warm_start=True, outer_optimizer=optax.adam(1e-2))
    with jax.numpy_dtype_promotion("standard"):
        whole, metrics = train(model_of(), method, 4)
        half, _ = train(model_of(), method, 2)
        resumed, again = train(model_of(), method, 2, state=half)
    chex.assert_trees_all_equal(whole._replace(key=0), resumed._replace(key=0))
    chex.assert_trees_all_equal(metrics, again)


@pytest.mark.slow
def test_one_compilation_serves_all_steps_and_runs_may_be_vectorised(ordinary_promotion):
    problem, dev = make(0), make(1)
    method = make_method(outer_optimizer=optax.adam(1e-2))
    init, step = auxjax.make_step(model_of(), method, optax.adam(1e-2), donate=False)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda state: step.__wrapped__(state, problem.batch, dev.batch)[0], n=1))
    starts = [init(jax.random.key(seed), make(seed).params, problem.batch) for seed in (0, 1)]
    ends = [update(update(state)) for state in starts]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    together = jax.vmap(lambda state: step.__wrapped__(state, problem.batch, dev.batch)[0])
    together = jax.jit(lambda states: together(together(states)))(stacked)
    for index, alone in enumerate(ends):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], together)
        chex.assert_trees_all_close((one.params, one.method), (alone.params, alone.method), rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_four_devices_are_one():
    found = []
    for mesh in (None, data_mesh(4)):
        problem, dev = make(0, count=8), make(1, count=8)
        for batch in (problem.batch, dev.batch):
            for name in ("other_x", "other_y"):
                batch[name] = batch[name][:4]
        init, step = auxjax.make_step(model_of(), make_method(**WEIGHTS), optax.sgd(0.05), mesh=mesh, donate=False)
        place = partial(replicate, mesh=mesh) if mesh is not None else (lambda tree: tree)
        state = place(init(KEY, problem.params, problem.batch))
        state, _ = step(state, place(problem.batch), place(dev.batch))
        found.append((state.params, state.method))
    chex.assert_trees_all_close(*map(jax.device_get, found), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_half_precision_features_are_generated_in_single_precision(single_precision):
    problem = make(0)
    seen = []

    def losses(params, batch, key):
        out = model_of().losses(params, batch, key)
        return out._replace(features={task: rows.astype(jnp.bfloat16) for task, rows in out.features.items()})

    def feature_loss(params, features, labels):
        seen.append((features.dtype, labels.dtype))
        return model_of().feature_loss(params, features, labels)

    problem = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype.kind == "f" else leaf, problem)
    state, _ = train(model_of()._replace(losses=losses, feature_loss=feature_loss), make_method(), 1, problem=problem)
    assert set(seen) == {(jnp.dtype("bfloat16"), jnp.dtype("float32"))}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.method.meta)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("options", "error", "piece"),
    [
        ({"num_generated": None}, TypeError, "num_generated=None"),
        ({"num_generated": 1}, ValueError, "whole number >= 2"),
        ({"task": "ranking"}, ValueError, "expected 'classification' or 'regression'"),
        ({"features": "copied"}, ValueError, "expected 'generated', 'mixed' or 'source'"),
        ({"targets": "copied"}, ValueError, "expected 'generated' or 'random'"),
        ({"jacobian": "none"}, ValueError, "expected 'held_fixed' or 'exact'"),
        ({"hidden": (0,)}, ValueError, "hidden"),
        ({"auxiliary_weight": -1.0}, ValueError, ">= 0"),
        ({"target_weight": float("nan")}, ValueError, "finite"),
        ({"labels": 3}, TypeError, "function of the batch"),
        ({"num_classes": 1}, ValueError, "num_classes=1"),
        ({"num_classes": None}, ValueError, "give num_classes="),
        ({"labels": lambda batch: batch["other_y"]}, ValueError, "each example"),
        ({"labels": lambda batch: batch["x"] > 0}, ValueError, "integers or floats"),
        ({"partner": "primary"}, ValueError, "auxiliary tasks are"),
        ({"generator": 3}, TypeError, "JointGenerator"),
        ({"generator": joint_generator.joint_generator(2)}, ValueError, "ready-made"),
        ({"hypergradient": "neumann"}, TypeError, "estimator"),
    ],
)
def test_mistakes_are_named(options, error, piece):
    with pytest.raises(error, match=piece):
        state_of(model_of(), make(0), method=make_method(**options))


def change(**fields):
    """The model with other fields of its `TaskLosses`."""
    return lambda model: model._replace(
        losses=lambda params, batch, key: model.losses(params, batch, key)._replace(
            **{name: value(params, batch) for name, value in fields.items()}
        )
    )


@pytest.mark.parametrize(
    ("edit", "piece"),
    [
        (lambda model: model._replace(feature_loss=None), "feature_loss="),
        (lambda model: model._replace(feature_loss=lambda *_: jnp.zeros(3)), "feature_loss returned"),
        (lambda model: model._replace(feature_loss=lambda p, f, y: jnp.zeros(len(f), jnp.int32)), "floating"),
        (change(features=lambda params, batch: None), "has none for task"),
        (change(features=lambda params, batch: {"aux": batch["other_x"]}), "'primary'"),
        (change(features=lambda params, batch: batch["y"]), "one row"),
        (change(features=lambda params, batch: {"primary": batch["x"], "aux": batch["other_x"][:, :2]}), "width"),
    ],
)
def test_models_that_do_not_fit_are_named(edit, piece):
    with pytest.raises(ValueError, match=piece):
        state_of(edit(model_of()), make(0), method=make_method(partner="aux", labels=None, num_classes=None))


@pytest.mark.slow
def test_a_generator_of_ones_own():
    made = joint_generator.joint_generator(GENERATED, hidden=(3,))
    ours, _ = train(model_of(), make_method(), 1)
    theirs, _ = train(model_of(), make_method(generator=made, num_generated=None), 1)
    chex.assert_trees_all_equal(ours.method, theirs.method)
    wrong = made._replace(features=lambda params, primary, partner: primary[:, :2])
    with pytest.raises(ValueError, match="made features"):
        state_of(model_of(), make(0), method=make_method(generator=wrong, num_generated=None))
    wrong = made._replace(init=lambda *_: {"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match="'features' and 'targets'"):
        state_of(model_of(), make(0), method=make_method(generator=wrong, num_generated=None))


def noisy_classes(seed, count):
    """Four classes that are a function of ten inputs, with some noise; labels of the auxiliary task at random."""
    weights = np.random.default_rng(1000).normal(size=(2, 10, 4))
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 10))
    scores = x @ weights[0] + np.tanh(2 * x @ weights[1]) + 0.5 * rng.normal(size=(count, 4))
    labels = {"primary": np.argmax(scores, axis=1), "aux": rng.integers(0, 4, count)}
    return {"x": jnp.array(x)} | {name: jnp.array(label, jnp.int32) for name, label in labels.items()}


def larger_model(task):
    """Ten inputs, a trunk of two layers, three heads."""

    def losses(params, batch, key):
        del key
        features = jnp.tanh(jnp.tanh(batch["x"] @ params["first"] / 3) @ params["second"] / 4)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        values = {name: cross_entropy(features @ params[name], batch[name]) for name in ("primary", "aux")}
        return TaskLosses(values, features=features)

    def feature_loss(params, features, labels):
        outputs = features @ params["made"]
        if task == "classification":
            return optax.softmax_cross_entropy(outputs, labels)
        return jnp.mean((outputs - labels) ** 2, axis=1)

    return TaskModel(losses, "primary", feature_loss=feature_loss)


def larger_params(seed):
    rng = np.random.default_rng(seed)
    shapes = {"first": (10, 16), "second": (16, 12)}
    heads = {"primary": (12, 4), "aux": (12, 4), "made": (12, 8)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return jax.tree.map(jnp.array, params | {name: rng.normal(size=shape) / 10 for name, shape in heads.items()})


# Which terms of R count: copying, spread, targets.
TERMS = {
    "all": (1.0, 1.0, 1.0),
    "none": (0.0, 0.0, 0.0),
    "no copying": (0.0, 1.0, 1.0),
    "no spread": (1.0, 0.0, 1.0),
    "no targets": (1.0, 1.0, 0.0),
}


def collapse_after_training(task, monkeypatch, *, seeds=3, steps=200):
    """`{terms: InstanceCollapse of [seeds]}` on the training data, from one program for all of them."""
    measured, counted = joint_generator.instance_collapse, [jnp.ones(3)]

    def some_terms(*arguments, **options):
        found = measured(*arguments, **options)
        return joint_generator.InstanceCollapse(*(w * term for w, term in zip(counted[-1], found, strict=True)))

    monkeypatch.setattr(joint_generator, "instance_collapse", some_terms)
    options = {"labels": lambda batch: batch["primary"], "num_classes": 4, "hidden": (16,)}
    method = dtg_auxl(num_generated=8, task=task, outer_optimizer=optax.adam(5e-3), **options)
    init, step = auxjax.make_step(larger_model(task), method, optax.adam(1e-2), donate=False)

    def train(terms, data, dev, params, key):
        counted.append(terms)
        state = init(key, params, data)
        state, metrics = jax.lax.scan(lambda s, _: step.__wrapped__(s, data, dev), state, None, length=steps)
        counted.append(jnp.ones(3))
        after = step.__wrapped__(state, data, dev)[1]
        names = joint_generator.InstanceCollapse._fields
        return joint_generator.InstanceCollapse(*(after[f"collapse/{name}"] for name in names)), metrics

    runs = [
        (noisy_classes(s, 64), noisy_classes(s + 500, 32), larger_params(s), jax.random.key(s)) for s in range(seeds)
    ]
    runs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    per_seed = jax.vmap(train, in_axes=(None, 0, 0, 0, 0))
    every = jax.jit(jax.vmap(per_seed, in_axes=(0, None, None, None, None)))
    found, metrics = every(jnp.array(list(TERMS.values())), *runs)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(metrics))
    by_terms = zip(*map(np.asarray, found), strict=True)
    return {name: joint_generator.InstanceCollapse(*rows) for name, rows in zip(TERMS, by_terms, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", pytest.param("regression", marks=pytest.mark.slow)])
def test_every_term_of_the_regularisation_holds_off_its_collapse(task, monkeypatch, ordinary_promotion):
    """Trained beside an auxiliary task of random labels, over three seeds."""
    found = collapse_after_training(task, monkeypatch)
    means = {name: joint_generator.InstanceCollapse(*map(np.mean, rows)) for name, rows in found.items()}
    assert means["all"].copying < 0.3
    assert means["no copying"].copying > 0.4
    assert means["none"].copying > 0.3
    # Without the copying term nothing shrinks: what is generated does so to be unlike its sources.
    assert means["all"].spread < 0.02
    assert means["no spread"].spread > 0.03
    assert means["all"].targets < 0.02
    if task == "classification":  # real-valued targets collapse in a few runs only
        assert means["no targets"].targets > 0.1
        assert means["none"].targets > 0.1
