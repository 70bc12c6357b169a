"""Config files: every refusal names the key, its value and what was wanted; files and overrides merge; dump reads
back."""

from pathlib import Path

import pytest
import yaml

from moe.config import SpecialtyConfig
from moe.config_file import check, dump, load
from moe.errors import InputError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
ABSENT = object()


@pytest.fixture
def write(tmp_path):
    """A function: write a config file; a dict becomes YAML."""

    def file(content: dict | str | bytes, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        text = yaml.safe_dump(content, sort_keys=False) if isinstance(content, dict) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return file


def put(values: dict, key: str, value: object) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    if value is ABSENT:
        del values[last]
    else:
        values[last] = value


def refuse(key, value, *said, id):
    return pytest.param(key, value, said, id=id)


NOISE = {"noise_documents": 5}


@pytest.mark.parametrize(
    "key, value, said",
    [
        refuse("anchor.stepz", 3, "anchor.stepz", "no such key", "did you mean anchor.steps?", id="typo"),
        refuse("runs", {}, "runs", "no such key", "did you mean run?", id="typo-of-a-section"),
        refuse(
            "owners.billing.data.max_character", 3, "owners.billing.data.max_character", "no such key",
            "did you mean owners.billing.data.max_characters?", id="typo-below-an-owner",
        ),
        refuse("model.zzz", 3, "model.zzz", "no such key", id="unlike-any-key"),
        refuse("pack.train.steps", -3, "pack.train.steps", "-3", "greater than 0", id="negative-size"),
        refuse("anchor.steps", 0, "anchor.steps=0", "want at least 1, or base.model", id="nothing-to-begin-with"),
        refuse("model.d_ff", 0, "model.d_ff", "0", "greater than 0", id="zero-size"),
        refuse("anchor.steps", "many", "anchor.steps", "'many'", "integer", id="text-for-a-number"),
        refuse("anchor.steps", 2.5, "anchor.steps", "2.5", "integer", id="a-fraction-of-a-step"),
        refuse("anchor.steps", "3", "anchor.steps", "'3'", "integer", id="a-quoted-number"),
        refuse("run.seed", True, "run.seed", "True", "integer", id="yes-for-a-number"),
        refuse("run.precision", "float8", "run.precision", "'float8'", "'bfloat16'", id="not-one-of-the-choices"),
        refuse("pack.replay_share", 1.0, "pack.replay_share", "1.0", "less than 1", id="share-of-one"),
        refuse("calibration", {"rho": 0.0}, "calibration.rho", "0.0", "greater than 0", id="rho-zero"),
        refuse("tokenizer.vocab_size", 259, "tokenizer.vocab_size", "259", "260", id="vocabulary-below-the-bytes"),
        refuse("model", 3, "model", "3", "dictionary", id="number-for-a-section"),
        refuse("run.seed", ABSENT, "run.seed", "missing", id="missing-key"),
        refuse("public", ABSENT, "public", "missing", id="missing-section"),
        refuse("owners.billing.data", ABSENT, "owners.billing.data", "missing", id="owner-without-data"),
        refuse("owners.billing.slot", 2, "slot=2", "owners.billing", "owners.radiology", id="slot-twice"),
        refuse("owners.billing.slot", 0, "owners.billing.slot", "0", "greater than 0", id="the-anchors-slot"),
        refuse("owners.billing.slot", 16, "owners.billing.slot=16", "num_slots=16", id="slot-beyond-the-table"),
        refuse("owners.public", {"slot": 3, "data": NOISE}, "owners.public", "'public'", id="owner-named-public"),
        refuse("owners.anchor", {"slot": 3, "data": NOISE}, "owners.anchor", id="owner-named-as-slot-0-is"),
        refuse("owners.A-B", {"slot": 3, "data": NOISE}, "owners.A-B", "lower-case", id="owner-that-is-no-name"),
        refuse("owners", {}, "owners", "empty", "at least one", id="no-owners"),
        refuse(
            "public.demonstration", "public", "public", "demonstration and noise_documents", "exactly one",
            id="two-sources",
        ),
        refuse("owners.billing.data", {}, "owners.billing.data", "no source", "exactly one", id="no-source"),
        refuse("public.held_out", ["a.jsonl"], "held_out", "want both or neither", id="held-out-of-what"),
        refuse("anchor.batch_size", 6, "anchor.batch_size=6", "2 * 2", "multiple", id="batch-over-two-workers"),
        refuse("pack.train.batch_size", 5, "pack.train.batch_size=5", "2 * 1", "multiple", id="batch-of-a-pack"),
        refuse("model.num_heads", 3, "model.d_model=32", "multiple", "6", id="heads-do-not-divide-the-width"),
        refuse("model.num_heads", 32, "model.d_model=32", "multiple", "64", id="odd-head-size"),
        refuse("model.head_dim", 7, "model.head_dim=7", "even", id="odd-head-dim"),
        refuse("model.rotary_dim", 18, "model.rotary_dim=18", "at most", "16", id="more-turned-than-a-head-has"),
        refuse("model.rotary_dim", 3, "model.rotary_dim=3", "even", id="half-a-pair-turned"),
        refuse("model.num_kv_heads", 3, "model.num_kv_heads=3", "model.num_heads=2", "divisor", id="key-heads"),
        refuse("model.top_k", 17, "model.top_k=17", "num_slots=16", id="more-experts-than-slots"),
        refuse("model.top_k", 1, "model.top_k=1", "at least 2", id="no-room-for-anchor-and-owner"),
        refuse(
            "model.rope_scaling",
            {"kind": "llama3", "factor": 8.0, "original_context": 64, "low_frequency_factor": 5.0},
            "low_frequency_factor=5.0", "less than high_frequency_factor=4.0", id="stretched-positions-crossed",
        ),
        refuse(
            "model.rope_scaling", {"kind": "linear", "factor": 8.0, "original_context": 64},
            "rope_scaling", "llama3", id="an-unknown-stretch",
        ),
        refuse("run.name", "../elsewhere", "run.name", "'../elsewhere'", "letters", id="a-name-that-is-a-path"),
        refuse("run.name", "", "run.name", "''", "letters", id="an-empty-name"),
        refuse("anchor.learning_rate", float("nan"), "anchor.learning_rate", "nan", id="not-a-number"),
        refuse("anchor.learning_rate", float("inf"), "anchor.learning_rate", "inf", id="an-endless-learning-rate"),
        refuse("public", {"documents": ["a.jsonl"], "max_characters": 9}, "max_characters", id="a-cap-not-kept"),
    ],
)  # fmt: skip
def test_refusals_name_key_value_and_want(values, key, value, said):
    put(values, key, value)
    with pytest.raises(InputError) as refused:
        check(values)
    for part in said:
        assert part in str(refused.value)


def test_all_that_is_wrong_is_said_at_once(values):
    put(values, "anchor.steps", -1)
    put(values, "model.d_modl", 3)
    with pytest.raises(InputError, match=r"model\.d_modl.*anchor\.steps"):
        check(values)


@pytest.mark.parametrize("override", ["anchor.steps", "", "=4"])
def test_an_override_is_a_key_and_a_value(values, write, override):
    with pytest.raises(InputError, match="want key=value") as refused:
        load(write(values), [override])
    assert repr(override) in str(refused.value)


@pytest.mark.parametrize(
    "override, said",
    [
        pytest.param("anchor.steps=[1", "anchor.steps", id="broken-yaml"),
        pytest.param("anchor.steps.x=3", "anchor.steps", id="a-section-where-a-number-stands"),
        pytest.param("anchor=[1,2]", "anchor", id="a-list-where-a-section-stands"),
        pytest.param("run.name=${nobody}", "nobody", id="an-interpolation-of-nothing"),
    ],
)
def test_an_override_that_does_not_fit_is_named(values, write, override, said):
    with pytest.raises(InputError) as refused:
        load(write(values), [override])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "content, said",
    [
        pytest.param("run: [", "not YAML", id="broken-yaml"),
        pytest.param("run: {seed: 1, seed: 2}", "not YAML", id="a-key-twice"),
        pytest.param("[1, 2]", "want sections", id="a-list"),
        pytest.param(b"run: {name: caf\xe9}", "config.yaml", id="not-utf-8"),
        pytest.param("extends: nowhere.yaml", "nowhere.yaml", id="extends-a-missing-file"),
        pytest.param("extends: 3", "extends", id="extends-a-number"),
        pytest.param("extends: [3]", "extends", id="extends-a-list-of-numbers"),
        pytest.param("", "neither owners nor train", id="empty"),
    ],
)
def test_a_file_that_is_no_config_is_named(write, content, said):
    with pytest.raises(InputError) as refused:
        load(write(content))
    assert said in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.yaml cannot be read: No such file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_a_file_that_extends_itself_is_refused_with_its_chain(write):
    write("extends: a.yaml", "b.yaml")
    with pytest.raises(InputError, match="extends itself: a.yaml -> b.yaml -> a.yaml"):
        load(write("extends: b.yaml", "a.yaml"))


