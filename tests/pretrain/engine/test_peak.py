"""What devices can do at most, by name."""

import torch

from pretrain.engine import peak


def test_names_as_torch_gives_them():
    tera = 1e12
    assert peak.of_name("NVIDIA H100 80GB HBM3", "bf16") == 989 * tera
    assert peak.of_name("NVIDIA H100 PCIe", "bf16") == 756 * tera
    assert peak.of_name("NVIDIA A100-SXM4-80GB", "fp32") == 19.5 * tera
    assert peak.of_name("NVIDIA L40S", "fp16") == 362 * tera
    assert peak.of_name("NVIDIA L4", "fp16") == 121 * tera
    assert peak.of_name("NVIDIA GeForce RTX 4090", "bf16") == 165 * tera
    assert peak.of_name("abacus", "bf16") is None
    for other in ("NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA T400 4GB", "NVIDIA A10G"):
        assert peak.of_name(other, "bf16") is None, "no A40, A100, T4, A10"


def test_a_cpu_is_measured():
    assert peak.of(torch.device("cpu"), "fp32") > 1e8
