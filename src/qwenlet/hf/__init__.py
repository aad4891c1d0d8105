"""The transformers door: `import qwenlet.hf`, and the published quick start runs on the maintained model.

    guard           no code of a checkpoint is executed
    configuration   config.json as transformers holds it
    past            transformers' cache, as the model sees a past
    modeling        the model: the same modules as everywhere else
    tokenization    the tokenizer, with the published arguments
    conversation    model.chat and model.chat_stream

Importing registers the classes for `model_type: qwen` with the Auto classes. They count as local code, so that no file
of a checkpoint is executed, whatever `trust_remote_code` says.
"""

from __future__ import annotations

from qwenlet.errors import MissingExtraError

try:
    import transformers
except ImportError:
    raise MissingExtraError("transformers", "hf", "the transformers door") from None

from transformers.models.auto import tokenization_auto

from qwenlet.hf.configuration import QWenConfig
from qwenlet.hf.guard import OWN_TOKENIZER, guard_tokenizers
from qwenlet.hf.modeling import QWenLMHeadModel
from qwenlet.hf.tokenization import QWenTokenizer

transformers.AutoConfig.register("qwen", QWenConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)
tokenization_auto.REGISTERED_TOKENIZER_CLASSES[OWN_TOKENIZER] = QWenTokenizer
guard_tokenizers()

__all__ = ["QWenConfig", "QWenLMHeadModel", "QWenTokenizer"]
