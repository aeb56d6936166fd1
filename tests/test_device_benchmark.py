"""Parts of benchmarks/device.py that need no GPU."""

import math
import pathlib
import sys

import pytest

from pallas_kernels.block_sparse_matmul import _spec

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import device  # noqa: E402
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
