"""Kinds of variables, by which a model's state is split."""

from flax import nnx


class Mask(nnx.Variable):
    """Boolean mask of a kernel, True = kept."""


class Layout(nnx.Variable):
    """A ``layouts.BlockLayout``: places of a kernel's blocks."""


class GrowthProbe(nnx.Variable):
    """Zeros ``[kb, nb]``; a loss's gradient in them is the kernel's growth scores."""
