"""Every method by its equation, written out; that it balances; and that it does not matter who computes what."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import kernels
from kernels import Gate
from moe.config import BalanceConfig
from moe.model import Decoder
from moe.model.router import BalancedRouter
from moe.train import balance as balances
from moe.train import routing
from moe.train.balance import Balance

LOSSES, METHODS = ("micro_batch", "sequence", "global"), ("micro_batch", "sequence", "global", "bias")
MIXTURE = dict(num_experts=8, top_k=2, d_ff=24)
L = 16  # tokens of a sequence


@pytest.fixture
def mixture(model_config):
    """A function: a tiny mixture with uneven routers, the same weights each time."""

    def model(**changed) -> Decoder:
        made = Decoder(model_config(num_layers=3, mixture=MIXTURE | changed), 280).initialise(5)
        for router in made.routers():
            router.table.data.mul_(20)
        return made

    return model


def config(method: str, **changed) -> BalanceConfig:
    return BalanceConfig(method=method, **{"weight": 0.5, "z_loss_weight": 0.0, "bias_step": 0.25} | changed)


def step(model, balance, batches, applied=True):
    """The gradients of one update's router losses by name, and what was routed."""
    model.zero_grad()
    for batch in batches:
        routes = model(batch.token_T, batch.documents).routes
        (balance.loss(routes).total / len(batches)).backward()
        balance.add(routes)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, balance.update(applied)


