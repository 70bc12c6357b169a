"""What devices can do: figures of data sheets, shares of them that kernels reach, and how much of that training keeps.

No figure here was measured by us. Each share names where it was published; SUSTAINED alone is fitted, to the runs that
benchmarks/results/published_runs.yaml marks `fitted` (python -m benchmarks.published_runs prints how well). Where a
device has no published share, that of the nearest generation stands in, and `borrowed` says so.

    peak               bfloat16, dense, of the data sheet, in TFLOP/s
    matmul             of it, in the best plain product anybody has measured: stas00/ml-engineering,
                       compute/accelerator (maximum achievable matmul FLOPS: A100 271.2, H100 794.5, MI300X 668.4
                       TFLOP/s); those of the B200, the GB200 and the L40S are guesses
    attention          of it, forward and backward, causal, heads of 128: FlashAttention-2 (arXiv:2307.08691) on Ampere,
                       FlashAttention-3 (arXiv:2407.08608) on Hopper
    grouped            of the rate of plain products: the best public layers on an H100 reach 0.49 of it with experts
                       of 256, 0.74 with those of 2048 (SonicMoE, arXiv:2512.14080, figure 14); that small products
                       move more bytes for their work is counted apart (launch.plan.step)
    memory bandwidth   of the data sheet, in GB/s; kernels reach COPY of it (H100: 3.01 of 3.35 TB/s, Dao-AILab/quack)
"""

from typing import NamedTuple


class Device(NamedTuple):
    peak_tflops: float
    matmul: float
    attention_forward: float
    attention_backward: float
    bandwidth_gb_per_s: float
    memory_gb: float
    generation: str
    borrowed: bool = False
    grouped: float = 0.75  # of the rate of plain products, in those of experts
    measured: tuple[str, ...] = ()  # of the rates, those that come from our own benchmarks on such a device

    @property
    def peak(self) -> float:
        """In flops a second."""
        return 1e12 * self.peak_tflops

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a kernel reaches."""
        return 1e9 * COPY * self.bandwidth_gb_per_s

    @property
    def product_rate(self) -> float:
        """Flops a second of large products, sustained over a step."""
        return self.peak * self.matmul * SUSTAINED[self.generation]

    def attention_rate(self, backward: bool) -> float:
        share = self.attention_backward if backward else self.attention_forward
        return self.peak * share * SUSTAINED[self.generation]


COPY = 0.9
LINK = 0.8  # of a link's data sheet that large collectives reach: all-reduce of NCCL over NVLink and over InfiniBand

# Of the best product's rate, what whole steps keep in their products: power limits, launches, shapes that do not fill
# the device. Two constants, fitted to the runs marked `fitted`; the others are held out.
SUSTAINED = {"ampere": 0.80, "hopper": 0.63, "blackwell": 0.63, "cdna3": 0.63, "ada": 0.80}
FITTED = ("ampere", "hopper")  # the other generations borrow

# Of the published runs that were held out, what `python -m benchmarks.published_runs` shows, in November 2026.
EXPECT = ("of published runs, dense ones on A100 and H100 were planned within 17 %, on H200 28 to 34 % too slow, "
          "mixtures from 32 % too slow to 67 % too fast")

DEVICES = {
    "a100-40gb": Device(312, 0.869, 0.60, 0.53, 1555, 40, "ampere"),
    "a100-80gb": Device(312, 0.869, 0.60, 0.53, 2039, 80, "ampere"),
    "h100": Device(989, 0.803, 0.65, 0.55, 3350, 80, "hopper"),
    "h800": Device(989, 0.803, 0.65, 0.55, 3350, 80, "hopper"),
    "h100-96gb-500w": Device(989, 0.803, 0.65, 0.55, 2400, 96, "hopper"),
    "h200": Device(989, 0.803, 0.65, 0.55, 4800, 141, "hopper"),
    "b200": Device(2250, 0.776, 0.60, 0.50, 8000, 180, "blackwell", borrowed=True),
    "gb200": Device(2500, 0.776, 0.60, 0.50, 8000, 186, "blackwell", borrowed=True),
    "mi300x": Device(1307, 0.514, 0.40, 0.30, 5300, 192, "cdna3", borrowed=True),
    "l40s": Device(362, 0.77, 0.55, 0.45, 864, 48, "ada", borrowed=True),
}
