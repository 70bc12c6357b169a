"""What is wrong with a run's input is said before anything starts."""

import pytest

from moe import run_start
from moe.config_file import check
from moe.errors import InputError
from moe.hf import folder


@pytest.fixture
def upcycled(values, make_anchor, tmp_path):
    """A function: a job that upcycles the small anchor, some of its model changed."""
    folder.save(tmp_path / "dense", make_anchor())

    def config(source="dense", **model):
        sizes = make_anchor().decoder.config.model_dump(exclude_none=True) | model
        mixture = {"num_experts": 4, "top_k": 2, "d_ff": sizes["d_ff"]}
        return check({
            "run": values["run"], "tokenizer": values["tokenizer"], "model": sizes | {"mixture": mixture},
            "domains": {"public": values["public"]}, "train": values["anchor"],
            "upcycle": {"model": str(tmp_path / source)},
        })  # fmt: skip

    return config


def test_a_model_that_fits_is_upcycled(upcycled):
    run_start.check(upcycled())


@pytest.mark.parametrize("changed, said", [
    pytest.param({"source": "absent"}, "absent is not a whole model folder", id="no-such-model"),
    pytest.param({"num_layers": 3}, r"does not fit model\.num_layers=3 \(it has 2\)", id="layers"),
    pytest.param({"d_ff": 48}, r"model\.d_ff=48 \(it has 24\)", id="width"),
])  # fmt: skip
def test_a_model_that_does_not_fit_is_refused(upcycled, changed, said):
    with pytest.raises(InputError, match=said):
        run_start.check(upcycled(**changed))


def test_every_domain_is_looked_at(values, tmp_path):
    missing = str(tmp_path / "absent.jsonl")
    job = {key: values[key] for key in ("run", "tokenizer", "model")} | {"train": values["anchor"]}
    wrong = {"documents": [missing]}
    for config in (values | {"owners": {"billing": {"slot": 1, "data": wrong}}},
                   job | {"domains": {"public": values["public"], "billing": wrong}}):
        with pytest.raises(InputError, match="billing: .*absent.jsonl does not exist"):
            run_start.check(check(config))


def test_a_backend_that_does_not_run_here_is_refused(values):
    config = check(values | {"run": values["run"] | {"backend": "triton", "precision": "float32"}})
    assert run_start.resolve(config, use_gpu=True).run == config.run
    with pytest.raises(InputError, match="run.backend=triton: no worker has a GPU"):
        run_start.resolve(config, use_gpu=False)
