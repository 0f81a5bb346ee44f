"""``from econoserve import Engine``: SGLang's offline engine with our scheduler.

Owns only how the engine is started; everything else is SGLang's.
"""

from dataclasses import fields
from typing import Any

from sglang.srt.entrypoints.engine import Engine as SglangEngine
from sglang.srt.plugins import load_plugins

from econoserve.config import RuntimeConfig, armed
from econoserve.launching import (
    default_arguments,
    ensure_supported,
    init_tokenizer_manager,
    model_path,
)


class Engine(SglangEngine):
    """SGLang's ``Engine``; the constructor takes its arguments and ours.

    Args:
        kwargs: SGLang's server arguments, ``server_args`` among them, and
            ``econoserve_<setting>`` for each setting of ``RuntimeConfig``.

    Raises:
        ValueError: a setting of ours is unknown or out of range.
        Unsupported: an option combination that EconoServe does not serve.
    """

    init_tokenizer_manager_func = staticmethod(init_tokenizer_manager)

    def __init__(self, **kwargs: Any) -> None:
        known = {f"econoserve_{field.name}" for field in fields(RuntimeConfig)}
        ours = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith("econoserve_")}
        if unknown := sorted(set(ours) - known):
            raise ValueError(f"{', '.join(unknown)}: unknown, known are {', '.join(sorted(known))}")
        config = RuntimeConfig(
            **{key.removeprefix("econoserve_"): value for key, value in ours.items()}
        )
        if "server_args" not in kwargs:
            if "model_path" in kwargs:
                kwargs["model_path"] = model_path(kwargs["model_path"])
            kwargs = {**default_arguments(kwargs.get("device")), "log_level": "error", **kwargs}
            kwargs = {"server_args": self.server_args_class(**kwargs)}
        self._start(config, kwargs["server_args"])

    def _start(self, config: RuntimeConfig, server_args: Any) -> None:
        # Before anything is armed: this process keeps SGLang's own classes.
        load_plugins()
        ensure_supported(server_args, config)
        with armed(config):
            super().__init__(server_args=server_args)

    @classmethod
    def with_config(cls, config: RuntimeConfig, server_args: Any) -> "Engine":
        """Start an engine from parsed command lines.

        Args:
            config: our settings.
            server_args: SGLang's.

        Returns:
            The running engine.

        Raises:
            Unsupported: an option combination that EconoServe does not serve.
        """
        engine = cls.__new__(cls)
        engine._start(config, server_args)
        return engine
