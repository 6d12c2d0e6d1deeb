"""What a device can do at most: dense floating-point operations a second, by name and precision.

From the vendors' data sheets, without sparsity; tensor cores for bf16 and fp16, TF32 not counted for fp32 (torch leaves
it off for matrix products). A CPU has no such figure: it is measured by a matrix product.
"""

import re
import time

import torch

from pretrain.engine.precision import DTYPES, Precision

TERA = 1e12
#: part of the device's name -> (half precision, fp32), TFLOP/s; the first that is found counts
KNOWN = {
    "H100 PCIE": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200": (989, 67),
    "GH200": (989, 67),
    "H800": (989, 67),
    "B200": (2250, 75),
    "A100": (312, 19.5),
    "A800": (312, 19.5),
    "A40": (150, 37.4),
    "A30": (165, 10.3),
    "A10": (125, 31.2),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}


def of_name(name: str, precision: Precision) -> float | None:
    """Return FLOP/s of the device whose name has a known one as words of its own (an RTX A4000 is no A40), or None."""
    found = next((rates for known, rates in KNOWN.items() if re.search(rf"\b{known}\b", name.upper())), None)
    return found and TERA * found[0 if precision in DTYPES else 1]


def measured(precision: Precision, *, size: int = 768, seconds: float = 0.15) -> float:
    """Return FLOP/s of the fastest of some products of two square matrices on this CPU, with this process's threads."""
    dtype = DTYPES.get(precision, torch.float32)
    left, right = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def of(device: torch.device, precision: Precision) -> float | None:
    """Return FLOP/s of a device: from the table on a GPU (None if it is not there), measured on a CPU."""
    if device.type == "cuda":
        return of_name(torch.cuda.get_device_name(device), precision)
    return measured(precision)
