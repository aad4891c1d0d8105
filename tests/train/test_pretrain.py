"""Pre-training: corpora, cut vocabularies, baselines against values by hand, and a small run."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.tiny import byte_tokenizer
from tests.train.tiny import CPU, TINY

import qwenlet
from qwenlet.checkpoint import Checkpoint
from qwenlet.config import ModelConfig, TrainingConfig
from qwenlet.errors import ConfigError, DataError
from qwenlet.tokenizer import Tokenizer
from qwenlet.tokenizer_formats import Vocabulary, read_qwen
from qwenlet.train import corpus
from qwenlet.train.baselines import longest_overlap, ngram_loss
from qwenlet.train.batches import epoch_batches
from qwenlet.train.corpus import Corpus, build, encode
from qwenlet.train.planning import Plan
from qwenlet.train.pretrain import PretrainJob, cut_vocabulary, new_model, pretrain, sized
from qwenlet.train.samples import Report, Samples


def of_ids(*documents: list[int]) -> Samples:
    starts = np.cumsum([0, *(len(ids) for ids in documents)])
    ids = np.concatenate([np.array(ids, np.int32) for ids in documents])
    return Samples(ids, np.ones(len(ids), bool), starts, [""] * len(documents), Report())


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    tales = [f"The {animal} has {count} red hats." for animal in ("cat", "dog", "owl", "bee") for count in range(9)]
    path.write_text("\n<|endoftext|>\n".join(tales), encoding="utf-8")
    return path


def test_documents_end_where_the_file_says_and_are_cut_to_pieces(story: Path, tmp_path: Path):
    tokenizer = byte_tokenizer()
    learned, held_out = build([story], tokenizer, tmp_path / "made", held_out=0.1)
    assert (len(learned.starts) - 1, len(held_out.starts) - 1) == (32, 4)
    samples = learned.samples(16)
    assert samples.lengths.max() == 16
    assert samples.lengths.sum() == len(learned.ids)
    whole = [tokenizer.decode(learned.ids[a:b]) for a, b in zip(learned.starts, learned.starts[1:], strict=False)]
    assert all(text.startswith("The ") and text.endswith("hats.<|endoftext|>") for text in whole)
    assert isinstance(learned.ids, np.memmap)


def test_a_corpus_is_made_once(story: Path, tmp_path: Path):
    build([story], byte_tokenizer(), tmp_path / "made", held_out=0.1)
    (file,) = (tmp_path / "made").glob("*/train.tokens")
    before = file.stat().st_mtime_ns
    build([story], byte_tokenizer(), tmp_path / "made", held_out=0.1)
    assert file.stat().st_mtime_ns == before
    file.write_bytes(b"shorter!")
    with pytest.raises(DataError, match="expected"):
        Corpus.open(file)


@pytest.mark.parametrize(("name", "texts"), [("a.txt", 1), ("a.jsonl", 2), ("a.json", 2)])
def test_a_corpus_is_of_files_as_their_names_say_they_are_read(tmp_path: Path, name: str, texts: int):
    """The same bytes under other names are other documents, whatever the cache holds."""
    lines = '{"text": "one text"}\n{"text": "another"}\n'
    as_list = '[{"text": "one text"},\n{"text": "another"}]'
    for other in ("a.txt", "a.jsonl"):
        (tmp_path / other).write_text(lines, encoding="utf-8")
        encode([tmp_path / other], byte_tokenizer(), tmp_path / "made")
    path = tmp_path / name
    path.write_text(as_list if name == "a.json" else lines, encoding="utf-8")
    corpus = encode([path], byte_tokenizer(), tmp_path / "made")
    assert len(corpus.starts) - 1 == texts


def test_a_corpus_is_written_as_it_is_read(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of all documents no more than a few are in memory at once."""
    made: list[weakref.ref[Any]] = []
    whole = corpus._encoded

    def watched(*given: Any) -> Iterator[np.ndarray]:
        for ids in whole(*given):
            made.append(weakref.ref(ids))
            yield ids
            del ids
            assert sum(one() is not None for one in made) <= 4

    monkeypatch.setattr(corpus, "_encoded", watched)
    monkeypatch.setattr(corpus, "_GROUP", 1)
    learned, held_out = build([story], byte_tokenizer(), tmp_path / "made", held_out=0.1)
    assert len(made) == len(learned.starts) + len(held_out.starts) - 2 == 36
    assert {path.name.partition(".")[0] for path in (tmp_path / "made").glob("*/*")} == {"train", "held-out"}


