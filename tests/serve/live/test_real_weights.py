"""Real weights behind the server (slow): SmolLM2, upcycled, converses, is broken under load, and is repaired."""

import threading

import httpx
import openai
import pytest
import torch
from tests.serve.live.test_server import operator, serving, wait_for

from equipoise.commands.convert import upcycle
from equipoise.models.generate import generate
from equipoise.models.run_files import load
from equipoise.monitor.store import RunStore

pytestmark = pytest.mark.slow
LAYER, QUESTION, ASKED = "layers.7.mlp", "The capital of France is", "What is the capital of France?"


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smol") / "smol"
    assert upcycle("smollm2", folder) == 0
    return folder


def test_it_converses_is_broken_and_repaired(smol, tmp_path):
    loaded = load(smol)
    prompt = torch.tensor([loaded.tokenizer.encode(QUESTION).tolist()])
    twin = loaded.tokenizer.decode(generate(loaded.model, prompt, max_new_tokens=8, temperature=0.0)[0].tolist())
    num_layers = len(loaded.model.moe_layers)
    del loaded
    out = tmp_path / "serving"
    with serving(smol, "--recover", "--flush-s", "1", "--out", str(out)) as server:
        server.out = out
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        said = client.completions.create(
            model="smol",
            prompt=QUESTION,
            max_tokens=8,
            temperature=0,
            echo=True,
            extra_body={"equipoise": {"return_routed_experts": True}},
        )
        assert said.choices[0].text == twin
        assert "Paris" in twin
        [routed] = said.model_extra["equipoise"]["routed_experts"]
        assert routed["shape"][0] == num_layers
        chat = client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": ASKED}],
            max_tokens=24,
            temperature=0,
            stream=True,
        )
        assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chat if chunk.choices)

        answers, failed, stop = [], [], threading.Event()

        def user(number):
            while not stop.is_set():
                try:
                    reply = client.completions.create(
                        model="smol", prompt=f"{number}. {QUESTION}", max_tokens=8, temperature=0
                    )
                    answers.append(reply.choices[0].text)
                except openai.APIError as error:
                    failed.append(error)

        users = [threading.Thread(target=user, args=(n,)) for n in range(4)]
        for each in users:
            each.start()
        try:
            with operator(server) as admin, RunStore.open_readonly(out) as store:
                wait_for(lambda: len(answers) > 8)
                fault = {"fault": "collapse", "layer": LAYER, "expert": 3, "intensity": 30.0}
                posted = admin.post("faults", json={"fault": fault})
                assert posted.status_code == 200, posted.text
                found = (LAYER, "collapse", 3)
                wait_for(
                    lambda: found in [(a.finding.layer, a.finding.rule, a.finding.expert) for a in store.alerts()], 240
                )
                wait_for(lambda: [a for a in store.actions() if (a.layer, a.state) == (LAYER, "kept")], 240)
                assert admin.post("faults/remove", json={}).status_code == 200
        finally:
            stop.set()
            for each in users:
                each.join()
        assert failed == []
        assert sum("Paris" in answer for answer in answers) > 0.8 * len(answers)
        assert "equipoise_serve_answer_tokens_total" in httpx.get(f"{server.url}/metrics").text
