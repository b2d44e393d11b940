"""Requests that are too large, malformed or unauthorised get their status; the server goes on."""

from __future__ import annotations

import json
import socket
import time

import openai
import pytest
from helpers.servers import KEY, client_of, live_server, send

MESSAGES = [{"role": "user", "content": "plan a party"}]
CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4}


def is_well(url):
    status, said = send(f"{url}/v1/chat/completions", CHAT)
    return status == 200 and said["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("key", [None, "", "wrong", KEY + "x", KEY[:-1], "Ünïcode", "a" * 5000])
def test_without_the_key_nothing_but_health_is_shown(served, key) -> None:
    ascii_key = None if key is None else key.encode("utf-8").decode("latin-1")
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", b"not even read"),
        ("/v1/models", None),
        ("/v1/steering", None),
        ("/metrics", None),
        ("/admin/reload", b""),
    ):
        status, said = send(f"{served}{path}", body, key=ascii_key)
        assert status == 401, path
        assert said["error"]["type"] == "authentication_error"
    assert send(f"{served}/health", key=None) == (200, {"status": "ok"})
    with pytest.raises(openai.AuthenticationError):
        client_of(served, "wrong").models.list()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "Yes"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 65}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"n": 65, "temperature": 1}, "n"),
        ({"stop": ""}, None),
        ({"stop": ["x"] * 17}, None),
        ({"seed": 2**70}, "seed"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "stream": True}, "logprobs"),
        ({"steering": {"vector": "../../run.json"}}, "steering"),
        ({"steering": {"vector": "no_such"}}, "steering"),
        ({"steering": {"category": "no_such"}}, "steering"),
        ({"steering": {"rho": 1e9}}, "steering"),
        ({"steering": {"rho": 0.1, "scale": 1}}, "steering"),
        ({"steering": {"gate": False}}, "steering"),
        ({"steering": {"strength": 1}}, "steering.strength"),
        ({"steering": [1]}, "steering"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, None),
    ],
)
def test_a_wrong_field_is_refused_with_its_name(served, fields, param) -> None:
    status, said = send(f"{served}/v1/chat/completions", CHAT | fields)
    assert status == 400, said
    assert said["error"]["type"] == "invalid_request_error"
    assert "\n" not in said["error"]["message"]
    if param is not None:
        assert said["error"]["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"messages": NaN}',
        b"[" * 9000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_request_is_refused(served, body) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        status, said = send(f"{served}{path}", body)
        assert status == 400
        assert said["error"]["message"]
    assert is_well(served)


def test_a_body_over_the_limit_is_refused_however_it_is_sent(served) -> None:
    large = CHAT | {"messages": [{"role": "user", "content": "x" * 30_000}]}
    assert send(f"{served}/v1/chat/completions", large)[0] == 413
    host, port = served.removeprefix("http://").split(":")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode())
        for _ in range(8):
            connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert b" 413 " in connection.recv(200)
    assert is_well(served)


def test_paths_methods_kinds_and_models_that_are_not_there(served) -> None:
    assert send(f"{served}/v1/embeddings", CHAT)[0] == 404
    assert send(f"{served}/v1/chat/completions", method="GET")[0] == 405
    status, said = send(
        f"{served}/v1/chat/completions", CHAT, Content_Type="application/x-www-form-urlencoded"
    )
    assert status == 415
    assert "application/json" in said["error"]["message"]
    status, said = send(f"{served}/v1/chat/completions", CHAT | {"model": "gpt-4o"})
    assert (status, said["error"]["code"]) == (404, "model_not_found")
    assert send(f"{served}/v1/models/tiny:nothing")[0] == 404


def test_settings_that_change_nothing_are_let_through(served) -> None:
    more = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "user": "somebody",
        "metadata": {"a": "b"},
        "tools": None,
        "response_format": {"type": "text"},
        "messages": [{**MESSAGES[0], "type": "text", "tool_calls": None}],
    }
    assert send(f"{served}/v1/chat/completions", CHAT | more)[0] == 200


def test_too_many_answers_in_flight_are_refused_and_the_others_written(finished, tiny) -> None:
    pytest.importorskip("fastapi")
    from workbench.serve.prepare import Limits

    with live_server(finished, tiny, limits=Limits(max_in_flight=3)) as url:
        many = CHAT | {"n": 4, "temperature": 1.0}
        status, said = send(f"{url}/v1/chat/completions", many)
        assert (status, said["error"]["type"]) == (429, "rate_limit_error")
        three = CHAT | {"n": 3, "temperature": 1.0}
        assert len(send(f"{url}/v1/chat/completions", three)[1]["choices"]) == 3


def test_a_client_that_goes_away_frees_its_rows(served) -> None:
    host, port = served.removeprefix("http://").split(":")
    for stream in (True, False):
        body = json.dumps(CHAT | {"stream": stream, "max_tokens": 64, "n": 8, "temperature": 1.5})
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
                f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}"
            )
            connection.sendall(head.encode())
            if stream:
                connection.recv(100)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        page = send(f"{served}/metrics")[1]
        if "workbench_running 0.0" in page and "workbench_waiting 0.0" in page:
            break
        time.sleep(0.05)
    else:
        pytest.fail("rows are still written")
    assert is_well(served)


def test_steering_that_breaks_the_numbers_ends_its_own_request(finished, tiny, tmp_path) -> None:
    pytest.importorskip("fastapi")
    import shutil
    from dataclasses import replace

    from workbench.steering.vectors import load_vector, save_vector

    run = shutil.copytree(finished, tmp_path / "run")
    path = next(iter(sorted((run / "vectors").glob("*.*.*.safetensors"))))
    vector = load_vector(path)
    save_vector(path, replace(vector, vector=vector.vector / vector.norm * 3e38))
    with live_server(run, tiny) as url:
        steering = {"vector": path.name.removesuffix(".safetensors"), "scale": 100}
        status, said = send(f"{url}/v1/chat/completions", CHAT | {"steering": steering})
        assert (status, said["error"]["code"]) == (500, "generation_failed")
        stream = CHAT | {"steering": steering, "stream": True}
        status, said = send(f"{url}/v1/chat/completions", stream)
        assert status == 200
        assert "generation_failed" in said
        assert is_well(url)


def test_metrics_count_what_happened_without_any_words(served) -> None:
    assert is_well(served)
    status, page = send(f"{served}/metrics")
    assert status == 200
    assert 'workbench_requests_total{path="/v1/chat/completions",status="200"}' in page
    assert "workbench_first_token_seconds_count" in page
    assert "party" not in page
    assert KEY not in page


def test_without_a_key_only_this_machines_own_name_is_answered(finished, tiny) -> None:
    pytest.importorskip("fastapi")
    with live_server(finished, tiny, key=None) as url:
        assert send(f"{url}/v1/models", key=None)[0] == 200
        assert send(f"{url}/v1/models", key=None, Host="evil.example")[0] == 403
        assert send(f"{url}/admin/reload", b"", key=None)[0] == 403
