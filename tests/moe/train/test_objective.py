"""The loss by hand, and that a token weighs the same wherever it stands."""

import pytest
import torch

import kernels
from moe.config import BalanceConfig
from moe.data.loader import Batch
from moe.train.balance import Balance
from moe.train.objective import next_token, token_weights


def of(model, batch, z_loss_weight=0.0):
    """The model's output and its loss."""
    output = model(batch.token_T, batch.documents, label_T=batch.label_T, weight_T=token_weights(batch))
    return output, next_token(output, batch, Balance(model, BalanceConfig(method="none", z_loss_weight=z_loss_weight)))


@torch.no_grad()
def test_by_hand(make_model, make_batch):
    model, batch = make_model("pack"), make_batch(5, 9, 2)
    output, loss = of(model, batch, z_loss_weight=0.5)
    logits_TV = (output.hidden_TD @ model.embedding.weight.T).double()
    labelled = batch.label_T != kernels.IGNORED
    nll = -logits_TV.log_softmax(-1)[labelled, batch.label_T[labelled]].sum().item()
    z = sum(route.logits_TS.double().logsumexp(1).square().mean().item() for route in output.routes) / 2
    assert loss.nll_sum.item() == pytest.approx(nll, rel=1e-5)
    assert loss.num_labels.item() == 13  # three documents have a last token
    assert loss.z_loss.item() == pytest.approx(z, rel=1e-5)
    assert loss.total.item() == pytest.approx(nll / 16 + 0.5 * z, rel=1e-5)


def test_a_dense_model_has_no_router_loss(make_model, make_batch):
    model, batch = make_model(), make_batch(5, 9)
    _, loss = of(model, batch, z_loss_weight=0.5)
    assert loss.z_loss.item() == 0 and loss.total.item() == pytest.approx(loss.nll_sum.item() / 14, rel=1e-6)
    assert loss.total.requires_grad and not loss.nll_sum.requires_grad


def test_the_gradient_does_not_depend_on_the_cut_into_micro_batches(make_model, make_batch):
    """Documents of other lengths in each half: the halves have other numbers of labels, but every token one weight."""
    model, whole = make_model(), make_batch(3, 3, 2, 8)
    parts = [
        Batch(whole.token_T[part], whole.label_T[part], kernels.documents(edges), ())
        for part, edges in ((slice(0, 8), [0, 3, 6, 8]), (slice(8, 16), [0, 8]))
    ]

    def gradients(batches):
        losses = [of(model, batch)[1].total for batch in batches]
        return torch.autograd.grad(sum(losses) / len(losses), list(model.parameters()))

    for a, b in zip(gradients([whole]), gradients(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
