"""The page of a run: whole in itself, the same every time, and plain about what was missed."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from moe.errors import InputError
from moe.report.claims import claims
from moe.report.page import write_page
from moe.run_folder import RunFolder

RHO = 0.05
HASH = "0123456789abcdef" * 4


def results_of(owners=("billing", "radiology"), num_layers=2):
    """Figures that meet every bound."""

    def texts(anchor, merged, alone):
        return {"anchor_bpb": anchor, "merged_bpb": merged, "without_bpb": {o: alone.get(o, merged) for o in owners}}

    share = {
        text: {expert: 0.9 if expert == text else 0.1 / len(owners) for expert in ("anchor", *owners)}
        for text in ("public", *owners)
    }
    return {
        "schema": 1,
        "config_hash": HASH,
        "commit": None,
        "device": "CPU, 2 cores",
        "anchor_hash": HASH,
        "model_hash": HASH,
        "wall_s": {f"data-{owners[0]}": 61.7, "anchor": 8.25, "later-stage": 7500.0},
        "public": {**texts(3.0, 3.01, {}), "win_rate": dict.fromkeys(owners, RHO + 0.004)},
        "specialties": {
            owner: {**texts(4.0, 3.2, {owner: 4.01}), "pack_bpb": 3.19, "without_owner_bpb": 4.01} for owner in owners
        },
        "optout": {"subsets": 2 ** len(owners), "bitwise_equal": True, "plain_router_differs": True},
        "routing": {
            "purity": dict.fromkeys(owners, 0.9),
            "purity_by_layer": {owner: [0.9] * num_layers for owner in owners},
            "share": share,
            "share_by_layer": {text: [row] * num_layers for text, row in share.items()},
        },
        "throughput": {"anchor": {"tokens_per_s": 1234.5, "mfu": 0.31, "peak_memory_bytes": 2**30, "world_size": 2}},
    }


def fake_run(folder, results, name="toy", steps=4):
    """A finished run's folder, as far as the page reads it."""
    run, owners = RunFolder(folder), list(results["specialties"])

    def put(path, value):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))

    data = {"demonstration": None, "documents": ["/private/reports.jsonl"], "noise_documents": None}
    config = {
        "run": {"name": name},
        "public": {**data, "demonstration": "public"},
        "owners": {owner: {"slot": slot, "data": data} for slot, owner in enumerate(owners, 1)},
        "calibration": {"rho": RHO},
        "evaluation": {"optout_tokens": 1024},
    }
    put(run.results, results)
    put(run.config, json.dumps(config))  # JSON is YAML
    put(run.manifest, {"config_hash": HASH, "versions": {"python": "3.11"}, "notice": "Not for clinical use."})
    for job in ("anchor", *(f"pack-{owner}" for owner in owners)):
        rows = [{"step": step, "loss": 7 - step / steps} for step in range(1, steps + 1)]
        rows[-1]["held_out_bpb"] = 3.0
        put(run.stage(job) / "metrics.jsonl", "\n".join(map(json.dumps, rows)) + '\n{"step": 5, "lo')
    counts = {f"{split}_{unit}": 1234 for split in ("train", "eval") for unit in ("documents", "tokens", "bytes")}
    put(run.stage("data-public") / "DONE", {"outputs": counts})
    put(run.shards("public", "train") / "manifest.json", {"documents": 1234})
    for slot, owner in enumerate(owners, 1):
        pack = {"owner": owner, "slot": slot, "anchor_hash": HASH, "tensors": {"row": HASH}, "training": HASH}
        put(run.pack(owner) / "pack.json", pack)
    return run