def by_hand(method: str, score: str, route, load_S: Tensor | None = None) -> Tensor:
    """Token by token and expert by expert, in float64. With a `load`, one of three micro-batches."""
    odds_TS = route.logits_TS.double().sigmoid() if score == "sigmoid" else route.logits_TS.double().exp()
    share_TS = odds_TS / odds_TS.sum(dim=1, keepdim=True)
    S = share_TS.shape[1]
    runs = range(0, len(share_TS), L) if method == "sequence" else [0]
    losses = []
    for first in runs:
        last = first + L if method == "sequence" else len(share_TS)
        count = [(route.slot_TK[first:last] == s).sum().item() for s in range(S)]
        f = [c / sum(count) for c in count]
        if method == "global":
            f = [(own + 2 * load) / 3 for own, load in zip(f, load_S.tolist(), strict=True)]
        losses.append(S * sum(f[s] * share_TS[first:last, s].mean() for s in range(S)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("score", ["softmax_chosen", "softmax", "sigmoid"])
@pytest.mark.parametrize("method", LOSSES)
def test_by_hand(mixture, make_batch, method, score):
    model, batch = mixture(score=score), make_batch(20, 28)
    for number, router in enumerate(model.routers()):
        router.load.copy_(torch.rand(8, generator=torch.Generator().manual_seed(number)).softmax(0))
    balance, tables = Balance(model, config(method, z_loss_weight=0.25), 3), [r.table for r in model.routers()]
    routes = model(batch.token_T, batch.documents).routes
    wanted = [by_hand(method, score, route, router.load) for route, router in zip(routes, model.routers(), strict=True)]
    z_loss = sum(route.logits_TS.double().logsumexp(1).square().mean() for route in routes) / 3
    want, got = 0.5 * sum(wanted) / 3 + 0.25 * z_loss, balance.loss(routes)
    assert got.total.dtype == torch.float32 and not got.z_loss.requires_grad
    assert got.total.item() == pytest.approx(want.item(), rel=1e-6)
    assert got.z_loss.item() == pytest.approx(z_loss.item(), rel=1e-6)
    assert any(abs(loss.item() - 1) > 0.01 for loss in wanted)  # even routers would show nothing
    pairs = (torch.autograd.grad(loss, tables, retain_graph=True) for loss in (got.total, want))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["none", "bias"])
def test_methods_without_a_loss_have_the_z_loss_only(mixture, make_batch, method):
    model, batch = mixture(), make_batch(30)
    loss = Balance(model, config(method, z_loss_weight=0.25)).loss(model(batch.token_T, batch.documents).routes)
    assert loss.total.item() == pytest.approx(0.25 * loss.z_loss.item(), rel=1e-6)


def test_a_last_sequence_may_be_shorter(mixture, make_batch):
    model, batch = mixture(), make_batch(L, 5)
    (route, *_) = model(batch.token_T, batch.documents).routes
    got = balances.sequence_balance(route, "softmax", model.routers()[0].present_S, L)
    assert got.item() == pytest.approx(by_hand("sequence", "softmax", route, None).item(), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_it_balances(method):
    """A router that sends everything to two of eight, and nothing else to learn."""
    x_TD = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    x_TD[:, 0] = 1
    router = BalancedRouter(16, 8, Gate(2))
    router.table.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    router.table.data[:2, 0] += 3
    balance = Balance(SimpleNamespace(routers=lambda: [router], config=SimpleNamespace(context_length=L)),
                      config(method, weight=1.0, bias_step=0.1))
    for _ in range(40):
        route = router(x_TD)
        router.table.grad = None
        balance.loss([route]).total.backward()
        router.table.data -= 0.5 * router.table.grad
        balance.add([route])
        routed = balance.update(True)
    assert routing.violation(routed.count_LS).item() < 0.5  # 3 at first
    assert (router.selection_bias != 0).any() == (method == "bias")


@pytest.mark.parametrize("method", METHODS)
def test_four_ranks_are_four_micro_batches(mixture, make_batch, method, monkeypatch):
    """Over two updates, because the second sees what the first has left. Ranks are played one after another; what they
    would sum over the network is summed by hand."""
    one = mixture()
    ranks = [copy.deepcopy(one) for _ in range(4)]
    alone, others = Balance(one, config(method), 4), [Balance(rank, config(method), 4) for rank in ranks]
    for update in range(2):
        batches = [make_batch(20, 12, seed=4 * update + n) for n in range(4)]
        want, routed = step(one, alone, batches)
        monkeypatch.setattr(balances.dist, "is_initialized", lambda: True)
        for rank, balance, batch in zip(ranks, others, batches, strict=True):
            routes = rank(batch.token_T, batch.documents).routes
            rank.zero_grad()
            balance.loss(routes).total.backward()
            balance.add(routes)
        total = sum(balance._sums for balance in others)
        monkeypatch.setattr(balances.dist, "all_reduce", lambda sums, total=total: sums.copy_(total))
        for balance in others:
            torch.testing.assert_close(balance.update(True), routed, rtol=1e-12, atol=0)
        monkeypatch.undo()
        for name, gradient in want.items():
            got = sum(rank.get_parameter(name).grad for rank in ranks) / 4
            torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        for rank in ranks:
            for a, b in zip(rank.routers(), one.routers(), strict=True):
                assert torch.equal(a.load, b.load) and torch.equal(a.selection_bias, b.selection_bias)
    assert one.routers()[0].load.std() > 0


@pytest.mark.parametrize("method", ["sequence", "bias"])
def test_the_cut_into_micro_batches_changes_nothing(mixture, make_batch, method):
    """Those of `micro_batch` and `global` know a micro-batch, so it does."""
    whole = make_batch(*[L] * 4)
    parts = [make_batch(L) for _ in range(4)]
    for number, part in enumerate(parts):
        part.token_T.copy_(whole.token_T[number * L : (number + 1) * L])
    one, other = mixture(), mixture()
    of_one, of_other = Balance(one, config(method)), Balance(other, config(method))
    for _ in range(2):
        want, routed = step(one, of_one, [whole])
        got, same = step(other, of_other, parts)
        assert torch.equal(routed.count_LS, same.count_LS)
        torch.testing.assert_close(routed.share_LS, same.share_LS, rtol=1e-6, atol=0)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_what_is_told_is_of_the_whole_update(mixture, make_batch):
    model, batches = mixture(), [make_batch(L, seed=seed) for seed in range(3)]
    balance = Balance(model, config("global"))
    _, routed = step(model, balance, batches)
    routes = [model(batch.token_T, batch.documents).routes for batch in batches]
    for number in range(3):
        count_S = sum(of_batch[number].count_S for of_batch in routes)
        assert torch.equal(routed.count_LS[number], count_S.double())
    layers = [kernels.balance_loss(routed.count_LS[n], torch.stack([r[n].share_S for r in routes]).mean(0),
                                   torch.ones(8, dtype=torch.bool)).item() for n in range(3)]
    assert routing.balance_loss(routed) == pytest.approx(sum(layers) / 3, rel=1e-6)
    assert torch.equal(model.routers()[1].load, routing.load(routed.count_LS)[1].float())


def test_biases_move_towards_the_mean_count(mixture, make_batch):
    model = mixture()
    balance = Balance(model, config("bias"))
    _, routed = step(model, balance, [make_batch(30)])
    for router, count_S in zip(model.routers(), routed.count_LS, strict=True):
        bias_S = router.selection_bias
        assert abs(bias_S.mean()) < 1e-7
        assert bias_S[count_S < 7.5].min() - bias_S[count_S > 7.5].max() == pytest.approx(0.5)  # 30 * 2 / 8 = 7.5


@pytest.mark.parametrize("method", METHODS)
def test_an_update_that_was_left_out_moves_nothing(mixture, make_batch, method):
    model = mixture()
    _, routed = step(model, Balance(model, config(method)), [make_batch(30)], applied=False)
    assert routed.count_LS.sum() == 3 * 30 * 2
    for router in model.routers():
        assert not router.selection_bias.any() and (router.load == 1 / 8).all()


def test_recomputation_is_not_counted_twice(mixture, make_batch):
    results = []
    for recompute in (False, True):
        model = mixture()
        model.train()
        model.recompute_layers = recompute
        results.append(step(model, Balance(model, config("sequence")), [make_batch(L), make_batch(9, seed=1)]))
    (want, routed), (got, same) = results
    assert torch.equal(routed.count_LS, same.count_LS) and routed.count_LS.sum() == 3 * (L + 9) * 2
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-8)


def test_what_the_next_update_needs_is_in_the_state(mixture):
    model = mixture()
    names = {name for name in model.state_dict() if "ffn.router" in name}
    assert names == {f"layers.{n}.ffn.router.{key}" for n in range(3) for key in ("table", "selection_bias", "load")}


def test_other_models_have_nothing_to_balance(make_model, make_batch):
    batch = make_batch(9)
    for kind in ("dense", "pack"):
        model = make_model(kind)
        balance = Balance(model, config("global", z_loss_weight=0.5))
        routes = model(batch.token_T, batch.documents).routes
        if routes:
            assert balance.loss(routes).total.item() == pytest.approx(
                0.5 * sum(route.z_loss.item() for route in routes) / 2)
        balance.add(routes)
        assert balance.update(True) is None
