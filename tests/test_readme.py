"""The README's examples run, and print what their comments say."""

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.slow
def test_examples_print_what_they_say():
    """One after the other, as a reader would paste them."""
    wanted = re.findall(r"print\(.*\)  # (.*)", "".join(BLOCKS))
    assert len(BLOCKS) == 6 and len(wanted) >= 6
    printed = io.StringIO()
    # A reader's session has JAX's standard promotion, which optax needs.
    with contextlib.redirect_stdout(printed), jax.numpy_dtype_promotion("standard"):
        scope: dict = {}
        for block in BLOCKS:
            exec(block, scope)
    assert printed.getvalue().splitlines() == wanted


def test_commands_are_the_makefiles():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"    make {target}" in TEXT
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
