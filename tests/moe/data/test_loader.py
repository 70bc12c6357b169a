"""The loader: one order for every number of ranks, one integer of state, every token once an epoch."""

from math import floor

import numpy as np
import pytest
import torch

from kernels import IGNORED
from moe.data.loader import Loader, Source, collate, whole_documents
from moe.data.shards import Document

LENGTH = 16


@pytest.fixture
def text(packed, make_documents):
    """40 documents, some shorter and some longer than a sequence, in several shards."""
    return packed(make_documents(40), tokens_per_shard=200)


def take(loader, batches):
    """The next batches of one rank as plain values: tokens, labels, and where documents end."""
    return [
        (batch.token_T.tolist(), batch.label_T.tolist(), batch.documents.boundaries, batch.document_ids())
        for _ in range(batches)
        for batch in loader.micro_batches()
    ]


def flat(taken):
    """Tokens and labels, whatever the cut into batches; and the length of every piece with its document."""
    tokens = [token for tokens, *_ in taken for token in tokens]
    labels = [label for _, labels, *_ in taken for label in labels]
    pieces = [
        (name, int(size))
        for *_, edges, names in taken
        for name, size in zip(names, np.diff(edges), strict=True)
    ]  # fmt: skip
    return tokens, labels, pieces


# --- a source


@pytest.fixture
def domains(packed, make_documents):
    """Folders of three domains of very different sizes, one of them in several shards."""
    return [packed(make_documents(count, seed), f"domain{seed}", tokens_per_shard=200)
            for seed, count in enumerate((40, 3, 15))]


def test_several_domains_are_shuffled_as_one_text(domains, packed, make_documents):
    rows = [row for seed, count in enumerate((40, 3, 15)) for row in make_documents(count, seed)]
    apart, together = Source(domains, LENGTH, 1), Source(packed(rows), LENGTH, 1)
    assert apart.per_epoch == together.per_epoch > 20
    for index in range(2 * together.per_epoch):
        for a, b in zip(apart.sequence(index), together.sequence(index), strict=True):
            assert a.tokens.tolist() == b.tokens.tolist() and a.labels.tolist() == b.labels.tolist()
            assert a.origin[0].document_id(a.origin[1]) == b.origin[0].document_id(b.origin[1])


def test_each_piece_of_several_domains_says_where_it_is_from(domains):
    (batch,) = Loader(Source(domains, LENGTH, 1), 40, 40).micro_batches()
    assert {folder for folder, _ in batch.origins} == set(domains)
    edges = batch.documents.boundaries
    for (folder, document), start, stop in zip(batch.origins, edges, edges[1:], strict=False):
        whole, part = folder.tokens(document).tolist(), batch.token_T[start:stop].tolist()
        assert any(whole[n : n + len(part)] == part for n in range(len(whole)))



@pytest.mark.parametrize("length", [
    pytest.param(1, id="one-token-sequences"),
    pytest.param(7, id="documents-cut"),
    pytest.param(16, id="about-a-document"),
    pytest.param(200, id="several-documents"),
])  # fmt: skip
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_has_every_token_once_and_labels_are_the_next_token(text, length, epoch):
    source = Source(text, length, seed=1)
    read = dict.fromkeys(range(len(text)), 0)  # document -> how many of its tokens have come
    for index in range(epoch * source.per_epoch, (epoch + 1) * source.per_epoch):
        pieces = source.sequence(index)
        assert sum(len(piece.tokens) for piece in pieces) == length
        for piece in pieces:
            _, document = piece.origin
            whole = text.tokens(document).tolist()
            start, stop = read[document], read[document] + len(piece.tokens)
            assert piece.tokens.tolist() == whole[start:stop]
            # The label of a piece's last token is the next one of its document, and none at the document's end.
            assert piece.labels.tolist() == [*whole, IGNORED][start + 1 : stop + 1]
            read[document] = stop
    left_out = text.num_tokens - sum(read.values())
    assert left_out == text.num_tokens % length  # less than a sequence, at the end of the order


