"""The systems under test and how each is started, offline and as a server.

Owns their environments and arguments. What differs between systems is written here and nowhere
else, so that everything not written here is the same for all.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"

TORCH_NATIVE, SGLANG, ECONOSERVE, VLLM = "torch_native", "sglang", "econoserve", "vllm"
OUR_BACKEND = "econoserve_cpu"

DTYPE = "bfloat16"
VLLM_BLOCK_TOKENS = 128
MAX_REQUEST_TOKENS = 4096
MAX_RUNNING_REQUESTS = 256


@dataclass(frozen=True, slots=True)
class System:
    """One system under test.

    Attributes:
        name: its key in the results.
        title: what it is, for readers.
        client: what ``bench_serving`` calls its API.
        attention_backend: what SGLang must say it runs; ``None`` for vLLM.
        arguments: engine arguments that only this system gets, under its engine's names.
        environment: variables that only this system gets; ``None`` removes one.
    """

    name: str
    title: str
    client: str = "sglang"
    attention_backend: str | None = OUR_BACKEND
    arguments: Mapping[str, Any] = ()
    environment: Mapping[str, str | None] = ()

    @property
    def python(self) -> str:
        """The interpreter that runs it."""
        return str(VLLM_PYTHON) if self.name == VLLM else sys.executable


SYSTEMS = {
    system.name: system
    for system in (
        System(
            TORCH_NATIVE,
            "stock SGLang on our CPU platform, all operators upstream's, `torch_native` attention",
            attention_backend="torch_native",
            arguments={"attention_backend": "torch_native"},
            environment={"SGLANG_PLUGINS": "econoserve_cpu", "ECONOSERVE_CPU_OPS": "0"},
        ),
        System(
            SGLANG,
            "stock SGLang scheduler on our CPU platform with our attention",
            environment={"SGLANG_PLUGINS": "econoserve_cpu"},
        ),
        System(ECONOSERVE, "our scheduler on our CPU platform with our attention"),
        System(
            VLLM,
            "vLLM's CPU build",
            client="vllm",
            attention_backend=None,
            environment={
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_SERVER_DEV_MODE": "1",  # for its route that empties the prefix cache
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_LOGGING_LEVEL": "WARNING",
            },
        ),
    )
}

REMOVED_VARIABLES = (
    "ECONOSERVE",
    "ECONOSERVE_CONFIG",
    "ECONOSERVE_CPU_OPS",
    "OMP_NUM_THREADS",
    "SGLANG_PLUGINS",
    "VLLM_CPU_OMP_THREADS_BIND",
)
SHARED_VARIABLES = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def environment_of(system: System | None) -> dict[str, str]:
    """The environment a system or the load generator runs in.

    Args:
        system: the system; ``None`` for the load generator.

    Returns:
        This process's environment without what would make the systems differ by accident, and with
        what makes this one what it is.
    """
    kept = {name: value for name, value in os.environ.items() if name not in REMOVED_VARIABLES}
    return {**kept, **SHARED_VARIABLES, **dict(system.environment if system else {})}


def offline_environment_of(system: System) -> dict[str, str]:
    """The environment of an offline engine: every system computes on all cores.

    Nothing else runs then. As a server each system keeps its own default, which leaves a core to
    the HTTP process (``torch_native``: torch's default, all cores).

    Args:
        system: the system.

    Returns:
        ``environment_of`` with the number of threads.
    """
    cores = sorted(os.sched_getaffinity(0))
    threads = {"OMP_NUM_THREADS": str(len(cores))}
    if system.name == VLLM:
        threads["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    return environment_of(system) | threads


def _sglang_arguments(system: System, model: Path, kvc_tokens: int) -> dict[str, Any]:
    return {
        "model_path": str(model),
        "device": "cpu",
        "dtype": DTYPE,
        "max_total_tokens": kvc_tokens,
        "page_size": 1,
        "sleep_on_idle": True,
        "random_seed": 1,
        "log_level": "warning",
        **dict(system.arguments),
    }


def _vllm_arguments(system: System, model: Path, kvc_tokens: int) -> dict[str, Any]:
    own = dict(system.arguments)
    block_tokens = own.setdefault("block_size", VLLM_BLOCK_TOKENS)
    return {
        "model": str(model),
        "dtype": DTYPE,
        "max_model_len": MAX_REQUEST_TOKENS,
        "num_gpu_blocks_override": kvc_tokens // block_tokens + 1,  # no request gets the first one
        "seed": 1,
        **own,
    }


def offline_job(system: System, model: Path, kvc_tokens: int) -> dict[str, Any]:
    """What ``worker`` needs to start an offline engine.

    Args:
        system: the system.
        model: the model's folder.
        kvc_tokens: size of the KV cache.

    Returns:
        The job, still without prompts.
    """
    if system.name == VLLM:
        engine = {
            **_vllm_arguments(system, model, kvc_tokens),
            "max_num_seqs": MAX_RUNNING_REQUESTS,
            "disable_log_stats": True,
        }
    else:
        engine = {
            **_sglang_arguments(system, model, kvc_tokens),
            "max_running_requests": MAX_RUNNING_REQUESTS,
        }
    return {"system": system.name, "engine": engine}


def server_command(system: System, model: Path, kvc_tokens: int, port: int) -> list[str]:
    """The command that serves a model.

    Args:
        system: the system.
        model: the model's folder.
        kvc_tokens: size of the KV cache.
        port: on 127.0.0.1.

    Returns:
        Program and arguments.
    """
    module = {
        ECONOSERVE: "econoserve.launch_server",
        VLLM: "vllm.entrypoints.openai.api_server",
    }.get(system.name, "sglang.launch_server")
    arguments = (
        _vllm_arguments(system, model, kvc_tokens)
        if system.name == VLLM
        else _sglang_arguments(system, model, kvc_tokens)
    )
    command = [system.python, "-m", module, "--host", "127.0.0.1", "--port", str(port)]
    for name, value in arguments.items():
        command.append(f"--{name.replace('_', '-')}")
        if value is not True:
            command.append(str(value))
    return command
