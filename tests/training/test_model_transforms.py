"""Half precision, batches in parts and rematerialisation change memory and digits, and nothing else."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.models import ConvNet
from auxjax.training.memory import estimate_memory
from auxjax.training.model_transforms import accumulate, mixed_precision, remat
from auxjax.training.parallel import data_mesh, replicate, shard_batch
from tests.helpers.generation_problems import (
    SUB_CLASSES,
    generation_model,
    generation_problem,
    linear_generator,
    primary_class,
)
from tests.helpers.training_problems import LinearTasks, linear_model, network_problem

KEY = jax.random.key(3)
EXACT = {
    "accumulate": lambda model: accumulate(model, 4),
    "accumulate, unrolled": lambda model: accumulate(model, 4, unroll=True),
    "remat": remat,
    "remat, policy": lambda model: remat(model, jax.checkpoint_policies.dots_saveable),
    "both": lambda model: accumulate(remat(model), 2),
}


@pytest.fixture(params=EXACT)
def exact(request):
    return EXACT[request.param]


def assert_close(found, wanted, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, **tolerance)


def relative_error(found, wanted):
    """`||found - expected|| / ||expected||` over all leaves."""
    found, wanted = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def derivatives(model, problem):
    """Losses, and the gradient, a Hessian-vector and a Jacobian-vector product of a weighting of them by example."""

    def weighted(params):
        out = model.losses(params, problem.batch, KEY)
        weights = {task: jnp.linspace(0.5, 1.5, len(value), dtype=value.dtype) for task, value in out.values.items()}
        return auxjax.weighted_loss(out.values, weights, masks=out.masks), out

    @jax.jit
    def all_of_them(params):
        direction = jax.tree.map(jnp.cos, params)
        (_, out), gradient = jax.value_and_grad(weighted, has_aux=True)(params)
        product = jax.jvp(jax.grad(lambda p: weighted(p)[0]), (params,), (direction,))[1]
        forward = jax.jvp(lambda p: model.losses(p, problem.batch, KEY).values, (params,), (direction,))[1]
        return {"out": out, "gradient": gradient, "hessian": product, "jacobian": forward}

    return all_of_them(problem.params)


def test_losses_and_derivatives_are_those_of_the_whole_batch(exact):
    problem, model = network_problem(0, num_tasks=2, masked=True)
    found = derivatives(exact(model), problem)
    assert_close(found, derivatives(model, problem), rtol=1e-12, atol=1e-13)


def test_tasks_of_different_lengths_and_everything_a_model_may_return():
    problem = LinearTasks.make(1, num_tasks=3)
    for name in ("x", "y"):
        problem.batch[name]["aux0"] = jnp.concatenate([problem.batch[name]["aux0"]] * 2)
    found = derivatives(EXACT["both"](linear_model()), problem)
    assert found["out"].values["aux0"].shape == (16,)
    assert_close(found, derivatives(linear_model(), problem), rtol=1e-12, atol=1e-13)


FEW_PRODUCTS = {"hypergradient": auxjax.implicit(auxjax.cg(max_steps=2))}
GENERATED = {"labels": primary_class, "sub_classes": SUB_CLASSES, "generator": linear_generator()}
METHODS = {
    "equal": {},
    "jtds": FEW_PRODUCTS,
    "maoal": {"hypergradient": auxjax.implicit(auxjax.neumann(1))},
    "arml": {"form": "two_stage", "step_size": 0.01, "temperature": 0.01},
    "gradnorm": {},
    "maxl": GENERATED,
    "rl_aux": GENERATED | {"num_rollouts": 2},
    "dtg_auxl": FEW_PRODUCTS | {"num_generated": 4, "hidden": (4,)},
}
FAST = ("equal",)
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


def one_step(name, transform, **options):
    """State and metrics after one step."""
    if name in ("maxl", "rl_aux"):
        problem, dev = (generation_problem(seed, num_examples=8, masked=True) for seed in (0, 1))
        model = generation_model(**options)
    elif name == "dtg_auxl":
        problem, dev, model = LinearTasks.make(0), LinearTasks.make(1), linear_model()
    else:
        (problem, model), (dev, _) = (network_problem(seed, masked=True) for seed in (0, 1))
    init, step = auxjax.make_step(
        transform(model),
        auxjax.methods.get(name, **METHODS[name]),
        optax.sgd(0.1),
    )
    return step(init(KEY, problem.params, problem.batch), problem.batch, dev.batch)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_every_kind_of_method_is_the_same(name, ordinary_promotion):
    wanted = one_step(name, lambda model: model)
    assert_close(one_step(name, EXACT["both"]), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_an_own_loss_of_soft_labels_is_computed_in_parts_as_well(ordinary_promotion):
    wanted = one_step("maxl", lambda model: model, own_loss=True)
    assert_close(one_step("maxl", EXACT["both"], own_loss=True), wanted, rtol=1e-8, atol=1e-10)


def test_parts_have_keys_of_their_own_and_pass_the_model_state_on():
    """Part i has the rows i, i + 2, ..., the key fold_in(key, i), and the state that part i - 1 left."""

    def losses(params, batch, key, state):
        noise = jax.random.normal(key, batch["x"].shape)
        new = {"sum": state["sum"] + jnp.sum(batch["x"]), "count": state["count"] + jnp.int32(1)}
        return auxjax.TaskLosses({"primary": params * batch["x"] + noise + state["sum"]}, state=new)

    batch = {"x": jnp.arange(6.0), "scale": jnp.array(2.0), "key": jax.random.key(9), "keys": jax.random.split(KEY, 6)}
    start = {"sum": jnp.array(0.5), "count": jnp.array(3, jnp.int32)}
    for unroll in (False, True):
        model = accumulate(auxjax.TaskModel(losses, "primary"), 2, unroll=unroll)
        out = jax.jit(model.losses)(jnp.array(2.0), batch, KEY, state=start)
        wanted = np.zeros(6)
        for part, before in enumerate((0.5, 0.5 + 0 + 2 + 4)):
            noise = jax.random.normal(jax.random.fold_in(KEY, part), (3,))
            wanted[part::2] = 2 * np.arange(6.0)[part::2] + noise + before
        np.testing.assert_allclose(out.values["primary"], wanted, rtol=1e-14)
        assert_close(out.state, {"sum": jnp.array(15.5), "count": jnp.array(5, jnp.int32)})


def test_no_derivative_passes_from_part_to_part():
    def losses(params, batch, key, state):
        del key
        return auxjax.TaskLosses({"primary": params * batch + state}, state=params * jnp.sum(batch))

    model = accumulate(auxjax.TaskModel(losses, "primary"), 2)

    def values(params):
        return model.losses(params, jnp.arange(4.0), KEY, jnp.array(0.0)).values["primary"]

    slopes = jax.jacfwd(values)(jnp.array(1.0))
    np.testing.assert_array_equal(slopes, np.arange(4.0))


CONVNET = ConvNet(heads={"primary": 3, "other": 2}, channels=(8, 16), norm="batch")


def convnet_model():
    def losses(params, batch, key, state):
        del key
        images = batch["x"].astype(jax.tree.leaves(params)[0].dtype)
        out, state = CONVNET.apply({"params": params, **state}, images, train=True, mutable=["batch_stats"])
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        values = {task: cross_entropy(logits, batch[task]) for task, logits in out.heads.items()}
        return auxjax.TaskLosses(values, features=out.features, state=state)

    return auxjax.TaskModel(losses, "primary", trunk=lambda path: "trunk" in path)


def convnet_problem(num_examples=32):
    rng = np.random.default_rng(0)
    batch = {
        "x": jnp.array(rng.normal(size=(num_examples, 8, 8, 3)), jnp.float32),
        "primary": jnp.array(rng.integers(0, 3, num_examples), jnp.int32),
        "other": jnp.array(rng.integers(0, 2, num_examples), jnp.int32),
    }
    variables = jax.jit(CONVNET.init)(jax.random.key(0), batch["x"])
    return batch, variables["params"], {"batch_stats": variables["batch_stats"]}


def test_half_precision_is_close_and_everything_outside_is_float32(single_precision):
    """1 % for losses, 5 % for gradients and 10 % for Hessian-vector products, as bfloat16's 8 bits have it."""
    batch, params, model_state = convnet_problem()
    seen = []

    def watched(params, batch, key, state):
        out = convnet_model().losses(params, batch, key, state)
        seen.append({leaf.dtype.name for leaf in jax.tree.leaves((params, batch["x"], out.values, out.features))})
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32"}
        return out

    def products(model):
        def mean(params):
            out = model.losses(params, batch, KEY, state=model_state)
            return auxjax.weighted_loss(out.values, {"primary": 1.0, "other": 0.5}), out

        @jax.jit
        def run(params):
            (_, out), gradient = jax.value_and_grad(mean, has_aux=True)(params)
            return out, gradient, jax.jvp(jax.grad(lambda p: mean(p)[0]), (params,), (params,))[1]

        return run(params)

    half = products(mixed_precision(convnet_model()._replace(losses=watched)))
    full = products(convnet_model())
    assert set.union(*seen) == {"bfloat16"}
    for leaf, like in zip(*map(jax.tree.leaves, (half, full)), strict=True):
        assert leaf.dtype == like.dtype == jnp.float32
    for part, (found, wanted) in enumerate(zip(half, full, strict=True)):
        assert 1e-5 < relative_error(found, wanted) < (0.01, 0.05, 0.1)[part]


