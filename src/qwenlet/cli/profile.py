"""`qwenlet profile`: how fast a model runs here and what memory it takes, beside the machine's limits and the card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenlet.cli import console
from qwenlet.cli.options import new_app
from qwenlet.errors import CheckpointError, MissingExtraError, RequestError
from qwenlet.profiling.report import markdown
from qwenlet.profiling.workload import ATTENTION, PEERS, PRECISIONS, Workload, changed, quick

if TYPE_CHECKING:
    from qwenlet.profiling.records import Profile

app = new_app()

_STEM = "profile"


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a name on the hub, or demo.")],
    precisions: Annotated[
        str | None, typer.Option(help=f"Some of {', '.join(PRECISIONS)}; fp32,bf16,int8,int4 unless given.")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help=f"Some of {', '.join(ATTENTION)}; all that the device offers unless given.")
    ] = None,
    generate: Annotated[
        str | None, typer.Option(help="Tokens to generate from one: 2048,8192 unless given; none for none.")
    ] = None,
    encode: Annotated[int | None, typer.Option(min=0, help="Tokens of the prompt whose memory is measured.")] = None,
    prefill: Annotated[str | None, typer.Option(help="Lengths of prompts: 128,512,2048 unless given.")] = None,
    batch: Annotated[str | None, typer.Option(help="Replies at once: 1,2,4,8,16,32,64 unless given.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Steps of each batch that are timed: 32.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="The median of so many counts, of what is short.")] = None,
    limit_seconds: Annotated[
        float | None, typer.Option(help="Cut each run after so long; its row says how far it came.")
    ] = None,
    short: Annotated[bool, typer.Option("--quick", help="Less of everything: a couple of minutes.")] = False,
    peer: Annotated[str | None, typer.Option(help=f"Run another program on the same weights: {PEERS[0]}.")] = None,
    peer_tokens: Annotated[int | None, typer.Option(min=1, help="That both sides then generate from one.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of a CPU; torch's own choice unless given.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
    out: Annotated[Path | None, typer.Option(help="A folder for profile.md, profile.json and profile.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of Markdown.")] = False,
) -> None:
    """Measure speed and memory, beside what this machine allows and the card's figures.

    Each length is generated from one token, as the model card does. What is finished stays, also after Ctrl-C.
    """
    workload = changed(
        quick() if short else Workload(),
        precisions=_names(precisions),
        attention=_names(attention),
        generate=_numbers("--generate", generate),
        encode=encode,
        prefill=_numbers("--prefill", prefill),
        batch=_numbers("--batch", batch),
        batch_tokens=batch_tokens,
        rounds=rounds,
        limit_seconds=limit_seconds,
        peer=peer,
        peer_tokens=peer_tokens,
    )
    keeper = _Keeper(out)
    from qwenlet.profiling.session import Hooks, Session
    from qwenlet.profiling.subject import Subject

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    subject = Subject(model, device, offline or None, revision)
    with console.Progress() as progress:
        subject.facts(progress.update)  # fetches what is missing
    try:
        Session(subject, workload, Hooks(console.note, keeper.keep)).run()
    finally:
        keeper.end()
        if keeper.profile is not None:
            print(json.dumps(keeper.profile.to_dict(), ensure_ascii=False) if as_json else markdown(keeper.profile))


class _Keeper:
    """Holds the profile so far, in memory and in the folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.profile: Profile | None = None
        if folder is None:
            return
        if (folder / f"{_STEM}.json").exists():
            raise CheckpointError(f"{folder} holds a profile already", hint="choose another folder, or remove it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"can't make {folder}: {error.strerror}") from None

    def keep(self, profile: Profile) -> None:
        self.profile = profile
        if self.folder is not None:
            self._write(f"{_STEM}.json", json.dumps(profile.to_dict(), ensure_ascii=False, indent=1) + "\n")
            self._write(f"{_STEM}.md", markdown(profile))

    def _write(self, name: str, text: str) -> None:
        assert self.folder is not None
        path = self.folder / name
        work = path.with_name(f".{name}.partial-{os.getpid()}")
        work.write_text(text, encoding="utf-8")
        os.replace(work, path)

    def end(self) -> None:
        """The plot, of what there is."""
        if self.profile is None or self.folder is None:
            return
        from qwenlet.profiling.plot import write_png

        try:
            write_png(self.profile, self.folder / f"{_STEM}.png")
        except MissingExtraError as missing:
            console.note(f"no plot: {missing.message}; {missing.hint}")
        console.note(f"written to {self.folder}")


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """ "2048,8192" -> (2048, 8192); "none" -> ()."""
    if text is None:
        return None
    if text.strip() in ("none", "0"):
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers like 2048,8192", param_hint=option) from None
