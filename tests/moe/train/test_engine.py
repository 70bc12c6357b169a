"""The engine: its settings clash by key, it does what plain AdamW does, and what is frozen does not move."""

import deepspeed.ops
import pytest
import torch

from moe.config import BalanceConfig
from moe.errors import InputError
from moe.hashing import tensor_hashes
from moe.train.balance import Balance
from moe.train.engine import MOMENTS, Engine
from moe.train.engine_settings import settings
from moe.train.objective import next_token, token_weights
from moe.train.schedule import warmup_cosine

# --- settings


@pytest.mark.parametrize(
    "given, said",
    [
        pytest.param({"gradient_clipping": 3.0}, "deepspeed.gradient_clipping=3.0 clashes with 1.0", id="clipping"),
        pytest.param({"train_batch_size": 8}, "deepspeed.train_batch_size=8 clashes with 4", id="batch"),
        pytest.param(
            {"zero_optimization": {"overlap_comm": True, "stage": 3}},
            "deepspeed.zero_optimization.stage=3 clashes with 1", id="stage-below-a-section",
        ),
        pytest.param({"bf16": {"enabled": True}}, "deepspeed.bf16.enabled=True clashes with False", id="precision"),
        pytest.param({"bf16": True}, "deepspeed.bf16=True clashes", id="a-value-for-a-section"),
        pytest.param({"fp16": {"enabled": True}}, "deepspeed.fp16", id="another-precision"),
        pytest.param({"optimizer": {"type": "SGD"}}, "deepspeed.optimizer", id="an-optimizer-of-its-own"),
        pytest.param({"scheduler": {"type": "OneCycle"}}, "deepspeed.scheduler", id="a-schedule-of-its-own"),
    ],
)  # fmt: skip
def test_a_clash_names_its_key(train_config, given, said):
    with pytest.raises(InputError) as refused:
        settings(train_config(), "float32", 1, given)
    assert said in str(refused.value)


def test_what_does_not_clash_is_passed_through(train_config):
    given = {"zero_optimization": {"stage": 2, "overlap_comm": False}, "wall_clock_breakdown": True}
    made = settings(train_config(zero_stage=2), "bfloat16", 1, given)
    assert made["zero_optimization"] == {"stage": 2, "overlap_comm": False} and made["wall_clock_breakdown"] is True
    assert made["bf16"] == {"enabled": True} and made["communication_data_type"] == "fp32"
    assert given["zero_optimization"] == {"stage": 2, "overlap_comm": False}


@pytest.mark.parametrize("world_size, accumulation", [(1, 4), (2, 2), (4, 1)])
def test_the_batch_is_the_same_for_every_number_of_ranks(train_config, world_size, accumulation):
    made = settings(train_config(batch_size=8), "float32", world_size, {})
    assert (made["train_batch_size"], made["gradient_accumulation_steps"]) == (8, accumulation)


# --- updates


def batches(make_batch, step):
    return [make_batch(16, 7, 9, seed=10 * step + n) for n in range(2)]


def loss_of(forward, model, batch):
    output = forward(batch.token_T, batch.documents, 0.0, 0, batch.label_T, token_weights(batch))
    return next_token(output, batch, Balance(model, BalanceConfig())).total


def update(engine, model, micro_batches):
    for batch in micro_batches:
        engine.backward(loss_of(engine, model, batch))


