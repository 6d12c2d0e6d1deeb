"""A rank's part of a checkpoint on its way to disk: copied to host memory at once, written by a thread meanwhile.

The copy is one block of bytes in the order of the file (safetensors: a header, then the tensors end to end), so that
the thread only hashes and writes large chunks. Both leave Python's lock free, and training goes on. The block is kept
from save to save; on a GPU it is pinned and filled by a stream of its own.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK = 8 << 20  # bytes hashed and written at a time
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Task:
    """Work in a thread of its own, which starts at once; its result or error is asked for later."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="checkpoint")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        """Return whether the work has ended, well or not."""
        return not self._thread.is_alive()

    def result(self) -> Any:
        """Wait; return what the work returned or raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


class Block:
    """Host memory that holds a copy of tensors in the layout of a safetensors file."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._size = 0
        self._header = b""
        self._copied: Any = None  # CUDA event
        self._stream: Any = None

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors. Those on a GPU are still being copied at return: call `fence` before they are changed."""
        # the largest elements first, so that each tensor starts at a multiple of its element's size
        order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
        self._size = sum(t.nbytes for t in tensors.values())
        cuda = any(t.is_cuda for t in tensors.values())
        if self._memory.numel() < self._size:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._memory = torch.empty(self._size, dtype=torch.uint8, pin_memory=cuda)
        facts: dict[str, Any] = {}
        at = 0
        views = []
        for name, tensor in order:
            end = at + tensor.nbytes
            facts[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
            views.append((self._memory[at:end].view(tensor.dtype), tensor.detach().reshape(-1)))
            at = end
        header = json.dumps(facts, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header
        if cuda:
            self._copy_on_gpu(views)
        else:
            for to, tensor in views:
                to.copy_(tensor)

    def _copy_on_gpu(self, views: list[tuple[Tensor, Tensor]]) -> None:
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for to, tensor in views:
                to.copy_(tensor, non_blocking=True)
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)
            self._copied = self._stream.record_event()

    def fence(self) -> None:
        """Let what the GPU does from here on come after the copy. Costs the host nothing."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def write(self, path: Path, *, check: Callable[[], None]) -> dict[str, Any]:
        """Write the file and fsync it; return its size and SHA-256. `check` is called before each chunk.

        Raises:
            OSError: no space, or another trouble of the disk.
        """
        if self._copied is not None:
            self._copied.synchronize()
        body = memoryview(self._memory[: self._size].numpy())  # type: ignore[arg-type]
        chunks = [memoryview(self._header), *(body[at : at + CHUNK] for at in range(0, self._size, CHUNK))]
        digest = hashlib.sha256()
        check()
        path.parent.mkdir(parents=True, exist_ok=True)  # by every rank: a network disk may show it late
        with open(path, "wb", buffering=0) as file:
            for chunk in chunks:
                check()
                digest.update(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
            os.fsync(file.fileno())
        return {"bytes": len(self._header) + self._size, "sha256": digest.hexdigest()}

    def release(self) -> None:
        """Give the memory back."""
        self._memory = torch.empty(0, dtype=torch.uint8)
