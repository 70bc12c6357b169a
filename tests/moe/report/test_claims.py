"""A claim holds where every figure meets its bound, and a miss is shown as one."""

import re

import pytest

from moe.report.claims import claims
from moe.report.page import write_page

RHO = 0.05
OWNERS = ("billing", "radiology")

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


@pytest.fixture
def results(results_that_hold):
    return results_that_hold(OWNERS, 2)


@pytest.mark.parametrize("claim, where, figures", MISSES)
def test_a_miss_is_a_miss(claim, where, figures, results):
    assert all(c.holds for c in claims(results, RHO))
    section = results
    for key in where:
        section = section[key]
    section.update(figures)
    missed = [c.name for c in claims(results, RHO) if not c.holds]
    allowed = {claim, "Removal spares the others"} if claim == "Specialty gain" else {claim}  # it is against the merge
    assert claim in missed and set(missed) <= allowed


def test_a_figure_on_its_bound_meets_it(results):
    results["specialties"]["billing"].update(anchor_bpb=1.0, merged_bpb=0.9, without_owner_bpb=1.005)
    results["specialties"]["billing"]["without_bpb"] = {"billing": 1.005, "radiology": 0.9}
    results["public"]["win_rate"] = {"billing": 0.04, "radiology": 0.06}
    assert all(c.holds for c in claims(results, RHO))


def test_all_met_is_said(specialty_run, tmp_path):
    page = write_page(specialty_run(tmp_path)).read_text()
    assert "All 8 claims are met" in page
    assert "missed" not in page.split("</style>")[1]


def test_a_miss_is_shown(specialty_run, change_json, results, tmp_path):
    run = specialty_run(tmp_path)
    results["specialties"]["radiology"]["merged_bpb"] = 3.6004
    results["specialties"]["radiology"]["without_bpb"]["billing"] = 3.6004
    results["optout"]["bitwise_equal"] = False
    change_json(run.results, specialties=results["specialties"], optout=results["optout"])
    html = write_page(run).read_text()
    assert "6 of 8 claims are met" in html and "specialty gain and opt-out is exact" in html
    assert "9.99\u00a0%" in html, "rounded to 10.0 % it would look met"
    assert "Removal is NOT exact" in html and "Some bits were different" in html
    row = re.search(r"<tr>\s*<th scope=\"row\">Specialty gain.*?</tr>", html, flags=re.DOTALL).group()
    assert row.count("✓") == 1 and row.count("✗") == 2  # billing; radiology and the claim
    assert "at least 10\u00a0%" in row


@pytest.mark.parametrize("compared, equal, verdict, heading", [
    (64, True, True, "Removal is exact, bit for bit"),
    (64, False, False, "Removal is NOT exact"),
    (63, True, False, "Too little was compared"),
])  # fmt: skip
def test_of_many_owners_a_sample_of_subsets_is_compared(compared, equal, verdict, heading, specialty_run, change_json,
                                                        results_that_hold, tmp_path):  # fmt: skip
    owners = tuple(f"owner_{n}" for n in range(7))
    optout = {"subsets": compared, "bitwise_equal": equal, "plain_router_differs": True}
    found = next(c for c in claims(results_that_hold(owners, 2) | {"optout": optout}, RHO) if "exact" in c.name)
    assert found.holds == verdict and "64 of 128" in found.bound
    run = specialty_run(tmp_path, owners)
    change_json(run.results, optout=optout)
    page = " ".join(write_page(run).read_text().split())
    assert f"</span> {heading}" in page and f"{compared} of 128, nobody and everybody and a sample" in page
    assert "For every subset of owners" not in page


def test_little_to_remove_is_said(specialty_run, change_json, results, tmp_path):
    run = specialty_run(tmp_path)
    results["specialties"]["billing"].update(merged_bpb=3.999, without_owner_bpb=4.0)
    change_json(run.results, specialties=results["specialties"])
    assert "little to remove" in write_page(run).read_text()