def test_later_files_and_overrides_win_key_by_key(values, write):
    write(values, "base.yaml")
    write({"anchor": {"steps": 7, "clip": 3.0}}, "middle.yaml")
    (write(values, "base.yaml").parent / "deep").mkdir()
    child = write({"extends": ["../base.yaml", "../middle.yaml"], "anchor": {"clip": 2.0}}, "deep/child.yaml")
    config = load(child, ["run.name=over", "anchor.beta1=0.5", "owners.billing.slot=5"])
    assert (config.anchor.steps, config.anchor.clip, config.anchor.beta1) == (7, 2.0, 0.5)
    assert (config.anchor.batch_size, config.run.name) == (4, "over")  # from the base, from the override
    assert config.owners["billing"].slot == 5 and config.owners["billing"].data == config.owners["radiology"].data


def test_the_last_of_two_overrides_wins(values, write):
    assert load(write(values), ["anchor.steps=3", "anchor.steps=4"]).anchor.steps == 4


def test_null_removes_an_owner(values, write):
    assert list(load(write(values), ["owners.billing=null"]).owners) == ["radiology"]
    write(values, "base.yaml")
    child = write({"extends": "base.yaml", "owners": {"radiology": None}}, "child.yaml")
    assert list(load(child).owners) == ["billing"]


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_configs_load_and_read_back(path, write):
    config = load(path)
    assert load(write(dump(config), "again.yaml")) == config


