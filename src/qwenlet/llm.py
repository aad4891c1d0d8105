"""LLM: generate, stream, chat, score, embed. What a Python user holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from qwenlet import chat, tools
from qwenlet.chat import Message
from qwenlet.checkpoint import DEFAULT_SYSTEM, Checkpoint, LoadReport, dtype_name
from qwenlet.config import (
    DEFAULT_NEW_TOKENS,
    EngineConfig,
    GenerationDefaults,
    ModelConfig,
    SamplingParams,
)
from qwenlet.engine import Completion, Engine, Request, Stream, check_prompt
from qwenlet.errors import MissingTokenizerError, RequestError
from qwenlet.linear import QuantLinear
from qwenlet.lora import Adapter, LoadedAdapter
from qwenlet.model import Qwen
from qwenlet.tokenizer import Tokenizer
from qwenlet.tools import Toolbox, ToolMessage

Prompt = str | Sequence[int]
History = list[tuple[str, str]]
TOOL_FIELDS = {"tool_calls", "tool_call_id", "reasoning_content"}


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after a prompt.

    Attributes:
        logprob: natural log of the whole continuation's probability.
        is_greedy: whether greedy decoding would have written exactly this.
        token_logprobs: of each token of the continuation.
    """

    logprob: float
    is_greedy: bool
    token_logprobs: tuple[float, ...]


