"""The small operators and the linear layers compute what SGLang's own plain torch computes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from attention_batches import assert_close
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.rotary_embedding.rope_variant import DeepseekScalingRotaryEmbedding

from econoserve.platform import operators, packing
from econoserve.platform.cpu import ATTENTION_BACKEND
from econoserve.platform.kernels.launch import observed
from econoserve.platform.kernels.linear import MOST_ROWS

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", (FLOAT, BFLOAT), ids=str)
THREADS = pytest.mark.parametrize("threads", (1, 2))
POSITIONS = 128


@pytest.fixture(autouse=True)
def installed():
    operators.install(ATTENTION_BACKEND)
    torch.manual_seed(3)
    with torch.no_grad():
        yield


def kernels_in(call):
    """What the call returns, and how many of our kernels ran for it."""
    ran = []
    with observed(lambda *arguments: ran.append(arguments)):
        result = call()
    return result, len(ran)


def in_float32(module):
    """The module with the same weights, widened."""
    wide = copy.deepcopy(module).float()
    wide._forward_method = None
    return wide


def norm_of(width, dtype, **keywords):
    norm = RMSNorm(width, weight_dtype=dtype, **keywords)
    norm.weight.copy_(1 + torch.randn(width) / 4)
    return norm


# -- RMS norm


@DTYPES
@THREADS
@pytest.mark.parametrize("shape", ((1, 64), (2, 100), (3, 7), (5, 256), (200, 1024), (2, 3, 64)))
def test_rms_norm(dtype, threads, shape):
    torch.set_num_threads(threads)
    norm = norm_of(shape[-1], dtype, eps=1e-5)
    x = (3 * torch.randn(shape)).to(dtype)
    before = x.clone()
    out, kernels = kernels_in(lambda: norm(x))
    assert kernels == 1
    assert out.dtype == dtype and out.shape == x.shape
    assert_close(out, in_float32(norm).forward_native(x.float()))
    assert torch.equal(x, before)


@DTYPES
@THREADS
@pytest.mark.parametrize("shape", ((1, 64), (3, 7), (5, 256), (200, 1024)))
def test_rms_norm_of_a_sum_overwrites_both(dtype, threads, shape):
    torch.set_num_threads(threads)
    norm = norm_of(shape[-1], dtype)
    x, residual = torch.randn(2, *shape).to(dtype)
    expected, _ = in_float32(norm).forward_native(x.float(), residual.float())
    _, expected_sum = norm.forward_native(x, residual)
    (out, total), kernels = kernels_in(lambda: norm(x, residual))
    assert kernels == 1
    assert_close(out, expected)
    assert torch.equal(total, expected_sum)
    assert out.data_ptr() == x.data_ptr() and total.data_ptr() == residual.data_ptr()


def test_rms_norm_of_small_numbers_is_held_up_by_epsilon():
    norm = norm_of(64, FLOAT, eps=1e-3)
    x = torch.randn(3, 64) / 100
    assert_close(norm(x), norm.forward_native(x))


def test_rms_norm_keeps_a_nan_in_its_row():
    x = torch.randn(4, 64)
    x[2, 5] = torch.nan
    out = norm_of(64, FLOAT)(x)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


UNCOVERED_NORMS = {
    "float16": ({}, HALF, False),
    "not contiguous": ({}, FLOAT, False),
    "weights of another type": ({}, BFLOAT, False),
    "cast before the weights": ({"cast_x_before_out_mul": True}, BFLOAT, True),
    "float32 sum": ({"fp32_residual": True}, BFLOAT, True),
    "variance of a part": ({"var_hidden_size": 32}, FLOAT, True),
    "another result type": ({"override_orig_dtype": BFLOAT}, FLOAT, False),
    "three terms": ({}, FLOAT, True),
}


@pytest.mark.parametrize("case", UNCOVERED_NORMS)
def test_other_rms_norms_are_sglangs(case):
    keywords, dtype, with_residual = UNCOVERED_NORMS[case]
    norm = norm_of(64, FLOAT if case == "weights of another type" else dtype, **keywords)
    x, residual = torch.randn(2, 3, 64).to(dtype)
    if case == "not contiguous":
        x = torch.randn(64, 3).t()
    arguments = [x] + [residual] * with_residual + [torch.randn(3, 64)] * (case == "three terms")
    expected = norm.forward_native(*arguments)
    out, kernels = kernels_in(lambda: norm(*arguments))
    assert kernels == 0
    assert_same(out, expected)


def assert_same(out, expected):
    out, expected = ((one,) if torch.is_tensor(one) else one for one in (out, expected))
    for left, right in zip(out, expected, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


# -- SiLU and product


@DTYPES
@THREADS
@pytest.mark.parametrize("shape", ((1, 2), (2, 14), (5, 200), (130, 2048), (2, 3, 64)))
def test_silu_and_mul(dtype, threads, shape):
    torch.set_num_threads(threads)
    x = (6 * torch.randn(shape)).to(dtype)
    x[..., 0] = -200.0  # far beyond the range of exp
    out, kernels = kernels_in(lambda: SiluAndMul()(x))
    assert kernels == 1
    assert out.dtype == dtype and out.shape == (*shape[:-1], shape[-1] // 2)
    assert_close(out, SiluAndMul().forward_native(x.float()))


@pytest.mark.parametrize("x", (torch.randn(3, 64).half(), torch.randn(64, 3).t()), ids=("f16", "t"))
def test_other_silus_are_sglangs(x):
    out, kernels = kernels_in(lambda: SiluAndMul()(x))
    assert kernels == 0
    assert_same(out, SiluAndMul().forward_native(x))


# -- rotary embedding


def rope_of(head, rotary, neox, dtype, **keywords):
    return get_rope(head, rotary, POSITIONS, 10_000, neox, dtype=dtype, **keywords)


def tokens(count, head, dtype, heads=(4, 2)):
    """Positions, and queries, keys and values as columns of one matrix."""
    qkv = torch.randn(count, (sum(heads) + heads[1]) * head).to(dtype)
    q, k, v = qkv.split([heads[0] * head, heads[1] * head, heads[1] * head], dim=1)
    return torch.randint(0, POSITIONS, (count,)), q, k, v


def rotated_natively(rope, positions, q, k):
    return in_float32(rope).forward_native(positions, q.float(), k.float())


@DTYPES
@THREADS
@pytest.mark.parametrize("count", (1, 3, 5, 300))
@pytest.mark.parametrize(("head", "rotary"), ((64, 64), (64, 16), (80, 32)))
@pytest.mark.parametrize("neox", (True, False), ids=("neox", "interleaved"))
def test_rotary_embedding_in_place(dtype, threads, count, head, rotary, neox):
    torch.set_num_threads(threads)
    rope = rope_of(head, rotary, neox, dtype)
    positions, q, k, v = tokens(count, head, dtype)
    expected = rotated_natively(rope, positions, q, k)
    values = v.clone()
    out, kernels = kernels_in(lambda: rope(positions, q, k))
    assert kernels == 2
    for rotated, wanted, given_ in zip(out, expected, (q, k), strict=True):
        assert rotated.data_ptr() == given_.data_ptr()
        assert_close(rotated, wanted)
    assert torch.equal(v, values)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize("scaling", (LLAMA3, YARN, LINEAR, DYNAMIC), ids=lambda s: s["rope_type"])
def test_scaled_rotary_embeddings(scaling):
    rope = rope_of(64, 64, True, FLOAT, rope_scaling=scaling)
    positions, q, k, _ = tokens(5, 64, FLOAT)
    expected = rotated_natively(rope, positions, q, k)
    out, kernels = kernels_in(lambda: rope(positions, q, k))
    assert kernels == 2
    for rotated, wanted in zip(out, expected, strict=True):
        assert_close(rotated, wanted)


UNCOVERED_ROTATIONS = ("float16", "another table type", "offsets", "three dimensions", "int32")


@pytest.mark.parametrize("case", UNCOVERED_ROTATIONS)
def test_other_rotary_embeddings_are_sglangs(case):
    dtype = {"float16": HALF, "another table type": BFLOAT}.get(case, FLOAT)
    rope = rope_of(64, 64, True, HALF if case == "float16" else FLOAT)
    positions, q, k, _ = tokens(5, 64, dtype)
    keywords = {}
    if case == "offsets":
        positions //= 2
        keywords["offsets"] = torch.arange(5)
    if case == "three dimensions":
        q, k = q.unflatten(1, (-1, 64)), k.unflatten(1, (-1, 64))
    if case == "int32":
        positions = positions.int()
    expected = rope.forward_native(positions, q, k, **keywords)
    out, kernels = kernels_in(lambda: rope(positions, q, k, **keywords))
    assert kernels == 0
    assert_same(out, expected)


def test_a_rotary_embedding_with_its_own_forward_keeps_it():
    registered = operators.BaseFusedOp._oot_forward_registry[ATTENTION_BACKEND]
    assert DeepseekScalingRotaryEmbedding not in registered


# -- linear layers


class Layer(torch.nn.Module):
    """A layer with SGLang's linear method."""

    def __init__(self, outputs, inputs, dtype, method=UnquantizedLinearMethod):
        super().__init__()
        self.quant_method = method()
        weight = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