def copies(engine):
    """Of the whole state, which this one rank has all of."""
    whole = {piece.name: torch.full(piece.shape, torch.nan) for piece in engine.pieces()}
    for piece in engine.pieces():
        whole[piece.name].view(-1)[piece.start : piece.start + piece.values.numel()] = piece.values
    return whole


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "pack"])
def test_it_is_adamw_with_clipping_and_accumulation(
    process_group, make_model, make_batch, train_config, kind, zero_stage
):
    """Against torch's own, written out: the mean gradient of two micro-batches, clipped, decay on matrices only."""
    config = train_config(clip=0.5, weight_decay=0.3, zero_stage=zero_stage)
    model, plain = make_model(kind), make_model(kind)
    engine = Engine(model, config, "float32", {})
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.dim() >= 2], "weight_decay": 0.3},
            {"params": [p for p in trained.values() if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for step in range(4):
        factor = warmup_cosine(step, 6, 1, 0.1)
        assert engine.learning_rate() == pytest.approx(1e-2 * factor)
        update(engine, model, batches(make_batch, step))

        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        optimizer.zero_grad()
        for batch in batches(make_batch, step):
            (loss_of(plain, plain, batch) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        assert norm > 0.5, "the test is to clip"
        assert engine.gradient_norm() == pytest.approx(norm.item(), rel=1e-5)
        optimizer.step()

    state = copies(engine)
    fitted = {f"layers.{n}.ffn.{name}" for n in range(2) for name in ("row", "bias")} if kind == "pack" else set()
    assert set(state) == {f"{name}{end}" for name in trained for end in ("", ".exp_avg", ".exp_avg_sq")} | fitted
    for name, parameter in trained.items():
        # Adam divides by the gradient's own size, so its rounding reaches the weights times lr = 1e-2.
        torch.testing.assert_close(state[name], parameter.data, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        for moment in MOMENTS["adamw"]:
            want = optimizer.state[parameter][moment]
            tol = 1e-4 * want.abs().max().item()
            torch.testing.assert_close(state[f"{name}.{moment}"], want, rtol=1e-4, atol=tol)
            assert want.abs().max() > 0, "both groups have moments"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_frozen_does_not_move(process_group, make_model, make_batch, train_config, precision):
    model = make_model("pack")
    engine = Engine(model, train_config(weight_decay=0.5), precision, {})
    tensors = model.state_dict(keep_vars=True)
    frozen = {name: t for name, t in tensors.items() if isinstance(t, torch.nn.Parameter) and not t.requires_grad}
    assert "embedding.weight" in frozen and "layers.0.ffn.anchor.w_down" in frozen
    before = tensor_hashes(tensors)
    for step in range(3):
        update(engine, model, batches(make_batch, step))
    after = tensor_hashes(model.state_dict())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in before if before[name] != after[name]} == trained
    assert all(p.grad is None for p in frozen.values())
    assert not copies(engine).keys() & set(frozen)


def test_bfloat16_trains_float32_masters(process_group, make_model, make_batch, train_config):
    model = make_model()
    engine = Engine(model, train_config(), "bfloat16", {})
    for step in range(3):
        update(engine, model, batches(make_batch, step))
    for name, parameter in model.named_parameters():
        master = copies(engine)[name]
        assert parameter.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(parameter.data, master.bfloat16()), name
        assert (master != master.bfloat16()).any(), f"{name} has no more bits than the model"


@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bfloat16_gradients_are_summed_in_float32(process_group, make_model, make_batch, train_config, zero_stage,
                                                  offload):
    """Of 16 micro-batches; a sum in bfloat16 would be off by 4e-3. AdamW's first moment is a tenth of the gradient."""
    micro_batches = [make_batch(16, 16, seed=n) for n in range(16)]
    plain, model = make_model().bfloat16(), make_model()
    want = {name: torch.zeros(p.shape) for name, p in plain.named_parameters()}
    for batch in micro_batches:
        plain.zero_grad()
        loss_of(plain, plain, batch).backward()
        for name, parameter in plain.named_parameters():
            want[name] += parameter.grad.float() / 16
    passthrough = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}} if offload else {}
    engine = Engine(model, train_config(batch_size=32, clip=1e9, zero_stage=zero_stage), "bfloat16", passthrough)
    update(engine, model, micro_batches)
    got = copies(engine)
    for name, gradient in want.items():
        error = (10 * got[f"{name}.exp_avg"] - gradient).norm() / gradient.norm()
        assert error < 1e-6, f"{name}: {error}"


def test_a_loaded_state_is_the_state(process_group, make_model, make_batch, train_config):
    model = make_model()
    engine = Engine(model, train_config(), "float32", {})
    for step in range(3):
        update(engine, model, batches(make_batch, step))
    state = copies(engine)
    fresh = make_model()
    other = Engine(fresh, train_config(), "float32", {})
    other.load(lambda name, start, numel: state[name].flatten()[start : start + numel], updates=3)
    assert tensor_hashes(copies(other)) == tensor_hashes(state)
    assert tensor_hashes(fresh.state_dict()) == tensor_hashes(model.state_dict())
    assert other.learning_rate() == engine.learning_rate() == pytest.approx(1e-2 * warmup_cosine(3, 6, 1, 0.1))


def test_no_extension_is_compiled(process_group):
    """DeepSpeed builds its shared-memory op where it is said to be compatible: half a minute of every start."""
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
