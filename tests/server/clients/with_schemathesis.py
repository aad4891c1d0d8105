"""Bodies made from our own OpenAPI document: none may be answered with a status of the server's own fault, and what the
document forbids may not be taken. Run by test_clients.py in an environment that has schemathesis: URL in, JSON out.
"""

from __future__ import annotations

import sys
from typing import Any

import hypothesis
import schemathesis
from checks import run
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

EXAMPLES = 8  # of each path and method, of either kind


def tried(schema: Any, key: str, mode: GenerationMode) -> None:
    trouble, paths = [], set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            response = case.call(headers={"authorization": f"Bearer {key}"}, timeout=60)
            case.validate_response(response, checks=[not_a_server_error])
            if response.status_code >= 400:
                assert "error" in response.json(), f"no shape of ours: {response.text}"

        try:
            ask()
        except hypothesis.errors.Unsatisfiable:
            continue  # nothing of this kind can be made of a path without parameters
        except BaseException as problem:
            trouble.append(f"{operation.label}: {problem}")
        paths.add(operation.path)
    assert not trouble, "\n".join(trouble)
    assert len(paths) >= 10, paths


def check_what_the_document_allows(schema: Any) -> None:
    tried(schema, sys.argv[2], GenerationMode.POSITIVE)


def check_what_it_forbids(schema: Any) -> None:
    tried(schema, sys.argv[2], GenerationMode.NEGATIVE)


if __name__ == "__main__":
    url, key = sys.argv[1:]
    headers = {"authorization": f"Bearer {key}"}
    run(dict(globals()), schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers))
