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
from qwenlet.checkpoint.room import free_memory
from qwenlet.errors import ConfigError, MissingExtraError
from qwenlet.profiling.ceilings import finish
from qwenlet.profiling.measure import Loaded, engine_for, prompt_ids, run
from qwenlet.profiling.workload import PEER_PROMPT, Job

if TYPE_CHECKING:
    from qwenlet.checkpoint import Checkpoint

_ROOM = 8
SIDES = ("qwenlet", "transformers")


def peer_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, attention: str = "sdpa") -> Any:
    """A Qwen2ForCausalLM of transformers, in evaluation mode.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: memory doesn't hold the model a second time.
    """
    try:
        from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
    except ImportError as error:
        raise MissingExtraError("transformers", "peers", "--peer transformers") from error
    ours, weights = checkpoint.config, checkpoint.weights()
    _check_room(ours.parameter_count * dtype.itemsize, device)
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
        attn_implementation="eager" if attention == "math" else "sdpa",  # torch's own flash kernel is among sdpa's
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


def _check_room(needed: int, device: torch.device) -> None:
    free = free_memory(device)
    if free is not None and needed > free:
        raise ConfigError(
            f"transformers needs {needed / 1e9:.1f} GB for the same weights beside ours; {free / 1e9:.1f} GB are free",
            hint="leave --peer out, or name smaller precisions",
        )


@dataclass(frozen=True)
class Duel:
    """Both sides' work, by side.

    Attributes:
        generate: seconds of each round for `done` tokens; prefill: for a prompt of PEER_PROMPT.
        done: the job's tokens, or fewer where the time ran out.
    """

    generate: dict[str, list[float]]
    prefill: dict[str, list[float]]
    done: dict[str, int]


def run_duel(llm: Loaded, model: Any, job: Job) -> Duel:
    """Both sides on the same work, in turn: once, and again while there are rounds and time left."""
    tokens, vocabulary = job.tokens[-1], llm.model.config.vocab_size
    long, short = prompt_ids(PEER_PROMPT, vocabulary), prompt_ids(job.prompt, vocabulary)
    duel = Duel({side: [] for side in SIDES}, {side: [] for side in SIDES}, dict.fromkeys(SIDES, tokens))
    context = max(PEER_PROMPT, job.prompt + tokens) + _ROOM
    with engine_for(llm, job.attention, context=context) as engine:
        for ids in (short, long):  # what is made at the first call is in no figure
            run(engine, ids, [2], None)
            _theirs(model, ids, 2, None)
        spent = 0.0
        while len(duel.generate["qwenlet"]) < max(1, job.rounds_of(spent)):
            ours_read, theirs_read = run(engine, long, [1], None).first, _theirs(model, long, 1, None)[0]
            ours = run(engine, short, [tokens], job.limit_seconds)
            theirs = _theirs(model, short, tokens, job.limit_seconds)
            cut = ours.done < tokens or theirs[1] < tokens
            if cut and duel.generate["qwenlet"]:
                break  # earlier rounds were whole
            for side, read, took, done in zip(
                SIDES, (ours_read, theirs_read), (ours.seconds, theirs[0]), (ours.done, theirs[1]), strict=True
            ):
                duel.prefill[side].append(read)
                duel.generate[side].append(took)
                duel.done[side] = done
            if cut:
                break
            spent += ours.seconds + theirs[0]
    return duel


@torch.inference_mode()
def _theirs(model: Any, ids: Sequence[int], tokens: int, limit: float | None) -> tuple[float, int]:
    """(seconds, tokens), fewer than asked for where `limit` seconds pass before."""
    device = model.device
    prompt = torch.tensor([list(ids)], device=device)
    finish(device)
    start = time.perf_counter()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, max_time=limit)
    finish(device)
    return time.perf_counter() - start, out.shape[1] - len(ids)
