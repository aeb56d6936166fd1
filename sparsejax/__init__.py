"""sparsejax: sparse models in JAX, from masks to kernels.

``layouts`` and ``masks`` say what is kept, ``routing`` which expert serves which token,
``structured`` how a matrix is made of factors, ``attention`` which query sees which
key, ``ops`` multiplies; ``pruning`` chooses once, ``schedules``, ``transforms`` (optax)
and ``topology`` during training, where ``straight_through`` changes what the forward
pass sees; ``averaging`` joins sparse models, ``upcycling`` makes experts of a dense
one; ``layers`` with ``nnx`` and ``linen`` (Flax) are the modules, ``checkpoint``
(orbax) saves a run.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsejax import attention as attention
    from sparsejax import averaging as averaging
    from sparsejax import checkpoint as checkpoint
    from sparsejax import layers as layers
    from sparsejax import layouts as layouts
    from sparsejax import linen as linen
    from sparsejax import masks as masks
    from sparsejax import nnx as nnx
    from sparsejax import ops as ops
    from sparsejax import pruning as pruning
    from sparsejax import routing as routing
    from sparsejax import schedules as schedules
    from sparsejax import straight_through as straight_through
    from sparsejax import structured as structured
    from sparsejax import topology as topology
    from sparsejax import transforms as transforms
    from sparsejax import upcycling as upcycling
    from sparsejax._dispatch import explain as explain

__version__ = importlib.metadata.version("sparsejax")

# Loaded when first used: who takes the transforms alone loads no Flax and no Pallas.
_SUBPACKAGES = (
    "attention",
    "averaging",
    "checkpoint",
    "layers",
    "layouts",
    "linen",
    "masks",
    "nnx",
    "ops",
    "pruning",
    "routing",
    "schedules",
    "straight_through",
    "structured",
    "topology",
    "transforms",
    "upcycling",
)


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"sparsejax.{name}")
    if name == "explain":
        return importlib.import_module("sparsejax._dispatch").explain
    raise AttributeError(f"module 'sparsejax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBPACKAGES, "explain"])
