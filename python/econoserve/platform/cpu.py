"""The CPU platform: what SGLang's released wheel needs to know to serve without a GPU.

Upstream's own CPU engine imports ``sgl_kernel``, which needs libcuda or an AMX build; an
out-of-tree platform takes the paths that are written in plain torch instead.
"""

from typing import TYPE_CHECKING

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

if TYPE_CHECKING:
    import torch
    from sglang.srt.server_args import ServerArgs

ATTENTION_BACKEND = "econoserve_cpu"
"""Name of our attention backend, and of our platform among SGLang's operators."""


class EconoCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang's CPU device operations, declared out-of-tree, with no Triton and no graphs."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities(supports_triton=False, graph_capture=False)

    def is_pin_memory_available(self, device: object = None) -> bool:
        """A CPU has no host memory to pin.

        Returns:
            Always ``False``.
        """
        return False

    def apply_server_args_defaults(self, server_args: "ServerArgs") -> None:
        """Choose our attention backend where the user chose none, and rest when idle.

        Args:
            server_args: SGLang's arguments; changed in place.
        """
        # Upstream fills in the AMX backend for --device cpu before it asks the platform.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = ATTENTION_BACKEND
        # Its default has kernels for GPUs only.
        if server_args.lora_backend == "csgmv":
            server_args.lora_backend = "torch_native"
        # An idle scheduler would otherwise ask for messages in a loop and keep a core busy.
        server_args.sleep_on_idle = True

    def get_default_attention_backend(self) -> str:
        """The attention backend used unless ``--attention-backend`` is given.

        Returns:
            The name of our backend, which batches all requests into one kernel call.
        """
        return ATTENTION_BACKEND

    def get_dispatch_key_name(self) -> str:
        """The key under which our operators are registered.

        Returns:
            ``"econoserve_cpu"``; operators without a version of ours run in plain torch.
        """
        return ATTENTION_BACKEND

    def init_backend(self) -> None:
        """Make the attention backend and the operators known, in each process that runs a model."""
        import econoserve.patches.unpinned_lora
        import econoserve.platform.attention
        import econoserve.platform.operators

        econoserve.platform.operators.install(ATTENTION_BACKEND)
        econoserve.patches.unpinned_lora.install()

    def post_load_model(self, model: "torch.nn.Module") -> None:
        """Give a loaded model our linear layers, and this process its number of threads.

        Args:
            model: the model; changed in place.
        """
        from sglang.srt.runtime_context import get_server_args

        import econoserve.platform.operators
        import econoserve.platform.threads

        if not econoserve.platform.operators.enabled():
            return
        server_args = get_server_args()
        replicas = 1 if server_args.enable_dp_attention else server_args.dp_size
        ranks = server_args.tp_size * server_args.pp_size * replicas // server_args.nnodes
        econoserve.platform.threads.apply(max(1, ranks))
        econoserve.platform.operators.install_in(model)
        econoserve.platform.operators.meet_row_counts(model)
