"""Loaders in a process of their own that can be killed, and what they say of each global batch.

The process holds one Loader for each of W ranks, each with its own workers, and takes a batch of each in turn, as ranks
in lock-step do. It writes one line a global batch: its step and a hash of every byte of its rows in order.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pretrain.batch import Batch
from pretrain.data.loader import Loader

PER_ROW = ("tokens_BT", "blocks_BT", "labels_BT", "caption_B", "draw_B", "target_B", "source_B")
MakeLoader = Callable[..., Loader]  #: rank=, world=, workers= -> Loader


def digest(parts: list[Batch]) -> str:
    """Return one hash of a global batch given as the ranks' slices: keys, pixels, text, draws, what was replaced.

    Text is hashed without padding: a slice is trimmed to its own longest row.
    """
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        tensors = part.tensors()
        for row, key in enumerate(part.keys):
            length = int(part.valid_BT[row].sum())
            state.update(repr((key, Path(part.shards[row]).name, part.meta[row])).encode())
            state.update(part.image_NCHW[part.owner_N == row].numpy().tobytes())
            for name in PER_ROW:
                if name in tensors:
                    values = tensors[name][row]
                    state.update((values[:length] if name.endswith("T") else values).numpy().tobytes())
    state.update(repr([line for part in parts for line in part.bad]).encode())
    return state.hexdigest()


def digests(loaders: list[Loader], start: int) -> Iterator[str]:
    """Yield the hash of every global batch from step `start` on."""
    for parts in zip(*(loader.iterate(start) for loader in loaders)):
        yield digest(list(parts))


@dataclass
class Killable:
    """A process that takes batches and is killed with all its workers; `state` is what a checkpoint would hold."""

    make: MakeLoader
    state: Path
    every: int = 4  #: steps from one checkpoint to the next
    said: dict[int, str] = field(default_factory=dict)  #: step -> hash, from all lives

    def live(self, *, world: int, workers: int, batches: int) -> None:
        """Go on from the state; kill -9 the whole tree after `batches` batches.

        Raises:
            AssertionError: a batch that an earlier life had already shown came out differently.
        """
        out, into = os.pipe()
        process = multiprocessing.get_context("fork").Process(target=self._train, args=(into, world, workers))
        process.start()
        os.close(into)
        steps: list[int] = []
        with os.fdopen(out) as lines:
            for line in lines:
                step, found = line.split()
                assert self.said.setdefault(int(step), found) == found, f"step {step} is another batch"
                steps.append(int(step))
                if len(steps) == batches:
                    os.killpg(process.pid, signal.SIGKILL)  # lines already in the pipe are still read
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"the loaders ended by themselves with {process.exitcode}"
        assert steps == list(range(steps[0], steps[0] + len(steps)))

    def _train(self, into: int, world: int, workers: int) -> None:
        os.setsid()  # a process group of its own: the kill takes the workers along
        torch.set_num_threads(1)
        state = json.loads(self.state.read_text())
        loaders = [self.make(rank=rank, world=world, workers=workers) for rank in range(world)]
        for loader in loaders:
            loader.restore(state)
        start = int(state["batch"])
        for step, found in zip(itertools.count(start), digests(loaders, start)):
            os.write(into, f"{step} {found}\n".encode())
            if (step + 1) % self.every == 0:
                part = self.state.with_suffix(".part")
                part.write_text(json.dumps(loaders[0].state(step + 1)))
                part.replace(self.state)
