"""The command line: `qwenlet VERB ...`. Each verb is a module of its own, imported only when it is chosen.

The overview is printed from the table below, so that `qwenlet --help` loads nothing else. stdout carries data (replies,
ids, JSON, paths), stderr everything meant for a person. Exit codes: 0 done, 1 an error, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

# verb -> the first line of its help
VERBS = {
    "chat": "Talk to a model: a conversation on a terminal, or one answer for scripts.",
    "generate": "Continue a text, without any chat format.",
    "history": "List, search, show and move the conversations that were kept.",
    "serve": "Serve a model to clients of OpenAI's API, and to people by a web page.",
    "pull": "Fetch a model and print where it is.",
    "tokenize": "Show the tokens of a text, or the text of token ids.",
    "vocab": "Extend a vocabulary with words of your own.",
    "plan": "Say how much memory a model will take, whether it fits, and what to change where it doesn't.",
    "quantize": "Write a model in four or eight bits, and measure what it cost.",
    "finetune": "Teach a model from examples: all of it, or a small adapter beside it.",
    "pretrain": "Train a model on text, from nothing or further.",
    "merge": "Write a model with an adapter merged into its weights, and measure what that changed.",
    "random": "Write a checkpoint of random weights, for tests and benchmarks.",
    "profile": "Measure speed and memory, beside what this machine allows and the card's figures.",
    "eval": "Run benchmarks, and report them beside the published figures.",
    "convert": "Write a checkpoint in another layout.",
    "completion": "Print a script that completes qwenlet in a shell.",
    "doctor": "Say what this machine has, and what will run where and why.",
}


def overview() -> str:
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {verb:{width}}  {line}" for verb, line in VERBS.items())
    return (
        "Usage: qwenlet VERB [OPTIONS] [ARGUMENTS]\n\n"
        "First-generation Qwen, chatting. Start with: qwenlet chat\n\n"
        f"Verbs:\n{rows}\n\n"
        "Options:\n  --help     Show this message; after a verb, the help of that verb.\n"
        "  --version  Show the version.\n\n"
        "Environment:\n  NO_COLOR=1            no colours\n  QWENLET_DEBUG=1       show tracebacks\n"
        "  QWENLET_NO_HISTORY=1  keep no conversations\n  QWENLET_DATA=FOLDER   where conversations are kept"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code. `arguments`: without the program's name; None takes sys.argv."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = arguments[0] if arguments else "--help"
    if verb in ("--help", "-h", "help"):
        print(overview())
        return 0 if arguments else 2
    if verb == "--version":
        from qwenlet import __version__

        print(f"qwenlet {__version__}")
        return 0

    from qwenlet.cli import console

    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        console.error(
            f"there is no verb {verb!r}; known are {', '.join(VERBS)}",
            hint=f"did you mean: qwenlet {near[0]}" if near else "qwenlet --help says what each does",
        )
        return console.USAGE
    return console.run(lambda: importlib.import_module(f"qwenlet.cli.{verb}").app, verb, arguments[1:])
