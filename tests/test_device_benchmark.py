"""Parts of benchmarks/device.py that need no GPU."""

import dataclasses
import math
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_matmul import _spec

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import device  # noqa: E402
import device_experts  # noqa: E402
import device_worker  # noqa: E402


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("op", ["dsd", "dsd_transposed", "sdd"])
def test_candidates_fit_the_chip(op, block):
    args = (op, 4096, 4096, 4096, (block, block), 102, "bfloat16", "bfloat16")
    problem = _spec.Problem(*args)
    default, *others = device_worker.candidates(problem)
    assert default == _spec.config_mosaic_gpu(problem, "h200")
    assert default not in others and len(set(others)) == len(others) >= 3
    for config in others:
        rows = config.tile_m // config.warpgroups
        # wgmma has 64 rows; a warpgroup holds 192 x 128 sums; 227 KiB for the stages
        # and, beside them, for what two warpgroups write.
        assert rows % 64 == 0 and rows * block <= 192 * 128
        stage = 2 * config.tile_k * (config.tile_m + block)
        out = config.tile_m * math.gcd(2 * block, 128) * (config.warpgroups - 1)
        assert 2 <= config.stages <= (227 * 1024 - 1024 - out) // stage
        assert block % config.tile_k == 0 or op == "sdd"
        assert config.warpgroups == 2 or config.cluster == 1


def test_sizes_of_groups():
    np.testing.assert_array_equal(device_experts.group_sizes("even", 4, 10), [10] * 4)
    sizes = device_experts.group_sizes("uneven", 8, 1024)
    assert sizes.sum() == 8192 and sizes.min() >= 0 and len(set(sizes)) == 8


@pytest.mark.parametrize("op", device_experts.OPS)
def test_what_the_experts_kernels_are_checked_against(op):
    """Twice XLA's own error is allowed, and one row of another expert's is more."""
    operands = device_experts.Operands((3, 16, 64, 128), "uneven", op)
    right = operands.by_group(jnp.bfloat16)
    error, allowed = operands.error(right)
    assert 0 < error < allowed
    error, allowed = operands.error(jnp.roll(right, 1, axis=0))
    assert error > 10 * allowed
    # The dense product of equal work: one matrix, of which every row's has the shape.
    fn, args = operands.dense()
    assert fn(*args).shape == right.shape[-2:]


def test_candidates_of_the_experts_kernels_need_no_more_memory():
    for op in device_experts.OPS:
        default, *others = device_experts.candidates(
            device_experts.Operands((2, 256, 64, 128), "even", op).config()
        )
        assert default not in others and len(set(others)) == len(others) >= 4
        for config in others:
            for field in dataclasses.fields(config):
                if field.name != "group":
                    ours, most = (getattr(c, field.name) for c in (config, default))
                    assert ours <= most


def test_what_killed_a_process_is_not_tried_again():
    past = [
        {"busy": "a"},
        {"trying": 1, "of": "a"},
        {"of": "a", "result": "ok"},
        {"trying": 2, "of": "a"},
        {"died": -11},
        {"died": 3},
        {"busy": "b"},
        {"died": None},
    ]
    assert device_worker.last_words(past) == [{"trying": 2, "of": "a"}, {"busy": "b"}]


def test_a_part_that_raises_is_recorded(capfd):
    record = {}
    device.guarded(record, "tests", lambda: 1 / 0)
    assert not record["tests"]["ok"] and "ZeroDivisionError" in record["tests"]["error"]
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_counts_of_a_test_run(tmp_path):
    xml = tmp_path / "run.xml"
    assert device.counts(xml) == {}
    xml.write_text(
        "<testsuites><testsuite><testcase classname='t' name='good'/>"
        "<testcase classname='t' name='bad'><failure/></testcase>"
        "<testcase classname='t' name='away'><skipped/></testcase>"
        "</testsuite></testsuites>"
    )
    assert device.counts(xml) == {"tests": 3, "skipped": 1, "failed": ["t::bad"]}
