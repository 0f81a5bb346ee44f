"""Packed weights multiply as plain ones do, and follow every change of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attention_batches import assert_close
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from econoserve.platform import operators, packing
from econoserve.platform.kernels.linear import MOST_ROWS
from econoserve.platform.recording import Recording

pytestmark = pytest.mark.skipif(
    not packing.supported(), reason="oneDNN has no packed bfloat16 weights on this machine"
)
WORKER = Path(__file__).with_name("packing_worker.py")
ROWS = pytest.mark.parametrize("rows", (5, 7, 16, 100))
BFLOAT = torch.bfloat16


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(5)
    with torch.no_grad():
        yield


def weight_of(outputs, inputs, dtype=BFLOAT):
    return (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype)


class Layer(torch.nn.Module):
    """A layer with SGLang's linear method."""

    def __init__(self, outputs=512, inputs=512, dtype=BFLOAT, method=UnquantizedLinearMethod):
        super().__init__()
        self.quant_method = method()
        self.weight = torch.nn.Parameter(weight_of(outputs, inputs, dtype), requires_grad=False)

    def forward(self, x, bias=None):
        return self.quant_method.apply(self, x, bias)


class OfClass:
    """Makes a module an instance of SGLang's layers without their parallel groups."""

    def __init__(self, layer_class):
        self.layer_class = layer_class

    def __call__(self):
        layer = self.layer_class.__new__(self.layer_class)
        torch.nn.Module.__init__(layer)
        layer.quant_method = UnquantizedEmbeddingMethod()
        layer.weight = torch.nn.Parameter(weight_of(64, 32), requires_grad=False)
        return layer


def installed_in(layer):
    operators.install_in(layer)
    return layer


def is_packed(layer):
    return layer.quant_method.packed is not None


@given(
    outputs=st.integers(1, 300),
    inputs=st.integers(1, 300),
    rows=st.integers(1, 70),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_multiplications_are_torchs(outputs, inputs, rows, with_bias, seed):
    torch.manual_seed(seed)
    weight = weight_of(outputs, inputs)
    x = torch.randn(rows, inputs).to(BFLOAT)
    bias = torch.randn(outputs).to(BFLOAT) if with_bias else None
    wide = F.linear(x.float(), weight.float(), bias.float() if with_bias else None)
    assert_close(packing.PackedWeight(weight).linear(x, bias), wide)


@ROWS
@pytest.mark.parametrize("with_bias", (False, True))
def test_layers_use_the_copy(rows, with_bias):
    layer = installed_in(Layer())
    x = torch.randn(rows, 512).to(BFLOAT)
    bias = torch.randn(512).to(BFLOAT) if with_bias else None
    before = layer(x, bias)
    wide = F.linear(x.float(), layer.weight.float(), bias.float() if with_bias else None)
    assert_close(before, wide)
    layer.weight.data.mul_(2)  # nobody is told
    assert torch.equal(layer(x, bias), before)


def test_one_row_of_a_large_weight_uses_the_copy():
    layer = installed_in(Layer(4096))
    x = torch.randn(1, 512).to(BFLOAT)
    before = layer(x)
    layer.weight.data.mul_(2)
    assert torch.equal(layer(x), before)


def test_our_kernel_keeps_the_smallest_multiplications():
    layer = installed_in(Layer(64, 64))
    x = torch.randn(MOST_ROWS + 1, 64).to(BFLOAT)
    few, many = layer(x[:MOST_ROWS]), layer(x)
    layer.weight.data.mul_(2)
    assert torch.equal(layer(x[:MOST_ROWS]), 2 * few)
    assert torch.equal(layer(x), many)


@ROWS
def test_an_update_reaches_copy_and_recording(rows):
    layer = installed_in(Layer())
    x = torch.randn(rows, 512).to(BFLOAT)
    recording = Recording()
    with recording.record():
        recorded = layer(x)
    new = weight_of(512, 512)
    layer.weight.data.copy_(new)
    layer.quant_method.process_weights_after_loading(layer)
    expected = F.linear(x.float(), new.float())
    assert_close(layer(x), expected)
    recording.spoil()
    recording.replay()
    assert_close(recorded, expected)


def test_an_update_may_come_in_inference_mode():
    layer = installed_in(Layer())
    x = torch.randn(8, 512).to(BFLOAT)
    before = layer(x)
    with torch.inference_mode():
        layer.weight.data.mul_(2)
        layer.quant_method.process_weights_after_loading(layer)
    layer.weight.data.mul_(2)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer(x), 4 * before)


@pytest.mark.parametrize("how", ("parameter", "data"))
def test_another_tensor_in_the_weights_place_is_used_plain(how):
    layer = installed_in(Layer())
    x = torch.randn(8, 512).to(BFLOAT)
    layer(x)
    new = weight_of(512, 512)
    if how == "parameter":
        layer.weight = torch.nn.Parameter(new, requires_grad=False)
    else:
        layer.weight.data = new
    assert torch.equal(layer(x), F.linear(x, new))
    layer.quant_method.process_weights_after_loading(layer)
    new.mul_(2)
    assert torch.equal(layer(x), F.linear(x, new))


UNUSUAL = {
    "not contiguous": lambda: torch.randn(8, 1024).to(BFLOAT)[:, ::2],
    "three dimensions": lambda: torch.randn(2, 4, 512).to(BFLOAT),
    "no rows": lambda: torch.randn(0, 512).to(BFLOAT),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_inputs_are_torchs(case):
    x = UNUSUAL[case]()
    layer = installed_in(Layer())
    assert torch.equal(layer(x), F.linear(x, layer.weight))


def test_what_is_not_packed(monkeypatch):
    assert is_packed(installed_in(Layer()))
    assert not is_packed(installed_in(Layer(dtype=torch.float32)))
    assert not is_packed(installed_in(Layer(dtype=torch.float16)))
    transposed = Layer()
    transposed.weight = torch.nn.Parameter(weight_of(64, 32).t(), requires_grad=False)
    assert not is_packed(installed_in(transposed))
    monkeypatch.setattr(packing, "MOST_BYTES", 512 * 512 * 2)
    assert is_packed(installed_in(Layer()))
    assert not any(map(is_packed, installed_in(torch.nn.Sequential(Layer(), Layer()))))
    monkeypatch.setattr(packing, "supported", lambda: False)
    assert not is_packed(installed_in(Layer()))


def test_an_embedding_is_packed_only_if_it_yields_the_logits():
    embedding, output = OfClass(VocabParallelEmbedding), OfClass(ParallelLMHead)
    untied = installed_in(torch.nn.Sequential(embedding(), output()))
    assert list(map(is_packed, untied)) == [False, True]
    assert is_packed(installed_in(torch.nn.Sequential(embedding()))[0])


def test_an_update_of_a_serving_engine_reaches_its_copies_and_recordings(tmp_path):
    output = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(WORKER), str(output), str(tmp_path / "changed")],
        env={**os.environ, "ECONOSERVE_CPU_OPS": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "not recorded" not in done.stdout
    assert re.search(r"Decode batch, #running-req: 8.*cpu graph: True", done.stdout)
    result = json.loads(output.read_text())
    assert result["original"] != result["changed"]
    assert result["updated from tensors"] == result["changed"]
    assert result["updated from disk"] == result["original"]