def installed_in(layer):
    operators.install_in(layer)
    return layer


@DTYPES
@THREADS
@pytest.mark.parametrize("rows", (1, 2, 3, 4, 5, 33))
@pytest.mark.parametrize(("outputs", "inputs"), ((1, 64), (3, 1), (7, 100), (130, 96), (1023, 512)))
def test_linear(dtype, threads, rows, outputs, inputs):
    torch.set_num_threads(threads)
    layer = installed_in(Layer(outputs, inputs, dtype))
    x = torch.randn(rows, inputs).to(dtype)
    out, kernels = kernels_in(lambda: layer.quant_method.apply(layer, x))
    small = layer.quant_method.packed is None or rows * outputs * inputs <= 1 << 20
    assert kernels == (rows <= MOST_ROWS and small)
    assert out.shape == (rows, outputs) and out.dtype == dtype
    assert_close(out, F.linear(x.float(), layer.weight.float()))


@DTYPES
def test_output_layer_shares_its_weight_with_the_embedding(dtype):
    layer = installed_in(Layer(1000, 64, dtype, UnquantizedEmbeddingMethod))
    x = torch.randn(2, 64).to(dtype)
    out, kernels = kernels_in(lambda: layer.quant_method.apply(layer, x))
    assert kernels == 1
    assert_close(out, F.linear(x.float(), layer.weight.float()))
    ids = torch.tensor([5, 0, 999])
    assert torch.equal(layer.quant_method.embedding(layer, ids), layer.weight[ids])


