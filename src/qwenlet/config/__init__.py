"""Every dataclass that a file or a flag can set. No torch in here.

ModelConfig          what the weights are: shapes and maths
GenerationDefaults   what the checkpoint's generation_config.json asks for
SamplingParams       what a caller asks for one request; None means "as the checkpoint says"
GrammarSpec          the schema, regular expression or grammar a reply is held to
QuantConfig          how weights are quantized
LoraConfig           how a model is adapted by low-rank factors
EngineConfig         how the engine runs: context, attention backend
ServerConfig         how the server meets its clients: address, keys, limits
DataConfig           how training data become samples
TrainingConfig       how a training run goes
"""

from qwenlet.config.engine import ATTENTION_BACKENDS, EngineConfig
from qwenlet.config.fields import read_json
from qwenlet.config.generation import DEFAULT_NEW_TOKENS, JSON_GUIDANCE, GenerationDefaults, GrammarSpec, SamplingParams
from qwenlet.config.gguf import OWN_PREFIX, config_from_gguf
from qwenlet.config.lora import LoraConfig
from qwenlet.config.model import DYNAMIC_ROPE, LOGN_TABLE_LENGTH, MODEL_TYPES, ModelConfig, ModelType, qwen_1_8b
from qwenlet.config.quant import EMBEDDING_GROUP_SIZE, GROUP_SIZES, QuantConfig
from qwenlet.config.server import ServerConfig, is_loopback
from qwenlet.config.training import DataConfig, TrainingConfig

__all__ = [
    "ATTENTION_BACKENDS",
    "DEFAULT_NEW_TOKENS",
    "DYNAMIC_ROPE",
    "EMBEDDING_GROUP_SIZE",
    "GROUP_SIZES",
    "JSON_GUIDANCE",
    "LOGN_TABLE_LENGTH",
    "MODEL_TYPES",
    "OWN_PREFIX",
    "DataConfig",
    "EngineConfig",
    "GenerationDefaults",
    "GrammarSpec",
    "LoraConfig",
    "ModelConfig",
    "ModelType",
    "QuantConfig",
    "SamplingParams",
    "ServerConfig",
    "TrainingConfig",
    "config_from_gguf",
    "is_loopback",
    "qwen_1_8b",
    "read_json",
]
