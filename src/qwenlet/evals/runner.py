"""The two runners: samples in, answers out, through the engine that users get.

    likelihood    Choices and Passages: prompts are read, nothing is drawn
    generation    Continuations and Dialogues: replies are drawn, turn after turn

Both keep the engine busy with many samples at once and give answers as they come in. Samples with a common beginning,
one behind the other, share what is stored of it. What a sample gets does not depend on what runs beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from qwenlet import chat
from qwenlet.config import SamplingParams
from qwenlet.engine import AtOnce, Chunk, Completion, Listener, Request, check_prompt
from qwenlet.errors import CheckpointError, ContextLengthError, EngineError
from qwenlet.evals.task import Answer, Choices, Continuation, Dialogue, Passage, Sample
from qwenlet.llm import LLM

_LOOK_UP_SECONDS = 5.0  # how long to wait before looking whether the engine still lives


def answers(llm: LLM, samples: Iterable[Sample], *, seed: int = 0) -> Iterator[tuple[Sample, Answer]]:
    """Answers as they come in, not in the order of the samples. Closing the iterator cancels what runs.

    Args:
        seed: of everything drawn; each sample draws for itself, from this and its id.
    Raises:
        EngineError, CheckpointError: the model can't go on. A sample that doesn't fit the context is an answer with
            an error instead.
    """
    waiting = iter(samples)
    news: SimpleQueue[Request] = SimpleQueue()
    owners: dict[Request, _Work] = {}
    chunks: dict[Request, list[Chunk]] = {}
    open_works = 0
    bell = AtOnce()

    def enter(work: _Work, requests: Iterable[Request]) -> None:
        for request in requests:
            owners[request], chunks[request] = work, []
            work.running += 1
            request.listener = Listener(bell, partial(news.put, request))
            news.put(request)  # what came before the line above is found, too

    llm.engine.start()
    try:
        while True:
            while open_works < 2 * llm.options.max_requests and (sample := next(waiting, None)) is not None:
                work = _work(llm, sample, seed)
                try:
                    enter(work, work.begin())
                except ContextLengthError as error:
                    yield sample, Answer(prompt_tokens=error.prompt_tokens, error=error.message)
                else:
                    open_works += 1
            if not open_works:
                return
            request = _next(news, llm)
            if request not in owners or not _take(request, chunks[request]):
                continue
            work, came = owners.pop(request), chunks.pop(request)
            if request.failure is not None:
                raise request.failure
            if came[-1].finish_reason in ("error", "cancelled"):
                raise EngineError(f"a request ended early: {came[-1].error or came[-1].finish_reason}")
            work.running -= 1
            try:
                enter(work, work.ended(request, Completion.from_chunks(came)))
            except ContextLengthError as error:
                work.error = error.message
            if not work.running:
                open_works -= 1
                yield work.sample, work.answer()
    finally:
        for request in owners:
            llm.engine.cancel(request)


def _next(news: SimpleQueue[Request], llm: LLM) -> Request:
    while True:
        try:
            return news.get(timeout=_LOOK_UP_SECONDS)
        except Empty:
            if not llm.engine.alive:
                raise EngineError("the engine has stopped", hint="load the model again") from None


def _take(request: Request, chunks: list[Chunk]) -> bool:
    """Moves what came to `chunks`; whether the request has ended."""
    while not request.outbox.empty():
        chunks.append(request.outbox.get_nowait())
    return bool(chunks) and chunks[-1].finish_reason is not None


# -------------------------------------------------------------------------------------------- one sample's work


class _Work(Protocol):
    """A sample on its way."""

    sample: Sample
    running: int
    error: str | None

    def begin(self) -> list[Request]:
        """Its first requests."""
        ...

    def ended(self, request: Request, completion: Completion) -> list[Request]:
        """Takes in what came of a request; the requests that follow from it."""
        ...

    def answer(self) -> Answer: ...


def _work(llm: LLM, sample: Sample, seed: int) -> _Work:
    question = sample.question
    if isinstance(question, Choices):
        return _Choosing(llm, sample, question)
    if isinstance(question, Passage):
        return _Reading(llm, sample, question)
    return _Writing(llm, sample, question, seed)


class _Reading:
    """Log-probabilities of a passage's tokens."""

    def __init__(self, llm: LLM, sample: Sample, passage: Passage) -> None:
        self.llm, self.sample, self.passage = llm, sample, passage
        self.running = 0
        self.error: str | None = None
        self._logprobs: list[float] = []

    def begin(self) -> list[Request]:
        ids, first = check_prompt(self.passage.ids, self.llm.config.vocab_size), self.passage.first
        assert 0 < first < len(ids), f"position {first} of {len(ids)} can't be predicted"
        targets = torch.tensor(ids)

        def read(position: int, logits: Tensor) -> None:
            wanted = targets[position + 1 : position + 1 + len(logits)].to(logits.device)
            self._logprobs += _finite(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0])

        # the last token's own logits would predict what comes after the passage
        alpha = self.llm.config.ntk_alpha(len(ids)) if self.passage.ntk else 1.0
        return [self.llm.engine.read(ids[:-1], alpha, first - 1, read, logn=self.passage.logn)]

    def ended(self, request: Request, completion: Completion) -> list[Request]:
        return []

    def answer(self) -> Answer:
        return Answer(logprobs=tuple(self._logprobs), prompt_tokens=len(self.passage.ids), error=self.error)