@pytest.mark.parametrize("name", ["equal", pytest.param("jtds", marks=pytest.mark.slow)])
def test_steps_in_half_precision_keep_a_float32_state(name, single_precision):
    """Two steps: params, optimiser, statistics and the outer level's variables and metrics, hypergradient included."""
    batch, params, model_state = convnet_problem()
    states = {}
    for kind, transform in {"float32": lambda model: model, "bfloat16": mixed_precision}.items():
        model = transform(convnet_model())
        method = auxjax.methods.get(name, **METHODS[name])
        others = () if method.outer is None else (batch,)
        init, step = auxjax.make_step(model, method, optax.adam(1e-2))
        state = init(KEY, params, batch, model_state)
        for _ in range(2):
            state, metrics = step(state, batch, *others)
        states[kind] = (state._replace(key=()), metrics)
    for half, full in zip(*map(jax.tree.leaves, states.values()), strict=True):
        assert half.dtype == full.dtype
        assert half.dtype != jnp.bfloat16
        assert np.isfinite(half).all()
    full, half = (found[0].params for found in states.values())
    assert 0 < relative_error(half, full) < 0.05


def test_half_precision_leaves_float64_outside_and_other_leaves_alone():
    def losses(params, batch, key):
        assert params["w"].dtype == batch["x"].dtype == jnp.bfloat16
        assert batch["index"].dtype == jnp.int32
        assert batch["mask"].dtype == jnp.bool_
        noise = jax.random.normal(batch["key"], (4,)) + jax.random.normal(key, (4,))
        masks = {"primary": batch["mask"]}
        return auxjax.TaskLosses({"primary": batch["x"] * params["w"] + noise.astype(jnp.bfloat16)}, masks)

    def feature_loss(params, features, labels):
        assert params["w"].dtype == features.dtype == labels.dtype == jnp.bfloat16
        return jnp.sum(features * params["w"] - labels, axis=1)

    model = mixed_precision(auxjax.TaskModel(losses, "primary", feature_loss=feature_loss))
    batch = {"x": jnp.ones(4), "index": jnp.arange(4, dtype=jnp.int32), "mask": jnp.ones(4, bool), "key": KEY}
    out = model.losses({"w": jnp.array(2.0)}, batch, KEY)
    assert out.values["primary"].dtype == jnp.float64
    assert out.masks["primary"].dtype == jnp.bool_
    assert model.feature_loss({"w": jnp.array(2.0)}, jnp.ones((4, 2)), jnp.ones((4, 2))).dtype == jnp.float64
    assert model.soft_label_loss is None


