"""The settings on which the claims are tried: traces, hardware and models, objectives.

Owns the grid, and how a run of it is described. It holds no results.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from econoserve.core.types import Slo
from econoserve.sim.run import RunSpec
from econoserve.workload.workload import SYNTHETIC, WorkloadSpec

ATTAIN = 0.9
"""Share of requests that has to meet its SLO: DistServe's."""

PREDICTED, EXACT = "prefix-tree", "oracle"
"""The server's default predictor, and exact lengths."""

PEERS = ("vllm_v1", "past_future", "sglang", "sarathi")
"""Today's competition."""

FIRST = "vllm_v1"
"""The policy whose capacity the searches of the others begin at."""

VLLM_2023 = "vllm"
"""What the paper compares with."""

VARIANTS = ("d", "sd", "sdo", "full", "plus")

SYSTEMS = (("plus", PREDICTED), ("full", PREDICTED), ("plus", EXACT))
"""What is set against vLLM of 2023: ours, the paper's algorithm, and ours with exact lengths."""

FRACTIONS = (0.5, 0.8, 1.0, 1.2, 1.5)
FURTHER = (2.0, 3.0, 4.0)
"""Rates of the sweep, as shares of the capacity of vLLM of 2023. A further one is run where the
latency at the last one is still below vLLM's at its highest."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A setting.

    Attributes:
        lengths: which requests: a name of ``workload/synthetic.json``.
        hardware: of a profile.
        model: of a profile.
        slo: of every request.
        guess_rps: where the first search begins.
        published: whether the SLO is DistServe's; else it is ours.
        max_running: most requests in a batch: vLLM's default there, 256 or, on GPUs other than an
            A100 with 70 GiB or more, 1,024.
    """

    lengths: str
    hardware: str
    model: str
    slo: Slo
    guess_rps: float
    published: bool = False
    max_running: int = 256

    @property
    def name(self) -> str:
        """``LENGTHS@HARDWARE/MODEL``."""
        return f"{self.lengths}@{self.hardware}/{self.model}"

    @property
    def slo_text(self) -> str:
        """Its objectives, in seconds."""
        return f"{self.slo.ttft_s:g}/{self.slo.tpot_s:g}"


OPT_13B, OPT_66B = Slo(ttft_s=0.25, tpot_s=0.1), Slo(ttft_s=0.4, tpot_s=0.1)
"""DistServe's for ShareGPT."""

CELLS = (
    Cell("sharegpt", "a100", "opt-13b", OPT_13B, 5.4, published=True),
    Cell("azure-conv", "a100", "opt-13b", OPT_13B, 2.0),
    Cell("sharegpt", "a100", "opt-66b", OPT_66B, 5.1, published=True),
    Cell("azure-conv", "a100", "opt-66b", OPT_66B, 1.9),
    Cell("sharegpt", "rtx-pro-6000", "llama-3.1-8b", Slo(0.5, 0.05), 17.0, max_running=1024),
    Cell("azure-conv", "rtx-pro-6000", "llama-3.1-8b", Slo(1.0, 0.05), 8.6, max_running=1024),
    Cell(
        "mooncake-conversation",
        "rtx-pro-6000",
        "llama-3.1-8b",
        Slo(5.0, 0.1),
        0.3,
        max_running=1024,
    ),
    Cell("sharegpt", "rtx-4090", "llama-3.1-8b", Slo(1.0, 0.1), 5.7),
    Cell("azure-conv", "rtx-4090", "llama-3.1-8b", Slo(2.0, 0.1), 2.9),
    Cell("mooncake-conversation", "rtx-4090", "llama-3.1-8b", Slo(10.0, 0.1), 0.2),
)
"""Mooncake's prompts exceed OPT's context, so they are only for Llama."""

ABLATION = (
    "sharegpt@a100/opt-13b",
    "azure-conv@rtx-4090/llama-3.1-8b",
    "mooncake-conversation@rtx-pro-6000/llama-3.1-8b",
)
"""Where the variants are compared."""

BATCH_LIMITED = ("vllm", "vllm_v1", "sarathi")
"""Policies with a limit of their own on the requests in a batch; it is set to the cell's."""

GPU_CONSTANTS: Mapping[tuple[str, str], Mapping[str, int]] = {
    ("vllm_v1", "rtx-pro-6000"): {"max_batch_tokens": 8192}
}
"""By policy and hardware: constants that a server's defaults raise on that GPU. vLLM's rule is that
of ``Cell.max_running``. SGLang's chunk is left at 8,192 on the RTX 4090, where its default is 4,096
and serves somewhat less."""

DISTSERVE_HARDWARE = "a100"
"""Where times with several GPUs are known, so that placements can be searched."""

DISTSERVE_RUNNING = 1024
"""Most requests in a batch of a decode instance, in DistServe's evaluation."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How long runs are, and how close a search comes.

    Attributes:
        requests: least number in a run.
        min_duration_s: least time of arrivals in a run.
        step: ratio of neighbouring rates that a search tries.
        alone_requests: of the run at a tenth of the capacity, which shows whether the SLO can be
            kept at all.
        gpus: most GPUs of a placement.
        evaluate: placements that are measured as a whole.
    """

    requests: int = 3000
    min_duration_s: float = 1200.0
    step: float = 1.06
    alone_requests: int = 500
    gpus: int = 8
    evaluate: int = 4


FULL_SCALE = Scale()
QUICK = Scale(40, 8.0, 1.6, 20, 2, 1)


@dataclass(frozen=True, slots=True)
class Paper:
    """The whole trial.

    Attributes:
        cells: the settings.
        scale: of the runs.
        files: a trace file by the name of the lengths that it stands in for.
        seed: of all that is drawn.
    """

    cells: Sequence[Cell] = CELLS
    scale: Scale = FULL_SCALE
    files: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def rate_rps(self, index: int) -> float:
        """A rate that searches try.

        Args:
            index: its number; 0 is one request a second.

        Returns:
            ``scale.step`` to that power, to five digits.
        """
        return float(f"{self.scale.step**index:.5g}")

    def index_near(self, rate_rps: float) -> int:
        """The number of a rate that searches try.

        Args:
            rate_rps: a rate, more than 0.

        Returns:
            That of the one next to it.
        """
        return round(math.log(rate_rps, self.scale.step))

    def trace(self, cell: Cell) -> str:
        """Where the requests of a setting are from.

        Args:
            cell: the setting.

        Returns:
            A file, or the name of a synthetic workload.
        """
        return self.files.get(cell.lengths, SYNTHETIC + cell.lengths)

    def spec(
        self,
        cell: Cell,
        policy: str,
        rate_rps: float,
        predictor: str = PREDICTED,
        tensor: int | None = None,
        requests: int | None = None,
    ) -> RunSpec:
        """A run.

        Args:
            cell: its setting.
            policy: the policy.
            rate_rps: its rate.
            predictor: of the lengths.
            tensor: GPUs that share each layer, if not the profile's.
            requests: how many; by default as many as ``scale`` asks for.

        Returns:
            The run.
        """
        if requests is None:
            lasting = round(rate_rps * self.scale.min_duration_s)
            requests = max(self.scale.requests, lasting)
        workload = WorkloadSpec(self.trace(cell), rate_rps, requests, slo=cell.slo, seed=self.seed)
        constants = dict(GPU_CONSTANTS.get((policy, cell.hardware), {}))
        if policy in BATCH_LIMITED:
            constants["max_seqs"] = cell.max_running
        return RunSpec(
            policy,
            workload,
            cell.hardware,
            cell.model,
            predictor=predictor,
            constants=constants,
            max_running=cell.max_running,
            tensor=tensor,
        )
