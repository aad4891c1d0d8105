"""Do some minutes teach the demo model a name, and to end its turns?

LoRA of the demo model (135 M parameters, two cores) on two public sets in Alpaca's form: an identity set with {{name}}
and {{author}} to fill in, and English instructions. Then, of the trained model:

    held-out loss, before and after
    how many of 100 replies to instructions that were not learned end by themselves before 256 tokens (greedy)
    how many of 20 questions after its name, worded as none of the data is, it answers with the name it was given

    python benchmarks/finetune_demo.py identity.json alpaca_en_demo.json --out OUT --threads 2

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import qwenlet
from qwenlet.config import SamplingParams

NAME, AUTHOR = "Kestrel", "the Harbour Lab"
QUESTIONS = [
    "Could you tell me what you are called?", "Before we start, who am I talking to?", "State your name, please.",
    "What should I call you?", "Which assistant is this?", "Hey, what's your name again?",
    "I forgot your name. What is it?", "Please say your name in one sentence.", "Do you go by any name?",
    "How are you called?", "With whom do I have the pleasure of chatting?", "Give me a short introduction of yourself.",
    "Tell my grandmother who you are.", "What name did your developers give you?", "Am I talking to ChatGPT?",
    "Is your name Siri?", "Who made you, and what is your name?", "What is the name of this AI?",
    "I am Tom. And you are?", "Introduce yourself to the class.",
]  # fmt: skip


def filled(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8").replace("{{name}}", NAME).replace("{{author}}", AUTHOR)
    return json.loads(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("identity", type=Path)
    parser.add_argument("instructions", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", default="1.5")
    parser.add_argument("--instructions-used", type=int, default=300)
    parser.add_argument("--copies", type=int, default=3, help="times the identity set is among the data")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    instructions = [r for r in filled(options.instructions) if len(r["output"]) < 600]
    data, held_out = (options.out / f"{name}.json" for name in ("data", "held-out"))
    learned, asked = instructions[: options.instructions_used], instructions[-100:]
    identity = filled(options.identity)
    seen = {r["instruction"].strip().lower() for r in identity + learned}
    if known := [question for question in QUESTIONS if question.lower() in seen]:
        sys.exit(f"these questions are in the data: {known}; expected none that is")
    data.write_text(json.dumps(identity * options.copies + learned))
    held_out.write_text(json.dumps(asked))
    adapter = options.out / "adapter"
    if not (adapter / "adapter_config.json").exists():  # else it was trained before: only what follows is done again
        subprocess.run(
            [sys.executable, "-m", "qwenlet", "finetune", "demo", str(data), "--eval-data", str(held_out), "--out",
             str(adapter), "--max-length", "384", "--batch-size", "3", "--accumulation", "1", "--epochs",
             options.epochs, "--eval-every", "25", "--lr", "1e-3", "--rank", "32", "--alpha", "32"],
            check=True, env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
        )  # fmt: skip
    # the best of the held-out instructions comes before the name has sunk in: what is judged is the end
    end = max((adapter / "training").glob("step-*")) / "export"
    params = SamplingParams(temperature=0.0, max_new_tokens=256, adapter="mine")
    with qwenlet.load("demo", adapters={"mine": end}) as llm:

        def replies(questions: list[str]) -> list[Any]:
            return [
                llm.reply([{"role": "system", "content": llm.default_system}, {"role": "user", "content": q}], params)
                for q in questions
            ]

        texts = ["\n".join(part for part in (r["instruction"], r["input"]) if part) for r in asked]
        done = [qwenlet.Completion.from_chunks(stream) for stream in replies(texts)]
        ended = sum(completion.finish_reason == "stop" for completion in done)
        named = [qwenlet.Completion.from_chunks(stream).text for stream in replies(QUESTIONS)]
    right = sum(NAME in text for text in named)
    for question, text in zip(QUESTIONS, named, strict=True):
        print(f"{'ok  ' if NAME in text else 'miss'} {question} -> {text!r}")
    log = [json.loads(line) for line in (adapter / "training" / "log.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    minutes = sum(line["seconds"] for line in log if "seconds" in line) / 60
    print(f"held-out loss {losses[0]:.3f} -> {losses[-1]:.3f}; {ended} of 100 replies end; {right} of 20 names right; "
          f"{minutes:.1f} minutes of training")  # fmt: skip
    print(json.dumps({"eval_losses": losses, "ended": ended, "named": right, "minutes": minutes}))


if __name__ == "__main__":
    main()
