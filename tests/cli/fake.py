"""A model that answers at once, or slowly, or not at all, as the question asks; for tests of the command line.

Run as a script it is `qwenlet` with this model behind it: python -m cli.fake chat ...
"""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Iterator
from typing import Any

from qwenlet.config import GenerationDefaults, SamplingParams
from qwenlet.engine.records import Chunk, Completion, Timings
from qwenlet.errors import ContextLengthError
from qwenlet.tools import Toolbox

TIMINGS = Timings(
    time_to_first_token=0.25, prefill_seconds=0.5, decode_seconds=2.0, prefill_tokens=10, decode_tokens=20
)
SYSTEM = "You are a helpful assistant."


class FakeTokenizer:
    """One id per character."""

    def encode(self, text: str, *, allowed_special: object = "all") -> list[int]:
        return [1, *map(ord, text)] if allowed_special == "all" else list(map(ord, text))


class FakeLLM:
    name, device, dtype, precision, chat_format, context_length, default_system = (
        "fake",
        "cpu",
        "torch.float32",
        "int4",
        "chatml",
        64,
        SYSTEM,
    )

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.tokenizer = FakeTokenizer()
        self.defaults = GenerationDefaults(do_sample=True, top_p=0.8, repetition_penalty=1.1, max_new_tokens=512)
        self.requests: list[tuple[Any, SamplingParams]] = []
        self.toolboxes: list[Toolbox | None] = []
        self.cancelled = 0
        self.closed = False
        self.drawn = 100
        self.load_report = types.SimpleNamespace(warnings=[])

    def reply(
        self, messages: list[dict[str, Any]], params: SamplingParams, toolbox: Toolbox | None = None
    ) -> Iterator[Chunk]:
        self.requests.append((messages, params))
        self.toolboxes.append(toolbox)
        if toolbox is None:
            return self._speak(messages[-1]["content"], params)
        return self._speak(_in_react_format(messages, toolbox), params, verbatim=True)

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[Chunk]:
        self.requests.append((prompt, params))
        return self._speak("".join(map(chr, prompt)), params)

    def generate(self, prompt: list[int], params: SamplingParams) -> Any:
        completions = [Completion.from_chunks(self.stream(prompt, params)) for _ in range(params.n)]
        return completions[0] if params.n == 1 else completions

    def _speak(self, question: str, params: SamplingParams, *, verbatim: bool = False) -> Iterator[Chunk]:
        if params.seed is None:
            self.drawn += 1
        seed = self.drawn if params.seed is None else params.seed
        words = {
            "slow": ["word "] * 1000,
            "nothing": [],
            "escape": ["\x1b[31mred\x07\n\tend"],
            "chinese": ["你好", "…"],
            "code": ["if x:\n", "    y\n"],
        }.get(question, list(question) if verbatim else ["You ", "said ", question, f" ({seed})"])

        def chunk(text: str, done: int, reason: Any = None) -> Chunk:
            dropped = 2 if question == "long" else 0
            return Chunk(text, (7,) * done, reason, 10, 10, done, seed, TIMINGS, dropped_turns=dropped)

        finished = False
        try:
            yield Chunk("", (), None, 10, 5, 0, seed, Timings())
            if question == "too long":
                raise ContextLengthError(100, 64)
            for index, word in enumerate(words):
                if question == "slow":
                    time.sleep(0.02)
                yield chunk(word, index + 1)
                if question == "broken":
                    raise RuntimeError("the bug")
            finished = True
            yield chunk("", len(words) + 1, "length" if question == "cut" else "stop")
        finally:
            self.cancelled += not finished

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _in_react_format(messages: list[dict[str, Any]], toolbox: Toolbox) -> str:
    """Calls what the question says ("clock {...}"), again and again if it begins with "always", and then answers."""
    last = messages[-1]
    question = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    again = question.startswith("always ") and bool(toolbox)
    if last["role"] == "tool" and not again:
        return f" I now know the final answer.\nFinal Answer: It is {last['content']}."
    name, _, arguments = question.removeprefix("always ").partition(" ")
    if name not in {tool.name for tool in toolbox.offered}:
        return f"Thought: I know.\nFinal Answer: You said {question}."
    begin = "" if last["role"] == "tool" else "Thought:"
    return f"{begin} I call.\nAction: {name}\nAction Input: {arguments}\nObservation: made up"


class FakeApi(types.ModuleType):
    """Stands in for qwenlet.api; keeps what was loaded."""

    def __init__(self) -> None:
        super().__init__("qwenlet.api")
        self.loaded: list[tuple[str, dict[str, Any]]] = []
        self.llm = FakeLLM()

    def load(self, name: str, *, progress: Any, **options: Any) -> FakeLLM:
        progress(1, 2, "weights")
        self.loaded.append((name, options))
        return self.llm


if __name__ == "__main__":
    sys.modules["qwenlet.api"] = FakeApi()
    from qwenlet.cli import main

    sys.exit(main())
