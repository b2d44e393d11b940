"""What the server answers is what the run's own functions answer, one request or many at once."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from helpers.servers import KEY, client_of, live_server, send
from helpers.tiny_models import sentences

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.safesteer.saved_run import gated_steering_from, steering_from
from workbench.serve.catalogue import Catalogue, Choice

TEXTS = sentences(200, seed=11)


def chat(client, text, steering=None, **settings):
    return client.chat.completions.create(
        model=settings.pop("model", "tiny"),
        messages=[{"role": "user", "content": text}],
        max_tokens=settings.pop("max_tokens", 8),
        extra_body={"steering": steering} if steering is not None else None,
        **settings,
    )


def words(response):
    return response.choices[0].message.content


def offline(tiny, text, interventions=(), **settings):
    decoding = Decoding(**{"max_new_tokens": 8, **settings})
    return generate(tiny, text, list(interventions), decoding)


def test_openais_client_streams_a_steered_answer(client, finished, tiny) -> None:
    text, steering = TEXTS[0], {"category": "fraud", "scale": 3.0}
    chunks = list(chat(client, text, steering, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    expected = Catalogue.read(finished).interventions(Choice(category="fraud", scale=3.0))
    (answer,) = offline(tiny, text, expected)
    assert streamed == answer.text
    assert streamed != offline(tiny, text)[0].text
    assert chunks[0].choices[0].delta.role == "assistant"
    reason = {"length": "length", "eos": "stop"}[answer.finish]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == reason
    assert chunks[-1].usage.completion_tokens == len(answer.tokens)
    assert len(chunks) > 3


def counted(served, name):
    page = send(f"{served}/metrics")[1]
    return float(re.search(rf"^workbench_{name}_total (\S+)", page, re.MULTILINE)[1])


def test_200_requests_with_8_vectors_at_once_equal_their_single_answers(
    served, client, finished, tiny
) -> None:
    catalogue = Catalogue.read(finished)
    files = [name for name in catalogue.names if name.count(".") > 1][:6]
    ways = [{"vector": name, "rho": 0.3 + 0.1 * i} for i, name in enumerate(files)]
    ways += [{"category": "malware", "scale": 2.0}, {"rho": 0}]
    assert len(ways) == 8
    lengths = [4 + i % 9 for i in range(200)]
    before = [counted(served, name) for name in ("completion_tokens", "passes")]
    with ThreadPoolExecutor(200) as pool:
        jobs = [
            pool.submit(chat, client, text, ways[i % 8], max_tokens=lengths[i])
            for i, text in enumerate(TEXTS)
        ]
        together = [words(job.result()) for job in jobs]
    after = [counted(served, name) for name in ("completion_tokens", "passes")]
    assert after[0] - before[0] > 3 * (after[1] - before[1])  # they shared passes
    for i in range(0, 200, 13):  # over the wire, one at a time
        assert words(chat(client, TEXTS[i], ways[i % 8], max_tokens=lengths[i])) == together[i]
    for way in range(8):  # and all of them by the run's own functions, in its own batches
        rows = [i for i in range(200) if i % 8 == way]
        given = catalogue.interventions(Choice(**ways[way]))
        for length in sorted({lengths[i] for i in rows}):
            same = [i for i in rows if lengths[i] == length]
            answers = offline(tiny, [TEXTS[i] for i in same], given, max_new_tokens=length)
            assert [together[i] for i in same] == [answer.text for answer in answers]
    assert len(set(together)) > 100


def test_scale_0_has_the_bits_of_the_unsteered_model_whatever_was_served_before(client) -> None:
    how = {"logprobs": True, "top_logprobs": 5}
    before = chat(client, TEXTS[3], model="tiny:unsteered", **how)
    chat(client, TEXTS[3], {"category": "fraud", "scale": 5.0})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: chat(client, text, {"category": "malware"}), TEXTS[:16]))
    for steering in ({"scale": 0}, {"rho": 0, "category": "fraud"}):
        after = chat(client, TEXTS[3], steering, **how)
        assert after.choices[0].model_dump() == before.choices[0].model_dump()
        assert after.steering == {"steered": False}


@pytest.mark.parametrize("name", ["tiny", "tiny:fraud", "tiny:unsteered"])
def test_a_models_name_says_how_it_is_steered(client, finished, tiny, name) -> None:
    behind = name.partition(":")[2]
    interventions = (
        []
        if behind == "unsteered"
        else steering_from(finished, behind)
        if behind
        else gated_steering_from(finished)
    )
    answers = [words(chat(client, text, model=name)) for text in TEXTS[:4]]
    assert answers == [one.text for one in offline(tiny, TEXTS[:4], interventions)]
    assert name in [model.id for model in client.models.list()]
    assert client.models.retrieve(name).id == name


def test_a_gated_request_is_told_whether_the_gate_opened(client) -> None:
    said = chat(client, TEXTS[0], {"gate": True})
    assert said.steering["gate"] in ("open", "closed")
    assert said.steering["steered"]


def test_a_conversation_is_asked_with_its_turns(client, tiny) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": TEXTS[0]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "text", "text": TEXTS[1]}]},
    ]
    said = client.chat.completions.create(
        model="tiny:unsteered", messages=turns, max_completion_tokens=8
    )
    (expected,) = offline(tiny, [turns])
    assert words(said) == expected.text


def test_samples_stops_and_counts_are_those_of_generate(client, tiny) -> None:
    warm = {"temperature": 1.2, "top_p": 0.9, "seed": 5}
    said = chat(client, TEXTS[2], {"scale": 0}, n=3, max_tokens=12, **warm)
    answers = offline(tiny, TEXTS[2], n_samples=3, max_new_tokens=12, **warm)
    assert [one.message.content for one in said.choices] == [one.text for one in answers]
    assert said.usage.completion_tokens == sum(len(one.tokens) for one in answers)
    unlike = {words(chat(client, TEXTS[2], {"scale": 0}, temperature=1.2)) for _ in range(5)}
    assert len(unlike) > 1
    full = offline(tiny, TEXTS[4], max_new_tokens=20)[0].text
    stop = full[5:8]
    for stream in (False, True):
        said = chat(client, TEXTS[4], {"scale": 0}, max_tokens=20, stop=[stop], stream=stream)
        if stream:
            parts = list(said)
            text = "".join(one.choices[0].delta.content or "" for one in parts)
            reason = parts[-1].choices[0].finish_reason
        else:
            text, reason = words(said), said.choices[0].finish_reason
        assert text == full[: full.index(stop)]
        assert reason == "stop"


def test_texts_are_gone_on_from_as_they_are(client, tiny) -> None:
    ids = tiny.tokenizer(TEXTS[0]).input_ids
    how = {"model": "tiny:unsteered", "max_tokens": 6, "logprobs": 2}
    by_text = client.completions.create(prompt=[TEXTS[0], TEXTS[1]], **how)
    by_ids = client.completions.create(prompt=ids, **how)
    assert [one.index for one in by_text.choices] == [0, 1]
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_text.usage.prompt_tokens > by_ids.usage.prompt_tokens == len(ids)
    known = by_text.choices[0].logprobs
    assert len(by_ids.choices[0].logprobs.tokens) == by_ids.usage.completion_tokens
    assert known.token_logprobs[0] == pytest.approx(max(known.top_logprobs[0].values()))
    streamed = client.completions.create(
        model="tiny:unsteered", prompt=ids, max_tokens=6, stream=True
    )
    assert "".join(one.choices[0].text for one in streamed) == by_ids.choices[0].text


def test_reloaded_vectors_steer_from_then_on(finished, tiny, tmp_path) -> None:
    pytest.importorskip("fastapi")
    import shutil

    from workbench.steering.vectors import load_vector, save_vector

    run = shutil.copytree(finished, tmp_path / "run")
    with live_server(run, tiny) as url:
        client = client_of(url)
        name = next(name for name in Catalogue.read(run).names if name.count(".") > 1)
        steering = {"vector": name, "scale": 2.0}
        before = [words(chat(client, text, steering)) for text in TEXTS[:4]]
        path = run / "vectors" / f"{name}.safetensors"
        vector = load_vector(path)
        save_vector(path, replace(vector, vector=-4 * vector.vector))
        assert [words(chat(client, text, steering)) for text in TEXTS[:4]] == before
        status, said = send(f"{url}/admin/reload", b"", key=KEY)
        assert (status, said["status"]) == (200, "reloaded")
        after = [words(chat(client, text, steering)) for text in TEXTS[:4]]
        assert after != before
        given = Catalogue.read(run).interventions(Choice(vector=name, scale=2.0))
        assert after == [one.text for one in offline(tiny, TEXTS[:4], given)]
        path.write_bytes(b"no vector")
        status, said = send(f"{url}/admin/reload", b"", key=KEY)
        assert status == 409
        assert "the old vectors stay" in said["error"]["message"]
        assert [words(chat(client, text, steering)) for text in TEXTS[:4]] == after