class LLM:
    """A loaded model. Also a context manager; `close` gives its memory back.

    Attributes:
        tokenizer: raises MissingTokenizerError when used if the checkpoint has no vocabulary.
        config: shapes and maths.
        default_system: the system message a conversation starts with unless the user gives one.
        defaults: what the checkpoint's generation config asks for; a None in SamplingParams means these.
        source: the weight files.
        load_report: what loading did, `str()` for people.
    """

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        model: Qwen,
        tokenizer: Tokenizer | MissingTokenizerError,
        device: torch.device,
        dtype: torch.dtype,
        options: EngineConfig,
        report: LoadReport,
    ) -> None:
        self.name = name
        self.path, self.source = checkpoint.path, checkpoint.source
        self.config: ModelConfig = checkpoint.config
        self.default_system = checkpoint.default_system
        self.defaults: GenerationDefaults = checkpoint.defaults
        self.device, self.dtype, self.options = device, dtype, options
        self.load_report = report
        self._closed = False
        self._model = model
        self._tokenizer = tokenizer
        self._own_format = _chat_format(checkpoint.defaults, tokenizer)
        self._chatting: frozenset[str] = frozenset()
        known = tokenizer if isinstance(tokenizer, Tokenizer) else None
        # a base model's too: no text holds them, and an adapter may have taught it to end its turns
        stops = chat.stop_ids(known) if known is not None else ()
        self._engine = Engine(model, known, options, checkpoint.defaults, device, stops)
        if self._engine.obstacle is not None:
            how = "replies run without our kernels" if device.type == "cuda" else "runs by modules"
            chosen = options.linear != "auto" or options.decode != "auto"
            told = report.notes if chosen else report.warnings
            told.append(f"{how}, more slowly: {self._engine.obstacle}")

    @property
    def chat_format(self) -> Literal["chatml", "raw"]:
        """How conversations are told to the model; "raw" for one that learned none, itself or by an adapter."""
        return "chatml" if self._chatting else self._own_format

    @property
    def precision(self) -> str:
        """In what most linears' weights run: "int4", "int8", "bf16" ..."""
        bits = Counter(module.tiles.bits for module in self.model.modules() if isinstance(module, QuantLinear))
        return f"int{bits.most_common(1)[0][0]}" if bits else dtype_name(self.dtype)

    @property
    def engine(self) -> Engine:
        self._check_open()
        return self._engine

    @property
    def model(self) -> Qwen:
        self._check_open()
        return self._model

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError(f"the model {self.name} was closed", hint="load it again")

    @property
    def tokenizer(self) -> Tokenizer:
        if isinstance(self._tokenizer, MissingTokenizerError):
            raise self._tokenizer
        return self._tokenizer

    @property
    def context_length(self) -> int:
        """Positions one request may use."""
        return self.engine.context_length

    # ---------------------------------------------------------------------------------------------- generation

    @overload
    def generate(self, prompt: str, params: SamplingParams | None = None) -> Completion: ...

    @overload
    def generate(
        self, prompt: Sequence[int] | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Any: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Completion | list[Completion]:
        """Continues one prompt, or several.

        Args:
            prompt: text, token ids, or a list of either. Control tokens written out in text stay text.
            params: one for all, or as many as there are prompts.
        Returns:
            One Completion for one prompt with n=1; else a list, n after n in the order of the prompts.
        """
        single = _is_one(prompt)
        prompts: list[Prompt] = [prompt] if single else list(prompt)  # type: ignore[list-item, arg-type]
        if params is None or isinstance(params, SamplingParams):
            each = [_checked(params)] * len(prompts)
        else:
            each = [_checked(one) for one in params]
            if len(each) != len(prompts):
                raise RequestError(f"{len(each)} sampling parameters were given for {len(prompts)} prompts")
        requests: list[Request] = []
        try:
            for one, settings in zip(prompts, each, strict=True):
                requests += self.engine.submit(self._ids(one), settings)
            completions = [Completion.from_chunks(self.engine.stream(request)) for request in requests]
        finally:
            for request in requests:
                self.engine.cancel(request)
        return completions[0] if single and len(completions) == 1 else completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Continues one prompt piece by piece. Closing the iterator cancels the request."""
        return self._submit_one(self._ids(prompt), params)

    def reply(
        self,
        messages: Iterable[Message | Mapping[str, Any]],
        params: SamplingParams | None = None,
        toolbox: Toolbox | None = None,
    ) -> Stream:
        """The assistant's next message, piece by piece.

        Old turns are left out, oldest first, until the conversation and the reply fit the context (the chunks'
        `dropped_turns` says how many); the system message and the last question always stay.

        Args:
            messages: with tools also OpenAI's `tool_calls`, `tool_call_id` and `reasoning_content`.
            toolbox: tools that the reply may or must call; `qwenlet.tools.ReplyParser` finds the calls in its text.
        Raises:
            ContextLengthError: not even these two fit.
        """
        told = list(messages)
        params = params or SamplingParams()
        asked = params.max_new_tokens
        # the checkpoint's own reply length gives way to the conversation, a length that was asked for doesn't
        reserve = asked or min(self.defaults.max_new_tokens or DEFAULT_NEW_TOKENS, self.chat_window // 2)
        window = self.chat_window if reserve < self.chat_window else self.context_length
        if not toolbox and not any(isinstance(one, Mapping) and one.get("tool_calls") for one in told):
            fitted = chat.fit(self.tokenizer, told, window, reserve)
        else:
            toolbox = toolbox or Toolbox()
            conversation = [_tool_message(one) for one in told]
            fitted = tools.fit(self.tokenizer, conversation, toolbox, window, reserve)
            params = _with_calls(params, toolbox, thinking=tools.continues_thought(fitted.messages))
        return self._submit_one(fitted.ids, params, dropped_turns=fitted.dropped_turns)

    @property
    def chat_window(self) -> int:
        """Tokens a conversation and its next reply share: the training length, not its stretched maximum."""
        return min(self.config.seq_length, self.context_length)

    def chat(
        self,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        system: str = DEFAULT_SYSTEM,
        params: SamplingParams | None = None,
    ) -> tuple[str, History]:
        """One turn of a conversation: (response, history with this turn appended); the given history is not changed."""
        completion = Completion.from_chunks(self.chat_stream(query, history, system, params))
        return completion.text, [*(history or []), (query, completion.text)]

    def chat_stream(
        self,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        system: str = DEFAULT_SYSTEM,
        params: SamplingParams | None = None,
    ) -> Stream:
        """The same, piece by piece: each chunk carries the new text only."""
        return self.reply(chat.history_to_messages(query, history, system), params)

    def _submit_one(self, ids: Sequence[int], params: SamplingParams | None, *, dropped_turns: int = 0) -> Stream:
        params = _checked(params)
        if params.n != 1:
            raise RequestError(f"a stream carries one reply, but n is {params.n}", hint="use generate for several")
        return self.engine.stream(self.engine.submit(ids, params, dropped_turns=dropped_turns)[0])

    def _ids(self, prompt: Prompt | Tensor) -> Sequence[int]:
        """Token ids of a prompt: plain text encoded, tensors and arrays as lists."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, allowed_special=set())
        return prompt.tolist() if hasattr(prompt, "tolist") else prompt

    # ---------------------------------------------------------------------------------------------- adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that `SamplingParams.adapter` may have."""
        return self.engine.adapters

    def add_adapter(self, name: str, folder: str | Path) -> None:
        """Loads a LoRA adapter beside the model, in peft's format, for requests that ask for it by name.

        One of that name is replaced; requests that run go on with what they began with.

        Raises:
            CheckpointError: missing or damaged files, another model's adapter, or one that has to be merged first.
            ConfigError: an adapter of a kind that isn't read.
        """
        if not name or not name.isprintable():
            raise RequestError(f"an adapter's name is {name!r}, expected a printable text")
        adapter = Adapter.read(folder, self.config)
        self.engine.add_adapter(LoadedAdapter.beside(self.model, name, adapter))
        self._chatting = self._chatting | {name} if adapter.chat_format == "chatml" else self._chatting - {name}

    def remove_adapter(self, name: str) -> None:
        """Lets no request ask for it any more. Raises RequestError if there is none of that name."""
        self.engine.remove_adapter(name)
        self._chatting -= {name}

    # ---------------------------------------------------------------------------------------------- logits

    def logits(self, ids: Sequence[int] | Tensor, *, adapter: str | None = None) -> Tensor:
        """Float32 logits [T, vocab_size] of every position, from one prefill, on the CPU.

        Args:
            ids: token ids, a list or a LongTensor [T].
            adapter: name of the adapter to go with.
        Raises:
            RequestError: not a list of ids of this vocabulary.
            ContextLengthError: more ids than the model has maths for.
        """
        tokens = check_prompt(self._ids(ids), self.config.vocab_size)
        return self.engine.logits(tokens, self.config.ntk_alpha(len(tokens)), adapter=adapter)

    def score(self, prompt: Prompt, continuation: Prompt, *, adapter: str | None = None) -> Score:
        """How likely the continuation is after the prompt, as generation sees it: the NTK factor is the prompt's.

        Text is tokenized in two pieces, prompt and continuation.
        """
        before = check_prompt(self._ids(prompt), self.config.vocab_size)
        after = check_prompt(self._ids(continuation), self.config.vocab_size)
        target = torch.tensor(after)
        first, each, greedy = len(before) - 1, [], []

        def read(position: int, logits: Tensor) -> None:
            wanted = target[position - first :][: len(logits)].to(logits.device)
            each.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].cpu())
            greedy.append(bool((logits.argmax(-1) == wanted).all()))

        # the last token's own logits would predict what comes after the continuation
        tokens = (*before, *after[:-1])
        alpha = self.config.ntk_alpha(len(before))
        for _ in self.engine.stream(self.engine.read(tokens, alpha, first, read, adapter=adapter)):
            pass
        logprobs = torch.cat(each)
        return Score(float(logprobs.sum()), all(greedy), tuple(logprobs.tolist()))

    def embed(self, prompt: Prompt, *, adapter: str | None = None) -> Tensor:
        """The mean of the last hidden states, normed: float32 [hidden_size], on the CPU.

        The model was trained to write: texts of one subject lie near each other, but a model that was trained to embed
        does this better.
        """
        ids = check_prompt(self._ids(prompt), self.config.vocab_size)
        request, state = self.engine.embed(ids, self.config.ntk_alpha(len(ids)), adapter=adapter)
        for _ in self.engine.stream(request):
            pass
        return state.mean

    # ---------------------------------------------------------------------------------------------- life

    def close(self) -> None:
        """Ends what is running and gives the weights and pages back. Harmless the second time."""
        if self._closed:
            return
        self._closed = True
        self._engine.close()
        del self._engine, self._model

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        size = f"{self.load_report.parameters / 1e6:,.0f} M parameters"
        return f"LLM({self.name!r}, {size}, {dtype_name(self.dtype)}, {self.device})"


