"""The kernels compile for GPUs that are not here. In processes of its own: this one has Triton's interpreter."""

import json
import os
import re
import subprocess
import sys

import pytest

from kernels import aot
from kernels.triton_backend import configurations


def run(*arguments, **environment):
    """(exit status, what was printed)."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", configurations.VARIABLE)}
    done = subprocess.run([sys.executable, "-m", "kernels.aot", *arguments], env=clean | environment, text=True,
                          capture_output=True, timeout=280)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_every_kernel_that_ships_compiles_well(architecture):
    status, printed = run("--architecture", architecture)
    assert status == 0, printed
    rows = [line for line in printed.splitlines() if line.startswith(architecture)]
    assert len(rows) >= 30 and all(line.endswith("ok") for line in rows)
    assert re.search(r"(\d+) of \1 kernels are as they should be", printed)


@pytest.mark.parametrize("change, fault", [
    pytest.param(dict(block_n=256), r"\d+ bytes spilled: want none", id="spills"),
    pytest.param(dict(block_n=128, block_k=256, num_stages=3), "bytes of shared memory: want at most", id="too-large"),
    pytest.param(dict(block_m=16), "no wgmma", id="too-low-for-wgmma"),
    pytest.param(dict(block_n=100), "power of 2", id="does-not-compile"),
])
def test_a_bad_configuration_is_found(change, fault, tmp_path):
    entry = dict(product="up", kind="half", block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3, tma=True,
                 max_rows=1)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"entries": [entry | change]}))
    status, printed = run("--architecture", "sm_90", "--only", "up", **{configurations.VARIABLE: str(path)})
    assert status == 1 and re.search(fault, printed) and "0 of 1 kernels" in printed


@pytest.mark.parametrize("arguments, environment, message", [
    pytest.param(["--only", "nothing"], {}, "no kernel has 'nothing' in its name", id="no-such-kernel"),
    pytest.param(["--architecture", "sm_70"], {}, "invalid choice: 'sm_70'", id="no-such-target"),
    pytest.param([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set, and then nothing compiles", id="interpreter"),
])
def test_wrong_calls_are_refused(arguments, environment, message):
    status, printed = run(*arguments, **environment)
    assert status == 2 and message in printed
