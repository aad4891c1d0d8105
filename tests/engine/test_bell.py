"""Event loops are told of a step's chunks once, whoever waits for them, and a loop that is gone hurts nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from engine.test_engine import CPU, engine
from qwenlet.checkpoint import Checkpoint, load_model
from qwenlet.config import SamplingParams
from qwenlet.engine.bell import Bell, Listener, tell
from qwenlet.model import Qwen


@pytest.fixture(scope="module")
def model(golden: Path) -> Qwen:
    return load_model(Checkpoint.open(golden / "tiny-qwen"), torch.float32, CPU)[0]


def test_one_wake_up_for_all_streams_of_a_step(model: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine(model)
    params = SamplingParams(temperature=0, max_new_tokens=20, n=4)

    async def read() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        wakes, plain = 0, loop.call_soon_threadsafe

        def counted(*args: object, **more: object) -> asyncio.Handle:
            nonlocal wakes
            wakes += 1
            return plain(*args, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        streams = [e.astreams(e.submit([1, 2, at], params)) for at in range(1, 4)]

        async def all_of(one: object) -> int:
            written = 0
            while not one.ended:  # type: ignore[attr-defined]
                written += sum(len(chunk.token_ids) for _, chunk in await one.next())  # type: ignore[attr-defined]
            return written

        return sum(await asyncio.gather(*map(all_of, streams))), wakes

    written, wakes = asyncio.run(read())
    assert written == 3 * 4 * 20
    assert 0 < wakes <= e.stats.steps + 3


def test_silence_is_told_and_reading_goes_on(model: Qwen) -> None:
    e = engine(model)

    async def read() -> list[int]:
        # a request behind a thread that has not started: nothing comes
        (request,) = e.submit([4, 5, 6], SamplingParams(temperature=0, max_new_tokens=3))
        start, e.start = e.start, lambda: None  # type: ignore[method-assign]
        streams = e.astreams([request], patience=0.02)
        assert await streams.next() == []
        assert await streams.next() == []
        e.start = start  # type: ignore[method-assign]
        e.start()
        tokens: list[int] = []
        while not streams.ended:
            tokens += [token for _, chunk in await streams.next() for token in chunk.token_ids]
        streams.close()
        return tokens

    assert len(asyncio.run(read())) == 3


def test_a_loop_that_was_closed_is_not_rung() -> None:
    loop = asyncio.new_event_loop()
    listener = Listener(Bell(loop), lambda: pytest.fail("nobody is there"))
    loop.close()
    tell([listener, listener])


def test_what_was_told_before_a_look_comes_with_it() -> None:
    heard: list[int] = []

    async def listen() -> None:
        one = Bell(asyncio.get_running_loop())
        tell([Listener(one, lambda n=n: heard.append(n)) for n in range(3)])  # type: ignore[misc]
        tell([Listener(one, lambda: heard.append(3))])
        await asyncio.sleep(0)
        assert heard == [0, 1, 2, 3]
        tell([Listener(one, lambda: heard.append(4))])
        await asyncio.sleep(0)

    asyncio.run(listen())
    assert heard == [0, 1, 2, 3, 4]
