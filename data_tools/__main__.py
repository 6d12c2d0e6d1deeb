"""Make, check and change data sets: `python -m data_tools COMMAND ...`. One module of this package is one command.

A command module offers `add_arguments(parser)`, `run(args) -> exit status`, and a docstring: its first
line is the help, the rest (with an example) is shown under the options. A command whose options depend
on other options may offer `extend(parser, words)` as well.
"""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from pretrain import registry

NOT_COMMANDS = {"recipes", "sources"}


def commands() -> list[str]:
    """Return the names of all commands."""
    return [name for name in registry.names("data_tools") if name not in NOT_COMMANDS]


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; return 0 for success, 1 for a failure, 2 for bad usage."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0].startswith("-"):
        _overview().parse_args(words)
        _overview().print_help(sys.stderr)
        return 2
    if words[0] not in commands():
        hint = registry.nearest(words[0], commands())
        print(f"error: there is no command {words[0]!r}.{hint} Known: {', '.join(commands())}", file=sys.stderr)
        return 2
    module = registry.find("data_tools", words[0])
    return _guarded(module, parser_of(module, words[1:]).parse_args(words[1:]))


def parser_of(module: ModuleType, words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of one command; `words` decide about options that depend on others."""
    first, _, rest = (module.__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m data_tools {module.__name__.rpartition('.')[2]}",
        description=first,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    if hasattr(module, "extend"):
        module.extend(parser, [word for word in words if word not in ("-h", "--help")])
    return parser


def _guarded(module: ModuleType, args: argparse.Namespace) -> int:
    """Run a command and turn the mistakes of users and machines into one sentence each."""
    from pretrain.config import ConfigError
    from pretrain.data.format import ShardError

    try:
        return int(module.run(args))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ShardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: {error.filename or getattr(args, 'out', 'the system')}: {error.strerror or error}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _overview() -> argparse.ArgumentParser:
    lines = []
    for name in commands():
        first = (registry.find("data_tools", name).__doc__ or "").partition("\n")[0]
        lines.append(f"  {name:<12}{first}")
    return argparse.ArgumentParser(
        prog="python -m data_tools",
        usage="python -m data_tools COMMAND ...",
        description="Make, check and change image-text data sets.",
        epilog="commands:\n"
        + "\n".join(lines)
        + "\n\nexample:\n  python -m data_tools build photos/ --out data/photos --shard-size 1000\n"
        + "\n`python -m data_tools COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


if __name__ == "__main__":
    raise SystemExit(main())
