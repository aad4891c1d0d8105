"""What OpenAI's own client makes of our answers. Run by test_clients.py in an environment that has it: URL in,
JSON out.

Each function whose name begins with `check_` is one test; strict validation raises for an answer that is not of the
client's types.
"""

from __future__ import annotations

import sys
from typing import Any

import openai
from checks import run
from openai import OpenAI
from pydantic import BaseModel

ASK: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
SETTINGS: dict[str, Any] = {"model": "demo", "messages": ASK, "temperature": 0, "max_tokens": 12}


class City(BaseModel):
    name: str
    large: bool


def loose(client: OpenAI) -> OpenAI:
    """For answers of OpenAI's that its own types leave out: packed vectors, first tokens without value, pieces."""
    return OpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=0, timeout=60)


def check_chat(client: OpenAI) -> None:
    whole = client.chat.completions.create(**SETTINGS, logprobs=True, top_logprobs=2, n=2)
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[1].index == 1
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    assert whole.usage.prompt_tokens_details.cached_tokens >= 0
    assert whole._request_id.startswith("req_")


def check_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(**SETTINGS)
    chunks = list(client.chat.completions.create(**SETTINGS, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    with client.chat.completions.stream(**SETTINGS) as stream:
        kinds = {event.type for event in stream}
        assert "content.delta" in kinds
        assert stream.get_final_completion().choices[0].message.content == text


def check_a_stream_left_early(client: OpenAI) -> None:
    settings = SETTINGS | {"max_tokens": 500}
    with client.chat.completions.create(**settings, stream=True) as stream:
        next(iter(stream))
    assert client.chat.completions.create(**SETTINGS).choices


def check_parse(client: OpenAI) -> None:
    settings = SETTINGS | {"max_tokens": 60}
    done = client.chat.completions.parse(**settings, response_format=City)
    assert isinstance(done.choices[0].message.parsed, City)
    try:
        client.chat.completions.parse(**(SETTINGS | {"max_tokens": 2}), response_format=City)
    except openai.LengthFinishReasonError:
        return
    raise AssertionError("a reply that was cut was parsed")


def check_completions(client: OpenAI) -> None:
    done = loose(client).completions.create(model="demo", prompt=["Once", "Twice"], max_tokens=3, logprobs=1, echo=True)
    assert [choice.index for choice in done.choices] == [0, 1]
    assert done.choices[1].text.startswith("Twice")
    assert done.choices[0].logprobs.token_logprobs[0] is None
    pieces = loose(client).completions.create(model="demo", prompt="Once", max_tokens=3, stream=True)
    assert [piece.choices[0].finish_reason for piece in pieces][-1] == "length"


def check_embeddings(client: OpenAI) -> None:
    default = loose(client).embeddings.create(model="demo", input=["a cat", "a dog"])
    floats = client.embeddings.create(model="demo", input="a cat", encoding_format="float")
    pairs = zip(default.data[0].embedding, floats.data[0].embedding, strict=True)
    assert all(abs(one - other) < 1e-5 for one, other in pairs)
    assert default.data[1].index == 1


def check_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"


def check_errors(client: OpenAI) -> None:
    def refused(kind: type[openai.APIStatusError], **changes: Any) -> openai.APIStatusError:
        try:
            client.chat.completions.create(**(SETTINGS | changes))
        except kind as error:
            return error
        raise AssertionError(f"{changes} was taken")

    missing = refused(openai.NotFoundError, model="Qwen/Other")
    assert missing.code == "model_not_found"
    assert missing.request_id.startswith("req_")
    assert refused(openai.BadRequestError, top_p=7).param == "top_p"
    assert refused(openai.BadRequestError, extra_body={"temprature": 1}).param == "temprature"
    long = [{"role": "user", "content": "word " * 9000}]
    assert refused(openai.BadRequestError, messages=long).code == "context_length_exceeded"


def check_a_wrong_key(client: OpenAI) -> None:
    try:
        client.with_options(api_key="sk-tess").models.list()
    except openai.AuthenticationError:
        return
    raise AssertionError("a wrong key was taken")


if __name__ == "__main__":
    url, key = sys.argv[1:]
    client = OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=60, _strict_response_validation=True)
    run(dict(globals()), client)
