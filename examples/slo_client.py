"""Two requests with service-level objectives, sent by the OpenAI client, and what became of them.

Start a server with ``make serve``, then run ``python examples/slo_client.py``.
"""

import argparse

import httpx
import openai

QUESTION = [{"role": "user", "content": "Why is the sky blue? Explain it to a child of six."}]

# The same targets in both forms, in milliseconds: as HTTP headers, which a gateway can set, and
# in the body.
AS_HEADERS = {"extra_headers": {"x-slo-ttft-ms": "500", "x-slo-e2e-ms": "8000"}}
AS_BODY = {"extra_body": {"custom_params": {"econoserve": {"ttft_ms": 500, "e2e_ms": 8000}}}}


def ask(client: openai.OpenAI, slo: dict) -> str:
    """Stream one answer to the terminal; returns the request's id."""
    stream = client.chat.completions.create(
        model="demo", messages=QUESTION, max_tokens=100, stream=True, **slo
    )
    request_id = ""
    for chunk in stream:
        request_id = chunk.id
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
    return request_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server")
    url = parser.parse_args().url

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    for slo in (AS_HEADERS, AS_BODY):
        request_id = ask(client, slo)
        report = httpx.get(f"{url}/econoserve/requests/{request_id}")
        report.raise_for_status()
        for name, value in report.json().items():
            print(f"    {name}: {value}")


if __name__ == "__main__":
    main()
