"""From logits to a reply: what a step did for each request, token by token, and the chunks that leave."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from qwenlet.cache import PAGE_TOKENS
from qwenlet.engine.bell import Listener, tell
from qwenlet.engine.decoding import draws_plainly
from qwenlet.engine.prefix import PrefixCache
from qwenlet.engine.records import Chunk, FinishReason
from qwenlet.engine.request import Request
from qwenlet.engine.scheduler import Scheduler, Work
from qwenlet.engine.speculation import Speculation
from qwenlet.engine.stats import Stats
from qwenlet.sampling import Row, TokenLogprob, checked, choose, choose_all, draws_natively, token_logprob


class Replies:
    """Draws tokens, ends replies, writes chunks. To be called with the engine's lock held."""

    def __init__(
        self, scheduler: Scheduler, prefix: PrefixCache | None, speculation: Speculation | None, stats: Stats
    ) -> None:
        self.scheduler, self.prefix, self.speculation, self.stats = scheduler, prefix, speculation, stats
        self._unheard: list[Listener] = []

    def give_up(self, request: Request, error: Exception) -> None:
        request.failure = error
        self.finish(request, "error", error=line(error))

    @staticmethod
    def draw_ahead(work: Sequence[Work], logits: Sequence[Tensor]) -> dict[Request, int]:
        """The next token of every request that needs nothing else for it, drawn side by side."""
        rows: dict[Request, Row] = {}
        for one, some in zip(work, logits, strict=True):
            request = one.request
            if draws_plainly(request) and one.wanted == 1 and draws_natively(some):
                rows[request] = Row(some[0], request.params, request.counts, request.choice, len(request.known))
        try:
            return dict(zip(rows, choose_all(list(rows.values())), strict=True)) if rows else {}
        except Exception:
            return {}  # `take` draws for each alone, so that the one that can't be drawn for hurts no other

    def take(self, work: Work, logits: Tensor, seconds: float, drawn: int | None = None) -> None:
        """What a step did for one request; whatever goes wrong here is this request's alone.

        Args: drawn: its next token, where `draw_ahead` gave one.
        """
        request = work.request
        if request.ending is not None:
            self.finish(request, request.ending)
            return
        try:
            if request.reader is not None:
                self._read(request, work, logits)
            else:
                self._draw(request, work, logits, seconds, drawn)
        except Exception as error:
            if request.finish_reason is None:
                self.give_up(request, error)
        except BaseException:
            if request.finish_reason is None:  # half taken in: going on could lose a token
                self.finish(request, "error", error="interrupted while a token was taken in")
            raise

    def _read(self, request: Request, work: Work, logits: Tensor) -> None:
        assert request.reader is not None, "only readers come here"
        if len(logits):  # or hidden states
            request.reader(request.stored + len(work.tokens) - len(logits), logits)
        self._stored(request, len(work.tokens))
        if request.stored == len(request.known):
            self.finish(request, "length")
        else:
            self.emit(request)

    def _draw(self, request: Request, work: Work, logits: Tensor, seconds: float, drawn: int | None) -> None:
        if not work.wanted:
            self._stored(request, len(work.tokens))
            self.emit(request)
            return
        self._stored(request, len(work.tokens) - work.guesses)
        guesses = work.tokens[len(work.tokens) - work.guesses :]
        for right, row in enumerate(logits):
            token = self._choose(request, row, drawn)
            if request.finish_reason is not None or right == work.guesses or token != guesses[right]:
                break
            self._stored(request, 1)  # the guess was right, and its keys and values are there
        if self.speculation is not None and len(self.scheduler.running) == 1:
            if work.guesses:
                self.speculation.observe(work.guesses, right, seconds)
            elif len(work.tokens) == 1:
                self.speculation.observe_plain(seconds)

    def _stored(self, request: Request, count: int) -> None:
        request.stored += count
        full = request.stored // PAGE_TOKENS
        if self.prefix is not None and full > request.indexed:
            self.prefix.keep(request.root, request.known[: full * PAGE_TOKENS], request.pages[:full])
            request.indexed = full

    def _choose(self, request: Request, logits: Tensor, drawn: int | None = None) -> int:
        """Draws the next token and takes it in; the prompt's last logits serve its other choices, too."""
        if request.followers:
            for follower in self.scheduler.start_followers(request):
                try:
                    self._choose(follower, logits)
                except Exception as error:
                    self.give_up(follower, error)
        if drawn is None:
            allowed = logits if request.matcher is None else request.matcher.mask(logits)
            bias = request.early_bias if request.reply_length < request.params.min_new_tokens else request.bias
            token = choose(allowed, request.params, request.counts, request.choice, len(request.known), bias)
        else:
            token = checked(drawn, logits)
        now = time.perf_counter()
        if request.first_token_at is None:
            request.first_token_at = now
            self.stats.prompt_tokens += len(request.prompt)
            self.stats.first_token.observe(now - request.submitted_at)
        elif request.latest_token_at is not None:
            self.stats.between_tokens.observe(now - request.latest_token_at)
        request.latest_token_at = now
        self.stats.generated_tokens += 1
        wanted = request.params.logprobs
        self._accept(request, token, None if wanted is None else token_logprob(logits, token, wanted))
        return token

    def _accept(self, request: Request, token: int, logprob: TokenLogprob | None) -> None:
        """Takes a token into the reply, and ends the reply if it is the last."""
        request.known.append(token)
        if request.counts is not None:
            request.counts.add(token)
        if request.lookup is not None:
            request.lookup.add(token)
        if request.stop_tokens.hit(request.reply_end(request.stop_tokens.longest)):
            self.finish(request, "stop", token, logprob)
            return
        if request.matcher is not None:
            request.matcher.accept(token)
        piece = "" if request.decoder is None else request.decoder.push(token)
        text, stopped = request.stop_texts.push(piece)
        if stopped:
            self.finish(request, "stop", token, logprob, text=text, flush=False)
        elif request.matcher is not None and request.matcher.finished:
            self.finish(request, "stop", token, logprob, text=text)
        elif request.reply_length >= request.max_new_tokens:
            self.finish(request, "length", token, logprob, text=text)
        else:
            self.emit(request, text, token, logprob)

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        token: int | None = None,
        logprob: TokenLogprob | None = None,
        *,
        error: str | None = None,
        text: str = "",
        flush: bool = True,
    ) -> None:
        if flush:
            tail = "" if request.decoder is None else request.decoder.flush()
            more, stopped = request.stop_texts.push(tail)
            text += more if stopped else more + request.stop_texts.flush()
        request.finish_reason = reason
        self.stats.ended(reason, time.perf_counter() - request.submitted_at, request.timings)
        self.scheduler.remove(request)
        self.emit(request, text, token, logprob, error)

    def emit(
        self,
        request: Request,
        text: str = "",
        token: int | None = None,
        logprob: TokenLogprob | None = None,
        error: str | None = None,
    ) -> None:
        wanted = request.params.logprobs is not None
        request.outbox.put(
            Chunk(
                text=text,
                token_ids=() if token is None else (token,),
                finish_reason=request.finish_reason,
                prompt_tokens=len(request.prompt),
                prompt_done=min(max(request.stored, request.reply_length and len(request.prompt)), len(request.prompt)),
                completion_tokens=request.reply_length,
                seed=request.seed,
                timings=request.timings,
                logprobs=(() if logprob is None else (logprob,)) if wanted else None,
                choice=request.choice,
                dropped_turns=request.dropped_turns,
                cached_tokens=request.cached,
                error=error,
            )
        )
        if request.listener is not None:
            self._unheard.append(request.listener)

    def tell(self) -> None:
        """Wakes whoever waits for the chunks that were written since."""
        unheard, self._unheard = self._unheard, []
        if unheard:
            tell(unheard)


def line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}"
