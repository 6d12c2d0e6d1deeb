"""Who holds up a run that hangs: the rank without a sign of life, else the one furthest behind the others."""

from typing import NamedTuple

STEP = ("data", "forward", "backward", "update")  # of a step, in order


class Sign(NamedTuple):
    """What a rank says of itself."""

    beat: int  #: grows as long as its watchdog runs
    step: int
    phase: str
    seconds: float  #: since when
    calls: int  #: collectives so far
    collective: str  #: the last one
    host: str


class Verdict(NamedTuple):
    """Who holds up the run."""

    ranks: frozenset[int]
    phase: str  #: "no sign" where they do not say
    seconds: float  #: since when
    sentence: str


def verdict(signs: dict[int, Sign], silent: set[int], world: int) -> Verdict:
    """Return who holds up the run: those that give no sign of life, else those furthest behind."""
    gone = sorted(silent | (set(range(world)) - signs.keys()))
    if gone:
        known = signs.get(gone[0])
        where = f" and was last in {known.phase} of step {known.step}, collective {known.collective}" if known else ""
        host = f" on {known.host}" if known else ""
        sentence = (
            f"rank {gone[0]}{host} gives no sign of life{where}: it is stopped, cut off or dead, or in a call that "
            f"never lets go of Python's lock{_and_others(gone)}"
        )
        return Verdict(frozenset(gone), "no sign", 0.0, sentence)
    order = {phase: number for number, phase in enumerate(STEP)}

    def place(rank: int) -> tuple[int, int, int]:
        sign = signs[rank]
        return sign.step, order.get(sign.phase, -1), sign.calls

    behind = min(signs, key=place)
    same = sorted(rank for rank in signs if place(rank) == place(behind))
    sign = signs[behind]
    alone = len(same) < world or world == 1
    sentence = (
        f"{f'rank {behind} on {sign.host} is' if alone else 'all ranks are'} in {sign.phase} of step {sign.step} "
        f"for {sign.seconds:.0f} s and holds up the run; last collective: {sign.collective}"
        f"{_and_others(same) if alone else ''}"
    )
    return Verdict(frozenset(same), sign.phase, max(signs[rank].seconds for rank in same), sentence)


def _and_others(ranks: list[int]) -> str:
    if len(ranks) < 2:
        return ""
    listed = ", ".join(map(str, ranks[1:9]))
    return f" (ranks {listed}{' and more' if len(ranks) > 9 else ''} as well)"
