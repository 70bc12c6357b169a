"""Shards: what goes in comes out, whole or not at all, and a damaged file is named."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from moe.data import shards
from moe.data.shards import PARTS, Document, PackedDocuments
from moe.data.tokenizer import EOS, SPECIAL, Special, encode, identity, train
from moe.errors import InputError


def contents(packed):
    """Everything a reader can ask for, by document."""
    return [
        (packed.document_id(n), packed.tokens(n).tolist(), packed.num_bytes(n), int(packed.lengths[n]))
        for n in range(len(packed))
    ]


def test_round_trip(packed, tokenizer, make_documents):
    rows = make_documents(30)
    opened = packed(rows)
    want = encode(tokenizer, [row.text for row in rows])
    assert contents(opened) == [
        (row.id, ids, len(row.text.encode()), len(ids)) for row, ids in zip(rows, want, strict=True)
    ]
    assert opened.num_tokens == sum(map(len, want)) == opened.manifest["tokens"]
    assert opened.manifest["documents"] == 30
    assert opened.manifest["bytes"] == sum(len(row.text.encode()) for row in rows)


def test_a_part_of_a_document(packed, make_documents):
    opened = packed(make_documents(5))
    whole = opened.tokens(3)
    assert opened.tokens(3, 1, 3).tolist() == whole[1:3].tolist()
    assert opened.tokens(3, 2).tolist() == whole[2:].tolist()
    assert opened.tokens(3, 0, len(whole) + 9).tolist() == whole.tolist()  # never a token of the next document


@pytest.mark.parametrize(
    "tokens_per_shard, num_shards",
    [
        pytest.param(2**28, 1, id="all-in-one"),
        pytest.param(100, None, id="some-in-each"),
        pytest.param(1, 30, id="every-document-larger-than-a-shard"),
    ],
)
def test_several_shards_equal_one(packed, make_documents, tokens_per_shard, num_shards):
    rows = make_documents(30)
    one, several = packed(rows, "one"), packed(rows, "several", tokens_per_shard=tokens_per_shard)
    assert contents(several) == contents(one)
    assert several.num_tokens == one.num_tokens
    made = len(list(several.folder.glob("*.tokens.npy")))
    assert made == several.manifest["shards"] == (num_shards or made) and (num_shards or made > 2)


def test_batches_of_tokenization_leave_no_seam(packed, make_documents, monkeypatch):
    rows = make_documents(30)
    want = contents(packed(rows, "one"))
    monkeypatch.setattr(shards, "DOCUMENTS_PER_BATCH", 7)
    assert contents(packed(rows, "other", tokens_per_shard=100)) == want


def test_the_same_rows_give_the_same_bytes(packed, make_documents):
    rows = make_documents(30)
    assert packed(rows, "one").manifest == packed(rows, "other").manifest
    assert packed(rows[::-1], "reversed").manifest["files"] != packed(rows, "again").manifest["files"]


def test_small_vocabularies_take_two_bytes_a_token(packed, make_documents, tmp_path):
    opened = packed(make_documents(3))
    assert opened.tokens(0).dtype == np.uint16
    words = [*SPECIAL, *(f"w{n}" for n in range(70_000))]
    large = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=EOS))
    large.pre_tokenizer = pre_tokenizers.Whitespace()
    shards.write(tmp_path / "large", [Document("a", "w1 w69999")], large)
    tokens = PackedDocuments(tmp_path / "large").tokens(0)
    assert tokens.dtype == np.uint32 and tokens.tolist() == [0, 4, 70_002, 1]


def test_it_is_the_highest_number_that_counts(tmp_path):
    """Other families leave some out."""
    gaps = Tokenizer(models.WordLevel({"w1": 1, "<s>": 2, "w2": 70_000}, unk_token="w1"))
    gaps.pre_tokenizer = pre_tokenizers.Whitespace()
    shards.write(tmp_path / "gaps", [Document("a", "w1 w2")], gaps, special=Special("<s>", "<s>", None))
    opened = PackedDocuments(tmp_path / "gaps", identity(gaps, Special("<s>", "<s>", None)))
    assert opened.tokens(0).tolist() == [2, 1, 70_000, 2]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip_last_bit(path):
    flip(path, -1, 1)


def flip_a_bit_of_the_header(path):
    flip(path, 20, 128)


def flip(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "damage", [truncate, lengthen, flip_last_bit, flip_a_bit_of_the_header, lambda path: path.unlink()],
    ids=["truncated", "lengthened", "last-bit-flipped", "header-bit-flipped", "missing"],
)  # fmt: skip
def test_a_damaged_file_is_named(packed, make_documents, part, damage):
    folder = packed(make_documents(30), tokens_per_shard=100).folder
    damage(folder / f"00001.{part}.npy")
    with pytest.raises(InputError, match=rf"shard .*00001\.{part}\.npy is damaged"):
        PackedDocuments(folder)


@pytest.mark.parametrize("readers", [1, 2, 4, 20])
def test_readers_share_the_hashing_and_one_of_them_finds_it(packed, make_documents, readers):
    folder = packed(make_documents(30), tokens_per_shard=100).folder
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    for path in files:
        flip_last_bit(path)
        found = []
        for reader in range(readers):
            try:
                PackedDocuments(folder, None, reader, readers)
            except InputError as error:
                found.append(str(error))
        flip_last_bit(path)
        assert len(found) == 1 and f"shard {path} is damaged" in found[0]
    assert len(files) > 8


@pytest.mark.parametrize(
    "damage",
    [truncate, lambda path: path.unlink(), lambda path: path.write_text("{}")],
    ids=["truncated", "missing", "empty"],
)
def test_a_damaged_manifest_is_named(packed, make_documents, damage):
    folder = packed(make_documents(3)).folder
    damage(folder / "manifest.json")
    with pytest.raises(InputError, match="packed.*manifest.json"):
        PackedDocuments(folder)


def test_a_changed_number_in_the_manifest_is_noticed(packed, make_documents):
    """`tokens` decides how long an epoch is: a flipped bit there would change the order of training in silence."""
    folder = packed(make_documents(30)).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokens"] ^= 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest.json"):
        PackedDocuments(folder)


def test_another_tokenizer_is_refused(packed, tokenizer, make_documents):
    folder = packed(make_documents(3)).folder
    PackedDocuments(folder, identity(tokenizer))
    other = identity(train([d.text for d in make_documents(50)], 270))
    with pytest.raises(InputError, match=f"tokenized by {identity(tokenizer)[:12]}: want tokenizer {other[:12]}"):
        PackedDocuments(folder, other)


def test_no_documents_are_refused_and_leave_nothing(tmp_path, tokenizer):
    with pytest.raises(InputError, match="empty would have no documents"):
        shards.write(tmp_path / "empty", [], tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_when_reading_the_source_fails_there_is_no_folder(tmp_path, tokenizer, make_documents):
    def source():
        yield from make_documents(30)
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="network"):
        shards.write(tmp_path / "packed", source(), tokenizer, tokens_per_shard=100)
    assert not (tmp_path / "packed").exists()
    shards.write(tmp_path / "packed", make_documents(3), tokenizer)  # what was begun does not stand in the way
    assert len(PackedDocuments(tmp_path / "packed")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_when_the_disk_is_full_there_is_no_folder(tmp_path, tokenizer, make_documents, monkeypatch):
    save, saved = np.save, []

    def until_full(path, array, **options):
        if len(saved) == 5:
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(path, array, **options)

    monkeypatch.setattr(np, "save", until_full)
    with pytest.raises(OSError, match="No space left"):
        shards.write(tmp_path / "packed", make_documents(30), tokenizer, tokens_per_shard=100)
    assert not (tmp_path / "packed").exists()


def test_what_is_there_is_not_written_over(packed, tokenizer, make_documents):
    opened = packed(make_documents(3))
    with pytest.raises(OSError):
        shards.write(opened.folder, make_documents(4), tokenizer)
    assert len(PackedDocuments(opened.folder)) == 3
