"""How one training job learns."""

from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from moe.config.section import Section, Share


class TrainConfig(Section):
    """One training job. A batch is `batch_size` sequences of `model.context_length` tokens over all ranks."""

    steps: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt  # sequences a rank takes through the model at once
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt = 0
    final_learning_rate_share: Share = 0.1  # cosine decay ends at this share of learning_rate
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd without momentum shows what AdamW divides away: a wrong scale
    weight_decay: NonNegativeFloat = 0.1  # matrices only
    beta1: Share = 0.9
    beta2: Share = 0.95
    clip: PositiveFloat = 1.0  # largest gradient norm
    attention_dropout: Share = 0.0
    recompute_layers: bool = False  # keep only each layer's input for the backward: less memory, a third more work
    zero_stage: Literal[1, 2, 3] = 1  # 3 also shards the weights: dense models only
    evaluate_every: PositiveInt  # steps
    checkpoint_every: PositiveInt  # steps
    max_skipped: NonNegativeInt = 10  # updates left out in a row, because a gradient was not finite, before it gives up

    @property
    def micro_batches(self) -> int:
        """Of an update, over all ranks."""
        return self.batch_size // self.micro_batch_size

    def gradient_accumulation(self, world_size: int) -> int:
        return self.micro_batches // world_size

    def fits(self, world_size: int) -> bool:
        return self.batch_size % (self.micro_batch_size * world_size) == 0

    def learned(self) -> dict[str, Any]:
        """What determines the result, as plain values; what only moves roundings or says when to look is not in it, so
        that a job may go on under another choice of those."""
        free = {"zero_stage", "recompute_layers", "evaluate_every", "checkpoint_every", "max_skipped"}
        if not self.attention_dropout:  # which is drawn for each micro-batch
            free.add("micro_batch_size")
        return self.model_dump(mode="json", exclude=free)

    def check_world_size(self, key: str, world_size: int) -> None:
        if not self.fits(world_size):
            raise ValueError(
                f"{key}.batch_size={self.batch_size}: want a multiple of {key}.micro_batch_size * workers "
                f"= {self.micro_batch_size} * {world_size}"
            )


class BalanceConfig(Section):
    """What keeps a router from sending everything to a few experts; moe.train.balance has the equations."""

    method: Literal["none", "micro_batch", "sequence", "global", "bias"] = "global"  # over which tokens, or by biases
    weight: NonNegativeFloat = 1e-2  # of the balance loss
    bias_step: PositiveFloat = 1e-3  # by which method `bias` moves each expert's selection bias after an update
    z_loss_weight: NonNegativeFloat = 1e-3  # keeps the router's logits small
