"""Names and shapes between two layouts of the same weights: a table of pairs that is read both ways.

`convert_open_clip` and `convert_transformers` hold the tables, `clip_shape` says which towers they can hold.
A weight that no pair names is an error in both directions: nothing is dropped or left at random in silence.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config import ConfigError

Weights = dict[str, Tensor]


class Pair(NamedTuple):
    """One of our weights and the ones that hold it elsewhere."""

    ours: str
    theirs: tuple[str, ...]
    give: Callable[[Tensor], tuple[Tensor, ...]]  #: ours -> theirs
    take: Callable[[tuple[Tensor, ...]], Tensor]  #: theirs -> ours


def same(ours: str, theirs: str) -> Pair:
    """Return a pair of equal tensors."""
    return Pair(ours, (theirs,), lambda x: (x,), lambda xs: xs[0])


def linear(ours: str, theirs: str) -> list[Pair]:
    """Return the pairs of weight and bias of a linear or a norm."""
    return [same(f"{ours}.{leaf}", f"{theirs}.{leaf}") for leaf in ("weight", "bias")]


def transposed(ours: str, theirs: str) -> Pair:
    """Return the pair of a linear's weight [out, in] and a matrix [in, out]."""
    return Pair(ours, (theirs,), lambda x: (x.T,), lambda xs: xs[0].T)


def split(ours: str, theirs: Iterable[str]) -> Pair:
    """Return the pair of one tensor whose rows are the parts' rows one after the other."""
    names = tuple(theirs)
    return Pair(ours, names, lambda x: x.chunk(len(names)), torch.cat)


def leading(ours: str, theirs: str, *, dims: int) -> Pair:
    """Return the pair of a tensor with `dims` leading dimensions of 1, and the tensor without them."""
    return Pair(
        ours, (theirs,), lambda x: (x.reshape(x.shape[dims:]),), lambda xs: xs[0].reshape((1,) * dims + xs[0].shape)
    )


def scalar(ours: str, theirs: str, *, most: float = float("inf")) -> Pair:
    """Return the pair of our [1] and a 0-dim parameter; `most` is the clamp that our forward applies, theirs does not.

    DeepSpeed fails on 0-dim parameters, the libraries expect them. Some files hold [1]: taken too.
    """
    return Pair(ours, (theirs,), lambda x: (x.reshape(()).clamp(max=most),), lambda xs: xs[0].reshape(1))


def give(pairs: Iterable[Pair], state: Mapping[str, Tensor], *, layout: str) -> Weights:
    """Return our weights under `layout`'s names and shapes, contiguous and each with its own storage.

    Raises:
        ConfigError: a weight is missing, or `layout` has no place for it.
    """
    out: Weights = {}
    used: set[str] = set()
    for pair in pairs:
        if pair.ours not in state:
            raise ConfigError(f"weights: {pair.ours!r} is missing; the checkpoint is of another architecture")
        parts = pair.give(state[pair.ours])
        out |= {name: part.detach().contiguous().clone() for name, part in zip(pair.theirs, parts)}
        used.add(pair.ours)
    _refuse_left(state, used, f"{layout} has no place for")
    return out


def take(pairs: Iterable[Pair], state: Mapping[str, Tensor], *, layout: str) -> Weights:
    """Return `layout`'s weights under our names and shapes.

    Raises:
        ConfigError: a weight is missing, or we have no place for it.
    """
    out: Weights = {}
    used: set[str] = set()
    for pair in pairs:
        missing = [name for name in pair.theirs if name not in state]
        if missing:
            raise ConfigError(f"{layout} weights: {missing[0]!r} is missing; config and weights do not belong together")
        out[pair.ours] = pair.take(tuple(state[name] for name in pair.theirs)).detach().contiguous().clone()
        used.update(pair.theirs)
    _refuse_left(state, used, f"{layout} weights: our model has no place for")
    return out


def _refuse_left(state: Mapping[str, Tensor], used: set[str], sentence: str) -> None:
    left = sorted(set(state) - used)
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ConfigError(f"{sentence} {', '.join(left[:3])}{more}")
