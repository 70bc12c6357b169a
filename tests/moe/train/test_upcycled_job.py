"""A job that begins with an imported model, from the check of its config to the model that it writes: weights in
shards, more rows than tokens, and another family's tokens around a document."""

import json

import pytest
import torch

from moe import run_start
from moe.config_file import check
from moe.data.prepare import prepare
from moe.data.shards import PackedDocuments
from moe.errors import InputError
from moe.hf import folder as model_folder
from moe.hf.folder import ModelFolder
from moe.hf.writing import Writer
from moe.job.stages import plans
from moe.job.train import read_figures, train_job
from moe.model import Decoder
from moe.run_folder import RunFolder

ROWS = 300  # of the embedding; there are 280 tokens
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|endoftext|>",
            "chat_template": "{{ messages }}"}  # fmt: skip


@pytest.fixture
def imported(tmp_path, model_config, tokenizer):
    """The folder of a dense model as `polyclinic import` leaves it."""
    text = tokenizer.to_str().replace("<|bos|>", "<|endoftext|>").replace("<|eos|>", "<|im_start|>")
    theirs = type(tokenizer).from_str(text.replace("<|pad|>", "<|im_end|>"))
    folder, decoder = tmp_path / "imported", Decoder(model_config(num_heads=2, num_kv_heads=1), ROWS).initialise(3)
    model_folder.save(folder, ModelFolder(decoder.cast(torch.bfloat16), theirs, tokenizer_config=SETTINGS))
    (folder / "model.safetensors").unlink()
    writer = Writer(folder, shard_bytes=10_000)
    for name, tensor in decoder.state_dict().items():
        writer.put(name, tensor, [])
    writer.finish()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture
def config(values, imported, tmp_path):
    """A function: the job's config with some of it changed."""

    def job(vocab_size=ROWS):
        mixture = {"num_experts": 2, "top_k": 1, "d_ff": values["model"]["d_ff"]}
        return check({
            "run": values["run"] | {"folder": str(tmp_path / "runs"), "precision": "float32"},
            "tokenizer": {"vocab_size": vocab_size}, "model": values["model"] | {"mixture": mixture},
            "domains": {"text": values["public"]}, "train": values["anchor"] | {"steps": 2},
            "upcycle": {"model": str(imported)},
        })  # fmt: skip

    return job


def test_it_is_trained_and_keeps_its_tokenizer(process_group, config, imported):
    job = config()
    run_start.check(job)
    run = RunFolder(job.run.path)
    data, train = plans(job, run)
    assert all(isinstance(digest, str) for digest in train.settings["upcycle"]["model"])
    run.stage(data.name).mkdir(parents=True)
    prepare(job, run, "text")
    tokens = PackedDocuments(run.shards("text", "train")).tokens(0)
    assert tokens[0] == tokens[-1] == 0 and 0 not in tokens[1:-1]
    assert train_job(job, run, "the job's inputs", torch.device("cpu"), lambda row: False)
    assert 0 < read_figures(job, run)["bpb"] < 20
    model, dense = model_folder.load(run.model), model_folder.load(imported)
    assert len(model.decoder.embedding.weight) == ROWS and model.special == dense.special
    assert json.loads((run.model / "tokenizer_config.json").read_text()) == SETTINGS
    assert model.tokenizer.to_str() == dense.tokenizer.to_str()


def test_what_would_fail_late_is_refused_before(config, imported):
    with pytest.raises(InputError, match=rf"tokenizer\.vocab_size=280 \(it has {ROWS}\)"):
        run_start.check(config(vocab_size=280))
    settings = imported / "tokenizer_config.json"
    settings.write_text(json.dumps(SETTINGS | {"eos_token": None}))
    with pytest.raises(InputError, match="imported: the tokenizer has no tokens to begin and to end a document"):
        run_start.check(config())
    settings.write_text(json.dumps(SETTINGS))
    run_start.check(config())
    next(imported.glob("model-00001-*")).unlink()
    with pytest.raises(InputError, match="model-00001-of-.* is missing, which model.safetensors.index.json names"):
        run_start.check(config())
