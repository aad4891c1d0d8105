"""model.chat and model.chat_stream with the published signatures.

The last token is kept, text is cut by ids and not by characters, the caller's stop words are left alone, and streaming
decodes each token once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qwenlet import chat
from qwenlet.checkpoint import DEFAULT_SYSTEM
from qwenlet.errors import RequestError
from qwenlet.tokenizer import StreamDecoder

History = list[tuple[str, str]]


class Conversation:
    """What a published chat model can do beside `generate`."""

    generation_config: Any
    device: torch.device

    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[tuple[str, str]] | None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        generation_config: Any = None,
        **options: Any,
    ) -> tuple[str, History]:
        """One turn: (response, history with this turn appended); the given history is not changed."""
        ids, settings = self._turn(tokenizer, query, history, system, stop_words_ids, generation_config, options)
        output = self.generate(ids, **settings)  # type: ignore[attr-defined]
        text = _text(tokenizer, output[0, ids.shape[1] :].tolist(), stop_words_ids)
        return text, [*copy.deepcopy(list(history or ())), (query, text)]

    def chat_stream(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[tuple[str, str]] | None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        logits_processor: Any = None,
        generation_config: Any = None,
        **options: Any,
    ) -> Iterator[str]:
        """The reply as it grows: each item is the whole text so far. Closing the iterator ends the reply."""
        if logits_processor is not None:
            options["logits_processor"] = logits_processor
        ids, settings = self._turn(tokenizer, query, history, system, stop_words_ids, generation_config, options)
        tokens = _Tokens()
        settings["stopping_criteria"] = StoppingCriteriaList([*settings["stopping_criteria"], tokens.stop])
        problem: list[BaseException] = []

        def run() -> None:
            try:
                self.generate(ids, streamer=tokens, **settings)  # type: ignore[attr-defined]
            except BaseException as error:
                problem.append(error)
            finally:
                tokens.end()

        thread = Thread(target=run, name="qwenlet-chat", daemon=True)
        thread.start()
        decoder, text = StreamDecoder(tokenizer.core), ""
        ends = chat.stop_ids(tokenizer.core)
        try:
            while (token := tokens.queue.get()) is not None:
                if token not in ends and (new := decoder.push(token)):
                    text += new
                    yield text
            if rest := decoder.flush():
                yield text + rest
        finally:
            tokens.cancelled = True
            thread.join()
        if problem:
            raise problem[0]

    def _turn(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[tuple[str, str]] | None,
        system: str,
        stop_words_ids: Sequence[Sequence[int]] | None,
        generation_config: Any,
        options: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Any]]:
        """Ids [1, T], and how `generate` is called."""
        if "stream" in options:
            raise RequestError("chat has no argument stream", hint="use model.chat_stream(...)")
        config = generation_config if generation_config is not None else self.generation_config
        if getattr(config, "chat_format", "chatml") != "chatml":
            raise RequestError(
                f"the model's chat_format is {config.chat_format!r}, so it does not chat",
                hint="use model.generate, or load a chat model",
            )
        window = options.pop("max_window_size", None) or getattr(config, "max_window_size", None) or 6144
        _, ids = chat.make_context(tokenizer.core, query, history, system, window)
        words = [list(word) for word in stop_words_ids or ()]
        settings = options | {
            "generation_config": config,
            "eos_token_id": list(chat.stop_ids(tokenizer.core)),
            "pad_token_id": tokenizer.core.eod_id,
            "stopping_criteria": StoppingCriteriaList([*options.get("stopping_criteria", ()), _Words(words, len(ids))]),
        }
        tensor = torch.tensor([ids], device=self.device)
        return tensor, settings | {"attention_mask": torch.ones_like(tensor)}


def _text(tokenizer: Any, ids: list[int], words: Sequence[Sequence[int]] | None) -> str:
    for word in words or ():
        if word and ids[-len(word) :] == list(word):
            ids = ids[: -len(word)]
            break
    return chat.parse_reply(tokenizer.core, ids)


class _Words(StoppingCriteria):
    """Ends a reply at any of these sequences of ids."""

    def __init__(self, words: list[list[int]], prompt: int) -> None:
        self.words, self.prompt = words, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        rows = [row[self.prompt :] for row in input_ids.tolist()]
        done = [any(word and row[-len(word) :] == word for word in self.words) for row in rows]
        return torch.tensor(done, device=input_ids.device)


class _Tokens(BaseStreamer):
    """Hands tokens from the thread that makes them to the one that reads, and can end it."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[int | None] = SimpleQueue()
        self.prompt, self.cancelled = True, False

    def put(self, value: Tensor) -> None:
        if self.prompt:
            self.prompt = False
            return
        for token in value.flatten().tolist():
            self.queue.put(token)

    def end(self) -> None:
        self.queue.put(None)

    def stop(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.cancelled, device=input_ids.device)