def html_of(folder, results, **options):
    return write_page(fake_run(folder, results, **options)).read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of a run that meets every bound."""
    return html_of(tmp_path_factory.mktemp("run"), results_of())


class Tags(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, html):
        super().__init__()
        self.seen = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))


def test_is_self_contained(page):
    tags = Tags(page).seen
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        assert not {"src", "srcset", "data", "action"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("href", "#").startswith("#"), tag
    assert not re.search("https?:|@import", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_ids_are_unique_and_found(page):
    ids = [attributes["id"] for _, attributes in Tags(page).seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', page)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_plots_are_named_and_follow_the_page(page):
    plots = [attributes for tag, attributes in Tags(page).seen if tag == "svg"]
    assert len(plots) == 5
    assert all(plot["role"] == "img" and len(plot["aria-label"]) > 40 for plot in plots)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert "<text" in svg and "var(--ink)" in svg
        assert not re.findall(r"#[0-9a-f]{6}\b", svg), "a colour that dark mode cannot change"


def test_two_writes_give_the_same_bytes(tmp_path):
    run = fake_run(tmp_path, results_of())
    first = write_page(run).read_bytes()
    assert write_page(run).read_bytes() == first


def test_all_met(page):
    assert "All 8 claims are met" in page
    assert "missed" not in page.split("</style>")[1]


MISSES = [
    pytest.param("Specialty gain", ["specialties", "radiology"], {"merged_bpb": 3.6004}, id="gain-9.99-percent"),
    pytest.param("Public text kept", ["public"], {"anchor_bpb": 2.97}, id="public-worse"),
    pytest.param("Opt-out is exact", ["optout"], {"bitwise_equal": False}, id="a-bit-differs"),
    pytest.param("Opt-out is exact", ["optout"], {"subsets": 3}, id="a-subset-not-compared"),
    pytest.param("Control of the opt-out check", ["optout"], {"plain_router_differs": False}, id="check-cannot-fail"),
    pytest.param("Routing purity", ["routing", "purity"], {"billing": 0.79}, id="impure"),
    pytest.param("Routing purity", ["routing", "purity"], {"billing": float("nan")}, id="not-a-number-is-a-miss"),
    pytest.param("Win rate on public text", ["public", "win_rate"], {"billing": 0.039}, id="wins-too-seldom"),
    pytest.param("Win rate on public text", ["public", "win_rate"], {"billing": 0.061}, id="wins-too-often"),
    pytest.param("Removal removes", ["specialties", "billing"], {"without_owner_bpb": 3.97}, id="still-knows"),
    pytest.param("Removal spares the others", ["public", "without_bpb"], {"billing": 3.03}, id="public-moved"),
    pytest.param(
        "Removal spares the others", ["specialties", "billing", "without_bpb"], {"radiology": 3.18}, id="other-moved"
    ),
]


@pytest.mark.parametrize("claim, where, figures", MISSES)
def test_a_miss_is_a_miss(claim, where, figures):
    results = results_of()
    assert all(c.holds for c in claims(results, RHO))
    section = results
    for key in where:
        section = section[key]
    section.update(figures)
    missed = [c.name for c in claims(results, RHO) if not c.holds]
    allowed = {claim, "Removal spares the others"} if claim == "Specialty gain" else {claim}  # it is against the merge
    assert claim in missed and set(missed) <= allowed


def test_a_miss_is_shown(tmp_path):
    results = results_of()
    results["specialties"]["radiology"]["merged_bpb"] = 3.6004
    results["specialties"]["radiology"]["without_bpb"]["billing"] = 3.6004
    results["optout"]["bitwise_equal"] = False
    html = html_of(tmp_path, results)
    assert "6 of 8 claims are met" in html and "specialty gain and opt-out is exact" in html
    assert "9.99\u00a0%" in html, "rounded to 10.0 % it would look met"
    assert "Removal is NOT exact" in html and "Some bits were different" in html
    row = re.search(r"<tr>\s*<th scope=\"row\">Specialty gain.*?</tr>", html, flags=re.DOTALL).group()
    assert row.count("✓") == 1 and row.count("✗") == 2  # billing; radiology and the claim
    assert "at least 10\u00a0%" in row


def test_a_figure_on_its_bound_meets_it():
    results = results_of()
    results["specialties"]["billing"].update(anchor_bpb=1.0, merged_bpb=0.9, without_owner_bpb=1.005)
    results["specialties"]["billing"]["without_bpb"] = {"billing": 1.005, "radiology": 0.9}
    results["public"]["win_rate"] = {"billing": 0.04, "radiology": 0.06}
    assert all(c.holds for c in claims(results, RHO))


def test_little_to_remove_is_said(tmp_path):
    results = results_of()
    results["specialties"]["billing"].update(merged_bpb=3.999, without_owner_bpb=4.0)
    assert "little to remove" in html_of(tmp_path, results)


def test_names_are_escaped(tmp_path):
    html = html_of(tmp_path, results_of(owners=("<u>&$x$", 'a"b')), name="<u>run")
    assert "<u>" not in html and "&lt;u&gt;&amp;$x$" in html and "&lt;u&gt;run" in html
    labels = [attributes["aria-label"] for tag, attributes in Tags(html).seen if tag == "svg"]
    assert len(labels) == 5 and all("<u>&$x$" in label and 'a"b' in label for label in labels)


def test_says_what_the_data_is(page):
    assert "The text of public comes from the built-in demonstration corpus" in page
    assert "reports.jsonl" in page and "1,234" in page
    assert page.count("not on this machine") == 2  # the owners' data


@pytest.mark.parametrize(
    "owners, num_layers, steps",
    [
        pytest.param(("solo",), 1, 1, id="one-owner-one-layer-one-step"),
        pytest.param(tuple(f"specialty_{i}" for i in range(9)), 9, 301, id="too-many-for-numbers-and-for-points"),
    ],
)
def test_sizes(owners, num_layers, steps, tmp_path):
    html = html_of(tmp_path, results_of(owners, num_layers), steps=steps)
    assert all(f"layer {layer}<" in html for layer in range(num_layers))
    assert ("by construction" in html) == (len(owners) == 1)
    assert len(html) < 1_500_000


def test_without_metrics(tmp_path):
    run = fake_run(tmp_path, results_of())
    for job in ("anchor", "pack-billing", "pack-radiology"):
        (run.stage(job) / "metrics.jsonl").unlink()
    assert "metrics of the training jobs are not in this folder" in write_page(run).read_text()


def test_loss_that_is_not_finite(tmp_path):
    run = fake_run(tmp_path, results_of())
    (run.stage("anchor") / "metrics.jsonl").write_text('{"step": 1, "loss": Infinity}\n{"step": 2, "loss": NaN}\n')
    assert "not finite" in write_page(run).read_text()


@pytest.mark.parametrize("name", ["results.json", "config.yaml", "manifest.json"])
def test_no_finished_run_is_refused(name, tmp_path):
    run = fake_run(tmp_path, results_of())
    (run.path / name).unlink()
    with pytest.raises(InputError, match=rf"no finished run: it has no {name}"):
        write_page(run)
    assert not run.report.exists()


@pytest.mark.parametrize(
    "key, value, why",
    [
        pytest.param("schema", 2, "has schema 2", id="another-schema"),
        pytest.param("config_hash", "f00d", "of an earlier config", id="stale"),
    ],
)
def test_results_of_something_else_are_refused(key, value, why, tmp_path):
    with pytest.raises(InputError, match=why):
        html_of(tmp_path, {**results_of(), key: value})


def test_damaged_results_are_refused(tmp_path):
    run = fake_run(tmp_path, results_of())
    run.results.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        write_page(run)


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        write_page(RunFolder(tmp_path / "none"))


def test_imports_nothing_heavy():
    heavy = "{'torch', 'ray', 'deepspeed', 'transformers'} & set(sys.modules)"
    asked = [sys.executable, "-c", f"import sys, moe.report.page; sys.exit(str({heavy}) if {heavy} else 0)"]
    assert subprocess.run(asked, capture_output=True, text=True).stderr == ""
