"""A part is a safetensors file with the sum that is told, copied before the tensors change, and errors come back."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from pretrain.engine.writer import CHUNK, Block, Task


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(5, generator=draw).bfloat16(),
        "large": torch.randn(CHUNK // 4 + 3, generator=draw),
        "count": torch.tensor([7]),
        "yes": torch.tensor([True, False, True]),
        "none": torch.empty(0),
    }


def test_the_library_reads_what_is_written(tmp_path):
    block, made = Block(), tensors()
    block.fill(made)
    copies = {name: t.clone() for name, t in made.items()}
    made["large"].zero_()  # training goes on
    path = tmp_path / "folder" / "part.safetensors"
    checks: list[int] = []
    facts = block.write(path, check=lambda: checks.append(1))
    found = load_file(path)
    assert found.keys() == copies.keys() and all(torch.equal(found[name], copies[name]) for name in copies)
    assert facts == {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert len(checks) == 4  # before the first byte, the header, two chunks


def test_the_memory_is_used_again(tmp_path):
    block = Block()
    block.fill(tensors())
    before = block._memory.data_ptr()
    block.fill({"small": torch.ones(3)})
    assert block._memory.data_ptr() == before
    block.write(tmp_path / "part", check=lambda: None)
    assert load_file(tmp_path / "part")["small"].tolist() == [1, 1, 1]


def test_a_task_gives_its_value_or_its_error():
    assert Task(lambda: 3).result() == 3

    def full() -> None:
        raise OSError("No space left")

    failed = Task(full)
    with pytest.raises(OSError, match="No space"):
        failed.result()
    assert failed.done
