"""A checkpoint and data -> an adapter, or a checkpoint: full, LoRA, Q-LoRA, and DPO by an adapter or in full.

Finetune   data read and everything checked, what memory it takes foreseen; `load` reads the weights and takes the time;
           `run` trains and writes
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from qwenlet import hub
from qwenlet.checkpoint import (
    Checkpoint,
    Progress,
    auto_dtype,
    check_dtype,
    device_by_name,
    dtype_by_name,
    load_model,
    load_quantized,
    read_tokenizer,
    rounding_of,
    write_trained,
)
from qwenlet.config import DataConfig, LoraConfig, QuantConfig, TrainingConfig
from qwenlet.errors import CheckpointError, ConfigError, MissingTokenizerError, TrainingError
from qwenlet.lora import save_adapter
from qwenlet.model import Qwen
from qwenlet.tokenizer import Tokenizer
from qwenlet.train.checkpoints import FOLDER
from qwenlet.train.dpo import Preference
from qwenlet.train.learning import compute_in, keep_masters, make_learn, shapes_of
from qwenlet.train.objective import NextToken, Objective
from qwenlet.train.planning import Plan, foresee, make_plan, usable_memory
from qwenlet.train.preferences import Pairs, load_pairs
from qwenlet.train.processes import Processes, processes
from qwenlet.train.samples import Samples, load_samples
from qwenlet.train.trainer import Outcome, Trainer

Method = Literal["full", "lora", "qlora", "dpo", "dpo-full"]
METHODS: tuple[Method, ...] = ("full", "lora", "qlora", "dpo", "dpo-full")
FREE = {"keep", "save_every", "parallel", "checkpointing"}
"""Settings of training that a run may go on with another value of."""
# published for full and for adapters; preferences move a model that knows how to answer, so less at a time
_LR = {"full": 1e-5, "lora": 3e-4, "qlora": 3e-4, "dpo": 5e-5, "dpo-full": 5e-7}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked for.

    Attributes:
        model: as for chat; data: files; out: the folder to write.
        eval_data: files of samples that are measured and not learned; held_out: a share (below 1) or number of the data
            for that instead; 0: nothing is measured.
        lora: of new adapters; adapter: a folder to train further instead.
        quant: of Q-LoRA over a checkpoint of floats.
        memory: bytes that may be used, for the choice of what is computed again; what the device has left unless given.
    """

    model: str
    data: Sequence[str | Path]
    out: Path
    method: Method = "lora"
    eval_data: Sequence[str | Path] = ()
    held_out: float = 0.0
    samples: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    adapter: Path | None = None
    quant: str = "int4"
    device: str = "auto"
    offline: bool | None = None
    revision: str | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")
        if not self.data:
            raise ConfigError("no data are given")
        if self.eval_data and self.held_out:
            raise ConfigError("eval_data and held_out are both given", hint="measure on one of them")
        if self.moves_all and self.adapter is not None:
            raise ConfigError(
                f"an adapter is given, but method is {self.method!r}", hint="merge it first, or use method 'lora'"
            )
        if self.training.patience is not None and not (self.eval_data or self.held_out):
            raise ConfigError("patience is given, but nothing is measured", hint="give eval_data or held_out")

    @property
    def moves_all(self) -> bool:
        """Whether every weight learns, and no adapter."""
        return self.method in ("full", "dpo-full")

    @property
    def prefers(self) -> bool:
        """Whether the data are pairs."""
        return self.method in ("dpo", "dpo-full")


