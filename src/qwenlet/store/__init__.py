"""Conversations and responses in one SQLite file, for the server, its page and the command line. No torch in here.

    with Store.open() as store:
        talk = store.new_conversation(model="demo")
        question = store.append(talk.id, "user", "What is the capital of France?")
        store.append(talk.id, "assistant", "Paris.")
        store.branch(question.id, "And of Italy?")      # edits by a sibling; the old branch stays
        [message.content for message in store.path(talk.id)]  # ["And of Italy?"]

A conversation is a tree of messages with one current leaf; `path` is the branch that ends there. Any thread and several
processes may use one file. A file that is damaged, foreign or newer is refused and left as it is. Only its owner may
read it.

database        the file: opened, brought up to date, its troubles in words
conversations   trees of messages, and the search
responses       what /v1/responses keeps
interchange     out as JSON and Markdown, in from these and from other programs' files
"""

from qwenlet.store.conversations import Conversations, title_of
from qwenlet.store.database import SCHEMA_VERSION, data_dir, is_off
from qwenlet.store.records import TOLD, Conversation, Found, StoredMessage, StoredResponse, Tree
from qwenlet.store.responses import Responses

__all__ = [
    "SCHEMA_VERSION",
    "TOLD",
    "Conversation",
    "Found",
    "Store",
    "StoredMessage",
    "StoredResponse",
    "Tree",
    "data_dir",
    "is_off",
    "title_of",
]


class Store(Conversations, Responses):
    """An open file. Methods raise StoreError where it can't be read or written, or what is named isn't there."""
