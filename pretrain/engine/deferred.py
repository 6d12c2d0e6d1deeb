"""Weights built in parts: a model is built without memory, then each weight is drawn, sharded and let go in turn.

`recording` lets a model be built as always, on the meta device, and writes down what was done to its tensors.
`materialise` does it again for real, in the same order and from the same state of the generator, so that every weight
is equal to the bit to that of a whole build; a parameter is handed over as soon as nothing touches it any more. Draws
that a later initialisation overwrites (a layer's default, before the model's own) go to scratch, since the generator
must advance, and are forgotten. So a rank holds its shards and about one parameter, never the whole.

deepspeed.zero.Init does not do: 0.19.8 makes bf16 of fp32 on a CPU, and what timm initialises after a layer is built
(all of a ViT) would go to parameters that are emptied already.
"""

import mmap
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from pretrain.config import ConfigError

#: what parameters are made by; torch.tensor, arange and their kin hold data that a model may look at: they stay real
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
PAGES = 2**18  #: bytes from which memory is taken from the system directly
IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]
EMPTY = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}  #: memory that nothing is in yet
#: in-place operations after which nothing is left of what was there
OVERWRITES = {"uniform_", "normal_", "fill_", "zero_", "copy_", "bernoulli_", "exponential_"}


class Ref:
    """A meta tensor as it was when an operation saw it (in-place views change shapes): a view of a storage."""

    def __init__(self, tensor: Tensor) -> None:
        self.key, self.dtype = key(tensor), tensor.dtype
        self.layout = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        self.numel = tensor.untyped_storage().nbytes() // tensor.element_size()  #: of the whole storage

    def of(self, storage: Tensor) -> Tensor:
        """Return this view of the real storage, which is 1-D."""
        return storage.as_strided(*self.layout)

    def scratch(self) -> Tensor:
        """Return memory like that of the storage; much of it in pages that go back to the system when it is let go.

        glibc does not use a freed block again for an aligned one of the same size: the process would grow to the whole.
        """
        nbytes = self.numel * self.dtype.itemsize
        if nbytes < PAGES:
            return torch.empty(self.numel, dtype=self.dtype)
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=self.dtype)


class Op(NamedTuple):
    """One operation on meta tensors, which are Refs here."""

    func: Any
    args: Any
    kwargs: Any
    outputs: tuple[Ref | None, ...]  #: what it makes; None where it is a view of an input
    reads: frozenset[int]  #: storages, by `key`
    writes: int | None  #: the storage that an in-place operation changes
    overwrites: bool  #: nothing is left of it

    @property
    def draws(self) -> bool:
        """Return whether it advances the generator."""
        return torch.Tag.nondeterministic_seeded in self.func.tags


def key(tensor: Tensor) -> int:
    """Return what tells storages apart; a parameter shares that of the tensor it was made from."""
    return int(tensor.untyped_storage()._cdata)


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _ref(value: Any) -> Any:
    return Ref(value) if _is_meta(value) else value


class Record(TorchDispatchMode):
    """What was done to meta tensors, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.generator = torch.get_rng_state()
        self._alive: list[Tensor] = []  # or a later tensor could get the storage, and so the key, of one that is gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and write it down if it touches meta tensors; views are told by their storage later."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [t for t in tree_flatten((args, kwargs))[0] if _is_meta(t)]
        outputs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        made = [t for t in outputs if _is_meta(t)]
        if not made and not inputs:
            if torch.Tag.nondeterministic_seeded in func.tags:
                raise ConfigError(f"zero.init: the model draws {func} while it is built; build it with zero.init=whole")
            return out
        known = {key(t) for t in inputs}
        mutates = func._schema.is_mutable
        new = tuple(t if key(t) not in known else None for t in made)
        if torch.Tag.inplace_view in func.tags:
            mutates = False  # t_ and its kin: the numbers stay
        if mutates or any(t is not None for t in new):
            self._alive += made
            if func.overloadpacket.__name__ in EMPTY:
                return out  # `_run` makes memory when it is first written to
            writes = key(args[0]) if mutates else None
            whole = mutates and args[0].numel() * args[0].element_size() == args[0].untyped_storage().nbytes()
            overwrites = whole and func.overloadpacket.__name__ in OVERWRITES
            reads = frozenset(known - {writes} if mutates else known)
            args, kwargs, refs = tree_map(_ref, (args, kwargs, new))
            self.ops.append(Op(func, args, kwargs, refs, reads, writes, overwrites))
        return out


class _OnMeta(TorchFunctionMode):
    """Sends the factories that make parameters to the meta device, where no device is asked for.

    `is_meta` is answered with no: torch's own initialisations do nothing where it says yes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == IS_META:  # a new wrapper each time
            return False
        if func in FACTORIES and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def recording() -> Iterator[Record]:
    """Yield the record of all that is built inside.

    Raises:
        ConfigError: the model looks at values of its weights while it is built.
    """
    record = Record()
    try:
        with record, _OnMeta():
            yield record
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():
            raise
        raise ConfigError(
            f"zero.init: the model cannot be built in parts ({str(error).splitlines()[0]}); set zero.init=whole"
        ) from error


