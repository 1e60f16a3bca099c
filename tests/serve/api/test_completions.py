"""Completions through the official client: each parameter, whole and streamed, against the slow twin."""

import asyncio
import base64
import json
import math
from dataclasses import replace

import httpx
import numpy as np
import openai
import pytest
import tokenizers
from tests.serve.api.serving import EOT_ID, MAX_TOKENS, byte_tokenizer, expected, running, wait_until

from equipoise.models.hub_tokenizer import HUB_FILE, HubTokenizer
from equipoise.models.tokenizer import EOT
from equipoise.models.tokenizers import publish_tokenizer
from equipoise.serve.api.completions import plan_completions
from equipoise.serve.api.plan import Caller
from equipoise.serve.api.served import Bounds

# What is sent, and the same for the slow twin.
PARAMETERS = {
    "plain": ({}, {}),
    "greedy": ({"temperature": 0}, {"temperature": 0}),
    "temperature": ({"temperature": 0.3}, {"temperature": 0.3}),
    "top_p": ({"top_p": 0.5}, {"top_p": 0.5}),
    "presence": ({"temperature": 0, "presence_penalty": 2}, {"temperature": 0, "presence_penalty": 2}),
    "frequency": ({"temperature": 0, "frequency_penalty": 2}, {"temperature": 0, "frequency_penalty": 2}),
    "bias": ({"logit_bias": {"65": 50, "66": 50.5}}, {"logit_bias": {65: 50, 66: 50.5}}),
    "top_k": ({"extra_body": {"top_k": 2}}, {"top_k": 2}),
    "top_k off": ({"extra_body": {"top_k": -1}}, {}),
    "min_p": ({"extra_body": {"min_p": 0.4}}, {"min_p": 0.4}),
    "repetition": (
        {"temperature": 0, "extra_body": {"repetition_penalty": 3.0}},
        {"temperature": 0, "repetition_penalty": 3.0},
    ),
    "stop ids": (
        {"logit_bias": {"65": 50, "66": 50}, "extra_body": {"stop_token_ids": [66]}},
        {"logit_bias": {65: 50, 66: 50}, "stop_ids": frozenset({66})},
    ),
    "end of document": ({"logit_bias": {"256": 50, "65": 50}}, {"logit_bias": {EOT_ID: 50, 65: 50}}),
    "ignore_eos": (
        {"logit_bias": {"256": 50, "65": 50}, "extra_body": {"ignore_eos": True}},
        {"logit_bias": {EOT_ID: 50, 65: 50}, "ignore_eos": True},
    ),
    "stop": (
        {"logit_bias": {"65": 50, "66": 50}, "stop": "BA"},
        {"logit_bias": {65: 50, 66: 50}, "stop": ("BA",)},
    ),
    "stops": (
        {"logit_bias": {"65": 50, "66": 50}, "stop": ["BBB", "AA"]},
        {"logit_bias": {65: 50, 66: 50}, "stop": ("BBB", "AA")},
    ),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_parameter_gives_what_the_slow_twin_gives(client, model, name):
    sent, same = PARAMETERS[name]
    twin = expected(model, "Once upon", 16, seed=7, **same)
    response = client.completions.create(model="tiny", prompt="Once upon", seed=7, **sent)
    [choice] = response.choices
    assert (choice.text, choice.finish_reason) == (twin.text, twin.finish)
    assert response.usage.prompt_tokens == 9
    assert response.usage.completion_tokens == len(twin.token_ids)
    assert response.usage.total_tokens == 9 + len(twin.token_ids)
    assert response.equipoise == {"seed": 7}

    chunks = list(client.completions.create(model="tiny", prompt="Once upon", seed=7, stream=True, **sent))
    assert "".join(chunk.choices[0].text for chunk in chunks) == twin.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [twin.finish]
    assert chunks[-1].equipoise == {"seed": 7}


def test_parameters_change_something(model):
    """Or the test above would show nothing."""
    plain = expected(model, "Once upon", seed=7)
    for name, (_, same) in PARAMETERS.items():
        if same:
            assert expected(model, "Once upon", seed=7, **same).token_ids != plain.token_ids, name


def test_prompts_may_be_texts_or_tokens(client, model):
    def texts(prompt):
        response = client.completions.create(model="tiny", prompt=prompt, max_tokens=4, temperature=0)
        assert [choice.index for choice in response.choices] == list(range(len(response.choices)))
        return [choice.text for choice in response.choices]

    one, other = (expected(model, prompt, 4, temperature=0).text for prompt in ("one", "other"))
    assert texts("one") == texts(list(b"one")) == texts(["one"]) == texts([list(b"one")]) == [one]
    assert texts(["other", "one"]) == texts([list(b"other"), list(b"one")]) == [other, one]
    assert texts("") == [expected(model, [EOT_ID], 4, temperature=0).text]


def test_a_text_is_begun_as_the_checkpoint_expects_it(model, tmp_path):
    """Token ids are taken as they are; the text of an answer does not show the beginning."""
    tokenizer = begins_texts(byte_tokenizer(), tmp_path)
    with running(model, change=lambda served: replace(served, tokenizer=tokenizer)) as server:
        client = server.client()
        said = client.completions.create(model="tiny", prompt="abc", temperature=0, echo=True)
        as_ids = client.completions.create(model="tiny", prompt=[EOT_ID, *b"abc"], temperature=0, echo=True)
        bare = client.completions.create(model="tiny", prompt=list(b"abc"), temperature=0)
        assert said.choices[0].text == as_ids.choices[0].text
        assert said.choices[0].text.startswith("abc")
        assert (said.usage.prompt_tokens, bare.usage.prompt_tokens) == (4, 3)
        tokens = httpx.post(f"{server.url}/tokenize", json={"model": "tiny", "prompt": "abc"}).json()["tokens"]
        assert tokens == [EOT_ID, *b"abc"]


def begins_texts(tokenizer, folder) -> HubTokenizer:
    """The same tokens, published so that each text begins with the end of a document, as Llama's do with <s>."""
    publish_tokenizer(tokenizer, folder)
    published = tokenizers.Tokenizer.from_file(str(folder / HUB_FILE))
    published.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{EOT} $A", special_tokens=[(EOT, EOT_ID)]
    )
    published.save(str(folder / HUB_FILE))
    return HubTokenizer.load(folder)


