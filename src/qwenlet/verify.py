"""Is a converted checkpoint the same model? Both are loaded, and their logits compared.

The result is loaded by qwenlet, and where they are installed by the programs it was written for: transformers for a
folder, llama.cpp (llama-cpp-python) for a GGUF file. One model stands in memory at a time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import qwenlet.api as api
from qwenlet.checkpoint import Checkpoint
from qwenlet.errors import CheckpointError, MissingTokenizerError
from qwenlet.scoring import Comparison, compare

POSITIONS = 256
# Float32 arithmetic in another order; and what codes and half precision may cost before something must be broken.
EXACT_ERROR, ROUNDED_DIVERGENCE = 1e-4, 1.0

_TEXT = """A conversation needs two who listen. 一个人说话，另一个人听，然后换过来。
The river was low that summer, and children walked across it on stones: 1, 2, 3, 14, 255.
def add(a, b):
    return a + b  # the sum
"I'll come tomorrow," she wrote, "if the bridge holds." 明天见！"""


@dataclass(frozen=True)
class Verified:
    """What one program computed from the result, against the source in float32.

    Attributes:
        program: "qwenlet", "transformers" or "llama.cpp".
        positions: logits that were compared.
    """

    program: str
    positions: int
    comparison: Comparison

    def __str__(self) -> str:
        c = self.comparison
        return (
            f"{self.program}: {self.positions} positions, largest logit error {c.max_logit_error:.2g}, "
            f"KL divergence {c.divergence.mean:.2g}, top-1 agreement {c.top1_agreement:.1%}"
        )


def verify(source: str | Path, out: str | Path, *, positions: int = POSITIONS) -> list[Verified]:
    """Compares the logits of `out` with those of `source`, by every program at hand that loads `out`.

    Args:
        positions: tokens of the prompt, cut to the length up to which all programs agree; half of them are compared.
    Raises:
        CheckpointError: a result strays further from its source than its precision explains.
    """
    ids, reference = _reference(Path(source), positions)
    results = []
    for program, logits in _programs(Path(out)):
        comparison = compare(lambda _: reference, logits, [ids])
        results.append(Verified(program, len(ids) - len(ids) // 2 - 1, comparison))
    exact = _is_exact(Path(source), Path(out))
    for result in results:
        _check(result, exact)
    return results


def _check(result: Verified, exact: bool) -> None:
    c = result.comparison
    if result.program == "llama.cpp":
        exact = False  # it rounds activations to the precision of the weights
    if (exact and c.max_logit_error > EXACT_ERROR) or c.divergence.mean > ROUNDED_DIVERGENCE:
        raise CheckpointError(
            f"the result is not the same model: {result}",
            hint="the source may have changed while it was read; convert again, and report this if it stays",
        )


def _reference(source: Path, positions: int) -> tuple[list[int], Tensor]:
    with api.load(str(source), device="cpu", dtype="fp32", quant="none", linear="torch") as llm:
        length = min(positions, llm.config.seq_length)
        ids: list[int] = []
        with suppress(MissingTokenizerError):
            ids = list(llm.tokenizer.encode(_TEXT, allowed_special=set()))
        ids = [id for id in ids if id < llm.config.vocab_size][:length]
        generator = torch.Generator().manual_seed(0)
        ids += torch.randint(llm.config.vocab_size, (length - len(ids),), generator=generator).tolist()
        return ids, llm.logits(ids)


def _programs(out: Path) -> list[tuple[str, Callable[[Sequence[int]], Tensor]]]:
    programs: list[tuple[str, Callable[[Sequence[int]], Tensor]]] = [("qwenlet", lambda ids: _by_qwenlet(out, ids))]
    if out.is_dir() and Checkpoint.open(out).layout == "qwen2" and importlib.util.find_spec("transformers"):
        programs.append(("transformers", lambda ids: _by_transformers(out, ids)))
    if out.is_file() and importlib.util.find_spec("llama_cpp"):
        programs.append(("llama.cpp", lambda ids: _by_llama(out, ids)))
    return programs


def _by_qwenlet(out: Path, ids: Sequence[int]) -> Tensor:
    with api.load(str(out), device="cpu", dtype="fp32", quant="none", linear="torch") as llm:
        return llm.logits(ids)


def _by_transformers(out: Path, ids: Sequence[int]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([list(ids)])).logits[0]


def _by_llama(out: Path, ids: Sequence[int]) -> Tensor:
    import llama_cpp

    llama = llama_cpp.Llama(str(out), n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False)
    llama.eval(list(ids))
    return torch.from_numpy(llama.scores[: len(ids)].copy())


def _is_exact(source: Path, out: Path) -> bool:
    """Whether the result holds every number of the source: the same float dtype, or float32."""
    kinds = []
    for path in (source, out):
        checkpoint = Checkpoint.open(path)
        weights = checkpoint.weights()
        kinds.append({weights.stored_dtype(name) for name in weights.names() if len(weights.shape(name)) > 1})
    return None not in kinds[1] and (kinds[0] == kinds[1] or kinds[1] == {torch.float32})
