"""A signal while requests run: the whole process tree ends, and soon."""

import signal
import threading
import time
from typing import Any

import httpx
import pytest
from live_server import METRICS, LiveServer, wait_until

CLIENTS = 4
OUTPUT_TOKENS = 220
DEADLINE_S = 30.0


def stream(server: LiveServer, number: int, ends: list[Any]) -> None:
    """Stream an answer; append its last event, or the error that ended it."""
    sampling = {"max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    fields = {"text": f"Wave {number}", "sampling_params": sampling, "stream": True}
    events: list[str] = []
    try:
        with server.http.stream("POST", "/generate", json=fields) as response:
            events += [line for line in response.iter_lines() if line]
        ends.append(events[-1])
    except httpx.TransportError as error:
        ends.append(error)


@pytest.mark.parametrize(
    ("doomed_server", "how", "expected"),
    [((), signal.SIGTERM, 0), (METRICS, signal.SIGINT, 128 + signal.SIGINT)],
    ids=["SIGTERM", "SIGINT"],
    indirect=["doomed_server"],
)
def test_signal_while_requests_run_ends_every_process(doomed_server, how, expected):
    ends: list[Any] = []
    clients = [
        threading.Thread(target=stream, args=(doomed_server, number, ends), daemon=True)
        for number in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    wait_until(lambda: doomed_server.state()["running"] == CLIENTS, 20, "all requests run")
    assert len(doomed_server.tree()) >= 3
    began = time.monotonic()
    status = doomed_server.stop(how)
    assert time.monotonic() - began < DEADLINE_S
    for client in clients:
        client.join(5)
        assert not client.is_alive(), "a client was left hanging"
    assert ends == ["data: [DONE]"] * CLIENTS, "a running request was cut off"
    assert "Traceback" not in doomed_server.log_tail(), doomed_server.log_tail()
    assert status == expected
