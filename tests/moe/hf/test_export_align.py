"""Other people's trainers work on an exported model: PEFT's LoRA, and one step of TRL's DPO."""

import pytest
import torch

from moe.hashing import tensor_hashes
from moe.hf import folder as model_folder
from moe.hf.exporting import export_folder
from moe.specialty.merge import merge

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def exported(make_anchor, make_pack, tmp_path):
    """The folder of a model of two owners."""
    anchor = make_anchor()
    return export(merge(anchor, [make_pack(anchor, owner, slot) for owner, slot in (("billing", 1), ("radiology", 7))]),
                  tmp_path)


@pytest.fixture
def exported_mixture(make_anchor, tmp_path):
    """Of an ordinary mixture."""
    mixture = dict(num_experts=4, top_k=2, d_ff=12, score="sigmoid", renormalise=True)
    return export(make_anchor(mixture=mixture), tmp_path)


def export(model, tmp_path):
    model_folder.save(tmp_path / "ours", model)
    export_folder(tmp_path / "ours", tmp_path / "theirs", "polyclinic")
    return tmp_path / "theirs"


def load(folder):
    from moe.hf.architecture.modeling_polyclinic import PolyclinicForCausalLM

    return PolyclinicForCausalLM.from_pretrained(folder)


TEXT = torch.randint(280, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("targets", [
    pytest.param(dict(target_modules=ATTENTION), id="attention"),
    pytest.param(dict(target_modules=ATTENTION, target_parameters=["experts.w_gate_up", "experts.w_down"]),
                 id="attention-and-stacked-experts"),
])  # fmt: skip
def test_lora_learns_beside_the_weights_and_can_be_merged_into_them(exported, tmp_path, targets):
    peft = pytest.importorskip("peft", reason="wants the package peft: pip install -e '.[align]'")
    before = tensor_hashes(load(exported).state_dict())
    model = peft.get_peft_model(load(exported), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **targets))
    model.set_owners(["billing"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(TEXT, labels=TEXT).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-3
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = model(TEXT).logits
        again = peft.PeftModel.from_pretrained(load(exported), tmp_path / "adapter")
        again.set_owners(["billing"])
        assert (again(TEXT).logits - want).abs().max() < 1e-5
        assert again.generate(input_ids=TEXT, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (2, 13)
        merged = again.merge_and_unload()
        assert (merged(TEXT).logits - want).abs().max() < 1e-4
    changed = {name for name, digest in tensor_hashes(merged.state_dict()).items() if digest != before[name]}
    kinds = [*ATTENTION, "w_gate_up", "w_down"] if "target_parameters" in targets else ATTENTION
    assert changed and all(any(kind in name for kind in kinds) for name in changed)


@pytest.mark.parametrize("which", ["exported", "exported_mixture"])
def test_one_step_of_direct_preference_optimisation(request, tmp_path, which):
    exported = request.getfixturevalue(which)
    trl = pytest.importorskip("trl", reason="wants the package trl: pip install -e '.[align]'")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from moe.hf import architecture

    architecture.register()
    pairs = Dataset.from_list([
        {"prompt": "the left lung", "chosen": " is clear", "rejected": " claim paid"},
        {"prompt": "dose", "chosen": " 10 mg", "rejected": " x-ray left lung"},
    ])  # fmt: skip
    args = trl.DPOConfig(str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
                         report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True)
    model = load(exported)
    before = tensor_hashes(model.state_dict())
    trainer = trl.DPOTrainer(model, args=args, train_dataset=pairs,
                             processing_class=AutoTokenizer.from_pretrained(exported))
    loss = trainer.train().training_loss
    # log 2: the policy and its reference are equal before the step. Ordinary experts are balanced besides, owners' not.
    balance = model.config.router_aux_loss_coef * 2
    assert 0.693 < loss < 0.694 + balance and (balance > 0) == (which == "exported_mixture")
    after = tensor_hashes(trainer.model.state_dict())
    assert len([name for name in after if after[name] != before[name]]) > len(after) / 2
