"""sparsejax: sparse models in JAX, from masks to kernels.

``layouts`` and ``masks`` say what is kept, ``ops`` multiplies, ``schedules`` and
``transforms`` (optax) and ``topology`` change it during training, ``layers`` with
``nnx`` and ``linen`` (Flax) are the modules, ``checkpoint`` (orbax) saves a run.
"""

import importlib
import importlib.metadata
from typing import Any

from sparsejax import layers as layers
from sparsejax import layouts as layouts
from sparsejax import masks as masks
from sparsejax import ops as ops
from sparsejax import schedules as schedules
from sparsejax import topology as topology
from sparsejax import transforms as transforms
from sparsejax._dispatch import explain as explain

__version__ = importlib.metadata.version("sparsejax")

# Flax and orbax are loaded by those who use them.
_ON_DEMAND = ("checkpoint", "linen", "nnx")


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return importlib.import_module(f"sparsejax.{name}")
    raise AttributeError(f"module 'sparsejax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ON_DEMAND])
