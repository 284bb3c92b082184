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
from typing import Any

import jax
import optax

from auxjax._internal import checks
from auxjax.formulas import soft_labels
from auxjax.hypergrad import Amortised, BilevelProblem, Estimator, finite_difference, one_step, unrolled
from auxjax.interface import Method
from auxjax.methods._registry import register
from auxjax.methods.shared import evaluation, generation, outer_level


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
    hypergradient: Estimator | Amortised | None = None,
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
    return make_method("maxl", partial(_labelling, labels, sub_classes), **locals())


def _labelling(labels, sub_classes, outputs, batch) -> generation.Labelling:
    """The labels from the generator's outputs."""
    if not hasattr(outputs, "ndim"):
        raise TypeError(
            f"maxl(generator=): apply returned {type(outputs).__name__}; expected the logits [n, classes x "
            "sub_classes]. Generators that give weights as well are for method 'wamal'."
        )
    return generation.Labelling(soft_labels.masked_softmax(outputs, labels(batch), sub_classes))


def make_method(
    name: str,
    labelling: Callable[[Any, Any], generation.Labelling],
    *,
    generator,
    labels,
    sub_classes,
    auxiliary_weight,
    entropy_weight,
    sharpness_weight,
    outer_optimizer,
    form,
    look_ahead_steps,
    epsilon,
    hypergradient,
    reuse_batch,
) -> Method:
    """MAXL and WAMAL, which differ in how they read the generator's outputs: `labelling(outputs, batch)`."""
    generation.check_generator(name, generator)
    numbers = {"entropy_weight": entropy_weight, "sharpness_weight": sharpness_weight}
    checks.number(name, least=0, auxiliary_weight=auxiliary_weight, **numbers)
    checks.number(name, above=0, epsilon=epsilon)
    checks.function(name, "a function of the batch", labels=labels)
    checks.one_of(name, ("exact", "finite_difference"), form=form)
    checks.count(name, 1, sub_classes=sub_classes, look_ahead_steps=look_ahead_steps)
    if form == "finite_difference" and look_ahead_steps > 1:
        raise ValueError(f"{name}(form='finite_difference') looks one step ahead; got {look_ahead_steps=}.")
    if hypergradient is not None and (form != "exact" or look_ahead_steps > 1):
        raise ValueError(
            f"{name}(hypergradient=) is used instead of a look-ahead; leave form and look_ahead_steps out."
        )
    checks.optimizer(name, outer_optimizer=outer_optimizer)
    optimizer = optax.adam(1e-3) if outer_optimizer is None else outer_optimizer
    level = outer_level.make_outer_level(name, optimizer, hypergradient, False)

    def level_of(context, state) -> outer_level.OuterLevel:
        """A look-ahead starts from the inner optimiser's real state."""
        if hypergradient is not None:
            return level
        optimizer, opt_state = outer_level.look_ahead_optimizer(name, context, state)
        if form == "finite_difference":
            ahead = finite_difference(optimizer, epsilon=epsilon, opt_state=opt_state)
        elif look_ahead_steps > 1:
            ahead = unrolled(look_ahead_steps, optimizer, opt_state=opt_state)
        else:
            ahead = one_step(optimizer, opt_state=opt_state)
        return level._replace(estimator=ahead)

    def label(meta, batch) -> generation.Labelling:
        return labelling(generator.apply(meta, batch), batch)

    def problem_of(context, model_state, key) -> BilevelProblem:
        def inner(params, meta, batch):
            made = label(meta, batch)
            return generation.joint_loss(context, params, model_state, batch, key, made, auxiliary_weight).total

        def outer(params, meta, batch):
            out = evaluation.evaluate(context.model, params, model_state, batch, key)
            mask = evaluation.mask_of(out, context.model.primary)
            loss = evaluation.mean_losses(out, (context.model.primary,))[0]
            if not checks.is_traced(entropy_weight, sharpness_weight) and entropy_weight == sharpness_weight == 0:
                return loss
            made = label(meta, batch).labels
            spread = soft_labels.negative_entropy(soft_labels.mean_label(made, mask), context.reduce)
            return loss + entropy_weight * spread + sharpness_weight * soft_labels.mean_entropy(made, mask)

        return BilevelProblem(inner=inner, outer=outer, **outer_level.of_run(context))

    def init(context, state, batch, key):
        generation.primary_labels(name, labels, batch)
        meta = generator.init(key, batch)
        classes = jax.eval_shape(label, meta, batch).labels.shape[-1]
        generation.check_model(name, context, state, batch, key, classes)
        problem = problem_of(context, state.model_state, key)
        return outer_level.init_outer(level_of(context, state), problem, state.params, meta, batch, key)

    def inner(context, state, batch, key):
        made = label(state.method.meta, batch)
        return generation.descend_on(context, state, batch, key, made, auxiliary_weight)

    def outer(context, state, inner_batch, outer_batch, key):
        outer_batch = inner_batch if reuse_batch else outer_batch
        problem = problem_of(context, state.model_state, key)
        point = (level_of(context, state), problem, state, inner_batch, outer_batch, key)
        return outer_level.outer_step(*point, share=context.share)

    def weights(context, state, batch, key):
        made = label(state.method.meta, batch)
        return generation.reported_weights(context, state, batch, key, made, auxiliary_weight)

    how = {"outer_data": not reuse_batch, "all_params": hypergradient is not None}
    return Method(init, inner, outer, weights, shared=outer_level.shared, **how)
