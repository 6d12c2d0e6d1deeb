"""What an instruction is: a plug-in that lays a paper's words around an Example, between reader and composer.

An instruction file offers `Config` and `Instruction`; its module name is its name under `data.instruction`, or under
`instruction` of one source of a blend. It is a function of the example alone: what it draws (the task, whether a
caption is the right one, which words are hidden), it draws from `example.draw`.

A paper whose rows yield two samples each, their own and one made of it, names both tasks here, and one of them is drawn
for each sample: the law is the same, in half the rows an epoch. Two sources of a blend over the same shards give both
within the same epoch, each with a weight of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pretrain.batch import Example
from pretrain.config import ConfigError, plug_in
from pretrain.data import fields
from pretrain.data.decode import BadSample

PACKAGE = "pretrain.data.instructions"
T = TypeVar("T")

#: gives another sample of the same data set, as its reader reads it, by any number
Others = Callable[[int], Example]


class Instruction(ABC):
    """Base of the instructions."""

    def __init__(self, config: Any, *, others: Others | None) -> None:
        """`others` is None where no other sample is at hand (data.order: stream, remote shards).

        Raises:
            ConfigError: a file that the config names cannot be used.
        """
        self.config, self.others = config, others

    @abstractmethod
    def lay(self, example: Example, side: int) -> Example:
        """Return the example as the model is told it; its pictures are shown in squares of `side` pixels.

        Raises:
            BadSample: the reader's example has not what the task asks for.
        """

    def symbols(self) -> tuple[str, ...]:
        """Return symbols that it lays, at least the last of each kind: the vocabulary must have them."""
        return ()


def make(chosen: dict[str, dict[str, Any]], *, others: Others | None) -> Instruction | None:
    """Return the instruction that a config names, e.g. {"ofa": {"tasks": ["caption"]}}; None for an empty one.

    Raises:
        ConfigError: more than one instruction, an unknown one, or options it does not have.
    """
    if not chosen:
        return None
    if len(chosen) != 1:
        raise ConfigError(f"data.instruction: name one, as in {{ofa: {{tasks: [caption]}}}}, got {list(chosen)}")
    module, config = plug_in(PACKAGE, chosen, where="data.instruction")
    made: Instruction = module.Instruction(config, others=others)
    return made


def draw_one(choices: Sequence[T], draw: int, salt: str) -> T:
    """Return one of the choices, each as likely, drawn by (draw, salt)."""
    return choices[fields.draw_below(len(choices), draw, salt)]


def draw_share(draw: int, salt: str) -> float:
    """Return a number of [0, 1), drawn by (draw, salt)."""
    return fields.draw_below(2**52, draw, salt) / 2**52


def needed(found: T | None, task: str, what: str) -> T:
    """Return what a task needs of its example.

    Raises:
        BadSample: it is not there; the reader is another one's.
    """
    if found is None or (isinstance(found, str | list) and not found):
        raise BadSample(f"{task} needs {what}, which this data.reader does not give")
    return found


def lines(file: str, where: str) -> list[str]:
    """Return the lines of a file that are not blank.

    Raises:
        ConfigError: no such file, or nothing in it.
    """
    try:
        found = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {file} cannot be read ({error})") from None
    found = [line for line in found if line and "\0" not in line]
    if not found:
        raise ConfigError(f"{where}: {file} has no lines")
    return found
