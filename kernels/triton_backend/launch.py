"""What a launch needs to know of the device it runs on."""

import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

ALIGNMENT = 16  # bytes; of what a tensor descriptor describes: its base and all strides but the last
INTERPRETED = triton.knobs.runtime.interpret  # how the kernels of this process were made: for a device, or to be read


@functools.cache
def architecture(device: torch.device) -> str:
    """"sm_90", "gfx942"; "interpreter" for CPU tensors."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors; few under the interpreter, so that each program walks several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def on_its_device(launcher: Callable) -> Callable:
    """Run with the device of the first argument as the current one: Triton launches on that, whatever it is given."""
    @functools.wraps(launcher)
    def run(first: Tensor, *rest, **named):
        with torch.cuda.device_of(first):
            return launcher(first, *rest, **named)
    return run


def describable(*tensors: Tensor) -> bool:
    """Whether a tensor descriptor can describe them: half precision, rows and base at multiples of ALIGNMENT."""
    return all(t.element_size() == 2 and t.shape[-1] * 2 % ALIGNMENT == 0 and t.data_ptr() % ALIGNMENT == 0
               for t in tensors)


def exact(x: Tensor) -> bool:
    """Whether products must upcast their operands: Triton's interpreter multiplies bfloat16 wrongly."""
    return INTERPRETED and x.dtype == torch.bfloat16
