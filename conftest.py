"""Strict promotion, eight CPU devices, quick compilation, names for the doctests."""

import gc
import importlib.metadata
import itertools
import os
import threading

# Before jax starts its backend: eight devices, so that one process tests sharding; and
# machine code that is built quickly, since every test compiles and hardly runs. Not for
# tests/compile, whose subject is what the chips' compilers make, nor on a GPU.
_FLAGS = ["--xla_force_host_platform_device_count=8"]
# Implementations that this machine's chip runs: tests have them compiled, where they
# would have them interpreted. benchmarks/device.py sets it.
_COMPILED = os.environ.get("SPARSEJAX_COMPILED", "").split()
_ON_GPU = _COMPILED or os.path.exists("/dev/nvidiactl")
if not os.environ.get("SPARSEJAX_COMPILE") and not _ON_GPU:
    _FLAGS.append("--xla_backend_optimization_level=0")
    # Fusions by way of MLIR take twice as long to build. Later versions have no other.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
for _flag in _FLAGS:
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

# Two threads of tests fill two cores; BLAS's own, which wait busily, are in their way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Thousands of small programs are lowered: without the source lines of each operation,
# and without looking for garbage all the time, that takes a tenth less.
jax.config.update("jax_traceback_in_locations_limit", 0)
jax.config.update("jax_enable_compilation_cache", False)  # or each program is hashed
gc.set_threshold(50_000, 20, 50)

if importlib.metadata.version("jax").startswith("0.10."):
    # Each program is lowered in an MLIR context of its own, and to make one costs a
    # tenth of the tests' time. Later versions use one ten times over.
    from jax._src.interpreters import mlir

    _new_context = mlir.make_ir_context
    _context = threading.local()

    def _make_ir_context():
        if getattr(_context, "uses", 100) >= 100:
            _context.value, _context.uses = _new_context(), 0
        _context.uses += 1
        return _context.value

    mlir.make_ir_context = _make_ir_context

if _COMPILED:  # not otherwise: the package must not be loaded before its types are
    import sparsejax.testing

    _interpreted = sparsejax.testing.interpreted
    sparsejax.testing.interpreted = lambda name: (
        name if name in _COMPILED else _interpreted(name)
    )


_tests = itertools.count(1)


def pytest_runtest_teardown():
    """Lets go of what was compiled, now and then.

    A process holds gigabytes of it otherwise. A test that counts traces does so within
    itself, by a list of its own: jax's cache of calls is one for all and may be full.
    """
    if next(_tests) % 500 == 0:
        jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(autouse=True)
def names_for_doctests(doctest_namespace):
    import jax.numpy as jnp
    import optax

    import sparsejax

    doctest_namespace.update(jax=jax, jnp=jnp, optax=optax, sparsejax=sparsejax)
