"""How likely a prompt's own tokens are: what `echo` with `logprobs` tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from qwenlet.engine.request import Request
from qwenlet.sampling import TokenLogprob, token_logprob
from qwenlet.server.replies import ended
from qwenlet.server.service import Service


async def prompt_logprobs(
    service: Service, prompts: Sequence[Sequence[int]], alternatives: int, reply: int, *, model: str | None,
    priority: int = 0,
) -> list[list[TokenLogprob]]:  # fmt: skip
    """Of each prompt, the log-probability of every token but the first, which nothing predicts.

    A reply's pass finds the prompt's keys and values stored by this one: the NTK factor is that of the whole prompt, as
    in one pass of the published code over it. `LLM.score` knows where a continuation begins and takes the factor of
    what is before it, so beyond the training length the two differ.

    Args:
        reply: most tokens that will be written after the prompt.
    """
    engine = service.llm.engine
    found: list[list[TokenLogprob]] = [[] for _ in prompts]
    requests: list[Request] = []
    try:
        for ids, entries in zip(prompts, found, strict=True):
            read = _reader(ids, entries, alternatives)
            timeout = service.config.request_timeout
            alpha = engine.ntk_alpha(len(ids), reply)
            adapter = service.adapter(model)
            requests.append(engine.read(ids, alpha, 0, read, priority=priority, timeout=timeout, adapter=adapter))
        await ended(service, requests)
    finally:
        for request in requests:
            engine.cancel(request)
    return found


def _reader(ids: Sequence[int], entries: list[TokenLogprob], alternatives: int) -> Callable[[int, Tensor], None]:
    def read(position: int, logits: Tensor) -> None:
        for place, row in enumerate(logits, position + 1):
            if place == len(entries) + 1 < len(ids):  # a request that began anew is read again
                entries.append(token_logprob(row, ids[place], alternatives))

    return read
