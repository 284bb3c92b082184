"""MAXL: a network that gives every example a soft auxiliary label, learned through the primary loss.

    y~(phi) = masked_softmax(g_phi(x), c)                                 a label within primary class c's sub-classes
    inner   min_theta  L_0(theta) + w mean_i l(theta; x_i, y~_i(phi))
    outer   min_phi    L_0(theta+(phi)) + b sum_c u_c log u_c,            u = mean_i y~_i(phi)

with theta+ = theta + U(grad inner(theta, phi)) after one step U of the inner optimiser, momentum and all, or after n
steps; or the inner problem's solution, by an implicit hypergradient. The entropy term is the outer loss's own, explicit
part; it is added in every form. Without it one sub-class of each block takes all.

Reference: Liu, Davison, Johns, 2019, Self-Supervised Generalisation with Meta Auxiliary Learning, NeurIPS, equations 3
to 6.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax

from auxjax._internal import checks
from auxjax.formulas import soft_labels
from auxjax.hypergrad import BilevelProblem, finite_difference, one_step, unrolled
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import evaluation, generation, outer_level

FORMS = ("exact", "finite_difference")


@register("generated tasks", needs={"outer_batch", "label_losses"})
def maxl(
    *,
    generator: generation.Generator,
    labels: Callable[[Any], jax.Array],
    sub_classes: int = 5,
    auxiliary_weight: float = 1.0,
    entropy_weight: float = 0.2,
    sharpness_weight: float = 0.0,
    outer_optimizer: optax.GradientTransformation | None = None,
    form: str = "exact",
    look_ahead_steps: int = 1,
    epsilon: float = 0.01,
    hypergradient=None,
    reuse_batch: bool = False,
) -> Method:
    """Generates soft auxiliary labels.

    Args:
      generator: `Generator(init, apply)`, with `apply(meta, batch)` the logits `[n, C psi]` of the labels.
      labels: `batch -> int [n]`, the primary classes.
      sub_classes: psi, auxiliary classes per primary class.
      auxiliary_weight: w.
      entropy_weight: b, 0.2 in the authors' code.
      sharpness_weight: s, of an outer term of ours, s mean_i H(y~_i). The paper has none (0), and its labels tend to
        the uniform one, which tells the auxiliary head nothing; with s = b the two terms are -b times the information
        that a label has about its example.
      outer_optimizer: optimiser of the generator; `optax.adam(1e-3)` by default. (The authors use SGD with rate 1e-3
        and weight decay 5e-4.)
      form: "exact" differentiates the look-ahead, "finite_difference" replaces its mixed derivative by a difference of
        two gradients, the authors' first-order variant (whose code leaves the entropy's gradient out).
      look_ahead_steps: n, steps of the real optimiser with its real state, on one batch.
      epsilon: length of the finite difference's displacement.
      hypergradient: an estimator such as `implicit(neumann(3))` or one with state instead of a look-ahead.
      reuse_batch: take the outer loss on the inner batch, as the authors do, whatever outer batch is given.

    Returns:
      A `Method`; its outer variables are the generator's. It needs `TaskLosses.label_losses` or
      `TaskModel.soft_label_loss`; the paper's primary and auxiliary losses are focal losses
      (`auxjax.formulas.soft_labels.focal_losses`). Inner update: one gradient and a forward pass of the generator.
      Outer update with one exact step: one inner gradient, one outer gradient, a product of the mixed
      derivative (a forward-mode pass through the inner gradient and a backward pass of the generator). Epoch-wise
      alternation, as the authors have it: `make_step(inner_steps=n, outer_steps=n)`.

    Raises:
      ValueError, TypeError: an impossible option; a model without an auxiliary head, or one of another width (when the
        state is made).
    """
    return make_method(
        Options(
            name="maxl",
            generator=generator,
            labelling=partial(_labelling, labels, sub_classes),
            labels=labels,
            sub_classes=sub_classes,
            auxiliary_weight=auxiliary_weight,
            entropy_weight=entropy_weight,
            sharpness_weight=sharpness_weight,
            outer_optimizer=outer_optimizer,
            form=form,
            look_ahead_steps=look_ahead_steps,
            epsilon=epsilon,
            hypergradient=hypergradient,
            reuse_batch=reuse_batch,
        )
    )


def _labelling(labels, sub_classes, outputs, batch) -> generation.Labelling:
    """The labels from the generator's outputs."""
    if not hasattr(outputs, "ndim"):
        raise TypeError(
            f"maxl(generator=): apply returned {type(outputs).__name__}; expected the logits [n, classes x "
            "sub_classes]. Generators that give weights as well are for method 'wamal'."
        )
    return generation.Labelling(soft_labels.masked_softmax(outputs, labels(batch), sub_classes))


