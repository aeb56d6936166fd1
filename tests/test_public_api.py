"""What is public is documented; imports run one way; nothing heavy is loaded."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pallas_kernels
import sparsejax

PACKAGES = [
    "attention",
    "averaging",
    "layers",
    "layouts",
    "linen",
    "masks",
    "nnx",
    "ops",
    "pruning",
    "routing",
    "schedules",
    "straight_through",
    "structured",
    "topology",
    "transforms",
    "upcycling",
]
SYMBOLS = [
    (package, name)
    for package in PACKAGES
    for name in importlib.import_module(f"sparsejax.{package}").__all__
]


def test_packages_are_the_folders():
    root = Path(sparsejax.__file__).parent
    folders = {p.name for p in root.iterdir() if (p / "__init__.py").exists()}
    assert folders == set(PACKAGES)
    assert SYMBOLS


@pytest.mark.parametrize("package, name", SYMBOLS)
def test_every_public_symbol_is_documented(package, name):
    symbol = getattr(importlib.import_module(f"sparsejax.{package}"), name)
    assert (symbol.__doc__ or "").strip(), f"{package}.{name} has no docstring"
    # A dataclass or NamedTuple without one gets its signature as docstring.
    assert not symbol.__doc__.startswith(f"{name}("), f"{package}.{name}"


def test_kernels_ship_beside_the_package():
    assert (
        Path(pallas_kernels.__file__).parents[1] == Path(sparsejax.__file__).parents[1]
    )


@pytest.mark.parametrize(
    "module, absent",
    [
        ("sparsejax", ["flax", "orbax", "pallas"]),
        ("sparsejax.transforms", ["flax", "orbax", "pallas"]),
        (
            "sparsejax.ops",
            ["flax", "orbax", "jax.experimental.pallas", "matmul.mosaic"],
        ),
        (
            "sparsejax.layers",
            ["flax", "orbax", "jax.experimental.pallas", "matmul.mosaic"],
        ),
    ],
)
def test_import_loads_nothing_heavy(module, absent):
    """No module has such a word in its name, in a fresh process."""
    program = (
        f"import sys, {module}\n"
        f"print([m for m in sys.modules if any(w in m for w in {absent!r})])"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_on_demand_packages():
    assert sparsejax.nnx.MaskedLinear and sparsejax.linen.MaskedLinear
    assert sparsejax.checkpoint
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        getattr(sparsejax, "nonsense")  # noqa: B009
