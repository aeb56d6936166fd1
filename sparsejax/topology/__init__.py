"""Moving stored blocks during training: values, layout and optimizer state together."""

from sparsejax.topology._rigl import rigl_blocks as rigl_blocks
from sparsejax.topology._scores import block_scores as block_scores
from sparsejax.topology._scores import growth_probe as growth_probe
from sparsejax.topology._step import step as step

__all__ = ["block_scores", "growth_probe", "rigl_blocks", "step"]
