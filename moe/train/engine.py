"""The training engine: the only place that knows DeepSpeed.

It builds the optimizer, shards its state (ZeRO 1 or 2), reduces and clips gradients, and hands out the whole
float32 masters, moments and buffers by name, so that a checkpoint does not depend on how many ranks wrote it.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.config import TrainConfig
from moe.train.engine_settings import settings
from moe.train.schedule import warmup_cosine

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    # On a CPU nothing is compiled, and importing the compiler costs half of the engine's start-up.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import deepspeed
import deepspeed.ops
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


def connect() -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, if not joined already.

    Every rank must call it."""
    # Without this DeepSpeed compiles a C++ extension at first use, which takes half a minute and saves nothing here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)


class Engine:
    """A model, its optimizer and its schedule over all ranks. Only parameters that require a gradient are trained;
    the others never reach the optimizer, so weight decay and old moments cannot move them."""

    def __init__(self, model: nn.Module, config: TrainConfig, precision: str, passthrough: dict[str, Any]):
        """Every rank must call it, after `connect`, with equal weights (rank 0's are broadcast)."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_cosine(step, config.steps, config.warmup_steps, config.final_learning_rate_share),
        )
        self._engine, self._optimizer, _, self._schedule = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule,
            model_parameters=trained,
            config=settings(config, precision, dist.get_world_size(), passthrough),
        )
        self.model = model
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
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

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 tensor) of every trained parameter and of its moments, as NAME and NAME.MOMENT, and of
        every persistent buffer.

        Every rank must run it to its end: each tensor is gathered. Valid after the first update."""
        self._link()
        for name, parameter in self._trained():
            yield name, safe_get_full_fp32_param(parameter)
            for moment in MOMENTS:
                yield f"{name}.{moment}", safe_get_full_optimizer_state(parameter, moment)
        for name, buffer in self._buffers():
            yield name, buffer.float()

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Continue from what `state` gave after so many updates, at any world size. Every rank must call it."""
        for flat in self._optimizer.single_partition_of_fp32_groups:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self._optimizer.optimizer.state[flat] = {"step": torch.tensor(float(updates)), **moments}
        self._link()
        for name, parameter in self._trained():
            master = state[name].contiguous()
            parameter.data.copy_(master)  # DeepSpeed does not refresh the low-precision copy
            safe_set_full_fp32_param(parameter, master)
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{name}.{moment}"].contiguous(), moment)
        for name, buffer in self._buffers():
            buffer.copy_(state[name])
        self._engine.global_steps = updates
        self._schedule.last_epoch = updates - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that this optimizer has made no update yet
            self._schedule.step()

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """What a model is fitted with beside what it learns."""
        persistent = self.model.state_dict().keys()
        return [(name, buffer) for name, buffer in self.model.named_buffers() if name in persistent]

    def _link(self) -> None:
        # DeepSpeed links moments to parameters after its first group's first step and then never again, which leaves
        # out every later group: link anew before each use.
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()