def test_two_may_make_the_same_corpus_at_once(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the processes of a machine that sees no other's cache do: here one begins and ends amid the other."""
    own = corpus._encoded
    inner: list[Corpus] = []

    def interrupted(*given: Any) -> Iterator[np.ndarray]:
        for number, ids in enumerate(own(*given)):
            if number == 3:
                monkeypatch.setattr(corpus, "_encoded", own)
                inner.extend(build([story], byte_tokenizer(), tmp_path / "made", held_out=0.1))
            yield ids

    monkeypatch.setattr(corpus, "_encoded", interrupted)
    outer = build([story], byte_tokenizer(), tmp_path / "made", held_out=0.1)
    assert [one.ids.tolist() for one in outer] == [one.ids.tolist() for one in inner]


def test_pieces_of_one_token_are_in_no_batch(story: Path, tmp_path: Path):
    """Every tale has 23 characters or a multiple of the piece's length and one more: a tail that foretells nothing."""
    tokenizer = byte_tokenizer()
    length = len("The cat has 1 red hats.")
    job = small_job(story, tmp_path / "out")
    samples = encode([story], tokenizer, tmp_path / "made").samples(length)
    assert (samples.lengths == 1).sum() == 36
    batches = epoch_batches(samples, 0, seed=0, batch_size=1, budget=None)
    assert len(batches) == 36
    training = replace(job.training, batch_size=1, max_steps=3, packed=False)
    assert pretrain(replace(job, length=length, training=training)) is not None
    with pytest.raises(DataError, match="no document of two tokens"):
        Corpus(np.zeros(2, np.uint16), np.array([0, 1, 2]), "here").samples(8)


def test_a_model_is_published_before_it_is_told_about(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwenlet.train.pretrain.ngram_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(replace(small_job(story, tmp_path / "out"), baselines=(1,)))
    assert Checkpoint.open(tmp_path / "out").config.hidden_size == 32


def test_memory_is_foreseen_before_there_are_weights(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*_: object) -> None:
        raise MemoryError

    plans: list[Plan] = []
    monkeypatch.setattr("qwenlet.train.pretrain.new_model", killed)
    monkeypatch.setattr("qwenlet.train.planning.free_memory", lambda device: 5)
    with pytest.raises(MemoryError):
        pretrain(small_job(story, tmp_path / "out"), foreseen=plans.append)
    (plan,) = plans
    assert (plan.memory, plan.seconds) == (5, None)
    assert plan.peak > 5
    assert plan.learning == plan.all


def test_lines_of_json_and_what_is_wrong_with_them(tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one text"}\n{"text": "another"}\n', encoding="utf-8")
    learned, held_out = build([path], byte_tokenizer(), tmp_path / "made", held_out=0.5)
    assert len(learned.ids) + len(held_out.ids) == len("one text") + len("another") + 2
    path.write_text('{"text": "one"}\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"texts\.jsonl:2: text is 3"):
        build([path], byte_tokenizer(), tmp_path / "made", held_out=0.5)


def test_texts_to_measure_on_may_be_files_of_their_own(story: Path, tmp_path: Path):
    other = tmp_path / "other.txt"
    other.write_text("The fox has 12 red hats.", encoding="utf-8")
    whole = encode([story], byte_tokenizer(), tmp_path / "made")
    assert len(whole.starts) - 1 == 36, "nothing of it is left out"
    job = replace(small_job(story, tmp_path / "out"), eval_data=[other])
    report = pretrain(job)
    assert report is not None
    assert report.tokens == (len(whole.ids), len("The fox has 12 red hats.") + 1)


@pytest.mark.parametrize(
    ("asked", "memory", "done"), [("auto", 1 << 40, "none"), ("auto", 0, "full"), ("full", 1 << 40, "full")]
)
def test_what_is_computed_again_is_planned(story: Path, tmp_path: Path, asked: Any, memory: int, done: str):
    job = small_job(story, tmp_path / "out")
    job = replace(job, memory=memory, training=replace(job.training, checkpointing=asked))
    plans: list[Plan] = []
    report = pretrain(job, planned=plans.append)
    assert report is not None
    (plan,) = plans
    assert plan.recompute == done
    assert plan.steps == report.outcome.planned
    assert plan.learning == plan.all


def test_a_cut_vocabulary_encodes_as_the_whole_one_would_with_fewer_merges(qwen_vocab: Path):
    whole, _ = read_qwen(qwen_vocab)
    cut = Tokenizer(cut_vocabulary(whole, 1024))
    text = "Once upon a time, 从前 there was a fox.\n"
    ids = cut.encode(text)
    assert cut.decode(ids) == text
    assert max(ids) < 1024
    assert len(ids) > len(Tokenizer(whole).encode(text))
    assert cut.im_end_id == 1023
    with pytest.raises(ConfigError, match="259"):
        cut_vocabulary(whole, 100)


def test_counts_of_single_tokens_by_hand():
    """Learned: a a b. A single token's probability mixes its count with 1/4: two kinds, three tokens."""
    loss = ngram_loss(of_ids([0, 0, 1]), of_ids([0, 0, 2]), 1, vocabulary=4)
    assert loss == pytest.approx(-(math.log((2 + 2 / 4) / 5) + math.log((0 + 2 / 4) / 5)) / 2)


def test_longer_counts_foretell_what_repeats():
    learned, held_out = of_ids([0, 1, 2, 3] * 20), of_ids([0, 1, 2, 3] * 5)
    losses = [ngram_loss(learned, held_out, order, vocabulary=8) for order in (1, 2, 3)]
    assert losses[0] > 1.2
    assert losses[1] < 0.1


def test_counts_are_taken_of_some_tokens_at_most(monkeypatch: pytest.MonkeyPatch):
    learned, held_out = of_ids([0, 1, 2, 3] * 3, [5, 4, 5, 4]), of_ids([0, 1, 2, 3])
    expected = ngram_loss(of_ids([0, 1, 2, 3, 0, 1]), held_out, 3, vocabulary=8)
    monkeypatch.setattr("qwenlet.train.baselines.COUNTED", 6)
    assert ngram_loss(learned, held_out, 3, vocabulary=8) == pytest.approx(expected)


def test_counts_of_contexts_that_no_text_is_long_enough_for():
    learned, held_out = of_ids([0], [1]), of_ids([0, 1, 0])
    assert ngram_loss(learned, held_out, 5, vocabulary=4) == ngram_loss(learned, held_out, 1, vocabulary=4)


def test_the_longest_piece_that_was_learned_by_heart():
    assert longest_overlap("a red hat on a cat", ["the red hat", "on a mat"]) == " red hat"
    assert longest_overlap("xyz", ["abc"]) == ""
    assert longest_overlap("b" + "c", ["ab", "cd"]) in ("b", "c"), "texts are not joined"


def test_a_new_model_starts_as_published():
    config = ModelConfig(**(vars(TINY) | {"hidden_size": 64, "head_dim": 32, "num_hidden_layers": 8}))
    model = new_model(config, 0, CPU)
    assert float(model.transformer.wte.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    residual = torch.cat([block.mlp.c_proj.weight.detach().flatten() for block in model.transformer.h])
    assert float(residual.std()) == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert not model.transformer.h[0].attn.c_attn.bias.any()
    assert torch.equal(model.transformer.ln_f.weight, torch.ones(64))


def small_job(story: Path, out: Path) -> PretrainJob:
    """A step or two."""
    tokenizer = byte_tokenizer()
    vocabulary = Vocabulary(
        {bytes([byte]): byte for byte in range(256)}, tokenizer.special_tokens, tokenizer._pre_tokenizer, 259, "bytes",
        eos_id=256, pad_id=256,
    )  # fmt: skip
    return PretrainJob(
        data=[story], out=out, vocabulary=vocabulary, length=64, baselines=(),
        config=sized(TINY, vocab_size=320, hidden_size=32, num_attention_heads=2),
        training=TrainingConfig(max_steps=2, batch_size=8, accumulation=1, dtype="fp32"),
    )  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_a_small_model_learns_and_loads_as_any_checkpoint(story: Path, tmp_path: Path, tied: bool):
    job = replace(
        small_job(story, tmp_path / "out"), held_out=0.1, baselines=(1, 3), prompt="The ",
        config=sized(TINY, vocab_size=320, hidden_size=32, num_attention_heads=2, tie_word_embeddings=tied),
        training=TrainingConfig(epochs=25, batch_size=8, accumulation=1, lr=1e-2, dtype="fp32", warmup=5),
    )  # fmt: skip
    report = pretrain(job)
    assert report is not None
    assert report.held_out < report.baselines[1] - 1.0
    assert 0.0 < report.flops_share < 1.0
    assert report.sample.startswith("The ")
    assert report.overlap in story.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "training" / "report.json").read_text())["held_out"] == report.held_out
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.config == job.config
    with qwenlet.load(str(tmp_path / "out"), dtype="fp32") as llm:
        score = llm.score("The cat", " has 3 red hats.")
        assert math.exp(-score.logprob / len(score.token_logprobs)) < 8.0
