"""Checkpoints: bit for bit, typed keys included, and clear when they do not fit."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.training.checkpoint import arrays, open_checkpoints, restore, save
from tests.helpers.every_method import FEW, OPTIONS
from tests.helpers.training_problems import LinearTasks, linear_model

pytestmark = pytest.mark.usefixtures("ordinary_promotion")


def steps(state, step, batch, count):
    for _ in range(count):
        state, _ = step(state, batch, batch)
    return state


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "jtds")) for name in FEW])
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path, name):
    problem = LinearTasks.make(0, num_tasks=3)
    init, step = auxjax.make_step(linear_model(), auxjax.methods.get(name, **FEW[name]), optax.adam(0.01), donate=False)
    start = init(jax.random.key(0), problem.params, problem.batch)
    whole = steps(start, step, problem.batch, 6)
    with open_checkpoints(tmp_path / "c") as manager:
        assert restore(manager, start) is None
        save(manager, 3, steps(start, step, problem.batch, 3), {"best": 0.1 + 0.2})
    with open_checkpoints(tmp_path / "c") as manager:
        found = restore(manager, init(jax.random.key(1), problem.params, problem.batch))
    assert found.step == 3
    assert found.note == {"best": 0.1 + 0.2}
    assert type(found.tree) is auxjax.TrainState
    again = steps(found.tree, step, problem.batch, 3)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_only_the_newest_are_kept(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as manager:
        for number in range(5):
            save(manager, number, {"x": jnp.full(3, float(number))})
        assert manager.all_steps() == [3, 4]
        assert restore(manager, {"x": jnp.zeros(3)}).tree["x"][0] == 4


@pytest.mark.parametrize("other", [{"y": jnp.zeros(3)}, {"x": jnp.zeros(4)}, {"x": jnp.zeros(3), "y": jnp.zeros(1)}])
def test_another_runs_checkpoint_is_refused(tmp_path, other):
    with open_checkpoints(tmp_path) as manager:
        save(manager, 1, {"x": jnp.zeros(3)})
    with open_checkpoints(tmp_path) as manager, pytest.raises(ValueError, match="Use the settings it was made with"):
        restore(manager, other)


# Forms whose state is another than that of the default options.
FORMS = [
    *[(name, {}) for name in auxjax.methods.names()],
    *[(name, {"warm_start": True}) for name in ("auxilearn", "auxinash", "dtg_auxl", "jtds", "maoal", "n_jtds")],
    *[("auxilearn", {"form": form, "constraint": "softplus"}) for form in ("linear", "monotone", "deep_linear")],
    *[("adaloss", {"form": "log_auxiliary"}), ("arml", FEW["arml"]), ("cosine_similarity", {"module_of": str})],
    *[("fixed_weights", {"weights": {"aux0": lambda step: 0.5}}), ("ol_aux", {"form": "one_step"})],
    ("jtds", {"hypergradient": auxjax.single_loop()}),
    *[("jtds", {"hypergradient": auxjax.amortise(auxjax.cg(max_steps=2), history=2)})],
    *[("random_weights", {"redraw": False}), ("uncertainty", {"weigh_primary": False}), ("wamal", {"normalise": True})],
]


def test_the_state_of_every_method_in_every_form_is_saved_and_restored(tmp_path):
    problem, states, draw = LinearTasks.make(0, num_tasks=3), {}, np.random.default_rng(0)

    def filled(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(7)
        return np.asarray(draw.normal(size=leaf.shape) * 10).astype(leaf.dtype)

    for number, (name, options) in enumerate(FORMS):
        method = auxjax.methods.get(name, **{**OPTIONS.get(name, {}), **options})
        init, _ = auxjax.make_step(linear_model(), method, optax.adam(0.01), average=auxjax.Average())
        shapes = jax.eval_shape(init, jax.random.key(0), problem.params, problem.batch)
        # What is the same for all methods is saved once.
        states[f"{name} {number}"] = jax.tree.map(filled, shapes.method if number else shapes)
    with open_checkpoints(tmp_path) as manager:
        save(manager, 1, states)
    empty = jax.tree.map(lambda leaf: leaf if leaf.dtype == jax.random.key(7).dtype else np.zeros_like(leaf), states)
    with open_checkpoints(tmp_path) as manager:
        found = restore(manager, empty).tree
    assert jax.tree.structure(found) == jax.tree.structure(states)
    for (path, new), old in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(states), strict=True):
        if jnp.issubdtype(new.dtype, jax.dtypes.prng_key):
            new, old = jax.random.key_data(new), jax.random.key_data(old)
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new, old, err_msg=jax.tree_util.keystr(path))


SAVED = {
    "count": jnp.array(16777217, jnp.int32),
    "inner": {"w": jnp.array([1.0001, 3.14159], jnp.float32)},
    "key": jax.random.key(3),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with open_checkpoints(folder) as manager:
        save(manager, 1, SAVED | {"none": None, "empty": ()})
    with open_checkpoints(folder) as manager:
        yield manager


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"count": jnp.zeros((), jnp.float32)}, "dtype int32 for count; this run has float32"),
        (
            {"inner": {"w": jnp.zeros(2, jnp.bfloat16)}},
            r"dtype float32 for inner/w; .* bfloat16 \(restore\(convert=True",
        ),
        ({"inner": {"w": jnp.zeros(2, jnp.float64)}}, "dtype float32 for inner/w; this run has float64"),
        ({"inner": {"w": jnp.zeros(2, jnp.int32)}}, "dtype float32 for inner/w; this run has int32"),
        ({"key": jnp.zeros(2, jnp.uint32)}, "dtype key<fry> for key; this run has uint32"),
        ({"inner": {"w": jnp.zeros(3, jnp.float32)}}, r"shape \(2,\) for inner/w; this run has \(3,\)"),
        ({"inner": {"w": None}}, r"has float32\[2\] at inner/w, where this run has None"),
        ({"inner": None}, r"has float32\[2\] at inner/w, where this run has None"),
        ({"none": jnp.zeros(2)}, r"has None, or nothing, at none, where this run has float64\[2\]"),
        ({"more": jnp.zeros(2)}, r"has None, or nothing, at more, where this run has float64\[2\]"),
    ],
)
def test_a_leaf_that_differs_is_named(saved, changes, expected):
    with pytest.raises(ValueError, match=expected):
        restore(saved, SAVED | {"none": None, "empty": ()} | changes)


def test_containers_without_arrays_are_those_of_the_new_state(saved):
    """A state that has got a field without arrays resumes from the checkpoint of one without it."""
    found = restore(saved, SAVED | {"none": None, "tasks": {"a": (), "b": {}}}).tree
    assert found["tasks"] == {"a": (), "b": {}}
    assert found["count"] == 16777217


def test_floats_are_cast_on_demand(saved):
    like = SAVED | {"none": None, "empty": (), "inner": {"w": jnp.zeros(2, jnp.bfloat16)}}
    found = restore(saved, like, convert=True).tree
    assert found["inner"]["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["inner"]["w"], SAVED["inner"]["w"].astype(jnp.bfloat16))
    assert found["none"] is None
    assert found["empty"] == ()
    with pytest.raises(ValueError, match="dtype int32 for count"):
        restore(saved, like | {"count": jnp.zeros((), jnp.float32)}, convert=True)


def test_bad_arguments_are_named(tmp_path):
    with (
        pytest.raises(ValueError, match=r"open_checkpoints\(keep=0\): expected a whole number >= 1"),
        open_checkpoints(tmp_path, keep=0),
    ):
        pass
    for path in ("gs://bucket/run", pathlib.Path("gs://bucket/run")):
        with pytest.raises(ImportError, match=r"directory='gs://bucket/run'\): .*gcsfs"), open_checkpoints(path):
            pass
    with open_checkpoints(tmp_path) as manager, pytest.raises(ValueError, match=r"the leaf \['b'\] has shape \(0, 3\)"):
        save(manager, 1, {"a": jnp.zeros(2), "b": jnp.zeros((0, 3))})


def test_reading_leaves_alone_what_another_process_is_writing(tmp_path):
    with open_checkpoints(tmp_path) as manager:
        save(manager, 1, {"x": jnp.arange(3)}, {})
    writing = tmp_path / "2.orbax-checkpoint-tmp"
    writing.mkdir()
    np.testing.assert_array_equal(arrays(tmp_path, 1)["['x']"], [0, 1, 2])
    assert writing.exists()
    with open_checkpoints(tmp_path):
        assert not writing.exists()
