"""The engine: requests in, chunks out. `step()` = schedule -> run -> sample -> emit.

records      what leaves: Chunk, Completion, Timings
request      one prompt on its way: ids, counters, state
intake       prompts as they come from outside
sizing       how many pages there are
prefix       pages of earlier requests, found again
scheduler    who runs next, with how many tokens and which pages
speculation  guesses from the text itself
runner       lays out rows and pages, calls the model
stop         end tokens, stop sequences, stop texts
pooling      hidden states -> one vector
replies      from logits to tokens, text and chunks
stats        counters
engine       the step that ties them together
driver       the thread that calls it
streams      a request's chunks, for threads and for event loops
bell         wakes the loops, once a step
"""

from qwenlet.engine.bell import AtOnce, Listener
from qwenlet.engine.driver import Health
from qwenlet.engine.engine import Engine
from qwenlet.engine.intake import check_prompt
from qwenlet.engine.pooling import MeanState
from qwenlet.engine.records import Chunk, Completion, Timings
from qwenlet.engine.request import Request
from qwenlet.engine.stats import Stats
from qwenlet.engine.streams import AsyncStream, AsyncStreams, Stream

__all__ = [
    "AsyncStream",
    "AsyncStreams",
    "AtOnce",
    "Chunk",
    "Completion",
    "Engine",
    "Health",
    "Listener",
    "MeanState",
    "Request",
    "Stats",
    "Stream",
    "Timings",
    "check_prompt",
]