class Finetune:
    """A job read and checked.

    Attributes:
        samples, held_out: to learn and to measure.
        plan: what the run will be; from `load` on the time it takes, too.
        model: from `load` on.
    Raises:
        QwenletError: its branches say what was wrong with the model, the data or an option.
    """

    def __init__(
        self, job: Job, *, group: Processes | None = None, progress: Progress | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.job, self.group = job, group or Processes()
        self.note = note if note is not None and self.group.first else _silent
        self.device = device_by_name(job.device)
        if (job.out / "config.json").exists() or (job.out / "adapter_config.json").exists():
            raise CheckpointError(f"{job.out} holds a finished model already", hint="choose another --out or remove it")
        self.path = hub.resolve(job.model, offline=job.offline, revision=job.revision, progress=progress)
        self.checkpoint = Checkpoint.open(self.path)
        tokenizer = read_tokenizer(self.checkpoint)
        if isinstance(tokenizer, MissingTokenizerError):
            raise tokenizer
        self.tokenizer: Tokenizer = tokenizer
        self.pairs: Pairs | None = None
        self.held_pairs: Pairs | None = None
        self.samples, self.held_out = self._samples()
        self.dtype = self._dtype()
        self.memory = usable_memory(job.memory, self.device, self.group)
        self.model: Qwen
        self.plan = self._foreseen()

    def load(self, progress: Progress | None = None) -> None:
        """Reads the weights and tries some steps."""
        self.model = self._model(progress)
        frozen = self._frozen_bytes(self.model)
        self.plan = make_plan(
            self.model, self.samples, self.held_out, self.job.training, frozen_bytes=frozen, budget=self._budget(),
            memory=self.memory, dtype=self.dtype, device=self.device, group=self.group, reference=self.job.prefers,
        )  # fmt: skip

    # -------------------------------------------------------------------------------------------------------- the data

    def _samples(self) -> tuple[Samples, Samples | None]:
        job = self.job
        limit = self.checkpoint.config.seq_length
        if job.samples.max_length > limit:
            self.note(
                f"max_length {job.samples.max_length} is beyond the {limit} tokens the model was made for: training "
                "has neither dynamic NTK nor log-n attention, as published"
            )
        system = {"auto": self.checkpoint.default_system, "none": None}.get(job.samples.system, job.samples.system)
        if job.prefers:
            return self._pairs(system)
        cache = hub.cache_dir() / "tokens"
        read = partial(load_samples, tokenizer=self.tokenizer, config=job.samples, system=system, cache=cache)
        samples = read(job.data)
        self._tell(samples)
        if job.eval_data:
            held_out = read(job.eval_data)
            self._tell(held_out, "to measure on: ")
            return samples, held_out
        if job.held_out:
            return samples.split(job.held_out, job.training.seed)
        return samples, None

    def _pairs(self, system: str | None) -> tuple[Samples, Samples | None]:
        """The same of preferences: the two of a pair count as one sample."""
        job = self.job
        pairs = load_pairs(job.data, self.tokenizer, job.samples, system=system)
        self._tell(pairs.each)
        if job.eval_data:
            self.held_pairs = load_pairs(job.eval_data, self.tokenizer, job.samples, system=system)
            self._tell(self.held_pairs.each, "to measure on: ")
        elif job.held_out:
            pairs, self.held_pairs = pairs.split(job.held_out, job.training.seed)
        self.pairs = pairs
        return pairs.both, None if self.held_pairs is None else self.held_pairs.both

    def _tell(self, samples: Samples, which: str = "") -> None:
        for line in samples.report.lines(self.job.samples.max_length):
            self.note(f"{which}{line}")

    # ------------------------------------------------------------------------------------------------------- the model

    def _dtype(self) -> torch.dtype:
        named = self.job.training.dtype
        if self.job.method == "qlora" and named == "fp16":
            raise ConfigError(
                "dtype is 'fp16', but beside quantized weights it is bf16 or fp32", hint="leave dtype out"
            )
        dtype = auto_dtype(self.device)[0] if named == "auto" else dtype_by_name(named)
        check_dtype(dtype, self.device)
        return dtype

    def _model(self, progress: Progress | None) -> Qwen:
        job = self.job
        if job.method == "qlora":
            model = self._coded(progress)
            compute_in(model, self.dtype)
        else:
            model, _ = load_model(self.checkpoint, self.dtype, self.device, progress=progress)
        torch.manual_seed(job.training.seed)
        self._let_learn(model)
        keep_masters(model)
        return model.train()

    def _coded(self, progress: Progress | None) -> Qwen:
        """The model with its weights in codes, as they are stored or rounded now."""
        checkpoint = self.checkpoint
        quant = None if checkpoint.is_quantized else QuantConfig.named(self.job.quant).fit(checkpoint.config)
        if self.device.type == "cpu":
            return load_quantized(checkpoint, quant, hub.cache_dir() / "kernels", progress=progress)[0]
        rounding = None if quant is None else rounding_of(checkpoint, quant, progress)
        return load_model(checkpoint, self.dtype, self.device, quantized=True, rounding=rounding, progress=progress)[0]

    @property
    def chat_format(self) -> Literal["chatml"] | None:
        """What the model will have learned of conversations, which are all told alike."""
        im_start = self.tokenizer.im_start_id
        return "chatml" if im_start is not None and (self.samples.ids == im_start).any() else None

    def _let_learn(self, model: Qwen) -> None:
        job = self.job
        make_learn(model, whole=job.moves_all, lora=job.lora, adapter=job.adapter, vocabulary=self.tokenizer.vocab_size)

    # -------------------------------------------------------------------------------------------------------- the plan

    def _foreseen(self) -> Plan:
        """Of the model's shapes alone; what can't be trained is refused here, before weights are loaded."""
        job = self.job
        shapes = shapes_of(self.checkpoint.config)
        self._let_learn(shapes)
        begins = job.adapter is None and not job.moves_all and not {"wte", "lm_head"} <= set(job.lora.modules_to_save)
        if begins and self.chat_format is not None and self.checkpoint.defaults.chat_format == "raw":
            self.note(
                "this is a base model, to which <|im_start|> and <|im_end|> mean nothing yet; the published recipe has "
                "embedding and head learn beside its adapter: --modules-to-save wte --modules-to-save lm_head"
            )
        return foresee(
            shapes, self.samples, job.training, frozen_bytes=self._frozen_bytes(shapes), budget=self._budget(),
            memory=self.memory, dtype=self.dtype, group=self.group,
        )  # fmt: skip

    def _frozen_bytes(self, model: Qwen) -> int:
        """Of weights that stay in memory as they are."""
        config = self.checkpoint.config
        if self.job.method == "qlora":
            quant = self.checkpoint.quant or QuantConfig.named(self.job.quant)
            return config.parameter_count * (quant.bits + 1) // 8  # and a bit for scales
        # an embedding is a mapped file on a CPU, of which only some rows are read
        mapped = "wte" if self.device.type == "cpu" and not config.tie_word_embeddings else None
        frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
        return sum(n for name, n in frozen.items() if mapped is None or mapped not in name) * self.dtype.itemsize

    def _budget(self) -> int | None:
        """Tokens of a packed batch."""
        if not self.job.training.packed:
            return None
        both = 2 if self.job.prefers else 1  # a pair is two samples, one where it is measured
        return self.job.training.batch_size * both * self.job.samples.max_length

    # --------------------------------------------------------------------------------------------------------- the run

    def run(self, *, progress: Progress | None = None) -> Outcome:
        """Trains and writes `out`: the adapter or the checkpoint of the best evaluation, or of the end without one.

        An interrupted run goes on where it stopped when the same job is given again.

        Raises:
            TrainingError, CheckpointError: as `Trainer.run`.
        """
        job = self.job
        objective, held_out = self._objectives(progress)
        trainer = Trainer(
            self.model,
            objective,
            job.training,
            lr=job.training.lr or _LR[job.method],
            dtype=self.dtype,
            device=self.device,
            out=job.out,
            run=self._run(),
            held_out=held_out,
            group=self.group,
            export=self._export,
            export_always=not job.moves_all,
            budget=self._budget(),
            progress=progress,
            note=self.note,
        )
        outcome = trainer.run()
        if outcome.why == "interrupted":
            return outcome
        if outcome.best_step is not None and outcome.best_step != outcome.steps:
            trainer.take_best()
        work = job.out / FOLDER / "result"
        if self.group.first:
            shutil.rmtree(work, ignore_errors=True)
        self.group.wait()
        trainer.write(work)
        if self.group.first:
            publish(work, job.out)
        self.group.wait()
        return outcome

    def _objectives(self, progress: Progress | None) -> tuple[Objective, Objective | None]:
        """What is made smaller and what is measured, before a weight has moved."""
        if self.pairs is None:
            return NextToken(self.samples), None if self.held_out is None else NextToken(self.held_out)
        made = [Preference(pairs, self.job.training.dpo_beta) for pairs in (self.pairs, self.held_pairs) if pairs]
        fresh = not self.job.moves_all and self.job.adapter is None and not self.job.lora.modules_to_save
        if not fresh or self.group.count > 1:
            autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)
            for one in made:
                with autocast:
                    one.prepare(self.model, self.device, progress=progress)
        return made[0], made[1] if len(made) > 1 else None

    def _run(self) -> dict[str, Any]:
        """What the weights depend on."""
        job = self.job
        return {
            "model": str(self.path),
            "method": job.method,
            "data": self.samples.fingerprint,
            "held_out": None if self.held_out is None else self.held_out.fingerprint,
            "training": {name: value for name, value in asdict(job.training).items() if name not in FREE},
            "max_length": job.samples.max_length,
            "lora": None if job.moves_all else str(job.lora),
            "adapter": None if job.adapter is None else str(job.adapter),
            "quant": job.quant if job.method == "qlora" and not self.checkpoint.is_quantized else None,
            "processes": self.group.count,
        }

    def _export(self, folder: Path) -> None:
        if not self.job.moves_all:
            save_adapter(self.model, folder, base=str(self.path), chat_format=self.chat_format)
            return
        folder.mkdir(parents=True)
        dtype = torch.float16 if self.dtype == torch.float16 else torch.bfloat16
        dtype = torch.float32 if self.job.training.dtype == "fp32" else dtype
        write_trained(folder, self.checkpoint, self.model, dtype, chat_format=self.chat_format)


def finetune(
    job: Job,
    *,
    before: Callable[[Finetune], bool] | None = None,
    planned: Callable[[Plan], bool] | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Outcome | None:
    """Does a job, alone or as one of the processes that the environment names.

    Args:
        before: sees what was read and foreseen, before weights are loaded; False from it ends here.
        planned: sees the plan with its time; False from it ends here.
        progress: called with (done, in all, what) while files are read and while steps are done.
    """
    with processes(device_by_name(job.device)) as group:
        made = Finetune(job, group=group, progress=progress, note=note)
        # agreed on, as the others must not wait for the first one's weights
        if group.agreed(before is not None and group.first and not before(made)):
            return None
        made.load(progress)
        if group.agreed(planned is not None and group.first and not planned(made.plan)):
            return None
        return made.run(progress=progress)


def publish(work: Path, out: Path) -> None:
    """Moves what was written into its place, what names it as whole last."""
    try:
        for path in sorted(work.iterdir(), key=lambda path: path.suffix == ".json" and "config" in path.name):
            os.replace(path, out / path.name)
        work.rmdir()
    except OSError as error:
        raise TrainingError(
            f"{out} could not be written: {error}", hint="look at the free space; the same command goes on there"
        ) from None


def _silent(text: str) -> None: ...
