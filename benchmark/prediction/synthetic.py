"""A made-up workload with prompts: applications, their templates, users, and chats.

Owns its generator. What decides a response's length here is what a predictor can hope to find in
practice: the application (its system prompt), the words of the instruction, and the chat that a
prompt goes on; the rest is noise that nobody can foresee.
"""

import numpy as np

from econoserve.prediction.request import RequestFeatures, fingerprint
from econoserve.workload.trace import CAP_TOKENS, TraceRequest

APPLICATIONS = 30
USERS = 200
VOCABULARY = 32_000
INSTRUCTIONS = 40
"""Words, each of which makes a response longer or shorter by a factor of its own."""

SIGMA = 0.35
"""Standard deviation of the logarithm of a length, all else being known."""

CHAT = 0.25
"""Share of requests that go on with an earlier prompt of the same application."""

RATE_PER_S = 5.0


def synthetic(limit: int, seed: int = 5) -> list[TraceRequest]:
    """Make requests.

    Args:
        limit: how many.
        seed: other seeds make other applications, words and requests.

    Returns:
        The requests by arrival.
    """
    draw = np.random.default_rng(seed)
    templates = [
        draw.integers(100, VOCABULARY, draw.integers(24, 600)) for _ in range(APPLICATIONS)
    ]
    medians = np.exp(draw.normal(5.0, 1.0, APPLICATIONS))
    # Some applications obey the instruction, others answer in a fixed form.
    obedience = draw.choice((0.0, 0.5, 1.0), APPLICATIONS)
    popularity = 1.0 / np.arange(1, APPLICATIONS + 1)
    popularity /= popularity.sum()
    words = draw.integers(100, VOCABULARY, INSTRUCTIONS)
    effects = draw.normal(0.0, 0.7, INSTRUCTIONS)
    chats: list[list[tuple[np.ndarray, float]]] = [[] for _ in range(APPLICATIONS)]
    requests, at_s = [], 0.0
    for _ in range(limit):
        at_s += draw.exponential(1 / RATE_PER_S)
        number = int(draw.choice(APPLICATIONS, p=popularity))
        earlier = chats[number]
        if earlier and draw.random() < CHAT:
            prompt, style = earlier[int(draw.integers(len(earlier)))]
            turn = draw.integers(100, VOCABULARY, draw.integers(100, 400))
            prompt = np.concatenate((prompt, turn))
        else:
            style = draw.normal(0.0, 0.3)
            text = draw.integers(100, VOCABULARY, draw.integers(20, 300))
            prompt = np.concatenate((templates[number], text))
        word = int(draw.integers(INSTRUCTIONS))
        prompt = np.concatenate((prompt, words[word : word + 1], draw.integers(10, 30, 3)))
        if len(prompt) < 6000:
            earlier.append((prompt, style))
            del earlier[:-50]
        effect = style + obedience[number] * effects[word] + draw.normal(0.0, SIGMA)
        output_tokens = int(np.clip(medians[number] * np.exp(effect), 1, 8192))
        user = int(draw.integers(USERS))
        features = RequestFeatures.of_prompt(
            prompt.tolist(),
            CAP_TOKENS,
            user=fingerprint(f"user {user}"),
            expected_tokens=_hint(draw, user, output_tokens),
        )
        requests.append(TraceRequest(at_s, features, output_tokens, (number, word)))
    return requests


def _hint(draw: np.random.Generator, user: int, output_tokens: int) -> int | None:
    """A third of the users give good hints, twice too high; a third bad ones; the rest none."""
    factor, wild = draw.lognormal(0.7, 0.2), draw.integers(1, 4000)
    return (int(output_tokens * factor) + 1, int(wild), None)[user % 3]