class Options(NamedTuple):
    """What `maxl` and `wamal` take, and how the generator's outputs are read: `labelling(outputs, batch)`."""

    name: str
    generator: generation.Generator
    labelling: Callable[[Any, Any], generation.Labelling]
    labels: Callable
    sub_classes: int
    auxiliary_weight: float
    entropy_weight: float
    sharpness_weight: float
    outer_optimizer: optax.GradientTransformation | None
    form: str
    look_ahead_steps: int
    epsilon: float
    hypergradient: Any
    reuse_batch: bool

    def label(self, meta, batch) -> generation.Labelling:
        """The generated labels of a batch."""
        return self.labelling(self.generator.apply(meta, batch), batch)


def make_method(options: Options) -> Method:
    """MAXL and WAMAL, which differ in what they read from the generator's outputs."""
    _check_options(options)
    weight = options.auxiliary_weight
    level = outer_level.make_outer_level(
        options.name, options.outer_optimizer, options.hypergradient, False, default_rate=1e-3
    )
    options = options._replace(outer_optimizer=level.optimizer)

    def inner(context, state, batch, key):
        return generation.descend_on(context, state, batch, key, options.label(state.method.meta, batch), weight)

    def weights(context, state, batch, key):
        made = options.label(state.method.meta, batch)
        return generation.reported_weights(context, state, batch, key, made, weight)

    return Method(partial(_init, options), inner, partial(_outer, options), weights)


def _check_options(options: Options) -> None:
    name = options.name
    generation.check_generator(name, options.generator)
    weights = ("auxiliary_weight", "entropy_weight", "sharpness_weight")
    generation.check_weight(name, **{option: getattr(options, option) for option in weights})
    if not callable(options.labels):
        raise TypeError(f"{name}(labels=): expected a function of the batch, got {type(options.labels).__name__}.")
    if options.form not in FORMS:
        raise ValueError(f"{name}(form={options.form!r}): expected one of {', '.join(FORMS)}.")
    for option in ("sub_classes", "look_ahead_steps"):
        value = getattr(options, option)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}({option}={value!r}): expected a whole number of at least 1.")
    if not checks.is_traced(options.epsilon) and not 0 < options.epsilon < float("inf"):
        raise ValueError(f"{name}(epsilon={options.epsilon}): expected a finite number > 0.")
    steps = options.look_ahead_steps
    if options.form == "finite_difference" and steps > 1:
        raise ValueError(f"{name}(form='finite_difference') looks one step ahead; got look_ahead_steps={steps}.")
    if options.hypergradient is not None and (options.form != "exact" or steps > 1):
        raise ValueError(
            f"{name}(hypergradient=) is used instead of a look-ahead; leave form and look_ahead_steps out."
        )


def _init(options, context, state, batch, key):
    generation.primary_labels(options.name, options.labels, batch)
    meta = options.generator.init(key, batch)
    found = jax.eval_shape(options.label, meta, batch)
    generation.check_model(options.name, context, state, batch, key, found.labels.shape[-1])
    problem = _problem(options, context, state.model_state, key)
    return outer_level.init_outer(_level(options, context, state), problem, state.params, meta, batch, key)


def _outer(options, context, state, inner_batch, outer_batch, key):
    problem = _problem(options, context, state.model_state, key)
    outer_batch = inner_batch if options.reuse_batch else outer_batch
    point = (problem, state.params, state.method, inner_batch, outer_batch, key)
    new, metrics = outer_level.update_outer(_level(options, context, state), *point)
    return state._replace(method=new), metrics


def _level(options, context, state) -> outer_level.OuterLevel:
    """The estimator; a look-ahead starts from the inner optimiser's real state."""
    estimator = options.hypergradient
    if estimator is None and options.form == "finite_difference":
        estimator = finite_difference(context.optimizer, epsilon=options.epsilon, opt_state=state.opt_state)
    elif estimator is None and options.look_ahead_steps > 1:
        estimator = unrolled(options.look_ahead_steps, context.optimizer, opt_state=state.opt_state)
    elif estimator is None:
        estimator = one_step(context.optimizer, opt_state=state.opt_state)
    return outer_level.OuterLevel(options.outer_optimizer, estimator)


def _problem(options, context, model_state, key) -> BilevelProblem:
    def inner(params, meta, batch):
        made = options.label(meta, batch)
        return generation.joint_loss(context, params, model_state, batch, key, made, options.auxiliary_weight).total

    def outer(params, meta, batch):
        out = evaluation.evaluate(context.model, params, model_state, batch, key)
        mask = evaluation.mask_of(out, context.model.primary)
        loss = evaluation.mean_losses(out, (context.model.primary,))[0]
        traced = checks.is_traced(options.entropy_weight, options.sharpness_weight)
        if not traced and options.entropy_weight == options.sharpness_weight == 0:
            return loss
        made = options.label(meta, batch).labels
        spread = soft_labels.negative_entropy(soft_labels.mean_label(made, mask), context.reduce)
        return loss + options.entropy_weight * spread + options.sharpness_weight * soft_labels.mean_entropy(made, mask)

    return BilevelProblem(inner=inner, outer=outer, reduce=outer_level.reduction(context))
