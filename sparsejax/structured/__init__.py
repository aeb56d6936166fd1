"""Structured matrices: patterns of factors, their projections and exact constructions.

A structured weight is a tuple of factors, each ``[a, d, c, b]`` (``Pattern``), applied
from first to last; ``Chain`` says which patterns follow each other, and between which
true sizes. Functions that name a family return its ``Chain``. ``sparsejax.ops``
multiplies by them.
"""

from sparsejax.structured._families import block_diagonal as block_diagonal
from sparsejax.structured._families import butterfly as butterfly
from sparsejax.structured._families import monarch as monarch
from sparsejax.structured._init import init_chain as init_chain
from sparsejax.structured._pattern import Chain as Chain
from sparsejax.structured._pattern import Pattern as Pattern
from sparsejax.structured._pattern import tensor_train as tensor_train
from sparsejax.structured._pattern import to_dense as to_dense

__all__ = [
    "Chain",
    "Pattern",
    "block_diagonal",
    "butterfly",
    "init_chain",
    "monarch",
    "tensor_train",
    "to_dense",
]