UNCOVERED_LINEARS = {
    "bias": lambda: (torch.randn(2, 64), FLOAT, torch.randn(10)),
    "float16": lambda: (torch.randn(2, 64).half(), HALF, None),
    "not contiguous": lambda: (torch.randn(2, 128)[:, ::2], FLOAT, None),
    "three dimensions": lambda: (torch.randn(2, 1, 64).bfloat16(), BFLOAT, None),
}


@pytest.mark.parametrize("case", UNCOVERED_LINEARS)
def test_other_linears_are_torchs(case):
    x, dtype, bias = UNCOVERED_LINEARS[case]()
    layer = installed_in(Layer(10, 64, dtype))
    out, kernels = kernels_in(lambda: layer.quant_method.apply(layer, x, bias))
    assert kernels == 0
    assert_same(out, F.linear(x, layer.weight, bias))


def test_bfloat16_rows_are_padded_to_sizes_met_before(monkeypatch):
    monkeypatch.setattr(packing, "supported", lambda: False)
    sizes = set()
    torchs = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: sizes.add(len(x)) or torchs(x, *rest))
    layer = installed_in(Layer(10, 64, BFLOAT))
    for rows in range(5, 129):
        layer.quant_method.apply(layer, torch.randn(rows, 64).bfloat16())
    assert len(sizes) <= 24


@pytest.mark.parametrize(("dtype", "sizes"), ((FLOAT, set()), (BFLOAT, {8, 32, 64, 512})), ids=str)
def test_bfloat16_sizes_are_met_before_the_first_request(dtype, sizes, monkeypatch):
    monkeypatch.setattr(packing, "supported", lambda: False)
    met = set()
    torchs = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: met.add(len(x)) or torchs(x, *rest))
    operators.meet_row_counts(installed_in(Layer(10, 64, dtype)))
    assert bool(met) == bool(sizes)
    assert sizes <= met == {operators.round_up(rows) for rows in met}


def test_the_environment_leaves_sglangs_operators_in_place(monkeypatch):
    monkeypatch.setenv(operators.ENVIRONMENT_VARIABLE, "0")
    layer = installed_in(Layer(10, 64, FLOAT))
    assert type(layer.quant_method) is UnquantizedLinearMethod
    monkeypatch.setattr(operators.BaseFusedOp, "_oot_forward_registry", {})
    operators.install(ATTENTION_BACKEND)
    assert operators.BaseFusedOp._oot_forward_registry == {}


@given(st.integers(0, 20_000))
def test_rounded_up_rows(rows):
    rounded = operators.round_up(rows)
    assert rows <= rounded <= operators.round_up(rows + 1)
    assert operators.round_up(rounded) == rounded
    if rows > 32:
        assert rounded - rows < rows / 4


def test_few_sizes_are_left():
    assert [operators.round_up(rows) for rows in range(1, 10)] == [1, 2, 3, 4, 8, 8, 8, 8, 12]
    assert len({operators.round_up(rows) for rows in range(1, 2049)}) <= 50
