"""The prefix cache of the obvious machine: a tree of segments, each in the KVC once."""

from typing import NamedTuple


class Segment(NamedTuple):
    """A piece of a prompt that others may begin with; its name tells what comes before it."""

    name: str
    tokens: int


class PrefixCache:
    """Segments that finished requests left, who holds which, and what else could be had.

    A segment that somebody holds is used KVC, once; one that nobody holds counts as free and is
    dropped when its slots are needed, those that continue it first.
    """

    def __init__(self):
        self.cached: dict[Segment, int] = {}

    @property
    def used(self):
        return sum(segment.tokens for segment, holders in self.cached.items() if holders)

    @property
    def evictable(self):
        return sum(segment.tokens for segment, holders in self.cached.items() if not holders)

    def match(self, path):
        """The beginning of a path that is cached."""
        known = 0
        while known < len(path) and path[known] in self.cached:
            known += 1
        return path[:known]

    def hold(self, path):
        for segment in path:
            self.cached[segment] += 1

    def let_go(self, path):
        for segment in path:
            self.cached[segment] -= 1
            assert self.cached[segment] >= 0

    def insert(self, path):
        for segment in path:
            self.cached.setdefault(segment, 0)

    def evict(self, tokens):
        """Drop what nobody holds until so many are free; continuations are younger."""
        for segment in reversed([*self.cached]):
            if tokens <= 0:
                return
            if not self.cached[segment]:
                tokens -= segment.tokens
                del self.cached[segment]
