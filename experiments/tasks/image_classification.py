"""Image classification with rotation prediction as the auxiliary task: what the image configs share.

Every inner batch holds upright images for the primary task and the same images turned by 0, 1, 2 or 3 quarter turns for
the auxiliary one, in one forward pass: BatchNorm's statistics are those of both halves, in single-task training, too,
whose updates cost what those of equal weights do. A decoy can be added, fixed random labels that have nothing to do
with the image, to see which methods notice.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from auxjax import TaskLosses, TaskModel
from auxjax.models import ConvNet
from auxjax.tasks.rotation import rotation_batch
from auxjax.training.model_transforms import accumulate, mixed_precision, remat
from experiments.contract import Experiment
from experiments.evaluation import classification
from experiments.evaluation.evaluators import Evaluator
from experiments.inputs import batches
from experiments.methods.defaults import common_options
from experiments.settings import RunSettings, setting

PRIMARY = "class"
AUXILIARY = ("rotation", "decoy")
DECOY_CLASSES = 5
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class LargeModelSettings(RunSettings):
    """Settings of images that are cut from a published training set, and of models that want memory.

    Attributes:
      padding: pixels reflected at the border before a random crop.
      train_size: training examples, 0 for all that remain.
      validation_size: validation examples.
      dtype: what the network computes in.
      accumulate: parts of a batch whose gradients are added up, one at a time.
      remat: compute activations again in the backward pass.
    """

    padding: int = 2
    train_size: int = 10_000
    validation_size: int = 2000
    dtype: str = setting("float32", choices=DTYPES)
    accumulate: int = setting(1, least=1)
    remat: bool = False


@dataclasses.dataclass(frozen=True)
class ConvNetSettings(LargeModelSettings):
    """Settings of `convnet_experiment`.

    Attributes:
      channels: of the convolutions.
      auxiliary: names of auxiliary tasks.
    """

    channels: tuple[int, ...] = setting((16, 32, 64), least=1)
    auxiliary: tuple[str, ...] = ("rotation",)


def heads(num_classes: int, auxiliary: tuple[str, ...]) -> dict[str, int]:
    """Output sizes of the network's heads.

    Raises:
      ValueError: an auxiliary task that is not one of `AUXILIARY`.
    """
    unknown = sorted(set(auxiliary) - set(AUXILIARY))
    if unknown:
        raise ValueError(f"auxiliary={auxiliary}: unknown task {unknown[0]!r}; known: {', '.join(AUXILIARY)}.")
    sizes = {"rotation": 4, "decoy": DECOY_CLASSES}
    return {PRIMARY: num_classes, **{task: sizes[task] for task in auxiliary}}


def to_float(images):
    """Images as float32: bytes are scaled to [-1, 1], floats taken as they are."""
    return images.astype(jnp.float32) / 127.5 - 1.0 if images.dtype == jnp.uint8 else images


def forward(network, params, model_state, images):
    """The network's `Outputs` in training, in float32, and its new state, `None` where it has none.

    The network computes in the dtype of the params: see `transformed`.
    """
    images = images.astype(jax.tree.leaves(params)[0].dtype)
    if model_state is None:
        out, new_state = network.apply({"params": params}, images, train=True), None
    else:
        out, new_state = network.apply({"params": params, **model_state}, images, train=True, mutable=list(model_state))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), out), new_state


def transformed(model: TaskModel, settings) -> TaskModel:
    """What the settings `dtype`, `remat` and `accumulate` make of a model; with their defaults, the model itself.

    Saved by `remat` is what convolutions and matrix products gave; the cheap steps between them are computed again.
    """
    if settings.dtype != "float32":
        model = mixed_precision(model, settings.dtype)
    if settings.remat:
        model = remat(model, jax.checkpoint_policies.dots_saveable)
    return accumulate(model, settings.accumulate)


def task_model(network, auxiliary: tuple[str, ...]) -> TaskModel:
    """The `TaskModel` of a network with the heads above; BatchNorm statistics are its model state, if it has any."""

    def losses(params, batch, key, state=None):
        images = to_float(batch["image"])
        count = images.shape[0]
        if "rotation" in auxiliary:
            turned, turns = rotation_batch(key, images)
            images = jnp.concatenate([images, turned])
        out, new_state = forward(network, params, state, images)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        upright = out.features[:count]
        values = {PRIMARY: cross_entropy(out.heads[PRIMARY][:count], batch["label"])}
        features = {PRIMARY: upright}
        if "rotation" in auxiliary:
            values["rotation"] = cross_entropy(out.heads["rotation"][count:], turns)
            features["rotation"] = out.features[count:]
        if "decoy" in auxiliary:
            values["decoy"] = cross_entropy(out.heads["decoy"][:count], batch["decoy"])
            features["decoy"] = upright
        return TaskLosses(values, features=features, state=new_state)

    return TaskModel(losses, primary=PRIMARY, trunk=lambda path: "trunk" in path)


def hashed_class(indices, num_classes: int):
    """A class in [0, num_classes) for the example at each place in the data: a hash, fixed for the whole run."""
    hashed = indices.astype(jnp.uint32) * jnp.uint32(2654435761) >> jnp.uint32(16)
    return (hashed % jnp.uint32(num_classes)).astype(jnp.int32)


def with_decoy(batch):
    """The batch with the decoy's labels."""
    return {**batch, "decoy": hashed_class(batch["index"], DECOY_CLASSES)}