def test_no_token_is_left_out_where_the_text_divides(packed):
    text = packed([Document(str(n), "x" * (n % 3 + 1)) for n in range(30)])
    assert text.num_tokens == 30 * 4  # bos, 1 to 3 letters, eos
    source = Source(text, 8, seed=0)
    assert source.per_epoch == 15
    seen = [piece.origin[1] for index in range(15) for piece in source.sequence(index) for _ in piece.tokens]
    assert np.bincount(seen).tolist() == text.lengths.tolist()


def test_sequences_do_not_depend_on_the_order_in_which_they_are_asked_for(text):
    def plain(pieces):
        return [(piece.origin[1], piece.tokens.tolist(), piece.labels.tolist()) for piece in pieces]

    walked = [plain(Source(text, LENGTH, seed=1).sequence(index)) for index in range(80)]
    source = Source(text, LENGTH, seed=1)
    for index in np.random.default_rng(0).permutation(80).tolist():
        assert plain(source.sequence(index)) == walked[index]


def order(source, epoch):
    first = epoch * source.per_epoch
    return [p.origin[1] for index in range(first, first + source.per_epoch) for p in source.sequence(index)]


def test_epochs_and_seeds_differ_and_repeat(text):
    orders = [order(Source(text, LENGTH, seed), epoch) for seed in (1, 2) for epoch in (0, 1, 2)]
    assert len(set(map(tuple, orders))) == 6
    assert orders[4] == order(Source(text, LENGTH, seed=2), 1)
    assert orders[0] != sorted(orders[0])  # shuffled


def test_a_text_shorter_than_a_sequence_is_taken_whole(packed):
    text = packed([Document("a", "xyz")])
    source = Source(text, 100, seed=0)
    assert source.per_epoch == 1
    for index in (0, 5):
        assert [piece.tokens.tolist() for piece in source.sequence(index)] == [text.tokens(0).tolist()]


# --- the loader


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("replay_share", [0.0, 0.3])
def test_the_order_does_not_depend_on_ranks_or_micro_batches(
    text, packed, make_documents, world_size, micro_batch_size, replay_share
):
    batch_size, batches = 16, 5  # 80 sequences: more than two epochs
    public = packed(make_documents(20, seed=9), "public")

    def loader(micro_batch_size, **of):
        replay = Source(public, LENGTH, seed=1) if replay_share else None
        return Loader(
            Source(text, LENGTH, 1), batch_size, micro_batch_size, replay=replay, replay_share=replay_share, **of
        )

    want = take(loader(batch_size), batches)
    ranks = [
        take(loader(micro_batch_size, rank=rank, world_size=world_size), batches) for rank in range(world_size)
    ]  # fmt: skip
    each = len(ranks[0]) // batches
    got = [part for n in range(batches) for rank in ranks for part in rank[n * each : (n + 1) * each]]
    assert flat(got) == flat(want)


def test_the_state_is_one_integer_and_a_jump_is_a_walk(text):
    walked = Loader(Source(text, LENGTH, 1), 4, 2, rank=1, world_size=2)
    take(walked, 7)
    assert walked.position == 28
    jumped = Loader(Source(text, LENGTH, 1), 4, 2, rank=1, world_size=2)
    jumped.position = walked.position
    assert take(jumped, 9) == take(walked, 9)


def test_a_batch_left_half_way_is_taken_again(text):
    loader = Loader(Source(text, LENGTH, 1), 4, 2)
    first = next(loader.micro_batches())
    assert loader.position == 0
    assert torch.equal(next(loader.micro_batches()).token_T, first.token_T)


def test_documents_are_laid_end_to_end(text):
    (batch,) = Loader(Source(text, LENGTH, 1), 4, 4).micro_batches()
    assert batch.token_T.shape == batch.label_T.shape == (4 * LENGTH,)
    assert batch.token_T.dtype == batch.label_T.dtype == torch.int64
    edges = batch.documents.boundaries
    assert set(range(0, 4 * LENGTH + 1, LENGTH)) <= set(edges)  # a sequence never sees the one before
    ids = batch.document_ids()
    assert len(ids) == len(edges) - 1
    for name, first, last in zip(ids, edges, edges[1:], strict=False):
        number = next(n for n in range(len(text)) if text.document_id(n) == name)
        piece, whole = batch.token_T[first:last].tolist(), text.tokens(number).tolist()
        assert any(piece == whole[i : i + len(piece)] for i in range(len(whole)))


