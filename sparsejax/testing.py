"""For tests and benchmarks: the tolerance rule, and kernels in Pallas' interpreter."""

from typing import Any

import numpy as np

from sparsejax._dispatch import Interpreted


def interpreted(name: str) -> Any:
    """Stands for the implementation ``name``, run by Pallas' interpreter on a CPU.

    Pass it as ``implementation=``. "mosaic_gpu" needs jax >= 0.11.
    """
    return Interpreted(name)


def assert_close(out: Any, reference: Any, low: Any, *, eps: float = 1e-6) -> None:
    """Asserts that ``out`` is at most twice as wrong as a plain low-precision result.

    ``max|out - reference| <= 2 max|low - reference| + eps max|reference|``.

    Args:
      out: What is tested.
      reference: The same in float64.
      low: The same formula by XLA in the precision of ``out``.
      eps: Slack where ``low`` happens to be exact, relative to the largest entry.
    """
    out, low = np.asarray(out, np.float64), np.asarray(low, np.float64)
    reference = np.asarray(reference, np.float64)
    assert out.shape == reference.shape == low.shape, (
        out.shape,
        reference.shape,
        low.shape,
    )
    if not out.size:
        return
    assert np.isfinite(out).all(), "not finite"
    error = np.abs(out - reference).max()
    bound = 2 * np.abs(low - reference).max() + eps * max(np.abs(reference).max(), 1.0)
    assert error <= bound, f"error {error:.3e}, allowed {bound:.3e}"
