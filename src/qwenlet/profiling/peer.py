"""transformers' Qwen2ForCausalLM on the same weights: up to the training length it is the same maths.

The tensors are read from our checkpoint and cut into its names in memory; nothing is written. Both sides decode
greedily in the same run, in turn: theirs by its own `generate`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qwenlet.checkpoint.files import read_parts
from qwenlet.checkpoint.load import plan_reading
from qwenlet.checkpoint.names import split
from qwenlet.errors import MissingExtraError
from qwenlet.profiling.ceilings import finish
from qwenlet.profiling.measure import Loaded, engine_for, prompt_ids, run
from qwenlet.profiling.workload import PEER_PROMPT, Job

if TYPE_CHECKING:
    from qwenlet.checkpoint import Checkpoint

_IMPLEMENTATIONS = {"flash": "flash_attention_2", "math": "eager"}
_ROOM = 8


def peer_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, attention: str = "sdpa") -> Any:
    """A Qwen2ForCausalLM of transformers, in evaluation mode.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
    except ImportError as error:
        raise MissingExtraError("transformers", "peers", "--peer transformers") from error
    ours, weights = checkpoint.config, checkpoint.weights()
    config = Qwen2Config(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_key_value_heads,
        head_dim=ours.head_dim,
        max_position_embeddings=ours.max_position_embeddings,
        rms_norm_eps=ours.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        tie_word_embeddings=ours.tie_word_embeddings,
        attn_implementation=_IMPLEMENTATIONS.get(attention, "sdpa"),
        use_cache=True,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(dtype)
    state = {}
    _, plan = plan_reading(checkpoint, weights, [])
    for name, parts in plan.items():
        for theirs, piece in split(name, read_parts(weights, parts, dtype), "qwen2", ours):
            # a copy: on a mapped file products run at 0.82 of the speed, and transformers would make one, too
            state[theirs] = piece.to(device, copy=True).contiguous()
    for name, parameter in model.named_parameters():
        if name not in state and name.endswith("_proj.bias"):  # a Llama has none, and zeros change nothing
            state[name] = torch.zeros(parameter.shape, dtype=dtype, device=device)
    model.load_state_dict(state, strict=not ours.tie_word_embeddings, assign=True)
    if ours.tie_word_embeddings:
        model.tie_weights()
    # buffers made on the meta device have no values
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.eval()


@dataclass(frozen=True)
class Duel:
    """Seconds of each round, by side.

    Attributes:
        generate: for the job's tokens; prefill: for a prompt of PEER_PROMPT.
    """

    generate: dict[str, list[float]]
    prefill: dict[str, list[float]]


def run_duel(llm: Loaded, model: Any, job: Job) -> Duel:
    """Both sides on the same work, in turn, until the rounds are done or the time is out (never before the first)."""
    tokens, vocabulary = job.tokens[-1], llm.model.config.vocab_size
    long, short = prompt_ids(PEER_PROMPT, vocabulary), prompt_ids(job.prompt, vocabulary)
    duel = Duel({"qwenlet": [], "transformers": []}, {"qwenlet": [], "transformers": []})
    context = max(PEER_PROMPT, 1 + tokens) + _ROOM
    with engine_for(llm, job.attention, context=context) as engine:
        run(engine, short, [2], None)
        _theirs(model, short, 2)
        spent = 0.0
        for count in range(job.rounds):
            if count and (job.rounds_of(spent) == 1 or spent > (job.limit_seconds or spent)):
                break
            duel.prefill["qwenlet"].append(run(engine, long, [1], None).first)
            duel.prefill["transformers"].append(_theirs(model, long, 1))
            ours = run(engine, short, [tokens], None).marks[tokens][0]
            duel.generate["qwenlet"].append(ours)
            duel.generate["transformers"].append(_theirs(model, short, tokens))
            spent += ours + duel.generate["transformers"][-1]
    return duel


@torch.inference_mode()
def _theirs(model: Any, ids: Sequence[int], tokens: int) -> float:
    device = model.device
    prompt = torch.tensor([list(ids)], device=device)
    finish(device)
    start = time.perf_counter()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens)
    finish(device)
    took = time.perf_counter() - start
    assert out.shape[1] == len(ids) + tokens, f"{out.shape[1] - len(ids)} tokens, expected {tokens}"
    return took
