"""The machine that the check runs on: its name, its memory, how fast that is reached from the host.

Owns what is asked of the device outside of engines.
"""

import os
import statistics
import time

from benchmark.gpu.sizes import Device

COPY_BYTES = 256 << 20
COPIES = 5


def device_name(device: Device) -> str:
    """What to call the machine.

    Args:
        device: where engines run.

    Returns:
        Its name.
    """
    import torch

    if device is Device.CPU:
        return f"CPU, {len(os.sched_getaffinity(0))} cores"
    return f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"


def memory_bytes(device: Device) -> int:
    """The memory that engines may use.

    Args:
        device: where engines run.

    Returns:
        That of the GPU, or of the machine.
    """
    import torch

    if device is Device.CPU:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.cuda.get_device_properties(0).total_memory


def host_bytes_per_s(device: Device) -> float:
    """Bandwidth from the device to the host's memory, by one large copy; KVC moves in smaller ones.

    Args:
        device: where engines run.

    Returns:
        Bytes per second; the median of some copies.
    """
    import torch

    on_gpu = device is Device.CUDA
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device.value)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
    times_s = []
    for _ in range(COPIES):
        began_s = time.perf_counter()
        target.copy_(source)
        times_s.append(time.perf_counter() - began_s)
    return COPY_BYTES / statistics.median(times_s)