@torch.no_grad()
def materialise(module: nn.Module, record: Record, take: Callable[[nn.Parameter], None]) -> None:
    """Replace a module's meta tensors by real ones; `take` gets each parameter once it is done, and may empty it.

    Tied parameters stay tied. The generator is left as a whole build leaves it.
    """
    parameters: dict[int, nn.Parameter] = {key(p): p for p in module.parameters() if _is_meta(p)}
    from_data = [p for p in module.parameters() if not _is_meta(p)]  # a temperature
    buffers = {key(b) for b in module.buffers() if _is_meta(b)}
    real: dict[int, Tensor] = {}  # storage -> all of it, 1-D
    owners: dict[int, list[tuple[dict[str, Any], str]]] = defaultdict(list)
    for part in module.modules():
        for name, p in part._parameters.items():
            owners[id(p)].append((part._parameters, name))
    last = _last_uses(record.ops)
    dead = _dead(record.ops)
    torch.set_rng_state(record.generator)

    def finish(storage: int, values: Tensor) -> None:
        was = parameters.pop(storage)
        now = nn.Parameter(Ref(was).of(values), requires_grad=was.requires_grad)
        now.__dict__.update(was.__dict__)
        for holder, name in owners[id(was)]:
            holder[name] = now
        take(now)

    for index, op in enumerate(record.ops):
        if index not in dead:
            _run(op, real)
        elif op.draws:
            _run(op, {op.args[0].key: op.args[0].scratch()})
        for storage in last[index]:
            if storage in parameters:
                finish(storage, real.pop(storage))
            elif storage not in buffers:
                real.pop(storage, None)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if _is_meta(buffer):
                assert buffer is not None
                part._buffers[name] = Ref(buffer).of(real.get(key(buffer), Ref(buffer).scratch()))
    for storage, was in list(parameters.items()):  # that nobody initialises: left as they are, as in a whole build
        finish(storage, Ref(was).scratch())
    for p in from_data:
        take(p)


def _last_uses(ops: list[Op]) -> list[list[int]]:
    """Return, per operation, the storages that nothing touches after it."""
    last: dict[int, int] = {}
    for index, op in enumerate(ops):
        touched = op.reads | {t.key for t in op.outputs if t} | ({op.writes} if op.writes is not None else set())
        last.update(dict.fromkeys(touched, index))
    out: list[list[int]] = [[] for _ in ops]
    for storage, index in last.items():
        out[index].append(storage)
    return out


def _dead(ops: list[Op]) -> set[int]:
    """Return the in-place operations of whose result a later one leaves nothing, with no reader between them."""
    doomed: set[int] = set()  # storages that are overwritten before they are read, seen from the end
    out = set()
    for index in reversed(range(len(ops))):
        op = ops[index]
        if op.writes is not None:
            if op.writes in doomed:
                out.add(index)
                continue  # what it read is not needed either
            if op.overwrites:
                doomed.add(op.writes)
        doomed -= op.reads
    return out


def _run(op: Op, real: dict[int, Tensor]) -> None:
    """Do an operation on the real storages."""

    def convert(value: Any) -> Any:
        if isinstance(value, Ref):
            if value.key not in real:  # still empty, or what filled it was left out, since it is overwritten now
                real[value.key] = value.scratch()
            return value.of(real[value.key])
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == "meta" else value

    out = op.func(*tree_map(convert, op.args), **tree_map(convert, op.kwargs))
    results = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
    if op.writes is None:
        for ref, result in zip(op.outputs, results):
            if ref:
                numel = result.untyped_storage().nbytes() // result.element_size()
                real[ref.key] = result.as_strided((numel,), (1,), 0)


def shard(module: nn.Module, record: Record, config: dict[str, Any]) -> None:
    """Materialise a module and partition each parameter over the ranks as ZeRO-3 does. All ranks call it."""
    from deepspeed.runtime.zero.partition_parameters import Init

    # an empty module: what is wanted is the converter, and the linear that does not keep gathered weights
    converter = Init(module=nn.Module(), config_dict_or_path=config, dtype=torch.float32)
    materialise(module, record, lambda p: converter._convert_to_zero_parameters([p]))
