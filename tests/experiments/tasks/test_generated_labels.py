"""Generated labels in the experiments: the model and its heads, and every method of the kind by its name alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from auxjax.formulas.soft_labels import focal_losses
from experiments.tasks import generated_labels, image_classification
from tests.helpers.commands import assert_same_run, call, copy_interrupted, read

pytestmark = pytest.mark.usefixtures("single_precision")
SHORT = {"steps": 4, "inner_steps": 2, "log_every": 2, "checkpoint_every": 2, "batch_size": 12, "outer_batch_size": 8}
SHORT |= {"channels": "4,4", "label_channels": "4,4", "train_size": 200, "dev_size": 100, "validation_size": 100}
LABELS = ("equal", "random_labels", "maxl", "wamal", "dtg_auxl", "rl_aux", "rl_aux:weighted=true")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A small archive in CIFAR-100's layout: 100 fine classes, noise for images."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("cifar100") / "small.npz"
    arrays = {"classes": np.array([f"fine{i}" for i in range(100)])}
    arrays |= {"coarse_classes": np.array([f"coarse{i}" for i in range(20)])}
    arrays["fine_to_coarse"] = rng.permutation(np.repeat(np.arange(20), 5))
    for name, each in (("train", 5), ("test", 2)):
        arrays[f"y_{name}"] = np.repeat(np.arange(100), each)
        arrays[f"r_{name}"] = rng.integers(0, 256, (100 * each, 3, 32, 32)).astype(np.uint8)
    np.savez(path, **arrays)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("method", LABELS)
def test_a_short_run_and_its_resumption(tmp_path, archive, method):
    whole, half = tmp_path / "whole", tmp_path / "half"
    changes = [part for name, value in SHORT.items() for part in ("--set", f"{name}={value}")]
    command = ["run", "cifar100", "--method", method, "--seed", "1", "--data-dir", archive, *changes]
    assert call(*command, "--out", whole) == 0
    result, log = read(whole)
    assert 0 <= result["test_accuracy"] <= 1
    if method != "equal":
        assert {"loss/generated", "weight/generated", "label_entropy", "label_usage"} <= log[-1].keys()
    copy_interrupted(whole, half)
    assert call(*command, "--out", half) == 0
    assert_same_run(whole, half)


@pytest.mark.slow
def test_a_short_run_in_parts_and_in_half_precision(tmp_path, archive):
    """130 training images at the end are no multiple of 4: the weights are those of the model as it is."""
    changes = {**SHORT, "train_size": 130, "accumulate": 4, "dtype": "bfloat16", "remat": "true"}
    settings = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    command = ["run", "cifar100", "--method", "equal", "--data-dir", archive, *settings, "--out", tmp_path / "out"]
    assert call(*command) == 0
    result, log = read(tmp_path / "out")
    assert 0 <= result["test_accuracy"] <= 1
    assert all(np.isfinite(line["loss/class"]) for line in log)


def batch_of(count=6):
    rng = np.random.default_rng(1)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (count, 8, 8, 3)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 4, count), jnp.int32),
        "sub_label": jnp.asarray(rng.integers(0, 3, count), jnp.int32),
        "index": jnp.arange(count),
    }


def model_of(manual):
    network = generated_labels.make_network("convnet", 4, 3, (4,))
    params, model_state = image_classification.init_params(network, (8, 8, 3))(jax.random.key(0))
    return generated_labels.task_model(network, manual, 3, 2.0), params, model_state


def test_the_human_labels_are_the_sub_classes_of_the_class():
    model, params, model_state = model_of("human")
    batch = batch_of()
    out = model.losses(params, batch, jax.random.key(0), model_state)
    assert out.label_losses.shape == (6, 12)
    wanted = [out.label_losses[i, 3 * batch["label"][i] + batch["sub_label"][i]] for i in range(6)]
    np.testing.assert_array_equal(out.values["human"], np.array(wanted))
    np.testing.assert_allclose(
        model.feature_loss(params, out.features, jax.nn.one_hot(jnp.zeros(6, int), 12), model_state),
        out.label_losses[:, 0],
        rtol=1e-5,
    )


def test_the_decoy_knows_neither_image_nor_class():
    model, params, model_state = model_of("decoy")
    batch = batch_of()
    other = {**batch, "label": (batch["label"] + 1) % 4, "sub_label": 1 - batch["sub_label"]}
    values = [model.losses(params, b, jax.random.key(0), model_state).values["decoy"] for b in (batch, other)]
    np.testing.assert_array_equal(*values)
    counts = np.bincount(image_classification.hashed_class(jnp.arange(12_000), 12), minlength=12)
    assert counts.min() > 800
    assert counts.max() < 1200


def test_the_primary_loss_is_focal():
    model, params, model_state = model_of("human")
    batch = batch_of()
    network = generated_labels.make_network("convnet", 4, 3, (4,))
    images = image_classification.to_float(batch["image"])
    out, _ = image_classification.forward(network, params, model_state, images)
    wanted = focal_losses(out.heads["class"])[jnp.arange(6), batch["label"]]
    np.testing.assert_allclose(model.losses(params, batch, None, model_state).values["class"], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("network=vgg", "vgg16"),
        ("manual=mine", "human, decoy"),
        ("sub_classes=0", "at least 1"),
        ("dtype=float16", "dtype='float16': expected one of float32, bfloat16"),
        ("accumulate=0", "accumulate=0: expected a whole number of at least 1"),
        ("remat=perhaps", "expected true or false, such as remat=false"),
        ("accumulate=5", "['image'] has 12 examples, which 5 parts cannot share evenly"),
    ],
)
def test_mistakes_are_named(tmp_path, archive, capsys, setting, match):
    changes = [part for name, value in SHORT.items() for part in ("--set", f"{name}={value}")]
    command = ["run", "cifar100", "--method", "stl", "--data-dir", archive, *changes, "--set", setting]
    assert call(*command, "--out", tmp_path) == 2
    assert match in capsys.readouterr().err