def draw(batch_size: int, augment=None, complete=with_decoy) -> batches.Draw:
    """How to draw batches, see `batches.Draw`; `augment(images, key)` if given."""
    if augment is None:
        return batches.Draw(batch_size, complete)
    return batches.Draw(batch_size, complete, lambda batch, key: {**batch, "image": augment(batch["image"], key)})


def crop_and_flip(padding: int):
    """`(images, key) -> images`: a random crop after reflecting `padding` pixels, and a mirror image half the time."""

    def augment(images, key):
        count, height, width, _ = images.shape
        key_rows, key_columns, key_flip = jax.random.split(key, 3)
        padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
        rows = jax.random.randint(key_rows, (count, 1), 0, 2 * padding + 1) + jnp.arange(height)[None, :]
        columns = jax.random.randint(key_columns, (count, 1), 0, 2 * padding + 1) + jnp.arange(width)[None, :]
        flip = jax.random.bernoulli(key_flip, shape=(count, 1))
        columns = jnp.where(flip, columns[:, ::-1], columns)
        example = jnp.arange(count)[:, None, None]
        return padded[example, rows[:, :, None], columns[:, None, :]]

    return augment


def evaluator(network, chunk: int = 1000) -> Evaluator:
    """Accuracy of the primary head."""

    def scores_of(params, model_state, images):
        return network.apply({"params": params, **(model_state or {})}, to_float(images), train=False).heads[PRIMARY]

    return classification.accuracy(scores_of, chunk=chunk)


def init_params(network, shape: tuple[int, ...]):
    """`key -> (params, model_state)` of a network with BatchNorm on images of a shape."""

    def init(key):
        variables = network.init(key, jnp.zeros((1, *shape), jnp.float32))
        return variables["params"], {"batch_stats": variables["batch_stats"]}

    return init


def convnet_options(settings, shapes) -> dict[str, dict]:
    """Options of the methods that need some, for `convnet_experiment`."""
    return common_options(settings, shapes, settings.auxiliary, max_updates=200, fixed_weight=0.3)


def convnet_experiment(settings, shapes) -> Experiment:
    """A convolutional network with BatchNorm (whose statistics only inner updates move), Adam with a cosine schedule.

    Args:
      settings: a config's, with `channels`, `auxiliary`, `learning_rate`, `steps`, `padding` (of the
        crops; there are mirror images, too), `batch_size`, `outer_batch_size` and what `transformed` and
        `common_options` want.
      shapes: `data.pools.Shapes`.
    """
    network = ConvNet(heads=heads(shapes.num_classes, settings.auxiliary), channels=settings.channels, norm="batch")
    model = task_model(network, settings.auxiliary)
    return Experiment(
        model=model,
        step_model=transformed(model, settings),
        optimizer=optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.steps)),
        init_params=init_params(network, shapes.inputs),
        draw_inner=draw(settings.batch_size, crop_and_flip(settings.padding)),
        draw_outer=draw(settings.outer_batch_size),
        evaluators=(evaluator(network),),
        metric="accuracy",
    )
