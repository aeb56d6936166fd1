"""Weights as the forward pass sees them: masked, with a gradient where they are not.

Pure functions of a weight, applied to it inside the loss. The parameter stays dense;
what the product sees is sparse, or nearly, and the gradient that comes back is not that
of the masking. A scalar that is annealed meanwhile is a traced argument, without a
gradient of its own, so that its change never recompiles; the optimizer's state holds it
(`transforms.anneal`) and a checkpoint of that state resumes it::

    tx = optax.chain(optax.adamw(3e-4), anneal(partial(cosine_sigmoid, end=10_000)))
    loss = lambda p, alpha: f(autosparse(p["kernel"], p["threshold"], alpha), p["bias"])
    grads = jax.grad(loss)(params, get_annealed(opt_state))
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)

Nothing here keeps weights at zero in the parameters: that is `transforms.sparsify`,
which is not for these. NaN weights are taken as the selection takes them, below every
number, except by `autosparse`, which hands them on. Reverse mode to any order.
"""

from sparsejax.straight_through._autosparse import autosparse as autosparse
from sparsejax.straight_through._autosparse import autosparse_mask as autosparse_mask
from sparsejax.straight_through._autosparse import autosparse_topk as autosparse_topk
from sparsejax.straight_through._bdwp import bdwp_matmul as bdwp_matmul
from sparsejax.straight_through._leaky import leaky_mask as leaky_mask
from sparsejax.straight_through._nm import geometric_sequence as geometric_sequence
from sparsejax.straight_through._nm import mask_decay as mask_decay
from sparsejax.straight_through._nm import pruned_part as pruned_part
from sparsejax.straight_through._nm import sr_ste as sr_ste
from sparsejax.straight_through._nm import stepwise_sequence as stepwise_sequence
from sparsejax.straight_through._nm import structure_decay as structure_decay
from sparsejax.straight_through._soft_topk import soft_topk as soft_topk

__all__ = (
    "autosparse",
    "autosparse_mask",
    "autosparse_topk",
    "bdwp_matmul",
    "geometric_sequence",
    "leaky_mask",
    "mask_decay",
    "pruned_part",
    "soft_topk",
    "sr_ste",
    "stepwise_sequence",
    "structure_decay",
)
