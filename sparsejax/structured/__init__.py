"""Structured matrices: patterns of factors, their projections and exact constructions.

A structured weight is a tuple of factors, each ``[a, d, c, b]`` (``Pattern``), applied
from first to last; ``Chain`` says which patterns follow each other, and between which
true sizes. Functions that name a family return its ``Chain``; ``init_chain`` draws its
factors, exact constructions return theirs. ``sparsejax.ops`` multiplies by them.

What is no chain is a small frozen dataclass with ``shape``, ``params``,
``flops(rows)``, ``init(key, dtype)``, ``to_dense(params)`` and ``apply(params, x)``, a
plain product: ``LowRank``, ``Kronecker`` (also by ``phm``), ``Pixelfly``, ``DenseNM``.
"""

from sparsejax.structured._compare import ProjectionReport as ProjectionReport
from sparsejax.structured._compare import compare_low_rank as compare_low_rank
from sparsejax.structured._dense_nm import DenseNM as DenseNM
from sparsejax.structured._families import block_diagonal as block_diagonal
from sparsejax.structured._families import butterfly as butterfly
from sparsejax.structured._families import monarch as monarch
from sparsejax.structured._init import init_chain as init_chain
from sparsejax.structured._kronecker import Kronecker as Kronecker
from sparsejax.structured._kronecker import phm as phm
from sparsejax.structured._low_rank import LowRank as LowRank
from sparsejax.structured._pattern import Chain as Chain
from sparsejax.structured._pattern import Pattern as Pattern
from sparsejax.structured._pattern import tensor_train as tensor_train
from sparsejax.structured._pattern import to_dense as to_dense
from sparsejax.structured._pixelfly import Pixelfly as Pixelfly
from sparsejax.structured._pixelfly import flat_butterfly as flat_butterfly
from sparsejax.structured._project import project as project
from sparsejax.structured._project_circulant import (
    project_circulant as project_circulant,
)
from sparsejax.structured._transforms import circulant as circulant
from sparsejax.structured._transforms import convolution as convolution
from sparsejax.structured._transforms import dct as dct
from sparsejax.structured._transforms import dft as dft
from sparsejax.structured._transforms import hadamard as hadamard
from sparsejax.structured._transforms import toeplitz as toeplitz

__all__ = [
    "Chain",
    "DenseNM",
    "Kronecker",
    "LowRank",
    "Pattern",
    "Pixelfly",
    "ProjectionReport",
    "block_diagonal",
    "butterfly",
    "circulant",
    "compare_low_rank",
    "convolution",
    "dct",
    "dft",
    "flat_butterfly",
    "hadamard",
    "init_chain",
    "monarch",
    "phm",
    "project",
    "project_circulant",
    "tensor_train",
    "to_dense",
    "toeplitz",
]
