"""The generic config loader: YAML -> pydantic sections -> dotted overrides. It knows no section.

Every mistake is a ConfigError: one sentence that says which key, what was expected and, for an
unknown key, the nearest known one.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pretrain.registry import find, nearest


class ConfigError(ValueError):
    """A config that cannot be used; the message says what, where and what to do."""


class Section(BaseModel):
    """Base of every config section: unknown keys are errors, values are validated on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


AnySection = TypeVar("AnySection", bound=Section)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.1 wants 1.0e-3) and refuses a key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = next((k for k in keys if keys.count(k) > 1), None)
    if twice is not None:
        raise ConfigError(f"{node.start_mark.name}: key {twice!r} is given twice")
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return a YAML file as a dict.

    Raises:
        ConfigError: missing, unreadable or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: cannot be read ({error})") from error
    return _parse(text, str(path))


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config {where}: not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config {where}: expected sections like `train:`, got {type(tree).__name__}")
    return dict(tree)


def override(tree: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """Return `tree` with `section.key=value` words applied; values are read as YAML."""
    out: dict[str, Any] = json.loads(json.dumps(tree))
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path or word.startswith("-"):
            raise ConfigError(f"override {word!r}: write it as section.key=value, e.g. train.steps=100")
        try:
            value = yaml.load(text, Loader=_Loader) if text else None  # noqa: S506
        except yaml.YAMLError as error:
            raise ConfigError(f"override {word!r}: value is not YAML: {error}") from error
        *parents, last = path.split(".")
        node = out
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = value
    return out


def plug_in(package: str, chosen: Mapping[str, Any], *, where: str) -> tuple[ModuleType, Section]:
    """Return the module that a mapping of one name to its options names, and its validated Config.

    Raises:
        ConfigError: an unknown name, or options that it does not have.
    """
    [(name, options)] = chosen.items()
    try:
        module = find(package, name)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    return module, build(module.Config, options or {}, where=f"{where}.{name}")


def build(section: type[AnySection], tree: Mapping[str, Any], *, where: str = "config") -> AnySection:
    """Return `tree` as a validated section.

    Raises:
        ConfigError: the first few problems, one a line, each with its dotted key.
    """
    try:
        return section.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(section, e, where) for e in error.errors()[:5])) from None


def load(section: type[AnySection], path: str | Path, words: Iterable[str] = ()) -> AnySection:
    """Return the config file at `path` with dotted overrides applied."""
    return build(section, override(read_yaml(path), words), where=str(path))


def dump(section: Section) -> str:
    """Return a section as YAML that loads back to the same section."""
    return yaml.safe_dump(section.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def _sentence(section: type[BaseModel], error: Any, where: str) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(top level)"
    if error["type"] == "extra_forbidden":
        known = _keys_at(section, error["loc"][:-1])
        hint = nearest(str(error["loc"][-1]), known)
        listed = f" Known there: {', '.join(known)}." if known else ""
        return f"{where}: unknown key {key!r}.{hint}{listed}"
    got = "" if error["type"] in ("missing", "value_error") else f" (got {error['input']!r})"
    return f"{where}: {key}: {error['msg'].removeprefix('Value error, ')}{got}"


def _keys_at(section: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    for part in loc:
        if isinstance(part, int):  # an entry of a list: the loop has already come to what the entries are
            continue
        found = section.model_fields.get(str(part))  # none of those with an alias holds other sections
        annotation = found.annotation if found else None
        if get_origin(annotation) is list:
            [annotation] = get_args(annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return [field.alias or name for name, field in section.model_fields.items()]


def exit_with(error: Exception, *, code: int = 2) -> NoReturn:
    """Print one sentence to stderr and leave: 2 for a bad config or bad usage, 1 for a failed run."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(code)
