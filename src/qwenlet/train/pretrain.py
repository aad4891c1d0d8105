"""Text -> a model: from nothing, or from a checkpoint that goes on reading.

A model from nothing starts as published: normal numbers of `initializer_range`, less for what writes to the residual
stream. Its vocabulary may be a cut of a larger one: the tokens that merge first.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenlet import hub
from qwenlet.checkpoint import (
    Checkpoint,
    Progress,
    auto_dtype,
    device_by_name,
    dtype_by_name,
    load_model,
    read_tokenizer,
    write_new,
    write_trained,
)
from qwenlet.config import ModelConfig, TrainingConfig
from qwenlet.errors import CheckpointError, ConfigError, MissingTokenizerError
from qwenlet.model import Qwen
from qwenlet.tokenizer import Tokenizer
from qwenlet.tokenizer_formats import Vocabulary
from qwenlet.train.baselines import COUNTED, longest_overlap, ngram_loss
from qwenlet.train.checkpoints import FOLDER
from qwenlet.train.corpus import Corpus, build, documents, encode
from qwenlet.train.finetune import FREE, publish
from qwenlet.train.learning import keep_masters, shapes_of
from qwenlet.train.objective import NextToken
from qwenlet.train.planning import Plan, foresee, make_plan, usable_memory
from qwenlet.train.processes import Processes, processes
from qwenlet.train.trainer import Outcome, Trainer

REPORT = "report.json"
_SAMPLE_TOKENS = 200


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """What is asked for.

    Attributes:
        data: files of text; out: the folder to write.
        model: a checkpoint that goes on; None: from nothing, as `config` and `vocabulary` say.
        length: tokens of a piece at most.
        held_out: share of the documents that is measured and not learned; eval_data: files of text for that instead.
        baselines: orders of the n-gram counts to hold the model against; 1: single tokens.
        prompt: how the sample begins that is written at the end; nothing where it is empty.
        memory: bytes that may be used, for the choice of what is computed again; what the device has left unless given.
    """

    data: Sequence[str | Path]
    out: Path
    model: str | None = None
    config: ModelConfig | None = None
    vocabulary: Vocabulary | None = None
    length: int = 256
    held_out: float = 0.02
    eval_data: Sequence[str | Path] = ()
    training: TrainingConfig = field(default_factory=TrainingConfig)
    baselines: Sequence[int] = (1, 3, 5)
    prompt: str = ""
    device: str = "auto"
    offline: bool | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.config is None):
            raise ConfigError("expected a model to go on with, or a config to begin with, and not both")
        if self.config is not None and self.vocabulary is None:
            raise ConfigError("a model from nothing needs a vocabulary", hint="give a tokenizer")
        if not 0.0 < self.held_out < 1.0:
            raise ConfigError(f"held_out is {self.held_out}, expected a share between 0 and 1")
        if self.length < 2:
            raise ConfigError(f"length is {self.length}, expected 2 tokens or more")


@dataclass(frozen=True)
class Report:
    """How it went.

    Attributes:
        outcome: of the run; held_out: loss at its end, in nats a token; baselines: the same of n-gram counts, by order.
        tokens: of the documents to learn and held out.
        flops_share: operations that the model needs (6 a parameter and token), of what products alone reach here.
        sample: text of the model, and overlap: its longest piece that stands in the data word for word.
    """

    outcome: Outcome
    held_out: float
    baselines: dict[int, float]
    tokens: tuple[int, int]
    flops_share: float
    sample: str
    overlap: str


def cut_vocabulary(whole: Vocabulary, size: int) -> Vocabulary:
    """The first tokens of a vocabulary, and the control tokens that end texts and turns: `size` in all.

    Raises:
        ConfigError: fewer than the single bytes take, or more than there are.
    """
    surfaces: list[str] = [s for s in ("<|endoftext|>", "<|im_start|>", "<|im_end|>") if s in whole.special_tokens]
    words = size - len(surfaces)
    if not 256 <= words <= len(whole.ranks):
        raise ConfigError(
            f"a vocabulary of {size} tokens is asked for, expected {256 + len(surfaces)} to "
            f"{len(whole.ranks) + len(surfaces)}"
        )
    ranked = sorted(whole.ranks, key=whole.ranks.__getitem__)
    single = [token for token in ranked if len(token) == 1]
    longer = [token for token in ranked if len(token) > 1][: words - len(single)]
    ranks = {token: id for id, token in enumerate(single + longer)}
    special: dict[str, int] = {surface: words + index for index, surface in enumerate(surfaces)}
    end = special.get("<|endoftext|>")
    return Vocabulary(
        ranks, special, whole.pre_tokenizer, size, f"{whole.source}, cut to {size}", eos_id=end, pad_id=end
    )


def new_model(config: ModelConfig, seed: int, device: torch.device) -> Qwen:
    """Random weights as published, in float32."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Qwen(config)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = model.initial_std(name)
            if std is None:
                parameter.zero_()
            elif std == 0.0:
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))
    return model


