"""However the ranks are laid out, an update is the same: mixtures trained by plain SGD, which hides no wrong scale.

Every layout takes the same sequences: fewer ranks take more micro-batches one after another. What differs is the order
of sums; over many updates of a float32 model that stays a few roundings as long as no token is sent elsewhere for it.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from moe.data import shards
from moe.train import checkpoint
from moe.train.telemetry import read

SCRIPT = Path(__file__).with_name("rank.py")
# Ranks, and those that hold one set of experts together.
LAYOUTS = {(1, 1): {}, (2, 1): {}, (2, 2): {"chunks": 2}, (4, 2): {}, (4, 4): {}}
METHODS = ("none", "micro_batch", "sequence", "global", "bias")
MODEL = dict(
    d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, context_length=16,
    mixture=dict(num_experts=4, top_k=2, d_ff=24, shared_d_ff=8),
)  # fmt: skip
TRAIN = dict(
    batch_size=8, micro_batch_size=2, optimizer="sgd", learning_rate=0.2, weight_decay=0.1, checkpoint_every=1000,
    evaluate_every=1000,
)  # fmt: skip


def tasks(root: Path, layout: tuple[int, int], jobs: dict[str, dict], steps: int) -> list[dict]:
    """The mixture's jobs in this layout; recomputed layers and attention's dropout wherever experts are spread."""
    return [
        {
            "kind": "mixture", "precision": job.get("precision", "float32"),
            "folder": str(root / "-".join(map(str, layout)) / name),
            "text": str(root / "text"), "vocabulary": 280, "model": MODEL, "stop_after": 0, "expert": layout[1],
            "train": {**TRAIN, "steps": steps, "zero_stage": job["stage"], "attention_dropout": 0.1,
                      "recompute_layers": layout[1] > 1, **job.get("train", {})},
            "balance": {"method": job["method"], "weight": 0.02, "bias_step": 0.01, "z_loss_weight": 1e-3},
            **LAYOUTS[layout],
        }
        for name, job in jobs.items()
    ]  # fmt: skip


def run(
    root: Path, layouts: list[tuple[int, int]], jobs: dict[str, dict], steps: int, run_ranks, seconds: float = 120
) -> None:
    for world_size in sorted({ranks for ranks, _ in layouts}):
        todo = [task for layout in layouts if layout[0] == world_size for task in tasks(root, layout, jobs, steps)]
        (root / "tasks.json").write_text(json.dumps(todo))
        run_ranks(world_size, SCRIPT, root / "tasks.json", root, seconds)


def differences(root: Path, layout: tuple[int, int], name: str, steps: int) -> dict[str, float]:
    """Largest relative difference from one rank: of losses, gradient norms and buffers, and of parameters, whose unit
    is the largest value in the tensor."""
    want, got = (root / "-".join(map(str, each)) / name for each in ((1, 1), layout))
    rows = list(zip(read(want / "metrics.jsonl"), read(got / "metrics.jsonl"), strict=True))
    assert len(rows) == steps
    found = {key: max(abs(b[key] / a[key] - 1) for a, b in rows) for key in ("loss", "gradient_norm", "z_loss")}
    found["balance_loss"] = max(abs(b["balance_loss"] / a["balance_loss"] - 1) for a, b in rows)
    one, many = (checkpoint.open_checkpoint(checkpoint.newest(each / "checkpoints")) for each in (want, got))
    assert set(one.names) == set(many.names)
    apart = {}
    for tensor in one.names:
        a, b = one.tensor(tensor), many.tensor(tensor)
        apart[tensor] = ((a - b).abs().max() / a.abs().max().clamp(min=1e-6)).item()
    assert any(torch.is_tensor(one.tensor(tensor)) and "load" in tensor for tensor in one.names)
    return found | {"parameters": max(apart.values())}


QUICK = {f"{method}-zero-{1 + number % 2}": {"method": method, "stage": 1 + number % 2}
         for number, method in enumerate(METHODS)}  # fmt: skip
# In bfloat16: AdamW, whose first moment is a mean of the gradients.
HALF = {f"bfloat16-zero-{stage}": {"method": "global", "stage": stage, "precision": "bfloat16",
                                   "train": {"optimizer": "adamw", "learning_rate": 1e-3}} for stage in (1, 2)}
QUICK_LAYOUTS, QUICK_STEPS = [(1, 1), (2, 2), (4, 2)], 3


@pytest.fixture(scope="module")
def quick(tmp_path_factory, tokenizer, make_documents, run_ranks):
    root = tmp_path_factory.mktemp("parity")
    shards.write(root / "text", make_documents(80), tokenizer)
    run(root, QUICK_LAYOUTS, QUICK | HALF, QUICK_STEPS, run_ranks)
    return root


@pytest.mark.parametrize("layout", QUICK_LAYOUTS[1:])
@pytest.mark.parametrize("job", QUICK)
def test_a_few_updates_are_the_same(quick, layout, job):
    for what, difference in differences(quick, layout, job, QUICK_STEPS).items():
        assert difference < 2e-6, what


@pytest.mark.parametrize("layout", QUICK_LAYOUTS[1:])
@pytest.mark.parametrize("job", HALF)
def test_in_bfloat16_gradients_are_the_same_to_its_rounding(quick, layout, job):
    """The embedding's too, which is the sum of the lookup's and the output head's."""
    one, many = (checkpoint.open_checkpoint(checkpoint.newest(quick / "-".join(map(str, each)) / job / "checkpoints"))
                 for each in ((1, 1), layout))
    moments = [name for name in one.names if name.endswith(".exp_avg")]
    assert "embedding.weight.exp_avg" in moments
    for name in moments:
        a, b = one.tensor(name), many.tensor(name)
        assert (a - b).norm() < 2**-7 * a.norm(), name  # after three updates; of the embedding 1e-3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fifty_updates_are_the_same(tmp_path, tokenizer, make_documents, run_ranks):
    """Every layout, balancing method and ZeRO stage. Prints the table of largest differences."""
    shards.write(tmp_path / "text", make_documents(300), tokenizer)
    jobs = {f"{method}-zero-{stage}": {"method": method, "stage": stage} for method in METHODS for stage in (1, 2)}
    run(tmp_path, list(LAYOUTS), jobs, 50, run_ranks, seconds=500)
    worst: dict[str, float] = {}
    for layout in list(LAYOUTS)[1:]:
        for job in jobs:
            found = differences(tmp_path, layout, job, 50)
            print(f"{layout} {job:20}", "  ".join(f"{what} {difference:.1e}" for what, difference in found.items()))
            worst = {what: max(found[what], worst.get(what, 0.0)) for what in found}
    print("largest", worst)
    assert worst["loss"] < 2e-6 and max(worst.values()) < 5e-5, worst


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_layout_goes_on_from_every_other(tmp_path, tokenizer, make_documents, run_ranks):
    """Begun in one layout and stage and finished in another, with AdamW: the losses of a run that never stopped."""
    shards.write(tmp_path / "text", make_documents(300), tokenizer)
    places = [(layout, stage) for layout in ((1, 1), (2, 1), (2, 2), (4, 2)) for stage in (1, 2)]
    half, whole = 4, 8

    def task(folder: Path, place, stop_after: int = 0) -> dict:
        layout, stage = place
        made, = tasks(tmp_path, layout, {"": {"method": "bias", "stage": stage}}, whole)
        made["train"] |= {"optimizer": "adamw", "learning_rate": 3e-3}
        return made | {"folder": str(folder), "stop_after": stop_after}

    def name(place) -> str:
        return "-".join(map(str, (*place[0], place[1])))

    def do(todo: list[tuple[tuple, dict]]) -> None:
        for world_size in sorted({place[0][0] for place, _ in todo}):
            mine = [each for place, each in todo if place[0][0] == world_size]
            (tmp_path / "tasks.json").write_text(json.dumps(mine))
            run_ranks(world_size, SCRIPT, tmp_path / "tasks.json", tmp_path, seconds=500)

    do([((each := ((1, 1), 1)), task(tmp_path / "straight", each))])
    do([(place, task(tmp_path / "begun" / name(place), place, half)) for place in places])
    pairs = [(begun, ended) for begun in places for ended in places]
    for begun, ended in pairs:
        shutil.copytree(tmp_path / "begun" / name(begun), tmp_path / "pairs" / f"{name(begun)}_{name(ended)}")
    do([(ended, task(tmp_path / "pairs" / f"{name(begun)}_{name(ended)}", ended)) for begun, ended in pairs])
    want = [row["loss"] for row in read(tmp_path / "straight" / "metrics.jsonl")]
    worst = 0.0
    for begun, ended in pairs:
        got = [row["loss"] for row in read(tmp_path / "pairs" / f"{name(begun)}_{name(ended)}" / "metrics.jsonl")]
        assert len(got) == len(want) == whole
        worst = max(worst, *(abs(b / a - 1) for a, b in zip(want, got, strict=True)))
    print(f"{len(pairs)} pairs; largest relative difference of a loss {worst:.1e}")
    assert worst < 2e-6
