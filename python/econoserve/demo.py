"""The demo: starts a server on this machine, sends it real requests and prints what they got.

Owns the server process that it starts and the prompts it sends. It must never leave a process
behind, however it ends. ``python -m econoserve.demo`` is ``make demo``; with ``--keep`` it is
``make serve``: no prompts, and the server stays up until Ctrl-C.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
import openai
from tabulate import tabulate
from tqdm import tqdm

from econoserve import demo_model

HOST = "127.0.0.1"
SERVE_PORT = 30000
START_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 15.0
ARRIVAL_GAP_S = 0.1
MAX_RESPONSE_TOKENS = 300
LOG_TAIL_LINES = 40

QUESTIONS = (
    "Hello!",
    "Who was Ada Lovelace?",
    "Name three rivers.",
    "What time is it on the moon?",
    "Translate to French: the window is open.",
    "Write a haiku about rain on a tin roof.",
    "Why is the sky blue? Explain it to a child of six.",
    "Give me five names for a small bakery near a railway station.",
    "I have two eggs, some rice and half a cabbage. What can I cook in twenty minutes?",
    "Write a polite note to a neighbour whose dog barks every morning at five.",
    "My train was cancelled and I missed a connection that I had paid for. Write a short letter "
    "that asks for my money back and mentions that I waited for three hours in the cold.",
)
TASKS = (
    "Summarise the text below in one sentence.",
    "List every number in the text below and say what it counts.",
    "Write five questions that a teacher could ask about the text below.",
    "Continue the text below in the same voice.",
    "Rewrite the text below for children.",
    "What do the texts below have in common, and which one would you cut first? Give reasons.",
)
# Targets in milliseconds, in the order in which the requests take turns; None is best effort.
SLOS: tuple[dict[str, int] | None, ...] = (
    {"ttft_ms": 500},
    None,
    {"ttft_ms": 1000, "tpot_ms": 60},
    {"e2e_ms": 8000},
    None,
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one request asks for.

    Args:
        text: the user's message.
        slo: targets in milliseconds by name (``ttft_ms``, ``tpot_ms``, ``e2e_ms``), or None.
        arguments: how the SLO travels, as arguments of the OpenAI client's ``create``.
    """

    text: str
    slo: dict[str, int] | None
    arguments: dict[str, Any]


@dataclass(slots=True)
class Outcome:
    """What the client saw of one request; times in milliseconds, None where there is none."""

    request_id: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    error: str | None = None
    report: dict[str, Any] | None = None


class ServerError(RuntimeError):
    """The server did not start, died, or failed requests."""


def prompts(count: int) -> list[Prompt]:
    """The demo's requests, from a few words to about a thousand tokens, short and long mixed.

    Args:
        count: how many, at least 1; they repeat after a while.

    Returns:
        The prompts in order of arrival.
    """
    passages = list(demo_model.PASSAGES.values())
    texts = []
    for index in range(count):
        # Every third request has texts attached: one, then up to five of them.
        turn, kind = divmod(index, 3)
        if kind == 2:
            attached = [passages[(turn + offset) % len(passages)] for offset in range(1 + turn % 5)]
            texts.append("\n\n".join([TASKS[turn % len(TASKS)], *attached]))
        else:
            texts.append(QUESTIONS[(2 * turn + kind) % len(QUESTIONS)])
    slos = itertools.cycle(SLOS)
    forms = itertools.cycle((_as_headers, _as_body))
    return [
        Prompt(text, slo, next(forms)(slo) if slo else {})
        for text, slo in zip(texts, slos, strict=False)
    ]


def _as_headers(slo: dict[str, int]) -> dict[str, Any]:
    headers = {f"x-slo-{name.replace('_', '-')}": str(value) for name, value in slo.items()}
    return {"extra_headers": headers}


def _as_body(slo: dict[str, int]) -> dict[str, Any]:
    return {"extra_body": {"custom_params": {"econoserve": slo}}}


def _server_command(port: int, max_total_tokens: int) -> list[str]:
    return [
        *(sys.executable, "-m", "econoserve.launch_server"),
        *("--model-path", "demo", "--device", "cpu", "--host", HOST, "--port", str(port)),
        *("--max-total-tokens", str(max_total_tokens), "--log-level", "warning"),
    ]


