"""Where the time of a step goes: marks set by hooks, the same for both trainers, without a line changed in either.

python tests/benchmarks/stages.py FILE --config ...      (ours, under torchrun; peer_trainer.py does it for open_clip)

A step is cut at marks, so that its stages add up to the whole: data, image, text (forward and backward), loss,
optimizer (from the end of backward: what is left of the gradients' reduction, norm, update, gather of weights), rest.
`in flight` lies across the stages: how long some collective of ours, or of DistributedDataParallel, was under way.
"""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

WARM = 2  #: first steps, not counted
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor",
    "reduce_scatter_single", "broadcast", "reduce",
)  # fmt: skip


class Stages:
    """Seconds by stage, of every step; rank 0 writes the means to a file at the end."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.steps: list[dict[str, float]] = []
        self.now: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def mark(self, stage: str) -> None:
        """Give the time since the last mark to `stage`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        here = time.perf_counter()
        self.now[stage] += here - self.last
        self.last = here

    def data(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches; a step ends where the next batch is asked for."""
        while True:
            self.mark("optimizer")
            if self.steps or "image" in self.now:
                self.steps.append(dict(self.now))
            self.now.clear()
            try:
                batch = next(batches)
            except StopIteration:
                self.write()
                return
            self.mark("data")
            yield batch

    def tower(self, name: str, call: Callable[..., Any], pick: Callable[[Any], Any]) -> Callable[..., Any]:
        """Return `call` with marks around it and at the point of backward where it is done with what came after.

        `pick` returns the features from what a call returns. The tower that is called last goes back first.
        """
        before = {"image": "rest", "text": "rest"}[name]

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.mark(before)
            out = call(*args, **kwargs)
            self.mark(name)
            features = pick(out)
            if features.requires_grad:
                features.register_hook(lambda grad: self.mark({"text": "loss", "image": "text"}[name]))
            return out

        return timed

    def collectives(self) -> None:
        """Time the collectives that are called from Python, by the wait of their caller."""
        for name in COLLECTIVES:
            call = getattr(torch_dist, name, None)
            if call is None:
                continue

            def timed(*args: Any, call: Callable[..., Any] = call, **kwargs: Any) -> Any:
                began = time.perf_counter()
                work = call(*args, **kwargs)
                if work is None:
                    self.now["in flight"] += time.perf_counter() - began
                else:
                    _finish(work, lambda: self._flown(began))
                return work

            setattr(torch_dist, name, timed)

    def _flown(self, began: float) -> None:
        self.now["in flight"] += time.perf_counter() - began

    def reducer(self, state: Any, bucket: torch_dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """All-reduce a bucket as DistributedDataParallel does by itself, with a clock (its communication hook)."""
        began = time.perf_counter()
        whole = bucket.buffer().div_(torch_dist.get_world_size())
        future = torch_dist.distributed_c10d.all_reduce(whole, async_op=True).get_future()

        def done(result: Any) -> Any:
            self._flown(began)
            return result.value()[0]

        return future.then(done)

    def backward(self) -> None:
        """Mark the end of every backward pass."""
        call = torch.Tensor.backward

        def timed(*args: Any, **kwargs: Any) -> None:
            call(*args, **kwargs)
            self.mark("image")

        torch.Tensor.backward = timed

    def write(self) -> None:
        """Write the mean seconds of a step by stage."""
        counted = self.steps[WARM:]
        names = sorted({name for step in counted for name in step})
        if os.environ.get("RANK", "0") == "0":
            means = {name: sum(step.get(name, 0.0) for step in counted) / len(counted) for name in names}
            self.file.write_text(json.dumps(means))


def _finish(work: Any, done: Callable[[], None]) -> None:
    wait = work.wait

    def waited(*args: Any, **kwargs: Any) -> Any:
        out = wait(*args, **kwargs)
        done()
        return out

    try:
        work.wait = waited
    except AttributeError:  # a work object that takes no attributes: counted as far as its launch
        done()


def ours(stages: Stages) -> None:
    """Put the clocks into this project's trainer."""
    from pretrain import recipe
    from pretrain.data.loader import Loader

    build, iterate = recipe.build_mixture, Loader.iterate

    def build_mixture(*args: Any) -> Any:
        mixture = build(*args)
        towers = mixture.model
        towers.vision.forward = stages.tower("image", towers.vision.forward, lambda out: out.image_NE)
        towers.text.forward = stages.tower("text", towers.text.forward, lambda out: out.text_BE)
        return mixture

    recipe.build_mixture = build_mixture
    Loader.iterate = lambda self, start_step=0: stages.data(iterate(self, start_step))
    stages.backward()
    stages.collectives()


def main() -> int:
    """Train with clocks."""
    stages = Stages(Path(sys.argv[1]))
    ours(stages)
    from pretrain import main as program

    code = program.main(sys.argv[2:])
    stages.write()  # without the last step: it ended with the run, not with the next batch
    return code


if __name__ == "__main__":
    from pretrain.engine import process

    process.leave(main())
