"""A check for tests: the ledger says what the KV pool says, in every iteration."""

from econoserve.core.ledger import Ledger


class BooksError(RuntimeError):
    """The ledger and the KV pool differ."""


def assert_true_books(
    ledger: Ledger, held: dict[str, int], used_tokens: int, shared_tokens: int
) -> None:
    """Compare the ledger with the KV pool.

    Args:
        ledger: the claims.
        held: KVC that each request holds, prefixes from the cache included; those in host memory
            hold none.
        used_tokens: KVC in use, as the pool reports it.
        shared_tokens: what of that the prefix cache owns and requests pin.

    Raises:
        BooksError: a request holds something else than its claim says, or the pool has more or
            less in use than the requests explain.
    """
    wrong = {
        rid: (ledger.held_by(rid), tokens)
        for rid, tokens in held.items()
        if ledger.held_by(rid) != tokens
    }
    unknown = len(ledger) - sum(rid in ledger for rid in held)
    if wrong or unknown:
        raise BooksError(
            f"claims and KVC differ, (claim, held) by request: {wrong}; {unknown} claims of "
            "requests that hold nothing"
        )
    if used_tokens < shared_tokens:
        raise BooksError(f"used_tokens={used_tokens} is less than shared_tokens={shared_tokens}")