@contextlib.contextmanager
def _running_server(command: list[str], port: int, log_path: Path) -> Iterator[subprocess.Popen]:
    """Run a server until the block ends; whatever it started is gone afterwards."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerError(f"--port {port}: {error.strerror}; choose another one") from error
    # Its own session: Ctrl-C reaches this process alone, which then stops the server in order.
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_until_healthy(process, port)
        yield process
    finally:
        _stop(process)


def _wait_until_healthy(process: subprocess.Popen, port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerError(f"the server ended with exit status {process.returncode}")
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"http://{HOST}:{port}/health").status_code == 200:
                    return
            time.sleep(0.2)
    raise ServerError(f"the server was not healthy after {START_TIMEOUT_S:.0f} s")


def _stop(process: subprocess.Popen) -> None:
    """Ask the server to end, then kill what is left of the process group that it leads."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not interrupt this
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


async def _send_all(port: int, requests: list[Prompt]) -> tuple[list[Outcome], float]:
    """Send one request every ``ARRIVAL_GAP_S``; also give the seconds until the last answer."""
    started = time.perf_counter()
    http_client = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=REQUEST_TIMEOUT_S)
    async with openai.AsyncOpenAI(
        base_url=f"http://{HOST}:{port}/v1",
        api_key="none",
        max_retries=0,
        http_client=http_client,
    ) as client:
        with tqdm(total=len(requests), unit="request", desc="answered") as bar:
            tasks = []
            for request in requests:
                tasks.append(asyncio.create_task(_send(client, request)))
                tasks[-1].add_done_callback(lambda _: bar.update())
                await asyncio.sleep(ARRIVAL_GAP_S)
            outcomes = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - started
        for outcome in outcomes:
            if outcome.error is None:
                url = f"http://{HOST}:{port}/econoserve/requests/{outcome.request_id}"
                with contextlib.suppress(httpx.HTTPError):  # the report is a bonus
                    answer = await http_client.get(url)
                    outcome.report = answer.json() if answer.status_code == 200 else None
    return outcomes, seconds


