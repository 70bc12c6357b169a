"""What can be known of tuning without a device: what is tried, who wins, and that the file is read as it was meant."""

import dataclasses
import json
import time
from itertools import pairwise
from multiprocessing import active_children

import pytest
import torch

from kernels import reference, tune
from kernels.testing import errors, expert_choice
from kernels.triton_backend import configurations
from kernels.triton_backend.configurations import PRODUCTS, Configuration, choose, load
from kernels.tune import FEW, Problem, Shape, candidates, chosen, finalists, pick, problems, slowdowns

SHAPE = Shape(64, 32, 48, 4, 2)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def config(block_k=64, product="up", **changes):
    return Configuration(product, "half", 64, 64, block_k, 4, 3, **changes)


def problem(max_rows=None, product="up", columns=48, depth=32, shape=SHAPE):
    return Problem(product, "half", shape, columns, depth, max_rows=max_rows)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["half", "float32"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_candidates_are_pinned_and_fit(product, kind, target):
    made = candidates(product, kind, target)
    assert made == candidates(product, kind, target) and len(set(made)) == len(made) >= 6
    for c in made:
        assert (c.product, c.kind, c.columns, c.depth, c.max_rows) == (product, kind, None, None, None)
        assert tune.shared_memory(c) <= tune.SHARED.get(target, tune.SHARED["sm_90"])
        assert not c.tma or (target in ("sm_90", "sm_100") and kind == "half")


def test_shared_memory_by_hand():
    """Three stages of 64 rows and twice 64 columns by 64, two bytes each."""
    assert tune.shared_memory(config()) == 3 * (64 + 128) * 64 * 2


def test_problems_with_many_rows_come_first():
    found = problems([SHAPE, SHAPE._replace(D=64)], ["half"])
    assert [p.max_rows for p in found] == [None] * 12 + [FEW] * 12
    assert {p.product for p in found} == set(PRODUCTS)
    few = found[-1].shape
    assert few.T * few.K // few.E == tune.FEW_MEASURED


def test_flops_of_a_step():
    """The six of one shape are the products of the experts: 2 N D F each, up and the two of w_gate_up twice that."""
    N, D, F = SHAPE.T * SHAPE.K, SHAPE.D, SHAPE.F
    flops = [p.flops for p in problems([SHAPE], ["half"])[:6]]
    assert sum(flops) == 18 * N * D * F and sorted(flops) == sorted([2 * N * D * F] * 3 + [4 * N * D * F] * 3)


def test_finalists_are_of_every_order():
    times = {dataclasses.replace(config(), num_stages=s): float(s) for s in range(1, 6)}
    times[config(32)] = 99.0
    best = finalists(times)
    assert [c.num_stages for c in best[:3]] == [1, 2, 3] and best[3:] == [config(32)]


@pytest.mark.parametrize("many, few, want", [
    pytest.param({64: 1.0, 32: 1.5}, {64: 2.0, 32: 1.0}, 64, id="many-rows-decide"),
    pytest.param({64: 1.0, 32: 1.005}, {64: 2.0, 32: 1.0}, 32, id="alike-with-many-so-few-decide"),
    pytest.param({64: 1.0, 32: 1.005}, {64: 1.0}, 64, id="measured-with-few"),
])
def test_one_order_for_few_rows_and_many(many, few, want):
    entries = pick({problem(): {config(k): ms for k, ms in many.items()},
                    problem(FEW): {config(k): ms for k, ms in few.items()}})
    assert [(e.max_rows, e.block_k) for e in entries] == [(FEW, want), (None, want)]


def test_nothing_is_picked_without_many_rows():
    assert pick({problem(FEW): {config(): 1.0}}) == []


def test_slowdowns_are_means_over_what_all_have_run():
    a, b, c = map(config, (16, 32, 64))
    got = slowdowns([{a: 1.0, b: 2.0, c: 1.0}, {a: 8.0, b: 4.0}])
    assert got == {a: pytest.approx(2**0.5), b: pytest.approx(2**0.5)}


def measured_everywhere():
    """All products at two shapes; candidate 64 is the fastest at the second, 32 at the first."""
    found = {}
    for p in problems([SHAPE, SHAPE._replace(D=64, F=96)], ["half"]):
        slow = 1.2 if p.shape.D == 32 else 0.5
        found[p] = {config(32, p.product): 1.0, config(64, p.product): slow}
    return found


def test_the_file_is_read_as_it_was_meant(tmp_path, monkeypatch):
    general = [Configuration(product, kind, 16, 16, 16, 1, 1) for product in PRODUCTS for kind in ("half", "float32")]
    entries = chosen(measured_everywhere(), general)
    path = tmp_path / "device.json"
    tune.write(path, entries, measured_everywhere(), [SHAPE], "a device")
    assert load(path) == tuple(entries)
    content = json.loads(path.read_text())
    assert content["shapes"] == [list(SHAPE)] and len(content["measured"]) == 24 and content["versions"]["torch"]
    monkeypatch.setenv(configurations.VARIABLE, str(path))
    x = torch.zeros(1, dtype=torch.float16)
    assert choose("up", x, columns=48, depth=32, rows_per_expert=1000).block_k == 32
    assert choose("up", x, columns=96, depth=64, rows_per_expert=1000).block_k == 64
    assert choose("up", x, columns=96, depth=64, rows_per_expert=10).max_rows == FEW
    assert choose("up", x, columns=7, depth=7, rows_per_expert=1000).block_k == 64, "loses least over both"
    assert choose("up", x.float(), columns=48, depth=32, rows_per_expert=1000).block_m == 16, "not measured"


def test_what_no_time_was_left_for_keeps_its_defaults():
    general = [Configuration(product, "half", 16, 16, 16, 1, 1) for product in PRODUCTS]
    assert chosen({}, general) == general


def test_measure_gives_the_finalists_more_runs_and_ends_in_time():
    sound = {config(64), config(32), config(16, "rows")}
    asked = []

    def timer(calls, times):
        asked.append((len(calls), times))
        return [call() for call in calls]

    def calls(p, c, tensors):
        assert c.product == p.product and tensors.x.shape == (64, 32)
        return lambda: float(c.block_k)

    wanted = [problem(), problem(product="rows")]
    got = tune.measure(wanted, sound, timer, device="cpu", calls=calls)
    assert {p: {c.block_k: ms for c, ms in times.items()} for p, times in got.items()} == {
        wanted[0]: {64: 64.0, 32: 32.0}, wanted[1]: {16: 16.0}}
    assert asked == [(1, tune.SCREENED)] * 2 + [(2, tune.FINAL), (1, tune.SCREENED), (1, tune.FINAL)]
    assert tune.measure(wanted, sound, timer, deadline=0.0, device="cpu", calls=calls) == {}


def test_a_candidate_that_a_shape_refuses_is_out(capsys):
    def calls(p, c, tensors):
        if c.block_k == 64:
            raise RuntimeError("too large")
        return lambda: 1.0

    got = tune.measure([problem()], {config(64), config(32)}, lambda calls, times: [c() for c in calls], device="cpu",
                       calls=calls)
    assert list(got[problem()]) == [config(32)] and "RuntimeError" in capsys.readouterr().out


def test_every_product_can_be_launched_by_itself():
    """With a candidate's tiles, each computes what the equation says."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    t = tune.Tensors(SHAPE, "half", device)
    got = {}
    for p in problems([SHAPE], ["half"])[:6]:
        small = Configuration(p.product, "half", 32, 32, 32, 4, 1)
        found = tune.call_of(p, small, t)()
        got[p.product, p.left_gathered] = (t.h_out, t.a_out) if p.product == "up" else found
    token_N = t.dispatch.token_N.long()
    of = [slice(*pair) for pair in pairwise(t.dispatch.offset.tolist())]
    x, dout, w_gate_up, w_down, h, a = (v.float() for v in (t.x[token_N], t.dout[token_N], t.w_gate_up, t.w_down, t.h,
                                                            t.a))
    weight_N = torch.empty(len(token_N), device=device)
    weight_N[t.dispatch.row_TK.long()] = t.weight_TK

    def rows(left, w_E):
        return torch.cat([left[of[e]] @ w_E[e] for e in range(SHAPE.E)])

    def gradients(left, right):
        return torch.stack([left[of[e]].T @ right[of[e]] for e in range(SHAPE.E)])

    def activation(h):
        gate, up = h.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up

    up = rows(x, w_gate_up.mT)
    h_leaf = h.clone().requires_grad_()
    da = rows(dout, w_down)  # before the weight
    (dh,) = torch.autograd.grad(activation(h_leaf), h_leaf, weight_N[:, None] * da)
    dh_got, scaled_got, partial_got = got["down_backward", False]
    for name, found, want in (
            ("h", got["up", False][0], up), ("a", got["up", False][1], activation(up)),
            ("y", got["rows_transposed", False], rows(a, w_down.mT)), ("dx", got["rows", False], rows(h, w_gate_up)),
            ("dh", dh_got, dh), ("weight * a", scaled_got, weight_N[:, None] * activation(h)),
            ("dweight", partial_got.sum(dim=0), (da * activation(h)).sum(dim=1)),
            ("dw_down", got["weight_gradient", True], gradients(dout, a)),
            ("dw_gate_up", got["weight_gradient", False], gradients(h, x))):
        assert found.shape == want.shape and errors(found, want)[0] < 2 * torch.finfo(t.x.dtype).eps, name


def test_who_hangs_in_the_compiler_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(tune, "try_one", time.sleep)
    before, start = active_children(), time.monotonic()
    assert tune.compiled([600.0, 601.0], deadline=start + 3, width=1) == (set(), {})
    assert time.monotonic() - start < 60
    while active_children() != before and time.monotonic() - start < 60:
        time.sleep(0.1)
    assert active_children() == before


def test_the_file_is_kept_behind_each_problem_and_is_whole_at_any_moment(tmp_path, monkeypatch):
    path, seen = tmp_path / "device.json", []

    def keep(measured):
        tune.write(path, chosen(measured, []), measured, [SHAPE], "a device")
        seen.append(len(json.loads(path.read_text())["measured"]))

    wanted = [problem(), problem(product="rows")]
    tune.measure(wanted, {config(), config(product="rows")}, lambda calls, times: [c() for c in calls], device="cpu",
                 calls=lambda *_: lambda: 1.0, keep=keep)
    assert seen == [1, 2] and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(tune.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune.write(path, [], {}, [], "a device")
    assert len(json.loads(path.read_text())["measured"]) == 2, "what was there is left as it was"


def test_dispatch_of_the_tensors():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = tune.Tensors(SHAPE, "half", device)
    want = reference.dispatch(expert_choice(SHAPE.T, SHAPE.K, SHAPE.E).to(device), SHAPE.E)
    assert all(map(torch.equal, tensors.dispatch, want))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main(["--minutes", "1"]) == 2
    assert capsys.readouterr().err == "kernels.tune needs a GPU, and torch finds none.\n"
