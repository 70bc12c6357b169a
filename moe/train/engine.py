"""The training engine: the only place that knows DeepSpeed.

It builds the optimizer, shards its state (ZeRO 1 to 3), reduces and clips gradients, and hands out the float32 masters,
moments and buffers in pieces of logical tensors, so that a checkpoint does not depend on how many ranks wrote it.

In bfloat16 each micro-batch's gradients are of that type, and their sums over micro-batches and ranks are float32. That
takes 4 bytes a parameter of each rank in ZeRO 1 (a micro-batch's own gradients go one by one, as they are added), 4
bytes shared among the ranks in ZeRO 2 and 3, and 4 bytes instead of 2 on the way between ranks and in the buckets.

Experts that are spread over ranks (moe.parallel) have optimizer groups of their own: their gradients are averaged over
the ranks that hold the same ones, and divided by the number of all ranks, as all others are.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.config import TrainConfig
from moe.model import Decoder
from moe.parallel import Mesh
from moe.train.engine_settings import settings
from moe.train.schedule import warmup_cosine

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    # On a CPU nothing is compiled, and importing the compiler costs half of the engine's start-up.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import deepspeed
import deepspeed.ops
from deepspeed.moe.layer import MoE
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.utils import groups

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
Read = Callable[[str, int, int], Tensor]  # name, first element, elements -> float32 [elements] on the CPU


class Piece(NamedTuple):
    """What one rank holds of a logical tensor."""

    name: str  # NAME, NAME.MOMENT, or a persistent buffer's
    shape: tuple[int, ...]  # of the whole tensor, over all ranks
    start: int  # the piece's first element in it, flat
    values: Tensor  # float32, flat; a view


class Part(NamedTuple):
    """What one rank has of a logical parameter to compute with: all of it, or the experts it holds."""

    shape: tuple[int, ...]  # of the whole
    start: int  # its first element in the whole, flat


def connect() -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, if not joined already.

    Every rank must call it."""
    # Without this DeepSpeed compiles a C++ extension at first use, which takes half a minute and saves nothing here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch has begun to call deprecated, and torch says so at each call.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)


class Engine:
    """A model, its optimizer and its schedule over all ranks. Only parameters that require a gradient are trained;
    the others never reach the optimizer, so weight decay and old moments cannot move them."""

    def __init__(self, model: Decoder, config: TrainConfig, precision: str, passthrough: dict[str, Any]):
        """Every rank must call it, after `connect`, with equal weights (rank 0's are broadcast), and of experts that
        are spread each with its own."""
        self.model, self.stage = model, config.zero_stage
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._parts = _parts(model)
        self._moments = MOMENTS[config.optimizer]
        optimizer = _optimizer(model, config)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_cosine(step, config.steps, config.warmup_steps, config.final_learning_rate_share),
        )
        with _experts_known(model), _one_optimizer():
            self._engine, self._optimizer, _, self._schedule = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                lr_scheduler=schedule,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                config=settings(config, precision, self.world_size, passthrough),
            )
        self.device = self._engine.device

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient; after the batch's last micro-batch, reduce, clip and update."""
        self._engine.backward(loss)
        self._engine.step()

    def gradient_norm(self) -> float:
        """Of the last update, before clipping."""
        return float(self._engine.get_global_grad_norm())

    def learning_rate(self) -> float:
        """Of the next update."""
        return self._schedule.get_last_lr()[0]

    @contextlib.contextmanager
    def whole(self, parameter: nn.Parameter) -> Iterator[None]:
        """Within, a parameter has its values on every rank, although its module is not in use. All ranks must enter."""
        if self.stage < 3:
            yield
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                yield

    def pieces(self) -> list[Piece]:
        """This rank's part of every trained parameter, of its moments, and of every persistent buffer.

        The pieces of all ranks together are each tensor, once. Valid until the next update: views of what training
        goes on to change."""
        self._make_moments(0)  # where every update so far was left out
        self._link()
        found = []
        for name, parameter in self._trained():
            whole, first = self._parts[name]
            start, fragments = self._fragments(parameter)
            found += [Piece(key, whole, first + start, values) for key, values in self._named(name, fragments)]
        if self.rank == 0:  # all ranks have the same buffers
            found += [Piece(name, tuple(b.shape), 0, b.detach().flatten()) for name, b in self._buffers()]
        return found

    def load(self, read: Read, updates: int) -> None:
        """Continue from what the `pieces` of any number of ranks held after so many updates. All ranks must call it."""
        self._make_moments(updates)
        self._link()
        for name, parameter in self._trained():
            first = self._parts[name].start
            if self.stage < 3:  # DeepSpeed does not refresh the low-precision copy
                parameter.data.copy_(read(name, first, parameter.numel()).view_as(parameter))
            start, fragments = self._fragments(parameter)
            for key, values in self._named(name, fragments):
                values.copy_(read(key, first + start, values.numel()))
            if self.stage == 3 and fragments:
                parameter.ds_tensor.data[:fragments[0].numel()].copy_(fragments[0])
        for name, buffer in self._buffers():
            buffer.copy_(read(name, 0, buffer.numel()).view_as(buffer))
        self._engine.global_steps = updates
        self._schedule.last_epoch = updates - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that this optimizer has made no update yet
            self._schedule.step()

    def _named(self, name: str, fragments: list[Tensor]) -> list[tuple[str, Tensor]]:
        keys = [name, *(f"{name}.{moment}" for moment in self._moments)]
        return list(zip(keys, fragments, strict=True)) if fragments else []

    def _fragments(self, parameter: nn.Parameter) -> tuple[int, list[Tensor]]:
        """Where this rank's share of a parameter starts in it, and the views of its master and moments; none where
        another rank has all of it."""
        if self.stage == 3:
            # Equal shares; the last ones are padded, or nothing but padding.
            share = parameter.ds_tensor.ds_numel
            start = min(self.rank * share, parameter.ds_numel)
            size = min(share, parameter.ds_numel - start)
            state = [self._optimizer._get_fp32_opt_state_partition(parameter, False, key)[0]
                     for key in (None, *self._moments)]
            return start, [tensor.detach().flatten()[:size] for tensor in state] if size > 0 else []
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, []
        state = [mapping.hp_fragment, *(mapping.optim_fragment[moment] for moment in self._moments)]
        return mapping.lp_fragment_address.start, [tensor.detach() for tensor in state]

    def _make_moments(self, updates: int) -> None:
        """No state exists before the first update that is made: make what the optimizer would."""
        if self.stage == 3:
            masters = self._optimizer.fp32_partitioned_groups_flat
        else:
            masters = self._optimizer.single_partition_of_fp32_groups
        state = self._optimizer.optimizer.state
        for flat in masters if self._moments else ():
            if flat in state:
                continue
            moments = {moment: torch.zeros_like(flat) for moment in self._moments}
            state[flat] = {"step": torch.tensor(float(updates), device=flat.device), **moments}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """What a model is fitted with beside what it learns."""
        persistent = self.model.state_dict().keys()
        return [(name, buffer) for name, buffer in self.model.named_buffers() if name in persistent]

    def _link(self) -> None:
        if self.stage < 3:
            # DeepSpeed links moments to parameters after its first group's first step and then never again, which
            # leaves out every later group: link anew before each use.
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()