def test_dump_reads_back_what_is_hard_to_spell(values, write):
    put(values, "run.name", "2024")  # would be a number without its quotes
    put(values, "anchor.learning_rate", 1e-5)  # YAML's own rule reads 1e-05 as text
    put(values, "public", {"documents": ["a b.jsonl", "c.parquet"], "held_out": ["d.jsonl"]})
    put(values, "deepspeed", {"zero_optimization": {"overlap_comm": False}, "list": [1, "x", None]})
    config = check(values)
    again = load(write(dump(config)))
    assert again == config and isinstance(again.public.documents[0], Path)


def test_every_path_becomes_absolute_and_nothing_else_changes(values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(values, "owners.billing.data", {"documents": ["a.jsonl", "/b.jsonl"], "held_out": ["c.jsonl"]})
    put(values, "run.folder", "runs")
    put(values, "deepspeed", {"zero_optimization": {"overlap_comm": False}})
    config = check(values)
    absolute = config.with_absolute_paths()
    data = absolute.owners["billing"].data
    assert data.documents == (tmp_path / "a.jsonl", Path("/b.jsonl")) and data.held_out == (tmp_path / "c.jsonl",)
    assert absolute.run.folder == tmp_path / "runs"
    put(values, "owners.billing.data", {"documents": [f"{tmp_path}/a.jsonl", "/b.jsonl"],
                                        "held_out": [f"{tmp_path}/c.jsonl"]})  # fmt: skip
    put(values, "run.folder", str(tmp_path / "runs"))
    assert absolute == check(values) != config


def test_a_config_does_not_change(values):
    config = check(values)
    with pytest.raises(ValueError, match="frozen"):
        config.anchor.steps = 3
    assert isinstance(config, SpecialtyConfig) and config.run.path == Path("runs/test")