async def _send(client: openai.AsyncOpenAI, prompt: Prompt) -> Outcome:
    outcome = Outcome()
    arrival_s: list[float] = []  # of each chunk
    finish_reason = None
    sent_s = time.perf_counter()
    try:
        stream = await client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": prompt.text}],
            max_tokens=MAX_RESPONSE_TOKENS,
            temperature=1.0,
            stream=True,
            stream_options={"include_usage": True},
            **prompt.arguments,
        )
        async for chunk in stream:
            outcome.request_id = chunk.id
            if chunk.choices:
                arrival_s.append(time.perf_counter())
                finish_reason = chunk.choices[0].finish_reason or finish_reason
            if chunk.usage:
                outcome.prompt_tokens = chunk.usage.prompt_tokens
                outcome.output_tokens = chunk.usage.completion_tokens
    except (openai.OpenAIError, httpx.HTTPError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
        return outcome
    if finish_reason not in ("stop", "length"):
        outcome.error = f"finish_reason={finish_reason}: the response was cut off"
    if arrival_s:
        outcome.ttft_ms = (arrival_s[0] - sent_s) * 1000
    if outcome.output_tokens > 1:
        outcome.tpot_ms = (arrival_s[-1] - arrival_s[0]) * 1000 / (outcome.output_tokens - 1)
    return outcome


def _table(requests: list[Prompt], outcomes: list[Outcome]) -> str:
    rows = []
    for prompt, outcome in zip(requests, outcomes, strict=True):
        report = outcome.report
        if outcome.error is not None:
            met = "failed"
        elif report is None:
            met = "n/a"
        else:
            met = {True: "yes", False: "no", None: "-"}[report["slo_met"]]
        targets = (prompt.slo or {}).items()
        rows.append(
            (
                outcome.prompt_tokens,
                report["predicted_tokens"] if report else "n/a",
                outcome.output_tokens,
                "-" if outcome.ttft_ms is None else f"{outcome.ttft_ms:.0f}",
                "-" if outcome.tpot_ms is None else f"{outcome.tpot_ms:.1f}",
                ", ".join(f"{name.removesuffix('_ms')} {ms}" for name, ms in targets) or "-",
                met,
            )
        )
    measured = ("prompt\ntokens", "response\npredicted", "response\nreal", "TTFT\nms", "TPOT\nms")
    return tabulate(
        rows,
        headers=(*measured, "SLO\nms", "\nmet"),
        disable_numparse=True,
        colalign=("right",) * len(measured) + ("left", "left"),
    )


def _summary(requests: list[Prompt], outcomes: list[Outcome], seconds: float) -> str:
    tokens = sum(outcome.output_tokens for outcome in outcomes)
    reports = [outcome.report for outcome in outcomes if outcome.report]
    kept = sum(report["slo_met"] is True for report in reports)
    met = f"{kept} of {sum(request.slo is not None for request in requests)}" if reports else "n/a"
    return (
        f"{len(outcomes)} requests in {seconds:.1f} s, {tokens} output tokens "
        f"({tokens / seconds:.0f} tokens/s), SLO met {met}"
    )


def _how_to_talk(port: int) -> str:
    question = '{"role": "user", "content": "Hello!"}'
    return f"""\
  curl http://{HOST}:{port}/v1/chat/completions \\
    -H 'Content-Type: application/json' -H 'x-slo-ttft-ms: 500' \\
    -d '{{"model": "demo", "max_tokens": 50, "messages": [{question}]}}'

  import openai
  client = openai.OpenAI(base_url="http://{HOST}:{port}/v1", api_key="none")
  answer = client.chat.completions.create(
      model="demo",
      messages=[{question}],
      extra_body={{"custom_params": {{"econoserve": {{"ttft_ms": 500, "e2e_ms": 4000}}}}}},
  )
  print(answer.choices[0].message.content)
"""


def _demo(port: int, requests: list[Prompt]) -> None:
    outcomes, seconds = asyncio.run(_send_all(port, requests))
    print(f"\n{_table(requests, outcomes)}\n\n{_summary(requests, outcomes, seconds)}\n")
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    if errors:
        raise ServerError("\n".join([f"{len(errors)} requests failed:", *dict.fromkeys(errors)]))
    print(f"`make serve` keeps a server running; then\n\n{_how_to_talk(SERVE_PORT)}")


def _serve(process: subprocess.Popen, port: int, log_path: Path) -> NoReturn:
    print(f"ready on http://{HOST}:{port} (log: {log_path}), Ctrl-C stops it\n", flush=True)
    print(_how_to_talk(port), flush=True)
    raise ServerError(f"the server ended with exit status {process.wait()}")


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join(lines[-LOG_TAIL_LINES:])


def _free_port() -> int:
    # Not one that the system hands out to clients: it could be gone before the server binds it.
    for port in random.sample(range(20_000, SERVE_PORT), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise ServerError("no free port below the clients' range; choose one with --port")


class _Stopped(BaseException):
    """A signal asked this program to end."""


def _stop_on_signal(_number: int, _frame: object) -> None:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise _Stopped from None
    for task in asyncio.all_tasks(loop):  # raised here, it would surface in whichever task runs
        loop.call_soon_threadsafe(task.cancel)


def main(argv: list[str] | None = None) -> int:
    """Run the demo, or with ``--keep`` a server until Ctrl-C.

    Args:
        argv: arguments; by default those of the command line.

    Returns:
        The exit status: 0 when every request succeeded, or on Ctrl-C with ``--keep``; else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m econoserve.demo", description="The demo.")
    parser.add_argument("--keep", action="store_true", help="serve until Ctrl-C, send nothing")
    parser.add_argument(
        "--port", type=int, help=f"default: {SERVE_PORT} with --keep, else a free one"
    )
    parser.add_argument("--requests", type=int, default=36, help="how many to send")
    parser.add_argument("--max-total-tokens", type=int, default=4096, help="KV cache capacity")
    options = parser.parse_args(argv)
    if options.requests < 1:
        parser.error(f"--requests {options.requests}: give 1 or more")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop_on_signal)
    with tempfile.TemporaryDirectory(prefix="econoserve-demo-") as folder:
        log_path = Path(folder) / "server.log"
        try:
            demo_model.ensure()
            print("starting the server", flush=True)
            port = options.port or (SERVE_PORT if options.keep else _free_port())
            command = _server_command(port, options.max_total_tokens)
            with _running_server(command, port, log_path) as process:
                if options.keep:
                    _serve(process, port, log_path)
                _demo(port, prompts(options.requests))
        except ServerError as error:
            print(error, _tail(log_path), sep="\n", file=sys.stderr)
            return 1
        except (_Stopped, asyncio.CancelledError):
            return 0 if options.keep else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
