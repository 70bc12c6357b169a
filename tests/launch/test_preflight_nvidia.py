"""What nvidia-smi says, as it says it (written by hand after its formats), and what is made of it."""

import subprocess
from dataclasses import replace

import pytest

from launch.preflight import nvidia
from launch.preflight.nvidia import Seen

GPUS = """\
0, NVIDIA H100 80GB HBM3, 570.124.06, Enabled, 1980, 1980, 0x0000000000000000, 0, 34, 81559, 4, Disabled
1, NVIDIA H100 80GB HBM3, 570.124.06, Enabled, 345, 1980, 0x0000000000000001, 0, 31, 81559, 4, Disabled
"""
CONSUMER = """\
0, NVIDIA GeForce RTX 4090, 550.54.14, Disabled, 210, 3105, 0x0000000000000001, [N/A], 41, 24564, 310, [N/A]
"""
PAGE = """\
Tue Nov 24 04:10:11 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 570.124.06             Driver Version: 570.124.06     CUDA Version: 12.8     |
|-----------------------------------------+------------------------+----------------------+
"""
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tPIX\t0-55\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tSYS\t0-55\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tSYS\t56-111\t1\t\tN/A
NIC0\tPIX\tSYS\tSYS\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
"""
THREE = nvidia.parse_gpus(GPUS + GPUS.splitlines()[0].replace("0, NVIDIA", "2, NVIDIA"))


def seen(**changes):
    """Two healthy GPUs, but for what is changed on the second."""
    first, second = nvidia.parse_gpus(GPUS)
    return Seen((first, replace(second, **changes)), (12, 8), "")


def test_gpus_are_read():
    first, second = nvidia.parse_gpus("Warning: infoROM is corrupted at gpu 0000:1B:00.0\n" + GPUS)
    assert (first.index, first.name, first.driver) == (0, "NVIDIA H100 80GB HBM3", "570.124.06")
    assert first.persistent and not first.mig and first.ecc_errors == 0 and first.memory_mib == 81559
    assert (second.clock_mhz, second.most_mhz, second.throttled, second.celsius) == (345, 1980, 1, 31)
    consumer, = nvidia.parse_gpus(CONSUMER)
    assert consumer.ecc_errors is None and not consumer.persistent and not consumer.mig


def test_the_cuda_of_the_driver_is_read():
    assert nvidia.parse_cuda(PAGE) == (12, 8)
    assert nvidia.parse_cuda(PAGE.replace("CUDA Version", "CUDA UMD Version")) == (12, 8)
    assert nvidia.parse_cuda("| CUDA Version: N/A |") is None


def test_links_are_read():
    assert nvidia.parse_topology(TOPOLOGY) == {(0, 1): "NV18", (0, 2): "NV18", (1, 2): "NV18"}
    assert nvidia.parse_topology("no such command") == {}


def test_a_healthy_machine_is_ok():
    page = Seen(THREE, (12, 8), TOPOLOGY)
    checks = nvidia.gpus, nvidia.throttling, nvidia.ecc, nvidia.persistence, nvidia.links
    assert [check(page).state for check in checks] == ["ok"] * 5
    assert nvidia.gpus(page).what == "3 x NVIDIA H100 80GB HBM3, driver 570.124.06"


@pytest.mark.parametrize(
    "check, changes, state, parts",
    [
        pytest.param(nvidia.throttling, {"throttled": 0x40, "celsius": 91}, "wrong", ["GPU 1", "heat", "91 C"],
                     id="heat"),
        pytest.param(nvidia.throttling, {"throttled": 0x88}, "wrong", ["hardware slowdown"], id="power"),
        pytest.param(nvidia.throttling, {"throttled": 0x2}, "warning", ["GPU 1", "setting"], id="clocks-held"),
        pytest.param(nvidia.throttling, {"throttled": 0x5}, "ok", ["1980 MHz"], id="idle-and-power-cap"),
        pytest.param(nvidia.ecc, {"ecc_errors": 3}, "wrong", ["GPU 1: 3 errors"], id="memory-errors"),
        pytest.param(nvidia.persistence, {"persistent": False}, "warning", ["off on GPU 1"], id="persistence"),
        pytest.param(nvidia.gpus, {"used_mib": 40000}, "warning", ["GPU 1", "held by another"], id="in-use"),
        pytest.param(nvidia.gpus, {"mig": True}, "warning", ["MIG"], id="divided"),
        pytest.param(nvidia.gpus, {"name": "NVIDIA A100"}, "warning", ["A100 and NVIDIA H100"], id="two-kinds"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_gpu_is_named(check, changes, state, parts):
    finding = check(seen(**changes))
    assert finding.state == state and all(part in finding.what for part in parts), finding


@pytest.mark.parametrize(
    "topology, state, part",
    [
        pytest.param(TOPOLOGY.replace("NV18", "PHB"), "warning", "over PCIe (PHB)", id="pcie"),
        pytest.param(TOPOLOGY.replace("GPU0\t X \tNV18", "GPU0\t X \tSYS"), "warning", "some GPUs only", id="a-bridge"),
        pytest.param("what is this", "skipped", "nothing that we can read", id="unreadable"),
    ],
)
def test_slow_links_are_named(topology, state, part):
    finding = nvidia.links(Seen(THREE, (12, 8), topology))
    assert finding.state == state and part in finding.what, finding


def test_without_gpus_it_is_a_cpu_run(monkeypatch):
    monkeypatch.setattr(nvidia.shutil, "which", lambda _: None)
    found = nvidia.look()
    assert found == Seen()
    for check in (nvidia.gpus, nvidia.throttling, nvidia.ecc, nvidia.persistence, nvidia.links):
        assert (check(found).state, check(found).what) == ("skipped", "no GPU: CPU run")


MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"


@pytest.mark.parametrize(
    "raised, part",
    [
        pytest.param(subprocess.CalledProcessError(18, "nvidia-smi", f"\n{MISMATCH}\n"), MISMATCH, id="mismatch"),
        pytest.param(subprocess.CalledProcessError(9, "nvidia-smi", ""), "exit status 9", id="no-word"),
        pytest.param(subprocess.TimeoutExpired("nvidia-smi", 15), "no answer within", id="hangs"),
    ],
)
def test_a_driver_that_does_not_answer_is_wrong(monkeypatch, raised, part):
    def fails(*_, **__):
        raise raised

    monkeypatch.setattr(nvidia.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(nvidia.subprocess, "run", fails)
    finding = nvidia.gpus(nvidia.look())
    assert finding.state == "wrong" and part in finding.what


@pytest.fixture
def infiniband(tmp_path):
    """A function: ports as /sys shows them, by (device, state, rate)."""

    def made(*ports):
        for device, state, rate in ports:
            folder = tmp_path / device / "ports/1"
            folder.mkdir(parents=True)
            (folder / "state").write_text(f"{state}\n")
            (folder / "rate").write_text(f"{rate}\n")
        return tmp_path

    return made


NDR = "400 Gb/sec (4X NDR)"
UP, DOWN = ("mlx5_0", "4: ACTIVE", NDR), ("mlx5_1", "1: DOWN", NDR)


@pytest.mark.parametrize(
    "ports, state, part",
    [
        pytest.param([], "skipped", "over TCP", id="none"),
        pytest.param([UP, ("mlx5_1", *UP[1:])], "ok", f"2 ports active, {NDR}", id="ok"),
        pytest.param([UP, DOWN], "warning", "mlx5_1/1 not active", id="one"),
        pytest.param([DOWN], "wrong", "none of 1", id="all-down"),
    ],
)
def test_infiniband_ports_are_seen(infiniband, ports, state, part):
    finding = nvidia.network(infiniband(*ports))
    assert finding.state == state and part in finding.what
