"""A sweep's runs are the runs of `make_step`: on one device and on four, with options and optimisers that differ."""

import inspect
import types
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.training.parallel import data_mesh, replicate, shard_batch
from auxjax.training.sweep import make_sweep, run_of
from tests.helpers.every_method import OPTIONS
from tests.helpers.training_problems import LinearTasks, linear_model

WEIGHTS, RATES = [0.1, 0.5, 1.0, 3.0], [0.1, 0.05, 0.02, 0.2]
POINTS = {"weight": jnp.array(WEIGHTS), "rate": jnp.array(RATES)}
KEYS = jax.random.split(jax.random.key(0), 4)
TRAIN, DEV = LinearTasks.make(0), LinearTasks.make(1)
PARAMS = {"w": jnp.array([1.0, 2.0, -1.0, 0.5])[:, None] * TRAIN.params["w"][None]}


def rows(data, key):
    """Five examples of every task: what a run draws shows its key."""
    chosen = jax.random.choice(key, 8, (5,), replace=False)
    return jax.tree.map(lambda leaf: leaf[chosen], data)


def equal(weight, rate):
    return linear_model(), auxjax.methods.get("equal", auxiliary_weight=weight), optax.sgd(rate)


def jtds(weight, rate):
    model = linear_model()
    return model, auxjax.methods.get("jtds", outer_optimizer=optax.adam(weight)), optax.sgd(rate, momentum=0.9)


def arml(weight, rate):
    method = auxjax.methods.get("arml", form="two_stage", step_size=rate, temperature=weight, total=weight)
    return linear_model(), method, optax.adam(rate)


DRAWN = {"inner_steps": 2, "draw_inner": rows, "draw_outer": rows}
SETTINGS = {"scan": DRAWN | {"loop": "scan"}, "host": DRAWN | {"loop": "host"}, "batch": {}}


def alone(index, make, options, steps=3):
    init, step = auxjax.make_step(*make(WEIGHTS[index], RATES[index]), **options)
    state = init(KEYS[index], run_of(PARAMS, index), TRAIN.batch)
    for _ in range(steps):
        state, metrics = step(state, TRAIN.batch, DEV.batch)
    return state, metrics


def together(make, options, mesh=None, steps=3, stacked=False):
    options = options | {"batches": "stacked"} if stacked else options
    init, step = make_sweep(lambda point: make(point["weight"], point["rate"]), POINTS, mesh=mesh, **options)
    data = TRAIN.batch, DEV.batch
    if stacked:
        data = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), data)
    if mesh is not None:
        data = (shard_batch if stacked else replicate)(data, mesh)
    state = init(KEYS, PARAMS, data[0])
    for _ in range(steps):
        state, metrics = step(state, *data)
    return state, metrics


def assert_close(one, other, rtol=1e-10):
    plain = lambda tree: jax.tree.map(np.asarray, tree)  # noqa: E731
    one, other = ((state._replace(key=jax.random.key_data(state.key)), metrics) for state, metrics in (one, other))
    chex.assert_trees_all_close(plain(one), plain(other), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (equal, "scan"),
        (arml, "host"),
        *(pytest.param(jtds, setting, marks=pytest.mark.slow) for setting in ("scan", "batch")),
    ],
)
def test_every_run_is_that_of_make_step(make, setting, ordinary_promotion):
    swept = together(make, SETTINGS[setting])
    for index in (0, 3):
        assert_close(run_of(swept, index), alone(index, make, SETTINGS[setting]))


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "stacked"), [(4, False), pytest.param(2, True, marks=pytest.mark.slow)])
def test_devices_share_the_runs_and_change_no_number(devices, stacked, ordinary_promotion):
    mesh = data_mesh(devices)
    state, metrics = together(jtds, SETTINGS["scan"], mesh, stacked=stacked)
    assert len(state.params["w"].sharding.device_set) == devices
    assert state.params["w"].addressable_shards[0].data.shape[0] == 4 // devices
    assert_close((state, metrics), together(jtds, SETTINGS["scan"]))


