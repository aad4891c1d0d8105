"""HTTP: clients of OpenAI's API talk to an LLM.

errors       what is refused, in the shape that clients expect
service      what all calls share: the model, its names, room for more requests
limits       how much one client may ask for
origin       whose pages may call
gate         every call passes it: ids, keys, limits, bodies, errors, the access log
fields       a request's fields: honoured, accepted without effect, refused by name
nested       ... and those of objects within, which come in several kinds
bodies       a body becomes a request; a client that leaves ends its work
declared     tools of a request
dialogue     messages and tools become a prompt, a grammar and a reader of the reply
replies      submits prompts; from the engine's chunks to text, usage, log-probabilities
parsed       ... and to text, thoughts and calls
prompts      how likely a prompt's own tokens are
events       server-sent events
items, output     of /v1/responses: what goes in becomes messages, what comes out items and events
chat, completions, responses, messages, ollama, models, embeddings, tokens, operations, metrics     one module
             per family of endpoints
page, conversations     the web page as it was built, and the door to the store that it alone may use
reference    the fields written down, for people
app          all of them together
connection   one client's, byte by byte: how large and how slow a request's head may be, what is left unread
run          sockets, signals, and the order of starting and stopping
"""

from qwenlet.server.app import build
from qwenlet.server.run import serve
from qwenlet.server.service import Service

__all__ = ["Service", "build", "serve"]
