"""What the soak sends: seeded requests of every kind, and what each must get.

Owns the mix. Two runs with one seed send the same requests in the same order.
"""

import random
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

FIRST_WORD_ID, LAST_WORD_ID = 300, 4000
PREFIXES, CANARIES = 6, 12
REGEX = r"[a-f]{3,20}-[0-9]{2,4}"
COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"


class Leave(Enum):
    """How a client ends its request."""

    STAYS = auto()
    EARLY = auto()
    """Closes the connection after a moment: most are queued or being prefilled."""
    MID_STREAM = auto()
    """Closes the connection after some events of the stream."""
    ABORT = auto()
    """Asks ``/abort_request`` after a moment and reads on."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request and what it must get.

    Attributes:
        number: its place in the run.
        path: endpoint.
        fields: body.
        headers: HTTP headers.
        leave: how the client ends it.
        after_s: when it leaves early or aborts.
        after_events: events after which it leaves a stream.
        status: HTTP status of the answer.
        choices: answers it gets.
        tokens: length of each, ``None`` where the model may stop earlier.
        pattern: regular expression that complete answers match.
        canary: requests of one number must all get the same text.
    """

    number: int
    path: str
    fields: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    leave: Leave = Leave.STAYS
    after_s: float = 0.0
    after_events: int = 0
    status: int = 200
    choices: int = 1
    tokens: int | None = None
    pattern: str | None = None
    canary: int | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer comes in events."""
        return self.fields.get("stream", False)


class Mix:
    """Draws requests.

    Args:
        seed: of all random numbers.
        kvc_tokens: size of the KVC; no prompt but the refused ones is longer than half of it.
    """

    def __init__(self, seed: int, kvc_tokens: int) -> None:
        self._random = random.Random(seed)
        self._kvc_tokens = kvc_tokens
        self._prefixes = [self._words(self._random.randint(20, 200)) for _ in range(PREFIXES)]
        self._canaries = [
            (self._prompt(), self._random.randint(5, 80)) for number in range(CANARIES)
        ]

    def draw(self, number: int) -> Request:
        """The next request.

        Args:
            number: its place in the run.

        Returns:
            A request.
        """
        kind = self._random.random()
        if kind < 0.01:
            return self._too_large(number)
        if kind < 0.08:
            return self._canary(number)
        if kind < 0.16:
            return self._shaped(number)
        return self._plain(number)

    def _words(self, count: int) -> list[int]:
        return [self._random.randint(FIRST_WORD_ID, LAST_WORD_ID) for _ in range(count)]

    def _prompt(self) -> list[int]:
        shared = self._random.choice(self._prefixes) if self._random.random() < 0.4 else []
        own = min(int(self._random.lognormvariate(3.6, 1.1)) + 1, self._kvc_tokens // 2)
        return [*shared, *self._words(own)]

    def _too_large(self, number: int) -> Request:
        words = self._words(self._kvc_tokens + self._random.randint(0, 300))
        fields = {"input_ids": words, "sampling_params": {"max_new_tokens": 4}}
        return Request(number, GENERATE, fields, status=400)

    def _canary(self, number: int) -> Request:
        which = self._random.randrange(CANARIES)
        prompt, tokens = self._canaries[which]
        fields = self._completion(prompt, tokens) | {"temperature": 0, "ignore_eos": True}
        fields["stream"] = self._random.random() < 0.5
        return self._finished(
            Request(number, COMPLETIONS, fields, tokens=tokens, canary=which), leaves=False
        )

    def _shaped(self, number: int) -> Request:
        """An answer that must match a pattern, or one with penalties or log-probabilities."""
        how = self._random.choice(("regex", "regex", "penalty", "logprobs"))
        if how == "regex":
            fields = self._completion(self._prompt(), 60) | {"regex": REGEX, "temperature": 1}
            fields["stream"] = self._random.random() < 0.5
            return self._finished(Request(number, COMPLETIONS, fields, pattern=REGEX))
        tokens = self._random.randint(1, 40)
        fields = self._completion(self._prompt(), tokens) | {"ignore_eos": True}
        fields |= {"frequency_penalty": 0.7} if how == "penalty" else {"logprobs": 2}
        return self._finished(Request(number, COMPLETIONS, fields, tokens=tokens))

    def _plain(self, number: int) -> Request:
        path = self._random.choice((COMPLETIONS, CHAT, GENERATE))
        tokens = min(int(self._random.lognormvariate(3.3, 1.0)) + 1, 300)
        stops = self._random.random() < 0.3
        temperature = self._random.choice((0, 1))
        choices = self._random.choice((2, 3)) if self._random.random() < 0.1 else 1
        if path == GENERATE:
            sampling = {"max_new_tokens": tokens, "temperature": temperature}
            sampling["ignore_eos"] = not stops
            fields = {"input_ids": self._prompt(), "sampling_params": sampling}
            choices = 1
        else:
            fields = {"max_tokens": tokens, "temperature": temperature, "ignore_eos": not stops}
            fields |= {"model": "default", "n": choices}
            if path == CHAT:
                text = " ".join(f"word{word}" for word in self._words(self._random.randint(1, 40)))
                fields["messages"] = [{"role": "user", "content": text}]
            else:
                fields["prompt"] = self._prompt()
        fields["stream"] = self._random.random() < 0.6
        exact = None if stops else tokens
        return self._finished(Request(number, path, fields, choices=choices, tokens=exact))

    def _completion(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        return {"model": "default", "prompt": prompt, "max_tokens": tokens}

    def _finished(self, request: Request, leaves: bool = True) -> Request:
        """Add an SLO to some, an end by the client to others."""
        fields, headers = dict(request.fields), dict(request.headers)
        if request.streams and request.path != GENERATE:
            fields["stream_options"] = {"include_usage": True}
        objective = self._random.choice((None, None, "ttft", "tpot", "e2e"))
        if objective is not None:
            limit = self._random.choice((1, 50, 500, 5000))
            headers[f"x-slo-{objective}-ms"] = str(limit)
        leave, chance = Leave.STAYS, self._random.random()
        if leaves and chance < 0.08:
            leave = Leave.EARLY
        elif leaves and chance < 0.2 and request.streams:
            leave = Leave.MID_STREAM
        elif leaves and chance < 0.26 and request.choices == 1:
            leave = Leave.ABORT
            fields["rid"] = f"soak-{request.number}"
        return Request(
            number=request.number,
            path=request.path,
            fields=fields,
            headers=headers,
            leave=leave,
            after_s=self._random.choice((0.0, 0.01, 0.05, 0.3, 1.0)),
            after_events=self._random.randint(1, 30),
            choices=request.choices,
            tokens=request.tokens,
            pattern=request.pattern,
            canary=request.canary,
        )