def test_no_device_talks_to_another(ordinary_promotion):
    make = lambda point: jtds(point["weight"], point["rate"])  # noqa: E731
    init, step = make_sweep(make, POINTS, mesh=data_mesh(), **SETTINGS["scan"])
    data = replicate((TRAIN.batch, DEV.batch), data_mesh())
    program = jax.jit(step).lower(init(KEYS, PARAMS, data[0]), *data).compile().as_text()
    assert not any(word in program for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


def test_runs_with_data_of_their_own():
    several = [LinearTasks.make(seed).batch for seed in range(4)]
    make = lambda point: equal(point["weight"], point["rate"])  # noqa: E731
    init, step = make_sweep(make, POINTS, batches="stacked")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    found = step(init(KEYS, PARAMS, stacked), stacked)
    for index, batch in enumerate(several):
        init, step = auxjax.make_step(*equal(WEIGHTS[index], RATES[index]))
        assert_close(run_of(found, index), step(init(KEYS[index], run_of(PARAMS, index), batch), batch))


def test_seeds_alone_need_no_points():
    init, step = make_sweep(lambda point: equal(1.0, 0.1), (), **SETTINGS["scan"])
    state, _ = step(init(KEYS, PARAMS, TRAIN.batch), TRAIN.batch)
    assert state.params["w"].shape == (4, 3)


def test_one_compilation_and_a_run_that_diverges_leaves_the_others_alone():
    traces = []

    def make(point):
        traces.append(None)
        return equal(1.0, point)

    init, step = make_sweep(make, jnp.array([0.1, 1e200]))
    state = init(KEYS[:2], {"w": PARAMS["w"][:2]}, TRAIN.batch)
    state, _ = step(state, TRAIN.batch)
    before = len(traces)
    for _ in range(4):
        state, _ = step(state, TRAIN.batch)
    assert len(traces) == before
    assert np.isfinite(state.params["w"][0]).all()
    assert not np.isfinite(state.params["w"][1]).any()


@pytest.mark.parametrize(
    ("points", "options", "match"),
    [
        ({"a": jnp.ones(3)}, {"mesh": 4}, "3 runs cannot be shared evenly by 4 devices"),
        (
            {"a": jnp.ones(3), "b": jnp.ones(2)},
            {},
            r"points\['b'\] has shape \(2,\); expected a leading axis of 3 runs",
        ),
        ({"a": 1.0}, {}, "points has a scalar"),
        ({"a": jnp.ones(2)}, {"batches": "some"}, "expected 'shared' or 'stacked'"),
        ({"a": jnp.ones(2)}, {"inner_steps": 0}, "inner_steps=0"),
        ({"a": jnp.ones(2)}, {"loop": "never"}, "expected 'scan', 'host'"),
    ],
)
def test_impossible_sweeps_are_refused(points, options, match):
    options = options | ({"mesh": data_mesh(options["mesh"])} if "mesh" in options else {})
    with pytest.raises(ValueError, match=match):
        make_sweep(lambda point: equal(1.0, 0.1), points, **options)


def test_init_wants_a_leading_axis_of_runs_everywhere():
    init, _ = make_sweep(lambda point: equal(point, 0.1), jnp.ones(4), batches="stacked")
    with pytest.raises(ValueError, match=r"4 points and init\(keys=\) has 3 keys"):
        init(KEYS[:3], PARAMS, TRAIN.batch)
    with pytest.raises(ValueError, match=r"params=.*\['w'\] has shape \(3,\)"):
        init(KEYS, TRAIN.params, TRAIN.batch)
    with pytest.raises(ValueError, match=r"batch=.*leading axis of 4 runs"):
        init(KEYS, PARAMS, TRAIN.batch)


def test_a_value_that_must_be_known_is_refused():
    def make(point):
        return equal(1.0 if point > 1 else 0.5, 0.1)

    with pytest.raises(ValueError, match="the value of a number of its point is asked for"):
        make_sweep(make, jnp.ones(2))


def number_options():
    """`(method, {option: a value})`, those of its options that are numbers."""
    for name in auxjax.methods.names():
        found = {}
        for option, about in inspect.signature(getattr(auxjax.methods, name)).parameters.items():
            kinds = typing.get_args(about.annotation) if isinstance(about.annotation, types.UnionType) else ()
            if about.annotation is float or float in kinds:
                found[option] = about.default or 0.01
        if found:
            yield name, found


FORMS = {"arml": {"form": "two_stage"}, "auto_lambda": {"form": "finite_difference"}}
FORMS |= {name: {"form": "finite_difference"} for name in ("maxl", "wamal")}


@pytest.mark.parametrize(("name", "numbers"), list(number_options()))
def test_every_option_that_is_a_number_can_be_swept(name, numbers, ordinary_promotion):
    """Traced, in shapes alone: `init`, an inner and an outer update."""
    problem = LinearTasks.make(0, num_tasks=3)
    needed = OPTIONS.get(name, {}) | FORMS.get(name, {})

    def make(point):
        return linear_model(), auxjax.methods.get(name, **needed | point), optax.sgd(0.1)

    points = {option: jnp.array([value, 0.9 * value]) for option, value in numbers.items()}
    init, step = make_sweep(make, points, donate=False)
    params = {"w": jnp.stack([problem.params["w"]] * 2)}
    state = jax.eval_shape(lambda: init(KEYS[:2], params, problem.batch))
    after, _ = jax.eval_shape(lambda state: step(state, problem.batch, problem.batch), state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after.params, state.params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
