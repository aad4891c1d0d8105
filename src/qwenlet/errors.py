"""Every error a user can meet, in one tree.

    QwenletError
    ├── ConfigError           (ValueError)   config.json, or an option that contradicts it
    ├── CheckpointError                      weights that are missing, damaged, foreign or of the wrong shape
    │   └── FormatError                      a file that is not what its name says, or a type we don't read
    ├── TokenizerError        (ValueError)   text or ids the tokenizer refuses
    │   ├── DisallowedSpecialError           a control token written out in text where it is not allowed
    │   └── MissingTokenizerError            a model without a vocabulary was asked for text
    ├── HubError                             a name could not be turned into local files
    │   ├── OfflineError                     ... because going online is forbidden
    │   └── DiskSpaceError                   ... because they would not fit
    ├── RequestError          (ValueError)   a prompt or a sampling parameter that can't be served
    │   └── ContextLengthError               prompt + reply don't fit the context (counts inside)
    ├── DataError             (ValueError)   training data that can't be read or used (file and line inside)
    ├── TrainingError                        a training run that can't start or go on
    ├── StoreError                           the file of conversations can't be used
    │   └── NotStoredError                       ... or does not have what was named
    ├── EvalError                            data of an evaluation, or the folder of a run, that can't be used
    ├── EngineError                          the engine was shut down, or a step failed
    │   └── DeadlineError                    a request did not end within its time
    ├── SandboxError                         model-written code can't be run here
    └── MissingExtraError     (ImportError)  an optional dependency is not installed

A message says what was seen and what was expected; `hint` says what to do next.
"""

from __future__ import annotations


class QwenletError(Exception):
    """Base of the tree. `str(error)` is the message followed by the hint, if there is one."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n  hint: {hint}")
        self.message = message
        self.hint = hint


class ConfigError(QwenletError, ValueError):
    """A configuration field is missing, contradictory, or changes the maths in a way we don't implement."""


class CheckpointError(QwenletError):
    """Weights are missing, damaged, foreign or of the wrong shape."""


class FormatError(CheckpointError):
    """A file is not of the format its name promises, or uses a storage type we don't read."""


class TokenizerError(QwenletError, ValueError):
    """Text or ids that the tokenizer can't take."""


class DisallowedSpecialError(TokenizerError):
    """A control token's surface appeared in text for which it was disallowed."""


class MissingTokenizerError(TokenizerError):
    """The model has no vocabulary, so only token ids can be used with it."""


class HubError(QwenletError):
    """A model name could not be turned into local files."""


class OfflineError(HubError):
    """The files are not on this machine and going online is forbidden."""


class DiskSpaceError(HubError):
    """The files would not fit on the disk."""


class RequestError(QwenletError, ValueError):
    """A prompt or a sampling parameter that can't be served."""


class ContextLengthError(RequestError):
    """Prompt and reply together don't fit the context.

    Attributes:
        prompt_tokens: tokens in the prompt.
        context_length: positions the model may use.
    """

    def __init__(self, prompt_tokens: int, context_length: int, max_new_tokens: int = 1) -> None:
        reply = f" and the reply needs room for {max_new_tokens} more" if max_new_tokens else ""
        super().__init__(
            f"the prompt has {prompt_tokens} tokens{reply}, but the context holds {context_length}",
            hint="shorten the prompt, drop old turns, ask for fewer new tokens, or load with a larger max_context",
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length
        self.max_new_tokens = max_new_tokens


class DataError(QwenletError, ValueError):
    """Training data can't be read or used; the message names the file and the line."""


class TrainingError(QwenletError):
    """A training run can't start or go on."""


class StoreError(QwenletError):
    """The file of conversations and responses can't be used, or does not have what was asked for."""


class NotStoredError(StoreError):
    """A conversation or a message of that name is not there."""


class EvalError(QwenletError):
    """An evaluation's data is missing or altered, or a run's folder holds something else."""


class EngineError(QwenletError):
    """The engine was shut down or can't go on."""


class DeadlineError(EngineError):
    """A request did not end within its time."""


class SandboxError(QwenletError):
    """Model-written code can't be run here, because the sandbox for it is missing or can't start."""


class MissingExtraError(QwenletError, ImportError):
    """An optional dependency is not installed.

    Args:
        package: the module that could not be imported.
        extra: the qwenlet extra that brings it.
        purpose: what it was needed for, as a noun phrase.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed", hint=f"pip install 'qwenlet[{extra}]'"
        )
