"""How the methods of ``compare_methods.py`` train, made of sparsejax's functions.

Each is a function of a case: what is trained and how sparse (``_compare.Case``).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import _compare
import jax
import jax.numpy as jnp
import optax
from _compare import Case, fit

from sparsejax import averaging, masks, pruning, schedules, straight_through, transforms

MEMBERS = 5  # of a soup


class Method(NamedTuple):
    """An entry of METHODS.

    Attributes:
      family: Panel of the picture.
      run: Trains: `case -> params`, or a list of several, over which scores are
        averaged. It is traced, once per sparsity.
      kind: At which sparsities it runs: "any", "pattern" (N:M) or "dense".
      finish: What else is done to the list, with numbers in it.
    """

    family: str
    run: Callable[[Case], Any]
    kind: str = "any"
    finish: Callable[[list], list] = lambda found: found


def updated(make: Callable[..., transforms.Updater], **keywords: Any):
    """Trains under `sparsify`, masks changing every so often up to 3/4 of training."""

    def run(case: Case):
        settings = case.settings
        times = {"begin": settings.every, "end": settings.end, "every": settings.every}
        updater = make(
            sparsity=case.sparsity, key=case.mask_key, **{**times, **keywords}
        )
        return fit(case, updater)

    return run


def chosen(choose: Callable[[Case, Any], Any]):
    """Trains under the masks that `choose(case, params)` makes of initial params."""

    def run(case: Case):
        params = case.task.init(case.init_key)
        return fit(case, transforms.fixed(choose(case, params)), params=params)

    return run


def snip(case: Case, params: Any):
    """SNIP on one batch."""
    batch = case.batch(case.mask_key)
    return pruning.snip(case.loss, params, batch, sparsity=case.sparsity)


def grasp(case: Case, params: Any):
    """GraSP on one batch, logits divided by 200 as in the authors' code."""

    def loss(params, batch):
        inputs, targets = batch
        logits = case.task.apply(params, inputs) / 200
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return loss.mean()

    batch = case.batch(case.mask_key)
    return pruning.grasp(loss, params, batch, sparsity=case.sparsity)


def synflow(case: Case, params: Any):
    """SynFlow through the perceptron; of text, behind the embedding."""
    shape = (1, params["layer_0"]["kernel"].shape[0])
    apply = _compare.apply_mlp
    return pruning.synflow(apply, params, shape, sparsity=case.sparsity)


def autosparse(case: Case):
    """Each kernel's largest weights; the gradient of the others is annealed."""

    def view(params, alpha):
        shapes = {
            name: leaf.shape
            for name, leaf in masks.named_leaves(params).items()
            if name.endswith("kernel")
        }
        densities = masks.erdos_renyi(shapes, 1 - case.sparsity)

        def see(path, leaf):
            if not _compare.is_kernel(path):
                return leaf
            density = densities[masks.path_name(path)]
            count = masks.exact_count(density, leaf.size)
            return straight_through.autosparse_topk(leaf, count, alpha)

        return jax.tree_util.tree_map_with_path(see, params)

    steps = case.settings.steps
    anneal = functools.partial(
        schedules.cosine_sigmoid, end=steps, reset=case.settings.end
    )
    return fit(case, view=view, annealing=anneal)


def seen(
    see: Callable[[Case, Any, Any], Any],
    annealing: Callable[[Case], Callable[[Any], Any]] = lambda case: lambda step: 0.0,
):
    """Trains dense kernels that the model is given as `see(case, kernel, annealed)`."""

    def run(case: Case):
        view = lambda params, value: _compare.on_kernels(
            lambda kernel: see(case, kernel, value), params
        )
        return fit(case, view=view, annealing=annealing(case))

    return run


def sr_ste(decay: float):
    """SR-STE with its decay beside AdamW, as AdamW has weight decay."""

    def run(case: Case):
        n, m = case.pattern
        see = lambda w: straight_through.sr_ste(w, n=n, m=m, decay=None)
        pull = lambda w: decay * straight_through.pruned_part(w, n=n, m=m)
        return fit(
            case,
            view=lambda params, _: _compare.on_kernels(see, params),
            beside=lambda params: _compare.on_kernels(pull, params, jnp.zeros_like),
        )

    return run


def mask_decay(case: Case, kernel: Any, b: Any, backward: str = "straight_through"):
    """What N:M prunes fades out."""
    n, m = case.pattern
    return straight_through.mask_decay(kernel, b, n=n, m=m, backward=backward)


def structure_decay(case: Case, kernel: Any, stage: Any):
    """From M-1 of M by halves to N of M."""
    sequence = straight_through.stepwise_sequence(*case.pattern)
    return straight_through.structure_decay(kernel, stage, sequence=sequence)


def fading(case: Case):
    """From 1 to 0 in the first half of training."""
    return functools.partial(schedules.linear, end=case.settings.steps // 2)


def fading_fast(case: Case):
    """The same in ten e-folds per training, cut off where masks come to rest."""
    return functools.partial(
        schedules.exponential, rate=10 / case.settings.steps, end=case.settings.end
    )


def stages(case: Case):
    """Equal shares of the first quarter of training; then the last stage."""
    count = len(straight_through.stepwise_sequence(*case.pattern))
    end = max(case.settings.steps // 4, count)
    return functools.partial(schedules.stage, stages=count, end=end)


def retrained(case: Case):
    """Prunes once, then trains several members on, each with its own order of data."""
    settings = case.settings
    every, end = settings.every, settings.end
    updater = transforms.gradual_magnitude(
        sparsity=case.sparsity, begin=every, end=end, every=every, distribution="global"
    )
    pruned = fit(case, updater)
    train = lambda member: fit(
        case,
        transforms.fixed(kept(pruned)),
        params=pruned,
        steps=max(settings.steps // 2, 1),
        learning_rate=settings.soup_rate,
        member=member,
    )
    members = jax.vmap(train)(1 + jnp.arange(MEMBERS))
    unstack = lambda i: jax.tree.map(lambda x: x[i], members)
    return [unstack(i) for i in range(MEMBERS)]


def kept(params: Any):
    """Masks of the kernels, by what is not zero; no other leaves."""
    return {
        name: {"kernel": layer["kernel"] != 0}
        for name, layer in params.items()
        if name.startswith("layer")
    }


def soup(members: list):
    """The members' average, which has their mask."""
    return [averaging.sparse_soup(members, [kept(member) for member in members])]
