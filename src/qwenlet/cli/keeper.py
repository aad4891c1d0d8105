"""A terminal's conversation, kept in the store as it goes: what is said, edited, taken back, and where it stands now.

The ids of what is stored live in the state itself, so that going back to an earlier state is going back in the store.
Nothing is removed: an edit and a new reply are branches.
"""

from __future__ import annotations

from dataclasses import replace

from qwenlet.cli.conversation import Exchange, State
from qwenlet.cli.saved import rows, settings_of, state_of
from qwenlet.errors import NotStoredError, RequestError
from qwenlet.store import Conversation, Store, StoredMessage


class Keeper:
    """Follows one conversation. Methods raise StoreError.

    Args:
        model: the name that new conversations are kept with.
        default_system: the model's own system prompt, which is not kept.
    """

    def __init__(self, store: Store, model: str, default_system: str) -> None:
        self.store = store
        self._model = model
        self._default_system = default_system
        self._followed: State | None = None

    def ask(self, state: State, question: str) -> tuple[State, str]:
        """Stores a question before its reply is there; returns the state before it, and the question's id."""
        state = self.follow(state, begin=True)
        assert state.talk is not None
        parent = state.exchanges[-1].leaf_id if state.exchanges else None
        asked = self.store.add(state.talk, parent, "user", question)
        self._followed = None  # unless a reply comes, the branch ends before the question
        return state, asked.id

    def follow(self, state: State, *, begin: bool = False) -> State:
        """Stores what is new in a state and makes its branch the current one; returns it with the ids.

        Args:
            begin: begin a conversation even if nothing was said yet.
        """
        if state is self._followed or (state.talk is None and not state.exchanges and not begin):
            return state
        settings = settings_of(state, self._default_system)
        talk = None if state.talk is None else self._there(state.talk)
        if talk is None:  # a new one, or somebody has removed it
            state = replace(state, exchanges=tuple(_forgotten(one) for one in state.exchanges))
            talk = self.store.new_conversation(model=self._model, settings=settings)
        else:
            others = {name: value for name, value in talk.settings.items() if name not in ("system", "sampling")}
            if talk.settings != others | settings:
                self.store.set_settings(talk.id, others | settings)
        exchanges: list[Exchange] = []
        leaf = None
        for exchange in state.exchanges:
            exchanges.append(exchange if exchange.leaf_id else self._store(talk.id, leaf, exchange))
            leaf = exchanges[-1].leaf_id
        self.store.go_back(talk.id, leaf)
        self._followed = replace(state, exchanges=tuple(exchanges), talk=talk.id)
        return self._followed

    def rename(self, state: State, title: str) -> State:
        state = self.follow(state, begin=True)
        assert state.talk is not None
        self.store.rename(state.talk, title)
        return state

    def branches(self, state: State) -> list[list[StoredMessage]]:
        """Every branch from its first message to its leaf, the oldest leaf first."""
        if state.talk is None:
            return []
        tree = self.store.tree(state.talk)
        parents = {message.parent for message in tree.messages}
        leaves = [message for message in tree.messages if message.id not in parents]
        return [replace(tree, conversation=replace(tree.conversation, current=leaf.id)).path for leaf in leaves]

    def branch(self, state: State, leaf: str) -> State:
        """The state that stands at a leaf, with the settings in force."""
        if state.talk is None:
            raise RequestError("nothing is stored yet")
        self.store.select(leaf)
        found, _ = state_of(self.store.tree(state.talk))
        return replace(state, exchanges=found.exchanges)

    def _there(self, talk: str) -> Conversation | None:
        try:
            return self.store.conversation(talk)
        except NotStoredError:
            return None

    def _store(self, talk: str, parent: str | None, exchange: Exchange) -> Exchange:
        question_id = exchange.question_id
        for told, extra in rows(exchange):
            if told["role"] == "user" and question_id is not None:
                parent = question_id
                continue
            message = self.store.add(talk, parent, told["role"], told["content"], extra)
            if told["role"] == "user":
                question_id = message.id
            parent = message.id
        return replace(exchange, question_id=question_id, leaf_id=parent)


def _forgotten(exchange: Exchange) -> Exchange:
    return replace(exchange, question_id=None, leaf_id=None)
