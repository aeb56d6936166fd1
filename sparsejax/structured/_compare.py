"""What a projection is worth beside low rank at as many parameters."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from sparsejax.structured._composite import with_rank
from sparsejax.structured._pattern import Chain
from sparsejax.structured._project import project, scaled


@dataclasses.dataclass(frozen=True)
class ProjectionReport:
    """A projection beside low rank at equal parameters; ``print`` says which is nearer.

    Attributes:
      relative_error: Of the projection, in the Frobenius norm.
      params: Of the chain, but for those that only padding meets.
      low_rank_error: Of the best matrix of rank ``low_rank``.
      low_rank: The highest rank of no more parameters.
      low_rank_params: Of its two factors.
    """

    relative_error: float
    params: int
    low_rank_error: float
    low_rank: int
    low_rank_params: int

    @property
    def better(self) -> bool:
        """Whether the projection is nearer than low rank."""
        return self.relative_error < self.low_rank_error

    def __str__(self) -> str:
        verdict = "nearer than" if self.better else "no better than"
        return (
            f"error {self.relative_error:.4g} with {self.params} parameters: {verdict} "
            f"low rank, {self.low_rank_error:.4g} with {self.low_rank_params} (rank "
            f"{self.low_rank})"
        )


def compare_low_rank(
    w: Shaped[Array, "..."],
    chain: Chain,
    *,
    rank: int | Sequence[int] | None = None,
) -> ProjectionReport:
    """Compares ``project`` with a truncated singular value decomposition.

    Structure is no nearer than low rank to every matrix: to one without any, such as a
    Gaussian, a Monarch matrix is as near, a long chain may be less so. Costs the
    singular values of all of w besides the projection. Not for use inside jit.

    Args:
      w: As for ``project``, a single matrix.
      chain: As for ``project``.
      rank: As for ``project``.

    Returns:
      Both errors, and which is lower.

    Raises:
      ValueError: As ``project``.

    Example:
      >>> from sparsejax import structured
      >>> chain = structured.butterfly(64)
      >>> noise = jax.random.normal(jax.random.key(0), (64, 64))
      >>> w = structured.to_dense(structured.init_chain(jax.random.key(1), chain))
      >>> print(structured.compare_low_rank(w + 0.01 * noise, chain))
      error 0.0... with 768 parameters: nearer than low rank, 0... with 768 (rank 6)
    """
    chain = with_rank(chain, rank)
    k, n = chain.shape
    if w.ndim != 2:
        raise ValueError(f"w: got shape {w.shape}, needed {chain.shape}, one matrix")
    _, error = project(w, chain)
    low = min(chain.params // (k + n), k, n)
    values = jnp.linalg.svd(scaled(w)[0], compute_uv=False)
    norm = jnp.linalg.norm(values)
    lost = jnp.linalg.norm(values[low:]) / jnp.where(norm == 0, 1, norm)
    return ProjectionReport(float(error), chain.params, float(lost), low, low * (k + n))
