"""SGLang's general plug-in: puts our scheduler into SGLang's processes when asked to.

Owns the decision whether this process is ours: only under our entry points or ``ECONOSERVE=1``.
"""

from econoserve.config import is_armed


def register() -> None:
    """Register the hooks that replace SGLang's scheduler and tokenizer manager, if armed."""
    if not is_armed():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from econoserve.patches.request_intake import EconoTokenizerManager
    from econoserve.runtime.scheduler import EconoScheduler

    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler", EconoScheduler, HookType.REPLACE
    )
    HookRegistry.register(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager",
        EconoTokenizerManager,
        HookType.REPLACE,
    )
