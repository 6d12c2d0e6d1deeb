"""Names are file names: a plug-in is found by the module that carries its name."""

import difflib
import importlib
import pkgutil
from types import ModuleType


def names(package: str) -> list[str]:
    """Return every plug-in of a package: its modules, less the private ones and `base`."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if m.name != "base" and not m.name.startswith("_"))


def nearest(name: str, known: list[str]) -> str:
    """Return a sentence that points from a mistyped name to the closest known one, or nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def find(package: str, name: str) -> ModuleType:
    """Return the module that implements `name`.

    Raises:
        ValueError: no such module; the message lists what there is.
    """
    known = names(package)
    if name not in known:
        raise ValueError(f"{package} has no {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
    return importlib.import_module(f"{package}.{name}")