class _Choosing:
    """Log-probability of every option after one prompt."""

    def __init__(self, llm: LLM, sample: Sample, question: Choices) -> None:
        self.llm, self.sample, self.question = llm, sample, question
        self.running = 0
        self.error: str | None = None
        self._prompt: tuple[int, ...] = ()
        self._options: list[tuple[int, ...]] = []
        self._later = range(0)  # options that wait for the first
        self._logprobs: list[float] = []
        self._greedy: list[bool] = []
        self._tokens = 0

    def begin(self) -> list[Request]:
        vocab = self.llm.config.vocab_size
        prompt = _ids(self.llm, self.question.prompt)
        window = self.question.window
        if window is not None and len(prompt) > window:
            prompt = prompt[1 - window :]
        self._prompt = check_prompt(prompt, vocab)
        self._options = [check_prompt(_ids(self.llm, option), vocab) for option in self.question.options]
        if all(len(option) == 1 for option in self._options):
            return [self._read(self._prompt, self._all_at_once)]
        self._logprobs, self._greedy = [0.0] * len(self._options), [True] * len(self._options)
        self._later = range(1, len(self._options))
        return [self._option(0)]

    def _read(self, ids: tuple[int, ...], reader: _Reader) -> Request:
        self._tokens += len(ids)
        alpha = self.llm.config.ntk_alpha(len(self._prompt))
        return self.llm.engine.read(ids, alpha, len(self._prompt) - 1, reader)

    def _all_at_once(self, _: int, logits: Tensor) -> None:
        ids = torch.tensor([option[0] for option in self._options], device=logits.device)
        self._logprobs = _finite(logits[-1].log_softmax(-1)[ids])
        self._greedy = (ids == logits[-1].argmax()).tolist()

    def _option(self, number: int) -> Request:
        option, first = self._options[number], len(self._prompt) - 1
        targets = torch.tensor(option)

        def read(position: int, logits: Tensor) -> None:
            wanted = targets[position - first :][: len(logits)].to(logits.device)
            self._logprobs[number] += math.fsum(_finite(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]))
            self._greedy[number] &= bool((logits.argmax(-1) == wanted).all())

        return self._read((*self._prompt, *option[:-1]), read)

    def ended(self, request: Request, completion: Completion) -> list[Request]:
        # the first has stored the prompt for the others
        later, self._later = self._later, range(0)
        return [self._option(number) for number in later]

    def answer(self) -> Answer:
        return Answer(
            logprobs=tuple(self._logprobs), greedy=tuple(self._greedy), prompt_tokens=self._tokens, error=self.error
        )


class _Writing:
    """Replies to a text or a conversation, one turn after the other."""

    def __init__(self, llm: LLM, sample: Sample, question: Continuation | Dialogue, seed: int) -> None:
        self.llm, self.sample, self.question = llm, sample, question
        self.running = 0
        self.error: str | None = None
        self._params = _seeded(question.params, seed, sample.id)
        assert self._params.n == 1 or not getattr(question, "then", ()), "several replies can't have one next turn"
        self._completions: dict[int, Completion] = {}  # by choice, or by turn
        self._messages = list(question.messages) if isinstance(question, Dialogue) else []
        self._turn = 0

    def begin(self) -> list[Request]:
        if isinstance(self.question, Continuation):
            return self._submit(_ids(self.llm, self.question.prompt))
        return self._submit(chat.render(self.llm.tokenizer, self._messages))

    def _submit(self, ids: Sequence[int]) -> list[Request]:
        return self.llm.engine.submit(ids, self._params)

    def ended(self, request: Request, completion: Completion) -> list[Request]:
        self._completions[request.choice if self._params.n > 1 else self._turn] = completion
        then = self.question.then if isinstance(self.question, Dialogue) else ()
        if self._turn == len(then):
            return []
        self._messages += [chat.Message("assistant", completion.text), chat.Message("user", then[self._turn])]
        self._turn += 1
        return self._submit(chat.render(self.llm.tokenizer, self._messages))

    def answer(self) -> Answer:
        completions = [self._completions[number] for number in sorted(self._completions)]
        return Answer(
            texts=tuple(completion.text for completion in completions),
            finish_reasons=tuple(completion.finish_reason for completion in completions),
            prompt_tokens=sum(completion.prompt_tokens for completion in completions),
            new_tokens=sum(completion.completion_tokens for completion in completions),
            error=self.error,
        )


def _ids(llm: LLM, prompt: str | Sequence[int]) -> Sequence[int]:
    """Text encoded as text, whatever control tokens it spells; ids as they are."""
    return llm.tokenizer.encode(prompt, allowed_special=set()) if isinstance(prompt, str) else prompt


class _Reader(Protocol):
    def __call__(self, position: int, logits: Tensor, /) -> None: ...


def _seeded(params: SamplingParams, seed: int, id: str) -> SamplingParams:
    """The same with a seed of the sample's own, unless the task set one."""
    if params.seed is not None:
        return params
    digest = hashlib.sha256(f"{seed}/{id}".encode()).digest()
    return replace(params, seed=int.from_bytes(digest[:4], "little"))


def _finite(logprobs: Tensor) -> list[float]:
    values: list[float] = logprobs.tolist()
    if not all(map(math.isfinite, values)):
        raise CheckpointError(
            "the model gives logits that are not finite numbers",
            hint="its weights are damaged, or overflow this dtype; load it in float32, or quantize it again",
        )
    return values
