"""The slow, obvious model of the KVC: claims as plain numbers, the future by simulation."""

from dataclasses import dataclass

from hypothesis import strategies as st


@dataclass
class Simple:
    """A claim: what it holds, what it will still decode, whether it decodes now."""

    held: int
    left: int
    decodes: bool


def occupancy(claims, steps):
    """KVC in use at each of the next steps if every length is as promised.

    A claim that decodes holds one token more after each step and is gone after its last.
    """
    now = [(claim.held, claim.left if claim.decodes else None) for claim in claims]
    future = []
    for step in range(1, steps + 1):
        future.append(
            sum(
                held + (0 if left is None else step)
                for held, left in now
                if left is None or step <= left
            )
        )
    return future


def fits(claims, capacity):
    """Whether the occupancy never exceeds the capacity, promises of waiting claims included."""
    waiting = sum(claim.left for claim in claims if not claim.decodes)
    horizon = max([claim.left for claim in claims if claim.decodes], default=0) + 1
    held = sum(claim.held for claim in claims)
    return held + waiting <= capacity and all(
        used + waiting <= capacity for used in occupancy(claims, horizon)
    )


claims = st.lists(
    st.builds(Simple, st.integers(0, 60), st.integers(1, 60), st.booleans()), max_size=8
)


def open_claims(ledger, simple):
    """The same claims in a ledger; those that decode are promised one length."""
    for number, claim in enumerate(simple):
        rid = f"c{number}"
        ledger.take(rid, claim.held)
        if claim.decodes:
            ledger.promise(rid, response=(claim.left,) * ledger.points)
            ledger.start(rid)
        else:
            ledger.promise(rid, prompt_tokens=claim.left)
    return sum(claim.held for claim in simple)
