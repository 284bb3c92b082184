"""The multi-label loss and its metrics, against sums by hand and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from auxjax.formulas.losses import weighted_loss
from auxjax.models import MLP
from experiments.evaluation.evaluators import Trained
from experiments.inputs import batches
from experiments.tasks import multilabel

pytestmark = pytest.mark.usefixtures("single_precision")
TASKS = ("c", "a", "b")


def make_data(count=40):
    rng = np.random.default_rng(0)
    labelled = np.arange(count) % 4 == 0
    return {
        "features": rng.normal(size=(count, 5)).astype(np.float32),
        "label": np.where(labelled, rng.integers(0, 2, count), 0).astype(np.int32),
        "labelled": labelled,
        "auxiliary": rng.integers(0, 2, (count, 2)).astype(np.int32),
    }


@pytest.fixture(scope="module")
def fitted():
    with jax.enable_x64(False):
        network = MLP(hidden=(7,), heads=multilabel.heads(TASKS))
        return network, network.init(jax.random.key(0), jnp.zeros((1, 5)))["params"]


def test_losses_are_cross_entropies_of_the_labels_they_belong_to(fitted):
    network, params = fitted
    data = make_data()
    out = jax.jit(multilabel.task_model(network, TASKS).losses)(params, data, jax.random.key(1))
    logits = np.asarray(network.apply({"params": params}, data["features"]).heads["labels"], np.float64)
    labels = {"c": data["label"], "a": data["auxiliary"][:, 0], "b": data["auxiliary"][:, 1]}
    assert set(out.values) == set(labels)
    for place, (task, label) in enumerate(labels.items()):
        chance = 1 / (1 + np.exp(-logits[:, place]))
        wanted = -np.log(np.where(label == 1, chance, 1 - chance))
        np.testing.assert_allclose(out.values[task], wanted, rtol=1e-5, err_msg=task)
    assert out.masks.keys() == {"c"}
    np.testing.assert_array_equal(out.masks["c"], data["labelled"])
    assert out.features.shape == (40, 7)


def test_hidden_labels_reach_neither_loss_nor_gradient(fitted):
    network, params = fitted
    data = make_data()
    other = {**data, "label": np.where(data["labelled"], data["label"], 1)}

    def loss(params, data):
        out = multilabel.task_model(network, TASKS).losses(params, data, jax.random.key(1))
        return weighted_loss(out.values, {"c": 1.0}, masks=out.masks)

    for a, b in zip(*(jax.tree.leaves(jax.grad(loss)(params, part)) for part in (data, other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_metrics_are_those_of_the_primary_task(fitted):
    network, params = fitted
    data = make_data()
    found = multilabel.evaluator(network).judge(Trained(params, (), None), data)
    logits = network.apply({"params": params}, data["features"]).heads["labels"][:, 0]
    assert found["auroc"] == pytest.approx(roc_auc_score(data["label"], logits))
    assert found["accuracy"] == pytest.approx(np.mean((np.asarray(logits) > 0) == data["label"]))


def test_a_batch_says_where_its_examples_stand():
    data = {name: jnp.asarray(array) for name, array in make_data().items()}
    batch = jax.jit(batches.Draw(16))(data, jax.random.key(2))
    assert np.unique(batch["index"]).size == 16
    for name, array in data.items():
        np.testing.assert_array_equal(batch[name], array[batch["index"]])
    whole = batches.Draw(100)(data, jax.random.key(2))
    assert sorted(whole["index"].tolist()) == list(range(40))
