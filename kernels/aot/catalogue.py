"""All that is compiled for an architecture."""

from collections.abc import Iterator
from itertools import chain

from kernels.aot import attention, decode, experts, linear_cross_entropy, norm, rope, router
from kernels.aot.build import Build

OPS = (router, experts, attention, decode, linear_cross_entropy, norm, rope)


def builds(architecture: str) -> Iterator[Build]:
    """Every kernel of this architecture."""
    return chain.from_iterable(op.builds(architecture) for op in OPS)


def sample(architecture: str) -> Iterator[Build]:
    """Of each kernel the first of its builds and the one in the middle."""
    of_kernel: dict[tuple[str, str], list[Build]] = {}
    for build in builds(architecture):
        of_kernel.setdefault((build.module, build.kernel), []).append(build)
    for same in of_kernel.values():
        yield from (same[place] for place in sorted({0, len(same) // 2}))
