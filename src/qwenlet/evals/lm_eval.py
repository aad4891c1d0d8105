"""lm-evaluation-harness with our engine as its model, and our tasks as tasks of its own: an outside check both ways.

    QwenletLM      a model class of lm-eval, registered as `qwenlet`
    write_task     questions of ours as a YAML file over a JSON file, which lm-eval runs with any of its models
    main           lm-eval's own command line with that model known:
                   python -m qwenlet.evals.lm_eval run --model qwenlet --model_args pretrained=demo --tasks ...

lm-eval's stock tasks load their data from a hub; local ones are found by --include_path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from qwenlet import chat
from qwenlet.api import load
from qwenlet.config import SamplingParams
from qwenlet.errors import EvalError, MissingExtraError, RequestError
from qwenlet.evals.runner import answers
from qwenlet.evals.task import Answer, Choices, Continuation, Question, Sample
from qwenlet.llm import LLM

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as problem:
    raise MissingExtraError("lm_eval", "lm-eval", "the model class for lm-evaluation-harness") from problem

# lm-eval's word -> ours
_DRAWING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed",
            "repetition_penalty": "repetition_penalty"}  # fmt: skip
_DEFAULT_NEW_TOKENS = 256  # of lm-eval's own models
_Scored = tuple[float, bool]
_Pair = tuple[tuple[str, str], list[int], list[int]]  # texts, and the ids of context and continuation


@register_model("qwenlet")
class QwenletLM(TemplateLM):
    """Our engine, many requests at once; what a request gets does not depend on the others.

    Args:
        pretrained: a model as `load` takes it.
        llm: one that is loaded already, instead.
        max_length: tokens a request may use; longer ones lose their beginning, as lm-eval does. None: the training
            length, or the context where that is shorter.
        max_gen_toks: tokens of a reply whose task doesn't say.
        batch_size: requests that run at once; "auto" is the engine's own number.
        device, options: for `load`: dtype="fp32", quant="int4", max_context=4096.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        llm: LLM | None = None,
        max_length: int | None = None,
        max_gen_toks: int = _DEFAULT_NEW_TOKENS,
        batch_size: int | str = "auto",
        device: str = "auto",
        seed: int = 1234,
        **options: Any,
    ) -> None:
        super().__init__()
        if (pretrained is None) is (llm is None):
            raise EvalError("the model qwenlet needs either pretrained or llm", hint="--model_args pretrained=demo")
        if str(batch_size).isdigit():
            options = {"max_requests": int(batch_size)} | options
        elif batch_size != "auto":
            raise EvalError(f"batch_size is {batch_size!r}, expected a whole number or 'auto'")
        if llm is None:
            assert pretrained is not None
            llm = load(pretrained, device=device, **options)
        self.llm, self.seed, self.max_gen_toks = llm, seed, int(max_gen_toks)
        self.max_length = int(max_length) if max_length is not None else llm.chat_window
        if not 1 < self.max_length <= llm.context_length:
            raise EvalError(f"max_length is {max_length}, expected 2 to {llm.context_length}, the model's context")
        self._chats = False  # whether prompts are rendered conversations, whose control tokens are meant

    # -------------------------------------------------------------------------------------------- texts and ids

    @property
    def eot_token_id(self) -> int:
        id = self.llm.tokenizer.eod_id
        if id is None:
            ends = self.llm.defaults.eos_token_ids
            if not ends:
                raise EvalError(f"the vocabulary of {self.llm.name} has no end token, which lm-eval puts before texts")
            return ends[0]
        return id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text. Control tokens it spells out are read as such only after `apply_chat_template`."""
        allowed = {"<|im_start|>", "<|im_end|>"} if self._chats else set()
        return self.llm.tokenizer.encode(string, allowed_special=allowed)

    @property
    def tokenizer_name(self) -> str:
        return self.llm.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return chat.CHAT_TEMPLATE if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as ChatML; without a generation prompt its last message stays open."""
        if self.llm.chat_format != "chatml":
            raise EvalError(f"{self.llm.name} has no chat format", hint="run without --apply_chat_template")
        self._chats = True
        text = chat.render_text(chat_history, add_generation_prompt)
        return text if add_generation_prompt else text.removesuffix("<|im_end|>")

    # -------------------------------------------------------------------------------------------- requests

    def _loglikelihood_tokens(
        self, requests: Sequence[_Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[_Scored]:
        """(log-probability, whether greedy) of every continuation. Requests of one context, one behind the other, share
        a pass where they can."""
        samples: list[Sample] = []
        for context, group in groupby(map(self._cut, requests), key=lambda pair: pair[0]):
            options = tuple(option for _, option in group)
            samples.append(Sample(str(len(samples)), Choices(context, options), None))
        found = self._answers(samples)
        scored = [pair for answer in found for pair in zip(answer.logprobs, answer.greedy, strict=True)]
        for request, pair in zip(requests, scored, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], pair)
        return scored

    def _cut(self, request: _Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(context, continuation) without the beginning that doesn't fit."""
        _, context, continuation = request
        if not context or not continuation or len(continuation) > self.max_length:
            raise EvalError(
                f"a request has {len(context)} + {len(continuation)} tokens, expected 1 or more of each and at most "
                f"{self.max_length} behind the context"
            )
        kept = [*context, *continuation][-(self.max_length + 1) :]
        place = len(kept) - len(continuation)
        return tuple(kept[:place]), tuple(kept[place:])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, window behind window, every token predicted once."""
        texts = [request.args[0] for request in requests]
        windows = [list(self._windows(text)) for text in texts]
        scored = iter(self._loglikelihood_tokens([window for each in windows for window in each]))
        totals = [sum(next(scored)[0] for _ in each) for each in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> Iterator[_Pair]:
        cut = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        for window in cut:
            yield (("", ""), *make_disjoint_window(window))

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies, up to what ends them."""
        samples = [self._to_continue(number, *request.args) for number, request in enumerate(requests)]
        texts = [answer.text for answer in self._answers(samples)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _to_continue(self, number: int, context: str, options: Mapping[str, Any]) -> Sample:
        params = drawing(options, self.max_gen_toks)
        assert params.max_new_tokens is not None
        room = self.max_length - params.max_new_tokens
        if room < 1:
            raise EvalError(
                f"max_gen_toks is {params.max_new_tokens}, but prompt and reply share {self.max_length} tokens",
                hint="--gen_kwargs max_gen_toks=128, or a larger max_length in --model_args",
            )
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        # the prompt's text is in the id, so that sampled replies don't depend on what runs before
        return Sample(f"{number}/{context}", Continuation(tuple(ids), params), None)

    def _answers(self, samples: Sequence[Sample]) -> list[Answer]:
        """In the order of the samples."""
        found = {id(sample): answer for sample, answer in answers(self.llm, samples, seed=self.seed)}
        ordered = [found[id(sample)] for sample in samples]
        if failed := next((answer.error for answer in ordered if answer.error is not None), None):
            raise EvalError(f"a request could not be answered: {failed}")
        return ordered


def drawing(options: Mapping[str, Any], new_tokens: int) -> SamplingParams:
    """lm-eval's generation options in our words. Raises RequestError for one that has none."""
    given = dict(options)
    until = given.pop("until", None) or ()
    stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        new_tokens = int(given.pop(name, new_tokens))
    sample = given.pop("do_sample", None)
    chosen = {ours: given.pop(theirs) for theirs, ours in _DRAWING.items() if theirs in given}
    if given:
        raise RequestError(
            f"{', '.join(sorted(given))} of lm-eval's generation options have no meaning here",
            hint=f"known are until, max_gen_toks, do_sample, {', '.join(_DRAWING)}",
        )
    if sample is False or (sample is None and not chosen.get("temperature")):
        chosen = {name: value for name, value in chosen.items() if name == "repetition_penalty"} | {"temperature": 0.0}
    elif sample and not chosen.get("temperature", 1.0):
        raise RequestError("do_sample is true, but temperature is 0")
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    return SamplingParams(**plain | chosen, max_new_tokens=new_tokens, stop=stop)


# ------------------------------------------------------------------------------------------------ tasks of ours


@dataclass(frozen=True)
class WrittenTask:
    """A task on disk: `folder` is what lm-eval's --include_path wants."""

    name: str
    folder: Path


_CHOICES = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{"test": {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: options
doc_to_target: target
target_delimiter: ""
metric_list:
  - metric: acc
"""
_REPLIES = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{"test": {file}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: target
target_delimiter: ""
generation_kwargs: {options}
metric_list:
  - metric: exact_match
"""


def write_task(name: str, samples: Iterable[Sample], folder: str | Path) -> WrittenTask:
    """Writes questions of ours as a local task of lm-eval: NAME.yaml over NAME.json.

    Args:
        samples: all Choices over texts, whose target is an option (as it is, or without the blank before it) or its
            number; or all Continuations of texts.
    Raises:
        EvalError: a question of another kind, or a target that is no option.
    """
    samples, folder = list(samples), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    kinds = {type(sample.question) for sample in samples}
    if kinds == {Choices}:
        rows = [_choices_row(sample) for sample in samples]
        text = _CHOICES.format(name=name, file=json.dumps(str(file.resolve())))
    elif kinds == {Continuation}:
        rows = [_reply_row(sample) for sample in samples]
        options = {json.dumps(_their_options(sample.question)) for sample in samples}
        if len(options) != 1:
            raise EvalError(f"questions of {name} are drawn in {len(options)} ways, and a task of lm-eval has one")
        text = _REPLIES.format(name=name, file=json.dumps(str(file.resolve())), options=options.pop())
    else:
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no questions"
        raise EvalError(f"{name} has {found}, but a task of lm-eval is made of Choices alone or Continuations alone")
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return WrittenTask(name, folder)


def _choices_row(sample: Sample) -> dict[str, Any]:
    question = sample.question
    assert isinstance(question, Choices)
    if not isinstance(question.prompt, str):
        raise EvalError(f"the question {sample.id} is given as ids, which lm-eval can't ask")
    options = list(question.options)
    stripped = [option.strip() if isinstance(option, str) else option for option in options]
    target = sample.target
    if not isinstance(target, int):
        if target not in options and target not in stripped:
            raise EvalError(f"the target {target!r} of {sample.id} is none of its options {options}")
        target = options.index(target) if target in options else stripped.index(target)
    return {"id": sample.id, "prompt": question.prompt, "options": options, "target": target}


def _reply_row(sample: Sample) -> dict[str, Any]:
    question = sample.question
    assert isinstance(question, Continuation)
    if not isinstance(question.prompt, str):
        raise EvalError(f"the question {sample.id} is given as ids, which lm-eval can't ask")
    return {"id": sample.id, "prompt": question.prompt, "target": str(sample.target)}


def _their_options(question: Question) -> dict[str, Any]:
    assert isinstance(question, Continuation)
    params = question.params
    options: dict[str, Any] = {"until": list(params.stop or ()), "max_gen_toks": params.max_new_tokens}
    if not params.temperature:
        return options | {"do_sample": False}
    named = {name: getattr(params, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    return options | {"do_sample": True} | {name: value for name, value in named.items() if value is not None}


def main() -> None:
    """lm-eval's command line; `--model qwenlet` is this class."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
