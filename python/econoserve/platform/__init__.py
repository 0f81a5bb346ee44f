"""SGLang on any CPU: the out-of-tree platform plug-in, found by ``sglang.srt.platforms``.

Owns the decision whether this machine is served by the CPU platform. It must never take over a
machine that has a GPU, and must import neither torch nor SGLang before SGLang asks.
"""

import os

PLATFORM_CLASS = "econoserve.platform.cpu.EconoCpuPlatform"


def activate() -> str | None:
    """Name the platform class for SGLang, or step aside.

    Returns:
        The class's dotted name where no accelerator that SGLang supports is present and the user
        did not ask for SGLang's own CPU engine (``SGLANG_USE_CPU_ENGINE=1``); else ``None``, so
        that SGLang picks its in-tree platform.
    """
    import torch

    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        return None
    for accelerator in ("npu", "musa"):
        module = getattr(torch, accelerator, None)
        if module is not None and module.is_available():
            return None
    return PLATFORM_CLASS