def _is_one(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Text, a list of ids, a tensor of ids: one prompt. A list of those: several."""
    if isinstance(prompt, str) or not len(prompt):
        return True
    return hasattr(prompt[0], "__index__") and getattr(prompt[0], "ndim", 0) == 0


def _checked(params: SamplingParams | None) -> SamplingParams:
    if params is not None and not isinstance(params, SamplingParams):
        raise RequestError(
            f"params is {params!r}, expected SamplingParams", hint="qwenlet.SamplingParams(temperature=0.7)"
        )
    return params or SamplingParams()


def _tool_message(value: Message | Mapping[str, Any]) -> ToolMessage:
    if isinstance(value, Message):
        return ToolMessage(value.role, value.content)
    if not isinstance(value, Mapping) or not value.keys() & TOOL_FIELDS:
        return _tool_message(Message.of(value))
    if unknown := value.keys() - TOOL_FIELDS - {"role", "content"}:
        raise RequestError(f"a message has the field {min(unknown)!r}, which is not understood here")
    return ToolMessage.of(value)


def _with_calls(params: SamplingParams, toolbox: Toolbox, *, thinking: bool) -> SamplingParams:
    """The reply ends where a tool's result belongs, and is held to a call where one is forced."""
    forced = tools.forced_reply(toolbox, thinking=thinking)
    stop = (*(params.stop or ()), tools.STOP_TEXT)
    return replace(params, stop=stop) if forced is None else replace(params, stop=stop, lark=forced)


def _chat_format(defaults: GenerationDefaults, tokenizer: object) -> Literal["chatml", "raw"]:
    if defaults.chat_format is not None:
        return defaults.chat_format
    return "chatml" if isinstance(tokenizer, Tokenizer) and tokenizer.im_start_id is not None else "raw"
