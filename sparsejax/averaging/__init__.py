"""Averages of sparse models that stay sparse: soups, and particles along training."""

from sparsejax.averaging._particles import RunningAverage as RunningAverage
from sparsejax.averaging._particles import average_particles as average_particles
from sparsejax.averaging._particles import averaged_params as averaged_params
from sparsejax.averaging._particles import init_average as init_average
from sparsejax.averaging._particles import swamp as swamp
from sparsejax.averaging._particles import update_average as update_average
from sparsejax.averaging._soup import greedy_soup as greedy_soup
from sparsejax.averaging._soup import sparse_soup as sparse_soup

__all__ = (
    "RunningAverage",
    "average_particles",
    "averaged_params",
    "greedy_soup",
    "init_average",
    "sparse_soup",
    "swamp",
    "update_average",
)
