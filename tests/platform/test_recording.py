"""What was recorded is done again, on the new contents of the same memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from econoserve.platform.kernels import elementwise, linear
from econoserve.platform.recording import NotRecordable, Recording

ROWS, WIDTH = 3, 16


class Model:
    """A computation with everything that a decode iteration has."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(50, WIDTH, generator=generator)
        self.weight = torch.randn(WIDTH, WIDTH, generator=generator)
        self.bias = torch.randn(WIDTH, generator=generator)
        self.pool = torch.zeros(40, 2, WIDTH // 2)

    def __call__(self, ids, slots):
        x = F.embedding(ids, self.table)
        x.add_(1.5)
        halves = torch.mm(x, self.weight).view(ROWS, 2, WIDTH // 2)
        self.pool.index_put_((slots,), halves)
        x = halves.transpose(0, 1).contiguous().transpose(0, 1).reshape(ROWS, WIDTH)
        first, second = torch.addmm(self.bias, x, self.weight).split(WIDTH // 2, dim=1)
        x = torch.cat((first * 2, second.float()), dim=1)
        normed = torch.empty_like(x)
        elementwise.rms_norm(
            "float32",
            *(ROWS, WIDTH, x.data_ptr(), 0, self.bias.data_ptr(), normed.data_ptr(), 1e-6),
        )
        out = torch.empty(ROWS, WIDTH)
        linear.linear(
            "float32",
            *(ROWS, WIDTH, WIDTH, normed.data_ptr(), self.weight.data_ptr(), out.data_ptr()),
        )
        return out + self.pool[slots].flatten(1)


def inputs(seed):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 50, ROWS)), torch.from_numpy(rng.permutation(40)[:ROWS])


@pytest.mark.parametrize("threads", (1, 2))
def test_a_repetition_computes_on_new_inputs(threads):
    torch.set_num_threads(threads)
    model, eager = Model(), Model()
    ids, slots = inputs(0)
    recording = Recording()
    with recording.record():
        out = model(ids, slots)
    assert torch.equal(out, eager(ids, slots))
    place = out.data_ptr()
    for seed in range(1, 20):
        more_ids, more_slots = inputs(seed)
        ids.copy_(more_ids)
        slots.copy_(more_slots)
        # Memory that the recording had let go of would be handed out here, and written to.
        scratch = [torch.full((ROWS, WIDTH), 1e9) for _ in range(20)]
        recording.replay()
        assert torch.equal(out, eager(more_ids, more_slots))
        assert torch.equal(model.pool, eager.pool)
        assert out.data_ptr() == place
        assert all((one == 1e9).all() for one in scratch)


def test_a_repetition_sees_new_weights():
    model, eager = Model(), Model()
    ids, slots = inputs(0)
    recording = Recording()
    with recording.record():
        out = model(ids, slots)
    model.weight.mul_(0.5)
    eager.weight.mul_(0.5)
    recording.replay()
    assert torch.equal(out, eager(ids, slots))


def test_a_repetition_writes_all_memory_that_it_reads():
    model = Model()
    recording = Recording()
    with recording.record():
        out = model(*inputs(0))
    first = out.clone()
    recording.spoil()
    assert out.isnan().all()
    assert model.weight.isfinite().all() and model.pool.isfinite().all()
    recording.replay()
    assert torch.equal(out, first)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(NotRecordable), Recording().record():
        torch.ones(3).add(1)


def test_memory_is_counted():
    recording = Recording()
    with recording.record():
        torch.ones(1000).add(1)
    assert recording.memory_bytes >= 8000


READS = {
    "item": lambda x: x.sum().item(),
    "a branch": lambda x: 1 if x.sum() > 0 else 2,
    "a comparison": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "a mask": lambda x: x[x > 0],
    "several results": lambda x: x.sort(),
}


@pytest.mark.parametrize("read", READS)
def test_a_computation_that_depends_on_contents_is_refused(read):
    x = torch.randn(4)
    recording = Recording()
    with pytest.raises(NotRecordable, match="aten"), recording.record():
        READS[read](x)


def test_errors_of_the_computation_are_its_own():
    with pytest.raises(ZeroDivisionError), Recording().record():
        raise ZeroDivisionError
    # And nothing is recorded afterwards.
    recording = Recording()
    with recording.record():
        pass
    torch.ones(3).add_(1)
    assert recording.memory_bytes == 0
