"""What a server sees of a request when it arrives: all that a predictor may learn from.

Owns the features and their hashes, which are the same in every process and on every rank. It must
never hold anything that is known only later, such as the response's length.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EDGE_TOKENS = 64
"""Tokens kept of a prompt's beginning and as many of its end, for n-grams. Our choice."""


CUTS = tuple(16 << power for power in range(11))
"""Lengths of the prefixes that are hashed, in tokens: 16 to 16,384. Twice as many predict no better
(docs/results/prediction.md)."""

_STARTS = np.array((0, *CUTS[:-1]))
with np.errstate(over="ignore"):
    _POWERS = np.cumprod(np.full(CUTS[-1], 0x9E3779B97F4A7C15, np.uint64))
    _SALTS = np.cumprod(np.full(len(CUTS), 0xD1342543DE82EF95, np.uint64))
_FINISH = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(31)
_MASK = (1 << 64) - 1


def mixed(kind: int, value: int) -> int:
    """A key for a value of a kind.

    Args:
        kind: a small number.
        value: any integer.

    Returns:
        64 bits, different for most pairs.
    """
    key = ((value & _MASK) ^ (kind * 0x9E3779B97F4A7C15)) & _MASK
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    return key ^ (key >> 31)


def fingerprint(text: str) -> int:
    """A hash of a text that is the same in every process, as Python's own is not.

    Args:
        text: any text; a user's name, a model, a grammar.

    Returns:
        64 bits; 0 for the empty text, which stands for what a request does not state.
    """
    if not text:
        return 0
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _as_numbers(token_ids: Sequence[int], count: int) -> np.ndarray:
    if isinstance(token_ids, array) and token_ids.typecode == "q":
        return np.frombuffer(token_ids, np.int64, count)
    return np.array(token_ids[:count], np.int64)


def prefix_hashes(token_ids: Sequence[int]) -> tuple[int, ...]:
    """Hash a prompt's prefixes at all cut points that it reaches.

    Each is a polynomial modulo 2^64 of the tokens, so that all come from one pass. They tell
    prompts apart; they protect from nobody who looks for collisions.

    Args:
        token_ids: the prompt; an ``array('q')``, as SGLang has it, is read in place.

    Returns:
        A hash for each cut of ``CUTS`` that is not longer than the prompt.
    """
    reached = _reached(len(token_ids))
    if not reached:
        return ()
    tokens = _as_numbers(token_ids, CUTS[reached - 1]).view(np.uint64)
    parts = np.add.reduceat((tokens + np.uint64(1)) * _POWERS[: len(tokens)], _STARTS[:reached])
    hashes = np.cumsum(parts) ^ _SALTS[:reached]
    hashes = (hashes ^ (hashes >> _SHIFT)) * _FINISH
    return tuple((hashes ^ (hashes >> _SHIFT)).tolist())


def _reached(tokens: int) -> int:
    for number, cut in enumerate(CUTS):
        if cut > tokens:
            return number
    return len(CUTS)


def edge_tokens(token_ids: Sequence[int]) -> bytes:
    """The first and the last tokens of a prompt, where instructions mostly are.

    Args:
        token_ids: the prompt.

    Returns:
        At most ``2 * EDGE_TOKENS`` token ids, 4 bytes each.
    """
    if len(token_ids) <= 2 * EDGE_TOKENS:
        return _as_numbers(token_ids, len(token_ids)).astype(np.int32).tobytes()
    head = _as_numbers(token_ids, EDGE_TOKENS)
    tail = np.array(token_ids[-EDGE_TOKENS:], np.int64)
    return np.concatenate((head, tail)).astype(np.int32).tobytes()


@dataclass(frozen=True, slots=True)
class RequestFeatures:
    """A request as a server sees it on arrival.

    Attributes:
        prompt_tokens: length of the prompt.
        cap_tokens: the request's limit on output tokens.
        prefix_hashes: of the prompt, shortest prefix first; see ``prefix_hashes``.
        edges: the prompt's first and last tokens; see ``edge_tokens``.
        user: who sends it, as ``fingerprint``; 0 where it does not say.
        model: model or adapter asked for, as ``fingerprint``.
        constraint: stop strings, grammar and whatever else forms the output, as ``fingerprint``.
        limit_tokens: the limit that the request states; 0 where only the context length or the
            KVC limits it, which says nothing of its response.
        expected_tokens: the sender's own estimate of the response, ``None`` without one.
    """

    prompt_tokens: int
    cap_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    edges: bytes = b""
    user: int = 0
    model: int = 0
    constraint: int = 0
    limit_tokens: int = 0
    expected_tokens: int | None = None

    @classmethod
    def of_prompt(
        cls, token_ids: Sequence[int], cap_tokens: int, **context: int | None
    ) -> "RequestFeatures":
        """The features of a prompt.

        Args:
            token_ids: the prompt.
            cap_tokens: the request's limit on output tokens.
            context: ``user``, ``model``, ``constraint``, ``limit_tokens``, ``expected_tokens``.

        Returns:
            The features. Prompts for different models or constraints share no prefix: what they
            are answered with has little in common.
        """
        hashes = prefix_hashes(token_ids)
        form = (context.get("model") or 0) * 3 + (context.get("constraint") or 0) * 5
        if form:
            salt = mixed(1, form)
            hashes = tuple(one ^ salt for one in hashes)
        return cls(len(token_ids), cap_tokens, hashes, edge_tokens(token_ids), **context)

    def ngrams(self, buckets: int) -> np.ndarray:
        """Hashed single tokens, pairs and triples of the prompt's edges.

        Args:
            buckets: size of the table that they index, a power of two.

        Returns:
            Indices, some of them several times; computed at each call.
        """
        tokens = np.frombuffer(self.edges, np.int32).astype(np.uint64) + np.uint64(1)
        pairs = tokens[1:] * np.uint64(0x9E3779B1) + tokens[:-1]
        triples = pairs[1:] * np.uint64(0x85EBCA77) + tokens[:-2]
        grams = np.concatenate((tokens, pairs, triples)) * np.uint64(0x9E3779B97F4A7C15)
        shift = np.uint64(64 - (buckets.bit_length() - 1))
        return (grams >> shift).astype(np.int64)
