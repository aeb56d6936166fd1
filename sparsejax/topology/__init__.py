"""Moving stored blocks during training: values, layout and optimizer state together."""

from sparsejax.topology._scores import block_scores as block_scores
from sparsejax.topology._scores import growth_probe as growth_probe

__all__ = ["block_scores", "growth_probe"]
