"""Batches, augmentation and the multi-task loss of the image configs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import auxjax
from auxjax.models import MLP, ConvNet
from auxjax.tasks.rotation import rotate_batch
from experiments.evaluation.evaluators import Trained
from experiments.inputs import batches
from experiments.tasks import image_classification

pytestmark = pytest.mark.usefixtures("single_precision")


def make_data(count=40, size=8, channels=1, dtype=np.float32):
    """Images that tell which example and which pixel they are."""
    rng = np.random.default_rng(0)
    image = rng.random((count, size, size, channels)).astype(np.float32)
    if dtype == np.uint8:
        image = (255 * image).astype(np.uint8)
    return {"image": jnp.asarray(image), "label": jnp.asarray(rng.integers(0, 3, count), jnp.int32)}


def where_in(data, batch):
    """The place in the data of every example of a batch."""
    same = np.asarray(data["image"])[None] == np.asarray(batch["image"])[:, None]
    return same.all(axis=(2, 3, 4)).argmax(axis=1)


def test_a_batch_has_no_example_twice_and_keeps_image_and_label_together():
    data = make_data()
    draw = jax.jit(image_classification.draw(16))
    seen = set()
    for number in range(30):
        batch = draw(data, jax.random.key(number))
        places = where_in(data, batch)
        assert len(set(places)) == 16
        np.testing.assert_array_equal(batch["label"], data["label"][places])
        seen |= set(places.tolist())
    assert seen == set(range(40))


def test_the_same_key_draws_the_same_batch_with_and_without_augmentation():
    data = make_data()
    key = jax.random.key(3)
    plain, again = image_classification.draw(16)(data, key), image_classification.draw(16)(data, key)
    np.testing.assert_array_equal(plain["image"], again["image"])
    augmented = image_classification.draw(16, image_classification.crop_and_flip(1))(data, key)
    np.testing.assert_array_equal(plain["label"], augmented["label"])
    np.testing.assert_array_equal(plain["decoy"], augmented["decoy"])
    assert augmented["image"].shape == plain["image"].shape


def test_a_batch_size_above_the_data_takes_all():
    data = make_data(count=10)
    batch = image_classification.draw(200)(data, jax.random.key(0))
    assert sorted(where_in(data, batch)) == list(range(10))


def test_the_decoys_label_belongs_to_the_example_and_to_nothing_else():
    data = make_data(count=1000)
    labels = np.asarray(image_classification.with_decoy(batches.take(data, jnp.arange(1000)))["decoy"])
    for number in range(3):
        batch = image_classification.draw(64)(data, jax.random.key(number))
        np.testing.assert_array_equal(batch["decoy"], labels[where_in(data, batch)])
    counts = np.bincount(labels, minlength=image_classification.DECOY_CLASSES)
    assert counts.size == image_classification.DECOY_CLASSES
    assert (np.abs(counts - 200) < 40).all()
    together = np.histogram2d(labels, np.asarray(data["label"]), bins=(image_classification.DECOY_CLASSES, 3))[0]
    expected = np.outer(together.sum(1), together.sum(0)) / 1000
    assert ((together - expected) ** 2 / expected).sum() < 26.1  # chi-square, 8 degrees of freedom, p = 0.001


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_without_padding_an_image_is_itself_or_its_mirror_image(dtype):
    images = make_data(count=64, channels=3, dtype=dtype)["image"]
    out = np.asarray(image_classification.crop_and_flip(0)(images, jax.random.key(0)))
    assert out.dtype == dtype
    same = (out == np.asarray(images)).all(axis=(1, 2, 3))
    mirrored = (out == np.asarray(images)[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 16 < same.sum() < 48


def test_a_crop_is_a_window_of_the_reflected_image():
    images = np.asarray(make_data(count=60, size=6, channels=2)["image"])
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    out = np.asarray(jax.jit(image_classification.crop_and_flip(2))(jnp.asarray(images), jax.random.key(1)))
    found = set()
    for example in range(60):
        windows = {
            (row, column, flip): padded[example, row : row + 6, column : column + 6][:, :: -1 if flip else 1]
            for row in range(5)
            for column in range(5)
            for flip in (False, True)
        }
        matches = [place for place, window in windows.items() if (window == out[example]).all()]
        assert matches, example
        found.add(matches[0])
    assert {place[0] for place in found} == {place[1] for place in found} == set(range(5))


def test_bytes_become_floats_from_minus_one_to_one():
    np.testing.assert_array_equal(image_classification.to_float(jnp.array([0, 255], jnp.uint8)), [-1.0, 1.0])
    images = jnp.array([0.3, 0.7], jnp.float32)
    assert image_classification.to_float(images) is images


def test_unknown_auxiliary_tasks_are_refused():
    assert image_classification.heads(10, ("decoy", "rotation")) == {"class": 10, "decoy": 5, "rotation": 4}
    with pytest.raises(ValueError, match="unknown task 'jigsaw'; known: rotation, decoy"):
        image_classification.heads(10, ("rotation", "jigsaw"))


def test_losses_are_those_of_separate_forward_passes():
    auxiliary = ("rotation", "decoy")
    network = MLP(hidden=(12,), heads=image_classification.heads(3, auxiliary))
    data = make_data()
    params = jax.jit(network.init)(jax.random.key(0), data["image"])["params"]
    batch, key = image_classification.draw(16)(data, jax.random.key(1)), jax.random.key(2)
    out = jax.jit(image_classification.task_model(network, auxiliary).losses)(params, batch, key)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    apply = jax.jit(network.apply)
    upright = apply({"params": params}, batch["image"])
    turns = jax.random.randint(key, (16,), 0, 4, jnp.int32)  # as rotation_batch draws them
    turned = apply({"params": params}, rotate_batch(batch["image"], turns))
    expected = {
        "class": cross_entropy(upright.heads["class"], batch["label"]),
        "decoy": cross_entropy(upright.heads["decoy"], batch["decoy"]),
        "rotation": cross_entropy(turned.heads["rotation"], turns),
    }
    assert out.values.keys() == expected.keys()
    for task, value in expected.items():
        np.testing.assert_allclose(out.values[task], value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.features["class"], upright.features, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.features["rotation"], turned.features, rtol=1e-5, atol=1e-6)
    alone = jax.jit(image_classification.task_model(network, ()).losses)(params, batch, key)
    assert list(alone.values) == ["class"]
    np.testing.assert_allclose(alone.values["class"], expected["class"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_only_inner_updates_move_batchnorm_statistics():
    network = ConvNet(heads=image_classification.heads(3, ("rotation",)), channels=(4, 4), norm="batch")
    data, dev = make_data(), make_data(count=12)
    variables = jax.jit(network.init)(jax.random.key(0), data["image"][:1])
    model = image_classification.task_model(network, ("rotation",))
    draw = image_classification.draw(8)
    options = {"inner_steps": 2, "draw_inner": draw, "draw_outer": draw, "donate": False}
    method = auxjax.methods.get("jtds")
    init, step = auxjax.make_step(model, method, optax.sgd(0.01), **options)
    start = init(jax.random.key(1), variables["params"], data, {"batch_stats": variables["batch_stats"]})
    state, _ = step(start, data, dev)
    # The statistics of two inner updates and nothing else: the same without the method's outer level.
    _, inner_only = auxjax.make_step(model, method._replace(outer=None), optax.sgd(0.01), **options)
    expected, _ = inner_only(start, data, dev)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), start.model_state, state.model_state)
    assert all(jax.tree.leaves(changed))
    for a, b in zip(jax.tree.leaves(state.model_state), jax.tree.leaves(expected.model_state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.uint8, marks=pytest.mark.slow)])
def test_evaluate_is_the_accuracy_in_chunks_of_any_size(dtype):
    network = ConvNet(heads=image_classification.heads(3, ()), channels=(4, 4), norm="batch")
    data = make_data(dtype=dtype)
    variables = jax.jit(network.init)(jax.random.key(0), image_classification.to_float(data["image"]))
    statistics = jax.tree.map(lambda leaf: leaf + 0.1, {"batch_stats": variables["batch_stats"]})
    scores = network.apply(
        {"params": variables["params"], **statistics}, image_classification.to_float(data["image"]), train=False
    )
    expected = np.mean(np.asarray(scores.heads["class"]).argmax(axis=1) == np.asarray(data["label"]))
    split = {name: np.asarray(array) for name, array in data.items()}
    for chunk in (7, 40, 1000):
        evaluator = image_classification.evaluator(network, chunk)
        found = evaluator.judge(Trained(variables["params"], (), statistics), split)
        assert found == {"accuracy": pytest.approx(expected, abs=1e-12)}


class Large(NamedTuple):
    """The settings for large models."""

    dtype: str = "float32"
    accumulate: int = 1
    remat: bool = False


def test_the_defaults_leave_the_model_alone():
    model = image_classification.task_model(MLP(hidden=(12,), heads=image_classification.heads(3, ())), ())
    assert image_classification.transformed(model, Large()) is model


@pytest.mark.slow
def test_losses_in_half_precision_in_parts_are_those_of_the_whole_in_float32():
    network = ConvNet(heads=image_classification.heads(3, ("decoy",)), channels=(4, 4), norm="batch")
    data = make_data(channels=3, dtype=np.uint8)
    params, model_state = image_classification.init_params(network, (8, 8, 3))(jax.random.key(0))
    batch = image_classification.with_decoy(batches.take(data, jnp.arange(32)))
    model = image_classification.task_model(network, ("decoy",))
    seen = []

    def watched(params, batch, key, state):
        seen.append(jax.tree.leaves(params)[0].dtype)
        return model.losses(params, batch, key, state)

    large = image_classification.transformed(model._replace(losses=watched), Large("bfloat16", 2, True))
    found = jax.jit(large.losses)(params, batch, jax.random.key(1), model_state)
    assert set(seen) == {jnp.dtype("bfloat16")}
    for part in (0, 1):
        rows = jax.tree.map(lambda leaf, part=part: leaf[part::2], batch)
        wanted = jax.jit(model.losses)(params, rows, jax.random.key(1), model_state)
        for task, values in wanted.values.items():
            assert found.values[task].dtype == jnp.float32
            np.testing.assert_allclose(found.values[task][part::2], values, rtol=0.05)
    for leaf, before in zip(*map(jax.tree.leaves, (found.state, model_state)), strict=True):
        assert leaf.dtype == before.dtype == jnp.float32
        assert (leaf != before).any()


def test_convolutions_in_half_precision_are_convolutions_in_half_precision():
    """Bytes become float32 images: they must not pull the network back to float32."""
    network = ConvNet(heads=image_classification.heads(3, ()), channels=(4, 4), norm="batch")
    data = make_data(channels=3, dtype=np.uint8)
    params, model_state = image_classification.init_params(network, (8, 8, 3))(jax.random.key(0))
    model = image_classification.transformed(image_classification.task_model(network, ()), Large("bfloat16"))
    program = str(jax.make_jaxpr(model.losses)(params, data, jax.random.key(1), model_state))
    convolutions = [line for line in program.splitlines() if "conv_general_dilated[" in line]
    assert len(convolutions) == 2
    assert all(":bf16[" in line for line in convolutions)