def wide_problem(num_examples=4096, width=64):
    """Eight wide layers: activations are most of what a gradient needs."""
    batch = {"x": jnp.ones((num_examples, width)), "y": jnp.ones(num_examples), "z": jnp.zeros(num_examples)}
    params = {"layers": [0.1 * jnp.eye(width)] * 8, "y": jnp.ones(width), "z": jnp.ones(width)}

    def losses(params, batch, key):
        del key
        hidden = batch["x"]
        for layer in params["layers"]:
            hidden = jnp.tanh(hidden @ layer)
        values = {task: (hidden @ params[task] - batch[task]) ** 2 for task in ("y", "z")}
        return auxjax.TaskLosses(values, features=hidden)

    return auxjax.TaskModel(losses, "y", trunk=lambda path: "layers" in path), params, batch


@pytest.mark.parametrize("name", ["equal", pytest.param("jtds", marks=pytest.mark.slow)])
def test_parts_need_less_memory(name, ordinary_promotion):
    """Four parts: a quarter of the activations of eight layers remains, and a copy of the batch."""
    model, params, batch = wide_problem()
    temporaries = []
    for transformed in (model, accumulate(model, 4)):
        init, step = auxjax.make_step(transformed, auxjax.methods.get(name, **METHODS[name]), optax.sgd(0.1))
        state = jax.eval_shape(init, KEY, params, batch)
        temporaries.append(estimate_memory(step, state, batch, batch).temporaries)
    assert temporaries[1] < 0.45 * temporaries[0]


