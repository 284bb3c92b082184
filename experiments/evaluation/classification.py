"""Evaluators of classifiers: accuracy over classes, and both numbers of a yes-or-no label."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.pools import length, rows
from experiments.evaluation.evaluators import Evaluator, known
from experiments.evaluation.predictions import predict
from experiments.evaluation.statistics import auroc


def accuracy(scores_of, *, chunk: int = 1000) -> Evaluator:
    """Accuracy of the class with the highest score.

    Args:
      scores_of: `(params, model_state, images) -> scores [n, C]`.
      chunk: images at a time.
    """

    @jax.jit
    def classes(params, model_state, images):
        return jnp.argmax(scores_of(params, model_state, images), axis=-1)

    def judge(trained, arrays) -> dict[str, float]:
        def apply(images):
            return classes(trained.params, trained.model_state, images)

        labels = rows(arrays["label"], 0, length(arrays))
        return {"accuracy": float(np.mean(predict(apply, arrays["image"], chunk=chunk) == labels))}

    return Evaluator(judge, known("accuracy"))


def binary(logits_of) -> Evaluator:
    """Accuracy at probability 1/2 and area under the ROC curve of one yes-or-no label.

    Args:
      logits_of: `(params, features) -> logits [n]`.
    """
    compiled = jax.jit(logits_of)

    def judge(trained, arrays) -> dict[str, float]:
        logits = predict(lambda features: compiled(trained.params, features), arrays["features"], chunk=10_000)
        positive = rows(arrays["label"], 0, length(arrays)) == 1
        return {"accuracy": float(np.mean((logits > 0) == positive)), "auroc": auroc(logits, positive)}

    return Evaluator(judge, known("accuracy", "auroc"))
