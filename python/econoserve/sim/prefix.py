"""The prefix cache of an instance: which blocks of prompts lie in the KVC, and who uses them.

Owns the blocks and what is evicted: what nobody uses, least recently used first. Requests hold the
rest of their KVC themselves; see ``sim.pool``.
"""

from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum


class PrefixCaching(Enum):
    """What an engine keeps of KVC that a request gives up."""

    OFF = "off"
    """Nothing: every prompt is computed whole."""
    PROMPTS = "prompts"
    """Prompts, as SGLang: what a preempted request generated is thrown away."""
    BLOCKS = "blocks"
    """All full blocks, as vLLM: a preempted request may find what it generated, too."""


class PrefixCache:
    """Blocks by name. A name stands for a block and all before it, so equal names hold the same.

    Attributes:
        evictable_tokens: KVC of blocks that nobody uses.
    """

    def __init__(self) -> None:
        self.evictable_tokens = 0
        self._users: dict[int, int] = {}
        self._unused: OrderedDict[int, int] = OrderedDict()

    def found(self, blocks: Sequence[int]) -> int:
        """How many of the first blocks of a prompt are there.

        Args:
            blocks: their names, from the beginning.

        Returns:
            A number of blocks.
        """
        for number, block in enumerate(blocks):
            if block not in self._users and block not in self._unused:
                return number
        return len(blocks)

    def unused(self, blocks: Sequence[int]) -> int:
        """How many of some blocks nobody uses.

        Args:
            blocks: names of blocks that are there.

        Returns:
            A number of blocks.
        """
        return sum(block in self._unused for block in blocks)

    def alone(self, blocks: Sequence[int]) -> int:
        """How many of some blocks have one user.

        Args:
            blocks: names of blocks that are used.

        Returns:
            A number of blocks.
        """
        return sum(self._users[block] == 1 for block in blocks)

    def use(self, blocks: Sequence[int]) -> int:
        """Use blocks that are there.

        Args:
            blocks: their names.

        Returns:
            KVC of those that nobody used before, in tokens: it cannot be had any more.
        """
        taken = 0
        for block in blocks:
            taken += self._unused.pop(block, 0)
            self._users[block] = self._users.get(block, 0) + 1
        self.evictable_tokens -= taken
        return taken

    def add(self, blocks: Sequence[int]) -> list[int]:
        """Name blocks that a request holds; it uses them from now on.

        Args:
            blocks: their names. What is there already under a name remains, and the request's copy
                is its own.

        Returns:
            The names that were new.
        """
        new = [one for one in blocks if one not in self._users and one not in self._unused]
        self._users.update(dict.fromkeys(new, 1))
        return new

    def leave(self, blocks: Sequence[int], block_tokens: int) -> int:
        """Use blocks no longer; they may be found until they are evicted.

        Args:
            blocks: names of blocks that were used, from the beginning: their ends are evicted
                first.
            block_tokens: size of each.

        Returns:
            KVC that nobody uses now, in tokens.
        """
        freed = 0
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                del self._users[block]
                self._unused[block] = block_tokens
                freed += block_tokens
        self.evictable_tokens += freed
        return freed

    def evict(self, free_tokens: int) -> None:
        """Evict blocks that nobody uses until they fit into the free KVC.

        Args:
            free_tokens: KVC that is not held.
        """
        while self.evictable_tokens > free_tokens:
            _, tokens = self._unused.popitem(last=False)
            self.evictable_tokens -= tokens
