"""The tokenizer behind transformers' API, with the published arguments and attributes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from qwenlet import chat
from qwenlet.errors import TokenizerError
from qwenlet.tokenizer import Tokenizer
from qwenlet.tokenizer_formats import QWEN_FILE


class QWenTokenizer(PreTrainedTokenizer):
    """Text <-> ids exactly as published; control tokens in text count unless `allowed_special=set()`.

    `apply_chat_template` makes ids in which no message can forge a turn.
    """

    vocab_files_names = {"vocab_file": QWEN_FILE}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self, vocab_file: str, errors: str = "replace", extra_vocab_file: str | None = None, **options: Any
    ) -> None:
        if extra_vocab_file is None:
            self.core = Tokenizer.from_folder(Path(vocab_file).parent)
            self.core.errors = errors  # type: ignore[assignment]
        else:
            self.core = Tokenizer.from_file(vocab_file, extra_vocab_file=extra_vocab_file, errors=errors)  # type: ignore[arg-type]
        self.errors = errors
        self.special_tokens = self.core.special_tokens
        options.setdefault("chat_template", chat.CHAT_TEMPLATE)
        options.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(errors=errors, **options)

    @property
    def vocab_size(self) -> int:
        return self.core.vocab_size

    @property
    def eod_id(self) -> int | None:
        return self.core.eod_id

    @property
    def im_start_id(self) -> int | None:
        return self.core.im_start_id

    @property
    def im_end_id(self) -> int | None:
        return self.core.im_end_id

    def __len__(self) -> int:
        return self.core.vocab_size

    def get_vocab(self) -> dict[Any, int]:
        """Bytes -> id of regular tokens as published, and surface -> id of control tokens, which others look for."""
        return {self._convert_id_to_token(id): id for id in self.core.token_ids()}

    # ----------------------------------------------------------------------------------------- adding is refused

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        for token in new_tokens or ():
            surface = str(token)
            if special_tokens and surface in self.special_tokens:
                continue
            kind = "unknown special" if special_tokens else "regular"
            raise TokenizerError(
                f"Adding {kind} tokens is not supported: {surface!r}",
                hint="<|extra_0|> to <|extra_204|> are free for uses of your own; qwenlet vocab extend learns words",
            )
        return 0

    def _update_total_vocab_size(self) -> None:
        self.total_vocab_size = self.core.vocab_size

    # -------------------------------------------------------------------------------------------- text and ids

    def tokenize(
        self, text: str, allowed_special: Any = "all", disallowed_special: Any = (), **_: Any
    ) -> list[bytes | str]:
        """Tokens: bytes, and the surfaces of control tokens as text."""
        return [self._convert_id_to_token(id) for id in self.core.encode(text, allowed_special, disallowed_special)]

    def _convert_token_to_id(self, token: Any) -> int:
        if isinstance(token, str) and token in self.special_tokens:
            return self.special_tokens[token]
        found = self.core.id_of(token.encode() if isinstance(token, str) else token)
        if found is None:
            raise TokenizerError(f"{token!r} is no token of this vocabulary")
        return found

    def _convert_token_to_id_with_added_voc(self, token: Any) -> int:
        return self._convert_token_to_id(token)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if tokens is None:
            return None
        if isinstance(tokens, (str, bytes)):
            return self._convert_token_to_id(tokens)
        return [self._convert_token_to_id(token) for token in tokens]

    def _convert_id_to_token(self, index: int) -> Any:
        token = self.core.token_bytes(index)
        return token.decode() if self.core.is_special(index) else token

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        if isinstance(ids, int):
            return self._convert_id_to_token(ids)
        return [self._convert_id_to_token(int(i)) for i in ids if not (skip_special_tokens and self.core.is_special(i))]

    def convert_tokens_to_string(self, tokens: Sequence[Any]) -> str:
        return b"".join(t.encode() if isinstance(t, str) else t for t in tokens).decode("utf-8", self.errors)

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, errors: str | None = None, **_: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.core.decode(ids, skip_special_tokens, errors or self.errors)  # type: ignore[arg-type]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return token_ids_0 if token_ids_1 is None else token_ids_0 + token_ids_1

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        self.core.save(save_directory)
        return (str(Path(save_directory) / QWEN_FILE),)

    # --------------------------------------------------------------------------------------------------- chats

    def apply_chat_template(self, conversation: Any, *args: Any, **options: Any) -> Any:
        """As transformers' own, but for one conversation and our template the ids are made by `chat.render`."""
        plain = not args and set(options) <= {"tokenize", "add_generation_prompt", "return_dict", "return_tensors"}
        own = self.chat_template == chat.CHAT_TEMPLATE and options.get("tokenize", True)
        one = isinstance(conversation, list) and bool(conversation) and isinstance(conversation[0], dict)
        if not (plain and own and one):
            return super().apply_chat_template(conversation, *args, **options)
        ids = chat.render(self.core, conversation, options.get("add_generation_prompt", False))
        out = self.prepare_for_model(
            ids, return_tensors=options.get("return_tensors"), prepend_batch_axis=bool(options.get("return_tensors"))
        )
        return out if options.get("return_dict", True) else out["input_ids"]
