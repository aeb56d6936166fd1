"""These tests need a chip's compiler, so each runs only when asked for by name.

``SPARSEJAX_COMPILE=tpu pytest tests/compile/test_tpu.py`` where libtpu is installed,
``SPARSEJAX_COMPILE=gpu pytest tests/compile/test_gpu.py`` in one with jax's CUDA plugin
and ptxas. Without the variable nothing here is collected.
"""

import os

WANTED = os.environ.get("SPARSEJAX_COMPILE", "")
if WANTED not in ("", "tpu", "gpu"):
    raise ValueError(f"SPARSEJAX_COMPILE: got {WANTED!r}, needed tpu or gpu")

# Files named after a compiler are that compiler's; the others ask the variable.
collect_ignore = [
    name
    for kind in ("tpu", "gpu")
    if kind != WANTED
    for name in (f"test_{kind}.py", f"_{kind}.py")
]
if not WANTED:
    collect_ignore_glob = ["*.py"]
