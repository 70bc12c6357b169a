"""The page of a run: whole in itself, the same every time, and plain about what was missed."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from moe.errors import InputError
from moe.report.page import write_page
from moe.run_folder import RunFolder


@pytest.fixture(scope="module")
def pages(tmp_path_factory, specialty_run, job_run):
    """Of a specialty run that meets every bound, and of a job."""
    made = {"specialty": specialty_run(tmp_path_factory.mktemp("run")), "job": job_run(tmp_path_factory.mktemp("run"))}
    return {kind: write_page(run).read_text() for kind, run in made.items()}


@pytest.fixture(params=["specialty", "job"])
def page(request, pages):
    return pages[request.param]


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
    tags = Tags(page).seen
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = [target for pair in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', page) for target in pair if target]
    wanted += [attributes[key] for _, attributes in tags for key in ("aria-labelledby", "aria-describedby")
               if key in attributes]
    assert wanted and set(wanted) <= set(ids)


@pytest.mark.parametrize("kind, titles", [
    ("specialty", ["Training loss", "Held-out bits per byte during training", "Learning rate and gradient norm",
                   "Bits per byte against every baseline", "Who answers for which text", "Routing purity by layer",
                   "The same, layer by layer", "Throughput"]),
    ("job", ["Training loss", "Held-out bits per byte during training", "Learning rate and gradient norm",
             "Balance of the router", "Load of each expert by layer", "Which text uses which expert",
             "How far domains are apart, by layer", "Throughput"]),
])  # fmt: skip
def test_plots_are_named_and_follow_the_page(kind, titles, pages):
    svgs = re.findall(r"<svg.*?</svg>", pages[kind], flags=re.DOTALL)
    assert sorted(re.search(r"<title[^>]*>(.*?)</title>", svg)[1] for svg in svgs) == sorted(titles)
    for svg in svgs:
        assert 'role="img"' in svg and len(re.search(r"<desc[^>]*>(.*?)</desc>", svg)[1]) > 40
        assert "<text" in svg and "var(--ink)" in svg
        assert not re.findall(r"#[0-9a-f]{6}\b", svg), "a colour that dark mode cannot change"


def test_two_writes_give_the_same_bytes(specialty_run, tmp_path):
    run = specialty_run(tmp_path)
    first = write_page(run).read_bytes()
    assert write_page(run).read_bytes() == first


def test_no_place_on_a_machine_is_told(pages):
    """Of absolute paths only the last part leaves the run's folder: of those in its config and in what a job said."""
    assert "…/reports.jsonl" in pages["specialty"] and "/private" not in pages["specialty"]
    assert "…/job" in pages["job"] and "someone" not in pages["job"]


def test_says_what_the_data_is(pages):
    page = pages["specialty"]
    assert "The text of public comes from the built-in demonstration corpus" in " ".join(page.split())
    assert page.count("<b>code-tables==1.5.0</b> public domain") == 1
    assert page.count("licence not recorded in the run") == 2  # the owners' files
    assert "1,234" in page and "missing or damaged" not in page


def test_names_are_escaped(specialty_run, change_json, tmp_path):
    run = specialty_run(tmp_path)
    change_json(run.manifest, notice="<u>&$x$ \"no\" 'clinical' use.")
    (run.config).write_text(run.config.read_text().replace("name: toy", "name: <u>toy"))
    html = write_page(run).read_text()
    assert "<u>" not in html and "&lt;u&gt;&amp;$x$" in html and "&lt;u&gt;toy" in html


@pytest.mark.parametrize("owners, num_layers, steps", [
    pytest.param(("solo",), 1, 1, id="one-owner-one-layer-one-step"),
    pytest.param(tuple(f"specialty_{i}" for i in range(9)), 9, 301, id="too-many-for-numbers-and-for-points"),
])  # fmt: skip
def test_sizes_of_specialty_runs(owners, num_layers, steps, specialty_run, tmp_path):
    html = write_page(specialty_run(tmp_path, owners, num_layers, steps)).read_text()
    assert all(f"layer {layer}<" in html for layer in range(num_layers))
    assert ("by construction" in html) == (len(owners) == 1)
    assert ("mean of up to 2 updates" in html) == (steps == 301)
    assert len(html) < 1_500_000


@pytest.mark.parametrize("more, wanted, absent", [
    pytest.param({"dense": True}, "dense, 3 layers", "Routing", id="dense"),
    pytest.param({"domains": ("public",)}, "Which text uses which", "How far domains are apart", id="one-domain"),
    pytest.param({"num_experts": 2048}, "fullest", "Which text uses which expert", id="too-many-experts-for-cells"),
])  # fmt: skip
def test_sizes_of_jobs(more, wanted, absent, job_run, tmp_path):
    html = write_page(job_run(tmp_path, **more)).read_text()
    assert wanted in html and absent not in html
    assert len(html) < 1_500_000


def test_without_metrics(specialty_run, tmp_path):
    run = specialty_run(tmp_path)
    for job in ("anchor", "pack-billing", "pack-radiology"):
        (run.stage(job) / "metrics.jsonl").unlink()
    assert "metrics of the training jobs are not in this folder" in write_page(run).read_text()


def test_figures_that_are_no_number(specialty_run, tmp_path):
    """JSON has null for them."""
    run = specialty_run(tmp_path)
    path = run.stage("anchor") / "metrics.jsonl"
    path.write_text(re.sub(r'"(loss|gradient_norm)": [\d.]+', r'"\1": null', path.read_text()))
    html = write_page(run).read_text()
    assert "not finite" in html and "4 updates of anchor" in html


def test_a_run_that_has_not_finished(specialty_run, tmp_path):
    run = specialty_run(tmp_path, finished=False)
    shutil.rmtree(run.stage("pack-radiology"))
    (run.stage("pack-billing") / "DONE").unlink()
    html = write_page(run).read_text()
    assert "Not finished." in html and "claims" not in html.split("</style>")[1]
    jobs = re.findall(r"<li><b>(.*?)</b>, (.*?)</li>", html)
    assert jobs == [("anchor: update 4 of 4", "finished"), ("pack-billing: update 4 of 4", "finished"),
                    ("pack-radiology: update 0 of 4", "not started")]


def test_results_of_an_earlier_config_are_not_shown(specialty_run, change_json, tmp_path):
    run = specialty_run(tmp_path)
    change_json(run.results, config_hash="f00d")
    html = write_page(run).read_text()
    assert "results.json is of an earlier config, and not shown here" in html and "Verdict" not in html


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
def test_what_is_no_run_is_refused(name, specialty_run, tmp_path):
    run = specialty_run(tmp_path)
    (run.path / name).unlink()
    with pytest.raises(InputError, match=rf"is no run: it has no {name}"):
        write_page(run)
    assert not run.report.exists()


@pytest.mark.parametrize("config, said", [
    ("", "config.yaml has no section anchor"),
    ("run: {name: toy}\ndomains: {}", "config.yaml has no section balance"),
    ("run: [", "config.yaml is not YAML"),
    ("[run]", "config.yaml has no section"),
])  # fmt: skip
def test_a_damaged_config_is_refused(config, said, specialty_run, tmp_path):
    run = specialty_run(tmp_path)
    run.config.write_text(config)
    with pytest.raises(InputError, match=said):
        write_page(run)


def test_results_of_another_version_are_refused(specialty_run, change_json, tmp_path):
    run = specialty_run(tmp_path)
    change_json(run.results, schema=2)
    with pytest.raises(InputError, match="has schema 2: this version reads schema 1"):
        write_page(run)


def test_damaged_results_are_refused(specialty_run, tmp_path):
    run = specialty_run(tmp_path)
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
