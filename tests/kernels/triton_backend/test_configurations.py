import json

import pytest
import torch

from kernels.triton_backend import configurations
from kernels.triton_backend.configurations import Configuration, check, choose, load

ENTRY = dict(product="up", kind="half", block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3)
X = torch.zeros(1, dtype=torch.float16)


@pytest.fixture
def configured(tmp_path, monkeypatch):
    def use(*entries):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"entries": entries}))
        monkeypatch.setenv(configurations.VARIABLE, str(path))
        return path
    return use


@pytest.mark.parametrize("path", sorted(configurations.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_files_that_ship_are_whole(path):
    """Every product has an entry that takes any width and any number of rows, in both kinds of float."""
    general = {(e.product, e.kind) for e in load(path) if (e.columns, e.depth, e.max_rows) == (None, None, None)}
    assert general == {(product, kind) for product in configurations.PRODUCTS for kind in ("half", "float32")}


def test_the_first_that_fits_is_taken(configured):
    configured(ENTRY | dict(columns=256, depth=512, block_n=16), ENTRY | dict(max_rows=64, block_m=32), ENTRY)
    assert choose("up", X, 256, 512, 1000).block_n == 16
    assert choose("up", X, 256, 128, 1000) == Configuration(**ENTRY)
    assert choose("up", X, 256, 128, 64.9).block_m == 32
    assert choose("up", X, 256, 128, 65).block_m == 64


def test_without_an_entry_that_fits(configured):
    configured(ENTRY | dict(columns=256))
    with pytest.raises(ValueError, match="has no configuration of up in half for 128 columns"):
        choose("up", X, 128, 512, 10)


def test_a_forced_file_must_exist(monkeypatch):
    monkeypatch.setenv(configurations.VARIABLE, "/nowhere.json")
    with pytest.raises(ValueError, match="POLYCLINIC_CONFIGS=/nowhere.json: no such file"):
        choose("up", X, 128, 512, 10)


@pytest.mark.parametrize("text, message", [
    pytest.param("{", "cannot be read as configurations", id="no-json"),
    pytest.param("{}", "cannot be read as configurations: 'entries'", id="no-entries"),
    pytest.param(json.dumps({"entries": [ENTRY | dict(blocks=1)]}), "argument .blocks.", id="typo"),
    pytest.param(json.dumps({"entries": [ENTRY | dict(product="down")]}), "product .down.: want one of", id="product"),
])
def test_a_damaged_file_is_refused(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path)


FEW = dict(max_rows=64)


@pytest.mark.parametrize("product, entries, fits", [
    pytest.param("up", [FEW, dict(block_k=32)], False, id="another-order-of-the-sum"),
    pytest.param("up", [FEW, dict(block_m=32, block_n=32)], True, id="another-tile"),
    pytest.param("down_backward", [FEW, dict(block_n=32)], False, id="other-partial-sums"),
    pytest.param("down_backward", [FEW, dict(block_m=128)], False, id="partial-sums-by-other-threads"),
    pytest.param("down_backward", [FEW, dict(block_m=128, num_warps=8)], True, id="as-many-rows-a-warp"),
    pytest.param("up", [dict(columns=128, block_k=32), FEW, {}], True, id="other-widths-first"),
    pytest.param("up", [FEW, dict(columns=128, block_k=32), {}], False, id="other-widths-meet-the-general-few"),
    pytest.param("up", [dict(columns=128, block_k=32, **FEW), {}], False, id="other-widths-meet-the-general-many"),
    pytest.param("up", [dict(kind="float32", block_k=32, **FEW), {}], True, id="another-kind"),
    pytest.param("up", [{}, dict(block_k=32, **FEW)], True, id="never-met"),
])
def test_the_number_of_rows_may_not_change_the_order_of_a_sum(product, entries, fits):
    given = [Configuration(**ENTRY | dict(product=product) | entry) for entry in entries]
    if fits:
        check(given, "here")
    else:
        with pytest.raises(ValueError, match=f"here: {product} in half adds up in the orders .* want one"):
            check(given, "here")


def test_an_unlisted_architecture_takes_what_runs_there_too():
    """Of its own generation; or sm_80's, whose instructions all later ones have, and which needs little memory."""
    assert configurations.older("sm_89") == ["sm_80"]
    assert configurations.older("sm_103") == ["sm_100", "sm_80"]
    assert configurations.older("sm_120") == ["sm_80"]
    assert configurations.older("sm_75") == [] and configurations.older("gfx950") == []
