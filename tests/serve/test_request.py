"""Requests that cannot be served as they are name what is wrong with them."""

import pytest

from equipoise.serve.request import Request, RequestError


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": ()}, "prompt", "expected at least one token, got none; begin with the end-of-document token"),
        ({"max_tokens": 0}, "max_tokens", "expected at least 1, got 0"),
        ({"max_tokens": -1, "prompt_logprobs": True}, "max_tokens", "expected at least 1, got -1"),
        ({"stop": ("a", "")}, "stop", "expected at most 16 texts, none of them empty, got 2"),
        ({"stop": ("a",) * 17}, "stop", "expected at most 16 texts, none of them empty, got 17"),
        ({"num_logprobs": 21}, "logprobs", "expected 0 to 20, got 21"),
    ],
)
def test_refused(fields, param, message):
    with pytest.raises(RequestError, match=message) as error:
        Request(**({"id": "a", "prompt": (1,), "max_tokens": 1} | fields))
    assert error.value.param == param


def test_no_tokens_are_enough_for_the_prompts_probabilities():
    assert Request("a", (1,), 0, prompt_logprobs=True).max_tokens == 0
