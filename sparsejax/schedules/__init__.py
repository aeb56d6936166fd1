"""Step -> number: when masks change, how sparse they are, how much they exchange."""

from sparsejax.schedules._drop import cosine_drop_fraction as cosine_drop_fraction
from sparsejax.schedules._sparsity import cubic_sparsity as cubic_sparsity
from sparsejax.schedules._times import is_update as is_update
from sparsejax.schedules._times import next_update as next_update
from sparsejax.schedules._times import update_steps as update_steps

__all__ = (
    "cosine_drop_fraction",
    "cubic_sparsity",
    "is_update",
    "next_update",
    "update_steps",
)