def _optimizer(model: Decoder, config: TrainConfig) -> torch.optim.Optimizer:
    """Weight decay for matrices only; experts that are spread in groups that DeepSpeed knows by name."""
    spread = {id(p) for mixture in _spread(model).values() for p in mixture.experts.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    own = [p for p in trained if id(p) not in spread]
    parameter_groups = [
        {"params": [p for p in own if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in own if p.dim() < 2], "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in spread], "weight_decay": config.weight_decay, "moe": True,
         "name": _group_name(model.mesh)},
    ]
    parameter_groups = [g for g in parameter_groups if g["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameter_groups, lr=config.learning_rate)
    return torch.optim.AdamW(parameter_groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


class _Experts(MoE):
    """Tells DeepSpeed, which looks for its own kind of layer, that there are experts, and makes its groups of ranks."""

    def __init__(self, mesh: Mesh, num_experts: int):
        nn.Module.__init__(self)  # not MoE's, which would make layers
        self.mesh, self.num_experts = mesh, num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        if _group_name(self.mesh) not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.mesh.expert_size, use_data_before_expert_parallel_)


@contextlib.contextmanager
def _experts_known(model: Decoder) -> Iterator[None]:
    """Mark spread experts while DeepSpeed is set up; outside, the model is as it was."""
    spread = _spread(model)
    for mixture in spread.values():
        for parameter in mixture.experts.parameters():
            parameter.allreduce, parameter.group_name = False, _group_name(model.mesh)
    if spread:
        model.experts_for_deepspeed = _Experts(model.mesh, next(iter(spread.values())).num_experts)
    try:
        yield
    finally:
        if spread:
            del model.experts_for_deepspeed


@contextlib.contextmanager
def _one_optimizer() -> Iterator[None]:
    """Keep DeepSpeed from choosing, for bfloat16 with float32 sums in ZeRO 1, another optimizer than for all else.

    That one reduces all gradients in a single exchange, whatever the buckets' size, and writes to the terminal."""
    checked = DeepSpeedEngine._do_optimizer_sanity_check
    DeepSpeedEngine._do_optimizer_sanity_check = lambda *given: checked(*given) and ZERO_OPTIMIZATION
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = checked


def _spread(model: Decoder) -> dict[str, nn.Module]:
    return model.mixtures() if model.mesh.expert_size > 1 else {}


def _group_name(mesh: Mesh) -> str:
    return f"ep_size_{mesh.expert_size}"  # what DeepSpeed calls it


def _parts(model: Decoder) -> dict[str, Part]:
    """Taken before DeepSpeed may shard the weights and leave their shapes empty."""
    parts = {name: Part(tuple(p.shape), 0) for name, p in model.named_parameters()}
    for layer, mixture in _spread(model).items():
        for name, parameter in mixture.experts.named_parameters():
            one = tuple(parameter.shape[1:])
            parts[f"{layer}.experts.{name}"] = Part((mixture.num_experts, *one), mixture.held.start * prod(one))
    return parts