@pytest.mark.parametrize("unroll", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_parts_on_four_devices_move_no_example(unroll):
    """The only communication is that of sums, the numbers are those of one device."""
    problem, model = network_problem(0, num_examples=32)
    mesh = data_mesh(4)
    found = []
    for place, devices in ((lambda tree, mesh: tree, None), (shard_batch, mesh)):
        transformed = accumulate(model, 4, unroll=unroll)
        init, step = auxjax.make_step(transformed, auxjax.methods.get("equal"), optax.sgd(0.1), mesh=devices)
        state, batch = init(KEY, problem.params, problem.batch), place(problem.batch, mesh)
        if devices is not None:
            state = replicate(state, mesh)
            program = step.lower(state, batch).compile().as_text()
            assert set(re.findall(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program)) == {"all-reduce"}
        found.append(step(state, batch)[0].params)
    assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)


def test_one_part_is_the_model_itself():
    model = linear_model()
    assert accumulate(model, 1) is model


@pytest.mark.parametrize(
    ("num_parts", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), ("4", TypeError)]
)
def test_impossible_numbers_of_parts_are_refused(num_parts, error):
    with pytest.raises(error, match=r"accumulate\(num_parts=.*whole number >= 1"):
        accumulate(linear_model(), num_parts)


def test_a_batch_that_does_not_divide_is_refused_by_name():
    problem = LinearTasks.make(0)
    problem.batch["y"]["aux0"] = jnp.zeros(6)
    init, _ = auxjax.make_step(accumulate(linear_model(), 4), auxjax.methods.get("equal"), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"the batch leaf \['y'\]\['aux0'\] has 6 examples, which 4 parts"):
        init(KEY, problem.params, problem.batch)
    model = accumulate(linear_model(), 4)
    with pytest.raises(ValueError, match=r"the batch leaf \(the batch\) has 6 examples"):
        model.feature_loss(problem.params, jnp.zeros((6, 3)), jnp.zeros((6, 4)))


def test_what_is_no_row_per_example_is_refused():
    problem = LinearTasks.make(0)

    def mean_loss(params, batch, key):
        out = linear_model().losses(params, batch, key)
        return out._replace(values={task: jnp.mean(value) for task, value in out.values.items()})

    def one_feature(params, batch, key):
        return linear_model().losses(params, batch, key)._replace(features=jnp.array(1.0))

    for losses, message in ((mean_loss, r"shape \(\); expected \[n\]"), (one_feature, r"features without an axis of")):
        with pytest.raises(ValueError, match=message):
            accumulate(auxjax.TaskModel(losses, "primary"), 2).losses(problem.params, problem.batch, KEY)


def test_other_arguments_that_cannot_be_are_refused():
    with pytest.raises(TypeError, match=r"mixed_precision\(dtype=int8\): expected a floating dtype"):
        mixed_precision(linear_model(), jnp.int8)
    with pytest.raises(TypeError, match=r"remat\(policy='dots'\): expected a function"):
        remat(linear_model(), "dots")
    init, _ = auxjax.make_step(
        mixed_precision(auxjax.TaskModel(lambda *_: 0.0, "y")), auxjax.methods.get("equal"), optax.sgd(0.1)
    )
    with pytest.raises(TypeError, match=r"must return auxjax\.TaskLosses and returned float"):
        init(KEY, {"w": jnp.ones(3)}, jnp.ones(4))


def test_outputs_go_where_the_losses_are_no_longer_made_of_them():
    def outputs(params, batch, key):
        return batch["x"] * params["w"]

    def output_losses(z, batch, key):
        return auxjax.TaskLosses({"primary": z**2})

    def losses(params, batch, key):
        return output_losses(outputs(params, batch, key), batch, key)

    given = {"outputs": outputs, "output_losses": output_losses}
    model = auxjax.TaskModel(losses, primary="primary", **given)
    for transformed in (mixed_precision(model), accumulate(model, 2)):
        assert transformed.outputs is transformed.output_losses is None
    params, batch = {"w": jnp.ones(3)}, {"x": jnp.arange(3.0)}
    kept = remat(model)
    np.testing.assert_array_equal(kept.outputs(params, batch, KEY), outputs(params, batch, KEY))
    assert kept.output_losses is output_losses
