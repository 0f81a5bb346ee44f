"""That ``SGLANG_FORCE_FUSED_OP_BACKEND=torch`` does what the check relies on in float32.

In a process of its own: SGLang reads the variable once.
"""

import os
import subprocess
import sys

from benchmark.gpu.sizes import CUDA_ENGINE, CUDA_FLOAT32, FLOAT32_ENVIRONMENT

SCRIPT = """
import torch
from sglang.kernels.fused_op import set_fused_op_backend
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.models import llama

def kernel(*args, **kwargs):
    raise RuntimeError("a kernel")

x = torch.ones(2, 128)
positions = torch.arange(2)
cases = [
    (RMSNorm(128), (x,)),
    (RMSNorm(128), (x, x.clone())),
    (SiluAndMul(), (x,)),
    (RotaryEmbedding(128, 128, 16, 10000, True, torch.float32), (positions, x, x.clone())),
]
assert llama.RMSNorm is RMSNorm and llama.SiluAndMul is SiluAndMul
for operator, arguments in cases:
    # Where a GPU has a kernel.
    operator._forward_method = kernel
    found = operator(*arguments)
    first = found if torch.is_tensor(found) else found[0]
    assert first.dtype == torch.float32
set_fused_op_backend(None)
for operator, arguments in cases:
    try:
        operator(*arguments)
    except RuntimeError as error:
        assert str(error) == "a kernel"
    else:
        raise AssertionError(operator)
print("done")
"""


def test_operators_of_a_llama_run_in_torch():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **FLOAT32_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "done"


def test_sglang_knows_the_arguments_for_a_gpu():
    from sglang.srt.server_args import ServerArgs

    known = set(ServerArgs.__struct_fields__)
    assert {*CUDA_ENGINE, *CUDA_FLOAT32} <= known
