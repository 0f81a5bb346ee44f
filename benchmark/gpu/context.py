"""What all stages know, and what they call wrong.

Owns the settings that both systems are started with.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.gpu import models
from benchmark.gpu.lengths import longest_output_tokens
from benchmark.gpu.pair import SYSTEMS, Engine, Engines, Setup
from benchmark.gpu.results import Results
from benchmark.gpu.sizes import Device, Sizes
from benchmark.scheduler_comparison.workload import Vocabulary

SEED = 1


class StageFailed(Exception):
    """A stage found something wrong."""


@dataclass(frozen=True, slots=True)
class Check:
    """What all stages know.

    Attributes:
        device: where engines run.
        sizes: how much is measured.
        folder: keeps results, models and logs.
        results: of the stages that are done.
        deadline_s: when the check's time is over, by ``time.monotonic``.
        engines: those that run.
    """

    device: Device
    sizes: Sizes
    folder: Path
    results: Results
    deadline_s: float = math.inf
    engines: Engines = field(default_factory=Engines)

    def setup(self, model: str, dtype: str, kvc_tokens: int, scale: float, **engine: Any) -> Setup:
        """Settings of both systems.

        Args:
            model: of ``models.SHAPES``, or ``demo``.
            dtype: of its weights.
            kvc_tokens: size of the KVC.
            scale: factor on lengths; says what limit requests state.
            engine: more of SGLang's arguments.

        Returns:
            The settings.
        """
        path = models.ensure(model, self.folder / "models")
        words = Vocabulary.of_model(path)
        return Setup(
            engine={
                **self.sizes.engine,
                "model_path": str(path),
                "load_format": models.load_format(model),
                "dtype": dtype,
                "max_total_tokens": kvc_tokens,
                "max_running_requests": self.sizes.max_running,
                "enable_custom_logit_processor": True,
                "random_seed": SEED,
                "log_level": "warning",
                **engine,
            },
            token_ids=words.prompt_ids[:4000],
            eos_ids=words.eos_ids,
            max_new_tokens=longest_output_tokens(scale),
            limit_s=self.sizes.limit_s,
        )

    def use(
        self, setup: Setup, stage: str, systems: Sequence[str] = SYSTEMS
    ) -> contextlib.AbstractContextManager[dict[str, Engine]]:
        """Have engines run; see ``Engines.use``.

        Args:
            setup: what they are started with.
            stage: names the folder for what they print, if they start now.
            systems: which.

        Returns:
            A context with the engines by system.
        """
        return self.engines.use(systems, setup, self._logs(stage), self.deadline_s)

    def _logs(self, stage: str) -> Path:
        folder = self.folder / "logs" / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def failures(answers: list[dict[str, Any]]) -> list[str]:
    """What went wrong in a burst.

    Args:
        answers: of all requests.

    Returns:
        A line for each request that failed or has another length than intended.
    """
    found = []
    for number, answer in enumerate(answers):
        if answer["error"] is not None:
            found.append(f"request {number}: {answer['error']}")
        elif answer["output_tokens"] != answer["wanted_tokens"]:
            found.append(
                f"request {number}: {answer['output_tokens']} output tokens instead of "
                f"{answer['wanted_tokens']}"
            )
    return found