def test_choices_of_several_prompts_come_in_order_of_prompts(client, model):
    response = client.completions.create(model="tiny", prompt=["one", "two"], n=3, max_tokens=5, seed=40)
    twins = [expected(model, prompt, 5, seed=seed).text for prompt in ("one", "two") for seed in (40, 41, 42)]
    assert [choice.text for choice in response.choices] == twins
    assert [choice.index for choice in response.choices] == list(range(6))
    assert response.usage.prompt_tokens == 6  # each prompt once
    assert response.usage.completion_tokens == 30

    chunks = list(
        client.completions.create(model="tiny", prompt=["one", "two"], n=3, max_tokens=5, seed=40, stream=True)
    )
    streamed = [""] * 6
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == twins
    assert [hasattr(chunk, "equipoise") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_without_a_seed_the_response_says_which_it_was(client, model):
    first, second = (client.completions.create(model="tiny", prompt="ab") for _ in range(2))
    assert first.equipoise["seed"] != second.equipoise["seed"]
    again = client.completions.create(model="tiny", prompt="ab", seed=first.equipoise["seed"])
    assert again.choices[0].text == first.choices[0].text


def test_max_tokens(client):
    def usage(**fields):
        response = client.completions.create(model="tiny", extra_body={"ignore_eos": True}, **fields)
        return response.usage.completion_tokens, response.choices[0].finish_reason

    assert usage(prompt="a") == (16, "length")
    assert usage(prompt="a", max_tokens=3) == (3, "length")
    assert usage(prompt="a" * (MAX_TOKENS - 2)) == (2, "length")  # the default is at most what there is room for
    assert usage(prompt="a" * (MAX_TOKENS - 2), max_tokens=2) == (2, "length")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_the_slow_twin(client, model, stream):
    twin = expected(model, "hi", 6, seed=3, num_logprobs=2, logit_bias={65: 40})
    sent = {"prompt": "hi", "max_tokens": 6, "seed": 3, "logprobs": 2, "logit_bias": {"65": 40}}
    tokens, values, tops, offsets = [], [], [], []
    for part in _parts(client, stream, **sent):
        tokens += part.logprobs.tokens
        values += part.logprobs.token_logprobs
        tops += part.logprobs.top_logprobs
        offsets += part.logprobs.text_offset
    assert tokens == ["A"] * 6
    assert offsets == [0, 1, 2, 3, 4, 5]
    assert values == pytest.approx([each.logprob for each in twin.logprobs], abs=1e-4)
    for top, each in zip(tops, twin.logprobs, strict=True):
        assert len(top) == 3  # the two likeliest of the model, and A, which the bias chose
        assert top["A"] == pytest.approx(each.logprob, abs=1e-4)
        likeliest = sorted(top.values(), reverse=True)[:2]
        assert likeliest == pytest.approx([value for _, value in each.top], abs=1e-4)


def _parts(client, stream, **sent):
    """The choices of the chunks, or the one choice."""
    response = client.completions.create(model="tiny", stream=stream, **sent)
    return [chunk.choices[0] for chunk in response] if stream else response.choices


def test_half_letters_have_names_and_offsets_count_letters(client):
    """The two bytes of one letter, and then another letter: the last two tokens begin after 0 and 1 letters."""
    response = client.completions.create(
        model="tiny", prompt=list("äb".encode()), max_tokens=0, echo=True, logprobs=0, temperature=0
    )
    [choice] = response.choices
    assert choice.text == "äb"
    assert choice.logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa4", "b"]
    assert choice.logprobs.text_offset == [0, 0, 1]
    assert choice.logprobs.top_logprobs[1] == {"bytes:\\xa4": choice.logprobs.token_logprobs[1]}


@pytest.mark.parametrize("stream", [False, True])
def test_echo_without_new_tokens_scores_a_text(client, model, stream):
    twin = expected(model, "score me", 0, prompt_logprobs=True, num_logprobs=1)
    [part] = _parts(client, stream, prompt="score me", max_tokens=0, echo=True, logprobs=1)
    assert part.text == "score me"
    assert part.finish_reason == "length"
    assert part.logprobs.tokens == list("score me")
    assert part.logprobs.token_logprobs[0] is part.logprobs.top_logprobs[0] is None
    assert part.logprobs.token_logprobs[1:] == pytest.approx(
        [each.logprob for each in twin.prompt_logprobs[1:]], abs=1e-4
    )
    for top, each in zip(part.logprobs.top_logprobs[1:], twin.prompt_logprobs[1:], strict=True):
        assert max(top.values()) == pytest.approx(each.top[0][1], abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_echo_puts_the_prompt_first(client, model, stream, logprobs):
    twin = expected(model, "begin ", 5, seed=2)
    parts = _parts(client, stream, prompt="begin ", max_tokens=5, seed=2, echo=True, logprobs=logprobs)
    assert "".join(part.text for part in parts) == "begin " + twin.text
    if logprobs is None:
        assert all(part.logprobs is None for part in parts)
        assert len(parts) > 1 or not stream
    else:
        [part] = parts  # a prompt's log-probabilities are known at the end, so there is one chunk
        assert len(part.logprobs.tokens) == 6 + 5
        assert part.logprobs.text_offset[:6] == [0, 1, 2, 3, 4, 5]


def test_usage_in_streams(client):
    def chunks(**options):
        return list(client.completions.create(model="tiny", prompt="abc", max_tokens=3, stream=True, **options))

    with_usage = chunks(stream_options={"include_usage": True}, extra_body={"ignore_eos": True})
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in with_usage[:-1])
    assert with_usage[-1].choices == []
    assert with_usage[-1].usage.prompt_tokens == 3
    assert with_usage[-1].usage.completion_tokens == 3
    assert with_usage[-1].equipoise["seed"] >= 0
    assert all("usage" not in chunk.model_fields_set for chunk in chunks())


def test_a_stream_is_not_kept_by_proxies(client):
    raw = client.completions.with_raw_response.create(model="tiny", prompt="x", max_tokens=1, stream=True)
    assert raw.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (raw.headers["cache-control"], raw.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert raw.http_response.read().endswith(b"data: [DONE]\n\n")


def test_prompts_that_were_seen_before_are_cached(client):
    prompt = "a prompt of more than one block"
    client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    usage = client.completions.create(model="tiny", prompt=prompt, max_tokens=1, n=2).usage
    assert usage.prompt_tokens == len(prompt)
    assert usage.prompt_tokens_details.cached_tokens == 24  # whole blocks of 8, without the last token


@pytest.mark.parametrize("stream", [False, True])
def test_routed_experts(client, model, stream):
    twin = expected(model, "route", 4, seed=9, routed_experts=True)
    response = client.completions.create(
        model="tiny", prompt=["route", "other"], max_tokens=4, seed=9, stream=stream,
        extra_body={"equipoise": {"return_routed_experts": True}},
    )  # fmt: skip
    last = list(response)[-1] if stream else response
    extra = last.equipoise
    assert extra["layers"] == list(model.moe_layers)
    assert [each["index"] for each in extra["routed_experts"]] == [0, 1]
    first = extra["routed_experts"][0]
    assert first["dtype"] == "int16"
    ids_LTK = np.frombuffer(base64.b64decode(first["data"]), "<i2").reshape(first["shape"])
    assert ids_LTK.shape == (2, 5 + 3, 2)  # the last token of an answer is not routed
    np.testing.assert_array_equal(ids_LTK, twin.experts)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_past_its_deadline_ends_with_what_there_is(server, client, model, stream):
    twin = expected(model, "late", 200, seed=5, ignore_eos=True)
    extra = {"ignore_eos": True, "equipoise": {"deadline_ms": 20}}
    parts = _parts(client, stream, prompt="late", max_tokens=200, seed=5, extra_body=extra)
    assert parts[-1].finish_reason == "deadline"
    text = "".join(part.text for part in parts)
    assert twin.text.startswith(text.rstrip("�"))
    assert len(text) < len(twin.text)
    assert server.idle()


@pytest.mark.parametrize(
    ("servers", "own", "seconds"),
    [(None, None, None), (5.0, None, 5.0), (5.0, 9000.0, 5.0), (5.0, 2000.0, 2.0), (None, 2000.0, 2.0)],
)
def test_a_request_may_only_bring_the_servers_deadline_forward(server, servers, own, seconds):
    served = replace(server.served, bounds=Bounds(answer_seconds=servers))
    body = {"model": "tiny", "prompt": "x"} | ({} if own is None else {"equipoise": {"deadline_ms": own}})
    plan, _ = plan_completions(served, Caller("id", "client", arrived=100.0), json.dumps(body).encode())
    assert plan.requests[0].deadline == (None if seconds is None else 100.0 + seconds)


def test_the_servers_deadline_ends_all_answers_with_what_there_is(model):
    """It is over before any step."""
    with running(model, change=lambda served: replace(served, bounds=Bounds(answer_seconds=1e-9))) as own:
        [choice] = own.client().completions.create(model="tiny", prompt="late").choices
        assert (choice.text, choice.finish_reason) == ("", "deadline")
        assert wait_until(lambda: [each.finishes for each in own.counted] == [("deadline",)])


def test_a_deadline_that_is_far_away_changes_nothing(client, model):
    extra = {"equipoise": {"deadline_ms": 1e6}}
    [choice] = client.completions.create(model="tiny", prompt="x", seed=1, extra_body=extra).choices
    assert choice.text == expected(model, "x", seed=1).text


def test_many_async_clients_get_their_own_answers(server, model):
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(seed: int) -> str:
                if seed % 2:
                    response = await client.completions.create(model="tiny", prompt="ab", seed=seed)
                    return response.choices[0].text
                stream = await client.completions.create(model="tiny", prompt="ab", seed=seed, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(seed) for seed in range(24)))

    assert asyncio.run(ask()) == [expected(model, "ab", seed=seed).text for seed in range(24)]


def test_the_model_is_listed(client):
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert model.created == 1_700_000_000
    assert model.max_model_len == MAX_TOKENS
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="there is no 'large' here; expected 'tiny'"):
        client.models.retrieve("large")


def test_what_is_counted(server, client):
    server.counted.clear()
    usage = client.completions.create(
        model="tiny", prompt=["counted", "twice"], n=2, max_tokens=4, extra_body={"ignore_eos": True}
    ).usage
    assert wait_until(lambda: server.counted)  # after the last byte
    [counted] = server.counted
    assert (counted.endpoint, counted.status, counted.degraded) == ("/v1/completions", 200, ())
    assert (counted.prompt_tokens, counted.answer_tokens) == (usage.prompt_tokens, usage.completion_tokens) == (12, 16)
    assert counted.finishes == ("length",) * 4
    assert len(counted.between_tokens) == 4 * 3
    assert 0 < counted.first_token < counted.seconds
    assert math.fsum(counted.between_tokens) < 4 * counted.seconds
