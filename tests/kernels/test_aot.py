"""The kernels compile for GPUs that are not here. In processes of its own: this one has Triton's interpreter."""

import json
import os
import re
import subprocess
import sys

import pytest

from kernels.aot.build import ARCHITECTURES
from kernels.triton_backend import configurations


def run(*arguments, timeout=280, **environment):
    """(exit status, what was printed)."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", configurations.VARIABLE)}
    done = subprocess.run([sys.executable, "-m", "kernels.aot", *arguments], env=clean | environment, text=True,
                          capture_output=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("arguments, least", [
    pytest.param(["--quick"], 45, id="quick"),
    pytest.param([], 150, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
])
def test_every_kernel_that_ships_compiles_well(arguments, least):
    status, printed = run(*arguments, timeout=3500)
    assert status == 0, printed
    for architecture in ARCHITECTURES:
        rows = [line for line in printed.splitlines() if line.startswith(architecture)]
        assert len(rows) >= least and all(line.endswith("ok") for line in rows)
    assert re.search(r"(\d+) of \1 kernels are as they should be", printed)


def test_bad_configurations_are_found(tmp_path):
    good = dict(product="up", kind="half", block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3, tma=True,
                max_rows=1)
    bad = {
        "128x256x64": (dict(block_n=256), r"\d+ bytes spilled: want none"),
        "128x64x64": (dict(block_n=64, num_stages=10), "bytes of shared memory: want at most"),
        "16x128x64": (dict(block_m=16), "no wgmma"),
        "128x100x64": (dict(block_n=100), "power of 2"),
    }
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"entries": [good | change for change, _ in bad.values()]}))
    status, printed = run("--architecture", "sm_90", "--only", "up", **{configurations.VARIABLE: str(path)})
    assert status == 1 and "0 of 8 kernels" in printed
    for tile, (_, fault) in bad.items():
        assert re.search(rf"^sm_90 up bf16 {tile} .*: .*{fault}", printed, re.MULTILINE), tile


@pytest.mark.parametrize("arguments, environment, message", [
    pytest.param(["--only", "nothing"], {}, "no kernel has 'nothing' in its name", id="no-such-kernel"),
    pytest.param(["--architecture", "sm_70"], {}, "invalid choice: 'sm_70'", id="no-such-target"),
    pytest.param([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set, and then nothing compiles", id="interpreter"),
])
def test_wrong_calls_are_refused(arguments, environment, message):
    status, printed = run(*arguments, **environment)
    assert status == 2 and message in printed
