"""The command checks before it loads anything, and ends on a signal without a trace."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.servers import KEY, send

from workbench import cli
from workbench.serve.command import check_address, read_key
from workbench.serve.prepare import Limits

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.4", "example.org"])
def test_beyond_this_machine_a_key_is_needed(host) -> None:
    with pytest.raises(ValueError, match="there is no key"):
        check_address(host, None)
    check_address(host, KEY)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_on_this_machine_none_is_needed(host) -> None:
    check_address(host, None)


def test_keys_come_from_a_file_or_the_environment_and_are_not_short(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    assert read_key("SOME_KEY", None) is None
    monkeypatch.setenv("SOME_KEY", KEY)
    assert read_key("SOME_KEY", None) == KEY
    path = tmp_path / "key"
    path.write_text(f"{KEY}-of-a-file\n")
    assert read_key("SOME_KEY", str(path)) == f"{KEY}-of-a-file"
    for wrong in ("short", f"{KEY} {KEY}", f"{KEY}ü"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="a key has at least 16") as refused:
            read_key("SOME_KEY", str(path))
        assert wrong not in str(refused.value)


@pytest.mark.parametrize("name", ["max_tokens", "max_body", "max_in_flight", "body_timeout_s"])
def test_limits_are_above_0(name) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0"):
        replace(Limits(), **{name: 0})


def test_a_wrong_folder_or_host_is_one_line(tmp_path, capsys) -> None:
    pytest.importorskip("fastapi")
    assert cli.main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert cli.main(["serve", str(tmp_path), "--host", "0.0.0.0", "--port", "0"]) == 2
    assert cli.main(["serve", str(tmp_path), "--port", "99999"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert "there is no key" in lines[1]
    assert "port" in lines[2]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end_and_stops_the_server(
    finished, tiny_path, tmp_path, sent
) -> None:
    pytest.importorskip("fastapi")
    import shutil

    run = shutil.copytree(finished, tmp_path / "tiny")
    notes = json.loads((run / "run.json").read_text())
    notes["config"]["model"] = str(tiny_path)
    (run / "run.json").write_text(json.dumps(notes))
    command = [sys.executable, "-m", "workbench", "serve", str(run), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORKBENCH_API_KEY": KEY}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as process:
        said = ""
        while not (found := re.search(r"served at http://127.0.0.1:(\d+)/v1", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        port = int(found[1])
        url = f"http://127.0.0.1:{port}"
        assert send(f"{url}/v1/models")[0] == 200
        body = json.dumps(
            {"messages": [{"role": "user", "content": "plan"}], "max_tokens": 60, "stream": True}
        )
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(
                (
                    "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                    f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n{body}"
                ).encode()
            )
            streamed = connection.recv(4096)
            process.send_signal(sent)
            time.sleep(0.05)
            while part := connection.recv(4096):
                streamed += part
        assert b"[DONE]" in streamed
        rest = process.communicate(timeout=60)[1]
        assert process.returncode == 0, said + rest
        assert "Traceback" not in said + rest
        assert KEY not in said + rest
