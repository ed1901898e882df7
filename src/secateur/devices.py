"""Hardware that a run could have: by the makers' data sheets, or this machine, measured. Serves `secateur estimate`."""

import time
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F

from secateur.config import Config
from secateur.files import InputError
from secateur.hardware import free_memory
from secateur.load import Described, autocast, learning_dtype, pick_device
from secateur.vocabulary import ROWS_AT_ONCE


@dataclass(frozen=True)
class Hardware:
    """A device that learns."""

    name: str
    memory: float
    """Bytes."""
    rate: float
    """FLOPs a second of products in the run's dtype."""
    bandwidth: float
    """Bytes a second from its memory."""
    kind: str = "other"


SHEET: dict[str, tuple[float, float, float, float]] = {
    "A100-40GB": (40, 312, 19.5, 1555),
    "A100-80GB": (80, 312, 19.5, 2039),
    "H100": (80, 989, 67, 3350),
    "H200": (141, 989, 67, 4800),
    "B200": (180, 2250, 80, 8000),
    "L4": (24, 121, 30.3, 300),
    "L40S": (48, 362, 91.6, 864),
    "RTX-3090": (24, 71, 35.6, 936),
    "RTX-4090": (24, 165, 82.6, 1008),
    "MI300X": (192, 1307, 163, 5300),
}
"""Name → GB, TFLOP/s of dense products in bfloat16 and in float32, GB/s, by the makers' data sheets."""


def hardware_of(name: str, config: Config, described: Described) -> tuple[Hardware, torch.dtype]:
    """The hardware of a name, or `present`, and the dtype of its products for these settings."""
    known = {key.casefold(): key for key in SHEET}
    if name == "present":
        return _present(config, described)
    if name.casefold() not in known:
        raise InputError(f"--hardware {name} is not known; there are present, {', '.join(SHEET)}")
    name = known[name.casefold()]
    gigabytes, low, full, bandwidth = SHEET[name]
    products = torch.float32 if config.precision == "float32" else torch.bfloat16
    if config.precision == "float32" and config.dtype != "float32":
        products = learning_dtype(described, torch.device("meta"), config.dtype)
    rate = full if products == torch.float32 else low
    return Hardware(name, gigabytes * 1e9, rate * 1e12, bandwidth * 1e9), products


def _present(config: Config, described: Described) -> tuple[Hardware, torch.dtype]:
    device = pick_device(config.device)
    dtype = learning_dtype(described, device, config.dtype)
    context = autocast(device, config.precision)
    products = torch.bfloat16 if context._enabled else dtype
    kind, name = ("cpu", f"this CPU ({torch.get_num_threads()} threads)") if device.type == "cpu" else ("other", "this")
    memory = float(free_memory())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, float(torch.cuda.mem_get_info(device)[0])
    with context:
        rate = _rate(described, device, dtype, products, config.batch_size * config.seq_len)
    return Hardware(name, memory, rate, _bandwidth(device), kind), products


def _rate(
    described: Described, device: torch.device, dtype: torch.dtype, products: torch.dtype, rows: int,
    seconds: float = 1.0,
) -> float:  # fmt: skip
    """FLOPs a second of the model's own linear maps, those of a layer and the head, as each is used."""
    description = described.description
    shapes: dict[tuple[int, ...], int] = {}
    for name in description.matmuls:
        shape = description.shapes[name][-2:]
        shapes[shape] = shapes.get(shape, 0) + 1
    head = description.shapes[list(description.matmuls)[-1]][-2:]
    flops = taken = 0.0
    most = ROWS_AT_ONCE["cpu" if device.type == "cpu" else "other"]
    for shape, count in shapes.items():
        used = min(rows, most if shape == head else 4096)
        x = torch.randn((used, shape[1]), device=device).to(dtype)
        weight = torch.randn(shape, device=device).to(products)
        F.linear(x, weight)
        start, times = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / len(shapes):
            F.linear(x, weight)
            times += 1
            if device.type != "cpu":
                torch.accelerator.synchronize()
        each = (time.perf_counter() - start) / times
        flops += count * 2.0 * rows * prod(shape)
        taken += count * each * rows / used
    return flops / taken


def _bandwidth(device: torch.device, count: int = 2**27) -> float:
    """Bytes a second that a sum reads."""
    values = torch.ones(count // 4, device=device)
    values.sum().item()
    start = time.perf_counter()
    values.sum().item()
    return count / (time.perf_counter() - start)
