"""The engine: requests in, chunks out. `step()` = schedule -> run -> sample -> emit.

records     what leaves: Chunk, Completion, Timings
request     one prompt on its way: ids, counters, state
scheduler   who runs next, with how many tokens and which pages
runner      lays out rows and pages, calls the model
stop        end tokens, stop sequences, stop texts
engine      the loop that ties them together
"""

from qwenlet.engine.engine import Engine, Stream
from qwenlet.engine.records import Chunk, Completion, Timings
from qwenlet.engine.request import Request

__all__ = ["Chunk", "Completion", "Engine", "Request", "Stream", "Timings"]
