"""Replies by the decode program, a step ahead of what is known: while a step's tokens are on their way the next step is
launched already, its ids taken from there on the device. A reply that ends meanwhile has computed one token too many,
which nobody sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qwenlet.cache import PAGE_TOKENS, PagePool
from qwenlet.config import EngineConfig
from qwenlet.decode import Decoder, Launch, Row, obstacle, unfit
from qwenlet.engine.request import Request
from qwenlet.engine.scheduler import Work
from qwenlet.errors import ConfigError
from qwenlet.model import Qwen
from qwenlet.sampling import is_greedy, uniform

Way = Literal["kernels", "torch", "modules"]
_OWN_ATTENTION = ("auto", "flash")  # what the decode program's own attention answers to


def way_to_decode(
    model: Qwen, options: EngineConfig, cache: torch.dtype, device: torch.device
) -> tuple[Way | None, str | None]:
    """How single tokens run here, and why not by our kernels. None: as the native program's obstacle says.

    Raises:
        ConfigError: the kernels were asked for, and don't run here.
    """
    if device.type == "cpu" and options.decode == "auto":
        return None, None
    reason = obstacle(device) or unfit(model, cache)
    if options.decode == "kernels" and reason is not None:
        raise ConfigError(f"decode='kernels' does not run here: {reason}", hint="use decode='auto'")
    if options.decode == "modules":
        return "modules", "decode='modules' was asked for"
    if options.decode == "auto" and options.attention not in _OWN_ATTENTION:
        return "modules", f"attention={options.attention!r} is torch's, which is not recorded"
    if options.decode == "torch":
        return "torch", "decode='torch' was asked for"
    return ("kernels", None) if reason is None else ("torch", reason)


def make_decoding(
    way: Way | None, model: Qwen, pool: PagePool, rows: int, pages: int, device: torch.device
) -> Decoding | None:
    """For `rows` requests at a time of up to `pages` pages; None where tokens run by the modules or the program."""
    if way in (None, "modules"):
        return None
    return Decoding(Decoder(model, pool, rows, pages, device, kernels=way == "kernels"))


def draws_plainly(request: Request) -> bool:
    """Whether the next token takes nothing but logits, counts and sampling parameters."""
    shaped = request.params.logit_bias or request.reply_length < request.params.min_new_tokens
    return request.reader is None and request.matcher is None and not request.followers and not shaped


@dataclass(eq=False)
class _Reply:
    """A request's slot, as long as it keeps its pages.

    Attributes:
        pages: the request's own list; another one takes its place when the request comes back from having none.
        known: how many tokens its counts on the device have seen; None: they aren't kept.
    """

    slot: int
    pages: list[int]
    known: int | None = None


@dataclass(frozen=True)
class _Part:
    """Where in a launch a request's token comes, from which position and over which pages."""

    launch: Launch
    row: int
    position: int
    pages: list[int]

    def serves(self, request: Request) -> bool:
        """Whether it is what the request's next step would compute."""
        return self.position == request.stored and self.pages is request.pages


