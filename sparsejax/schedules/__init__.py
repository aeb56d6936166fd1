"""Step -> number: when masks change, how sparse they are, what is annealed."""

from sparsejax.schedules._annealing import cosine as cosine
from sparsejax.schedules._annealing import cosine_sigmoid as cosine_sigmoid
from sparsejax.schedules._annealing import exponential as exponential
from sparsejax.schedules._annealing import linear as linear
from sparsejax.schedules._annealing import stage as stage
from sparsejax.schedules._drop import cosine_drop_fraction as cosine_drop_fraction
from sparsejax.schedules._sparsity import cubic_sparsity as cubic_sparsity
from sparsejax.schedules._times import is_update as is_update
from sparsejax.schedules._times import next_update as next_update
from sparsejax.schedules._times import update_steps as update_steps

__all__ = (
    "cosine",
    "cosine_drop_fraction",
    "cosine_sigmoid",
    "cubic_sparsity",
    "exponential",
    "is_update",
    "linear",
    "next_update",
    "stage",
    "update_steps",
)
