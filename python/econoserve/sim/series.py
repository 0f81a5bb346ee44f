"""What an instance did over time, in steps of simulated time.

Owns the averaging. The number of steps is bounded: when there are too many, pairs become one and
the step twice as long.
"""

from dataclasses import dataclass, field
from typing import Any

FIRST_STEP_S = 0.25
"""The step that a series begins with. Ours."""


@dataclass(slots=True)
class _Step:
    """Sums over the iterations that began in a step; of the first four, times their seconds."""

    held: float = 0.0
    used: float = 0.0
    running: float = 0.0
    waiting: float = 0.0
    forward_tokens: int = 0
    iterations: int = 0
    elapsed_s: float = 0.0
    tfs_tokens: float = 0.0
    tfs_samples: int = 0

    def add(self, other: "_Step") -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Series:
    """Means over steps of time.

    Attributes:
        points: most steps, at least 2.
        step_s: how long a step is by now.
    """

    points: int
    step_s: float = FIRST_STEP_S
    _steps: dict[int, _Step] = field(default_factory=dict)

    def begins(self, now_s: float) -> bool:
        """Whether an iteration that began then is the first of its step.

        Args:
            now_s: when.
        """
        return int(now_s / self.step_s) not in self._steps

    def add(
        self,
        began_s: float,
        elapsed_s: float,
        *,
        held: int,
        used: int,
        running: int,
        waiting: int,
        forward_tokens: int,
        tfs_tokens: int | None,
    ) -> None:
        """Count an iteration in the step in which it began.

        Args:
            began_s: when it began.
            elapsed_s: how long it took.
            held: tokens of KVC that were held.
            used: what of it belonged to requests in the forward pass.
            running: requests that decoded.
            waiting: requests that held no KVC.
            forward_tokens: tokens that the pass computed.
            tfs_tokens: the policy's target, ``None`` if it was not asked or has none.
        """
        step = self._steps.setdefault(int(began_s / self.step_s), _Step())
        asked = tfs_tokens is not None
        step.add(
            _Step(
                held * elapsed_s,
                used * elapsed_s,
                running * elapsed_s,
                waiting * elapsed_s,
                forward_tokens,
                1,
                elapsed_s,
                tfs_tokens if asked else 0.0,
                int(asked),
            )
        )
        while len(self._steps) > self.points:
            self._halve()

    def columns(self) -> dict[str, Any]:
        """The series.

        Returns:
            ``step_s`` and a list for each figure, with a value for each step in which an iteration
            began: ``time_s`` is the step's begin; KVC and requests are means over time,
            ``forward_tokens`` over iterations, ``tfs_tokens`` is ``None`` where there is none.
        """
        steps = [self._steps[number] for number in sorted(self._steps)]
        spans = [max(step.elapsed_s, 1e-12) for step in steps]

        def means(name: str) -> list[float]:
            pairs = zip(steps, spans, strict=True)
            return [round(getattr(step, name) / span, 3) for step, span in pairs]

        return {
            "step_s": self.step_s,
            "time_s": [number * self.step_s for number in sorted(self._steps)],
            "kvc_held_tokens": means("held"),
            "kvc_used_tokens": means("used"),
            "running": means("running"),
            "waiting": means("waiting"),
            "forward_tokens": [round(step.forward_tokens / step.iterations, 3) for step in steps],
            "tfs_tokens": [
                round(step.tfs_tokens / step.tfs_samples, 3) if step.tfs_samples else None
                for step in steps
            ],
        }

    def _halve(self) -> None:
        wider: dict[int, _Step] = {}
        for number in sorted(self._steps):
            wider.setdefault(number // 2, _Step()).add(self._steps[number])
        self.step_s, self._steps = 2 * self.step_s, wider