class Decoding:
    """Runs what `takes` says; between `start` and `finish` prompts may run beside."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._replies: dict[Request, _Reply] = {}
        self._ahead: dict[Request, _Part] = {}
        self._started: list[tuple[Work, _Part]] = []

    @staticmethod
    def takes(work: Work) -> bool:
        request = work.request
        return len(work.tokens) == work.wanted == 1 and request.adapter is None and request.reader is None

    def start(self, works: Sequence[Work], *, alone: bool) -> None:
        """Launches what isn't on its way yet, and the next step too where it can only be the same replies.

        alone: there is no other work in the step.
        """
        ahead, self._ahead = self._ahead, {}
        self._forget(works)
        parts: dict[Request, _Part] = {}
        for work in works:
            part = ahead.get(work.request)
            if part is not None and part.serves(work.request):
                parts[work.request] = part
        missing = [work for work in works if work.request not in parts]
        if missing:
            parts |= self._launch(missing)
        self._started = [(work, parts[work.request]) for work in works]
        launches = {id(part.launch) for part in parts.values()}
        if alone and len(launches) == 1 and all(self._goes_on(work.request) for work in works):
            rows = [self._row(work.request, 1, parts[work.request].row) for work in works]
            launch = self._decoder.launch(rows)
            self._ahead = _parts(launch, works, later=1)

    def finish(self) -> list[tuple[Tensor, int | None]]:
        """Of each work: logits [1, V], and the token where it was drawn; waits for them."""
        started, self._started = self._started, []
        tokens: dict[int, list[int]] = {}
        found = []
        for work, part in started:
            if id(part.launch) not in tokens:
                tokens[id(part.launch)] = part.launch.tokens()
            logits = part.launch.logits[part.row : part.row + 1]
            plain = draws_plainly(work.request)
            found.append((logits if plain else logits.float(), tokens[id(part.launch)][part.row] if plain else None))
        return found

    def reset(self) -> None:
        """Forgets what is on its way, after a step that failed."""
        self._ahead, self._started = {}, []
        for reply in self._replies.values():
            reply.known = None

    def _launch(self, works: Sequence[Work]) -> dict[Request, _Part]:
        parts: dict[Request, _Part] = {}
        most = self._decoder.launch_rows
        for first in range(0, len(works), most):
            some = works[first : first + most]
            launch = self._decoder.launch([self._row(work.request, 0, -1) for work in some])
            if len(works) > most:
                launch.logits = launch.logits.clone()  # the next one overwrites them
            parts |= _parts(launch, some)
        return parts

    def _row(self, request: Request, later: int, source: int) -> Row:
        """The request's part in this step, or in the one after it (`later` 1), whose token row `source` draws."""
        known = len(request.known) + later
        counted = request.counts is not None and draws_plainly(request)
        reply = self._reply(request, known if counted else None)
        drawn = draws_plainly(request) and not is_greedy(request.params)
        return Row(
            reply=reply,
            slot=reply.slot,
            token=None if later else request.known[request.stored],
            source=source,
            position=request.stored + later,
            pages=request.pages,
            params=request.params,
            u=uniform(request.seed, request.choice, known) if drawn else 0.0,
            counted=counted,
        )

    def _reply(self, request: Request, known: int | None) -> _Reply:
        """The request's slot, whose counts know the first `known` tokens and are about to see one more."""
        slots = self._decoder.slots
        reply = self._replies.get(request)
        if reply is None or reply.pages is not request.pages or (reply.known is None) != (known is None):
            slot = slots.take() if reply is None else reply.slot
            assert slot is not None, "more replies than slots"
            # a new object, as what the host's buffers hold of the old one is no longer true
            reply = self._replies[request] = _Reply(slot, request.pages)
            slots.begin(slot, request.alpha, request.logn)
        if known is not None:
            if reply.known != known:
                slots.count(reply.slot, request.counts)
            reply.known = known + 1
        return reply

    def _forget(self, works: Sequence[Work]) -> None:
        """Gives back the slots of what has ended, or lost its pages: replies that go on are in every step."""
        running = {work.request for work in works}
        for request in [one for one in self._replies if one not in running]:
            self._decoder.slots.give_back(self._replies.pop(request).slot)

    @staticmethod
    def _goes_on(request: Request) -> bool:
        """Whether the next step stores one more token of the request unless it ends by what it says."""
        return (
            draws_plainly(request)
            and request.params.logprobs is None
            and request.ending is None
            and request.reply_length + 1 < request.max_new_tokens
            and (request.stored + 1) // PAGE_TOKENS < len(request.pages)
        )


def _parts(launch: Launch, works: Sequence[Work], later: int = 0) -> dict[Request, _Part]:
    """`later` 1: of the step after the one that the works say."""
    return {
        work.request: _Part(launch, at, work.request.stored + later, work.request.pages)
        for at, work in enumerate(works)
    }
