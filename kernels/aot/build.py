"""What is compiled ahead of time, and what came out."""

from dataclasses import dataclass, field

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes of one program
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


@dataclass(frozen=True)
class Build:
    """One kernel, one architecture, one set of constants: what a launch would compile."""

    module: str
    kernel: str
    label: str  # what distinguishes it from others of the same kernel
    architecture: str
    types: dict[str, str]  # of every argument that is not a constant: "*bf16", "i32", "tensordesc<...>"
    constants: dict[str, object]
    options: dict[str, int]
    odd: bool = False  # nothing is said to be divisible by 16
    matrix: str = ""  # the instruction of its matrix product, which has to be there; "": it has none, or in float32
    tma: bool = False


@dataclass(frozen=True)
class Outcome:
    build: Build
    registers: int = 0
    spilled: int = 0  # bytes
    shared: int = 0  # bytes
    matrix: int = 0
    tma: int = 0
    async_copies: int = 0
    error: str = ""
    faults: tuple[str, ...] = field(default=())


def simple(module, kernel: str, label: str, architecture: str, constants: dict, options: dict, *, pointer: str,
            types: dict[str, str] | None = None) -> Build:
    """A kernel without a matrix product: every pointer of one type but those named."""
    names = getattr(module, kernel).arg_names
    types = {name: (types or {}).get(name, pointer if name.endswith("_ptr") else "i32")
             for name in names if name not in constants}
    return Build(module.__name__.split(".")[-1], kernel, label, architecture, types, constants, options)