class Numbers:
    """A source whose sequences are their own numbers."""

    def __init__(self):
        self.asked = []

    def sequence(self, index):
        self.asked.append(index)
        return []


@pytest.mark.parametrize("share", [0.0, 0.125, 0.1, 1 / 3, 0.5, 0.99])
def test_replay_takes_its_exact_share_and_skips_nothing(share, monkeypatch):
    monkeypatch.setattr("moe.data.loader.collate", lambda pieces: None)
    own, replay = Numbers(), Numbers()
    loader = Loader(own, 1, 1, replay=replay, replay_share=share)
    for taken in range(1, 1001):
        list(loader.micro_batches())
        assert len(replay.asked) == floor(taken * share)
    assert own.asked == list(range(len(own.asked))) and replay.asked == list(range(len(replay.asked)))


def test_without_replay_text_the_share_changes_nothing(monkeypatch):
    """The anchor's loader is given the packs' share and no replay: it must not read a sequence twice."""
    monkeypatch.setattr("moe.data.loader.collate", lambda pieces: None)
    own = Numbers()
    loader = Loader(own, 4, 4, replay=None, replay_share=0.125)
    for _ in range(20):
        list(loader.micro_batches())
    assert own.asked == list(range(80))


# --- evaluation


@pytest.mark.parametrize("length", [1, 5, 16, 500])
@pytest.mark.parametrize("tokens_per_batch", [1, 64, 10**6])
def test_evaluation_predicts_every_token_but_bos_once(text, length, tokens_per_batch):
    predicted, read, num_bytes = [], [], 0
    for batch, of_batch in whole_documents(text, length, tokens_per_batch):
        assert max(np.diff(batch.documents.boundaries)) <= length
        assert (batch.label_T != IGNORED).all()
        predicted += batch.label_T.tolist()
        read += batch.token_T.tolist()
        num_bytes += of_batch
    wholes = [text.tokens(n).tolist() for n in range(len(text))]
    assert predicted == [token for whole in wholes for token in whole[1:]]
    assert read == [token for whole in wholes for token in whole[:-1]]
    assert num_bytes == text.manifest["bytes"]


def test_evaluation_of_a_part_takes_whole_documents_up_to_the_limit(text):
    batches = list(whole_documents(text, LENGTH, 64, limit=100))
    tokens = sum(batch.token_T.numel() for batch, _ in batches)
    documents = dict.fromkeys(name for batch, _ in batches for name in batch.document_ids())
    assert tokens >= 100 > tokens - (int(text.lengths[len(documents) - 1]) - 1)
    assert list(documents) == [text.document_id(n) for n in range(len(documents))]
    assert sum(num_bytes for _, num_bytes in batches) == sum(text.num_bytes(n) for n in range(len(documents)))


def test_windows_of_a_long_document_do_not_see_one_another(text):
    longest = int(text.lengths.argmax())
    batch, _ = next(whole_documents(text, 4, 10**6))
    sizes = [int(size) for size, (_, number) in zip(np.diff(batch.documents.boundaries), batch.origins, strict=True)
             if number == longest]  # fmt: skip
    assert sum(sizes) == text.lengths[longest] - 1 and set(sizes[:-1]) == {4}


def test_collate_keeps_the_order_of_pieces(text):
    pieces = Source(text, LENGTH, 1).sequence(0) + Source(text, LENGTH, 1).sequence(1)
    batch = collate(pieces)
    assert batch.token_T.tolist() == [token for piece in pieces for token in piece.tokens]
    assert batch.origins == tuple(piece.origin for piece in pieces)


def test_a_batch_goes_to_a_device_from_page_locked_memory_without_a_wait(text, monkeypatch):
    """There is no GPU here: `meta` stands for one."""
    batch = collate(Source(text, LENGTH, 1).sequence(0))
    pinned, waited = [], []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, non_blocking=False: (
        waited.append(not non_blocking) or to(tensor, *where)))
    moved = batch.to(torch.device("meta"))
    tensors = (moved.token_T, moved.label_T, moved.documents.cu_seqlens, moved.documents.position_T)
    assert all(tensor.device.type == "meta" for tensor in tensors) and moved.origins == batch.origins
    assert moved.documents.boundaries == batch.documents.boundaries
    assert len(pinned) == len(waited) == 4 and not any(waited)
