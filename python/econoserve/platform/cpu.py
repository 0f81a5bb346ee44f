"""The CPU platform: what SGLang's released wheel needs to know to serve without a GPU.

Upstream's own CPU engine imports ``sgl_kernel``, which needs libcuda or an AMX build; an
out-of-tree platform takes the paths that are written in plain torch instead.
"""

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


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

    def get_default_attention_backend(self) -> str:
        """The attention backend used unless ``--attention-backend`` is given.

        Returns:
            ``"torch_native"``: scaled dot product attention, one request at a time.
        """
        return "torch_native"