def pretrain(
    job: PretrainJob,
    *,
    foreseen: Callable[[Plan], None] | None = None,
    planned: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Report | None:
    """Reads, trains, measures and writes; None where it was interrupted: the same job goes on where it stopped.

    Args:
        foreseen: is told what the run will be but for its time, before there are weights in memory.
        planned: is told all of it, before the run starts.
    Raises:
        QwenletError: its branches say what was wrong.
    """
    with processes(device_by_name(job.device)) as group:
        run = _Pretraining(job, group, note if note is not None and group.first else lambda text: None)
        told = (foreseen, planned) if group.first else (None, None)
        return run.run(progress, *told)


class _Pretraining:
    def __init__(self, job: PretrainJob, group: Processes, note: Callable[[str], None]) -> None:
        self.job, self.group, self.note = job, group, note
        self.device = device_by_name(job.device)
        if (job.out / "config.json").exists():
            raise CheckpointError(f"{job.out} holds a finished model already", hint="choose another --out or remove it")
        named = job.training.dtype
        self.dtype = auto_dtype(self.device)[0] if named == "auto" else dtype_by_name(named)
        self.checkpoint: Checkpoint | None = None
        if job.model is not None:
            self.checkpoint = Checkpoint.open(hub.resolve(job.model, offline=job.offline))
            found = read_tokenizer(self.checkpoint)
            if isinstance(found, MissingTokenizerError):
                raise found
            self.tokenizer = found
            self.config = self.checkpoint.config
        else:
            assert job.config is not None
            assert job.vocabulary is not None
            self.tokenizer = Tokenizer(job.vocabulary)
            if job.config.vocab_size < self.tokenizer.vocab_size:
                raise ConfigError(
                    f"the model has {job.config.vocab_size} rows for a vocabulary of {self.tokenizer.vocab_size} tokens"
                )
            self.config = job.config
        self.model: Qwen  # from `run` on, once its size has been told

    def _model(self) -> Qwen:
        if self.checkpoint is None:
            return new_model(self.config, self.job.training.seed, self.device)
        model, _ = load_model(self.checkpoint, torch.float32, self.device)
        model.requires_grad_(True)
        keep_masters(model)
        return model

    def run(
        self,
        progress: Progress | None,
        foreseen: Callable[[Plan], None] | None,
        planned: Callable[[Plan], None] | None,
    ) -> Report | None:
        job, training = self.job, self.job.training
        begun = time.perf_counter()
        if self.group.first:
            self._corpora()
        self.group.wait()
        corpus, left_out = self._corpora()
        samples, held_out = corpus.samples(job.length), left_out.samples(job.length)
        self.note(
            f"{len(corpus.ids):,} tokens of {len(corpus.starts) - 1:,} documents to learn, {len(left_out.ids):,} of "
            f"{len(left_out.starts) - 1:,} held out ({time.perf_counter() - begun:.1f} s)"
        )
        self.note(f"{self.config.parameter_count:,} parameters, {self._embedding():,} of them for the vocabulary")
        budget = training.batch_size * job.length if training.packed else None
        memory = usable_memory(job.memory, self.device, self.group)
        if foreseen is not None:
            foreseen(
                foresee(
                    shapes_of(self.config), samples, training, frozen_bytes=0, budget=budget, memory=memory,
                    dtype=self.dtype, group=self.group,
                )
            )  # fmt: skip
        self.model = self._model()
        plan = make_plan(
            self.model, samples, held_out, training, frozen_bytes=0, budget=budget, memory=memory, dtype=self.dtype,
            device=self.device, group=self.group,
        )  # fmt: skip
        if planned is not None:
            planned(plan)
        trainer = Trainer(
            self.model,
            NextToken(samples),
            training,
            lr=training.lr or 1e-3,
            dtype=self.dtype,
            device=self.device,
            out=job.out,
            run={"config": asdict(self.model.config), "data": samples.fingerprint, "length": job.length,
                 "training": {name: value for name, value in asdict(training).items() if name not in FREE},
                 "model": job.model, "processes": self.group.count},
            held_out=NextToken(held_out),
            group=self.group,
            export=self._export,
            budget=budget,
            progress=progress,
            note=self.note,
        )  # fmt: skip
        outcome = trainer.run()
        if outcome.why == "interrupted":
            return None
        if outcome.best_step is not None and outcome.best_step != outcome.steps:
            trainer.take_best()
        loss = trainer.measure(NextToken(held_out))
        work = job.out / FOLDER / "result"
        if self.group.first:
            shutil.rmtree(work, ignore_errors=True)
        self.group.wait()
        trainer.write(work)
        if not self.group.first:
            return None
        publish(work, job.out)  # before what takes long and only tells about it
        vocabulary = self.tokenizer.vocab_size
        if job.baselines and len(corpus.ids) > COUNTED:
            self.note(f"n-gram counts are taken over the first {COUNTED:,} tokens")
        baselines = {order: ngram_loss(samples, held_out, order, vocabulary) for order in job.baselines}
        sample = self._sample(job.out)
        share = 6 * self.model.config.parameter_count * outcome.tokens_per_second / self._products_per_second()
        report = Report(
            outcome, loss, baselines, (len(corpus.ids), len(left_out.ids)), share, sample,
            longest_overlap(sample, documents(job.data)) if sample else "",
        )  # fmt: skip
        (job.out / FOLDER / REPORT).write_text(
            json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return report

    def _corpora(self) -> tuple[Corpus, Corpus]:
        """(to learn, to measure)."""
        job, folder = self.job, hub.cache_dir() / "corpora"
        if not job.eval_data:
            return build(job.data, self.tokenizer, folder, held_out=job.held_out)
        return encode(job.data, self.tokenizer, folder), encode(job.eval_data, self.tokenizer, folder)

    def _embedding(self) -> int:
        config = self.config
        return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)

    def _export(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        dtype = torch.float32 if self.dtype == torch.float32 else torch.bfloat16
        if self.checkpoint is not None:
            write_trained(folder, self.checkpoint, self.model, dtype)
        else:
            assert self.job.vocabulary is not None
            write_new(folder, self.model, self.job.vocabulary, dtype)

    @torch.no_grad()
    def _sample(self, written: Path) -> str:
        """What the model writes, drawn at temperature 0.8 from the 50 likeliest; every token is computed anew."""
        from qwenlet.cache import Rows

        if not self.job.prompt:
            return ""
        # among several processes each may have but a part of the model, and only this one samples
        alone = self.group.count == 1
        model = self.model if alone else load_model(Checkpoint.open(written), self.dtype, self.device)[0]
        model.eval()
        generator = torch.Generator().manual_seed(self.job.training.seed)
        ids = self.tokenizer.encode(self.job.prompt, allowed_special=set())
        ends = {self.tokenizer.eod_id, self.tokenizer.eos_id}
        for _ in range(_SAMPLE_TOKENS):
            seen = ids[-self.job.length :]
            rows = Rows.fresh([len(seen)], [1.0], self.device)
            last = torch.tensor([len(seen) - 1], device=self.device)
            logits: Tensor = model(torch.tensor(seen, device=self.device), rows, logits_at=last)[0].float().cpu()
            values, places = logits[: self.tokenizer.vocab_size].topk(min(50, self.tokenizer.vocab_size))
            drawn = int(torch.multinomial((values / 0.8).softmax(-1), 1, generator=generator))
            if int(places[drawn]) in ends:
                break
            ids.append(int(places[drawn]))
        return self.tokenizer.decode(ids)

    def _products_per_second(self) -> float:
        """Operations of a large product in this dtype: what this machine could do at best."""
        x = torch.ones(2048, 2048, dtype=self.dtype, device=self.device)
        x @ x
        begun = time.perf_counter()
        for _ in range(3):
            x @ x
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 3 * 2.0 * 2048**3 / (time.perf_counter() - begun)


def sized(config: ModelConfig, **changes: Any) -> ModelConfig:
    """A config with some fields changed; as many key/value heads as query heads, which fill the hidden size.

    Raises:
        ConfigError: sizes that contradict each other.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    hidden = given.get("hidden_size", config.hidden_size)
    heads = given.get("num_attention_heads", config.num_attention_heads)
    if hidden % heads:
        raise ConfigError(f"hidden_size {hidden} is no multiple of {heads} heads")
    return replace(config, **given, num_key_value_heads=heads, head_dim=hidden // heads)
