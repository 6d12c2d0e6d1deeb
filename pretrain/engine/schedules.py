"""Learning-rate schedules: the rate of a step as a pure function of the step, so that a resume needs no state.

Every schedule starts at the last step of the warm-up (its peak, 1) and gives a factor for the peak rate:

    cosine              half a cosine from 1 to the floor at the last step (CLIP, arXiv:2103.00020)
    linear              a straight line from 1 to the floor at the last step
    constant            1 to the end
    constant_cooldown   1, then a straight line to the floor over the last steps: a run can be lengthened from any
                        checkpoint before them (Zhai et al. 2022, arXiv:2106.04560, section 3.5)
"""

import math
import re
from typing import Literal, NamedTuple

from pretrain.config import ConfigError

Name = Literal["cosine", "linear", "constant", "constant_cooldown", "epoch_cosine"]


class Course(NamedTuple):
    """What a schedule needs to know of a run."""

    total: int  #: steps
    warmup: int  #: steps; the rate is at its peak in the last of them
    cooldown: int = 0  #: steps at the end, of constant_cooldown
    floor: float = 0.0  #: factor at the last step


def check_length(value: int | str, what: str) -> int | str:
    """Return a length as a config gives it: steps, or a share of the run such as "5%".

    Raises:
        ValueError: neither of them.
    """
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{value} steps of {what}; give 0 or more")
        return value
    if not re.fullmatch(r"\d+(\.\d+)?%", value):
        raise ValueError(f"{value!r} is neither a number of steps nor a share like '5%'")
    return value


def in_steps(length: int | str, total: int) -> int:
    """Return a length in steps of a run of `total`."""
    return round(float(length[:-1]) / 100 * total) if isinstance(length, str) else length


def factor(name: Name, step: int, course: Course) -> float:
    """Return the rate of step 0 .. total - 1 as a share of the peak: (step + 1) / warmup first, the floor last.

    Raises:
        ConfigError: warm-up and cool-down overlap.
    """
    if name == "constant_cooldown" and course.warmup + course.cooldown > course.total:
        raise ConfigError(
            f"optim.cooldown: {course.cooldown} steps after {course.warmup} of warm-up do not fit into a run of "
            f"{course.total}; shorten one or write '20%'"
        )
    if step < course.warmup:
        return (step + 1) / course.warmup
    # the peak counts as the schedule's start; without warm-up step 0 is the peak
    first = max(course.warmup - 1, 0)
    last = course.total - 1
    if name == "constant_cooldown":
        first = max(last - course.cooldown, first)
        step = max(step, first)
    progress = min((step - first) / max(last - first, 1), 1.0)
    if name == "constant" or (name == "constant_cooldown" and not course.cooldown):
        return 1.0
    if name == "cosine":
        return course.floor + 0.5 * (1 - course.floor) * (1 + math.cos(math.pi * progress))
    return course.floor + (1 - course.floor) * (1 - progress)
