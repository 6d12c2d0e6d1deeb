"""The README keeps its promises: every file has its line, every command it shows exists, every link leads somewhere.

python -m tests.test_readme      writes the file list of README.md anew from the files' own first lines
"""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- files -->", "<!-- end of files -->"


def listing() -> str:
    """Return one line a file: its path and what its first line says."""
    lines = []
    for package in ("pretrain", "finetune", "data_tools", "launcher"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py":
                first = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
                lines.append(f"| `{path.relative_to(ROOT)}` | {first.replace('|', chr(92) + '|')} |")
    return "\n".join(["| file | what it is |", "|---|---|", *lines])


def test_every_file_has_its_line() -> None:
    text = README.read_text()
    found = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert found == listing(), "run `python -m tests.test_readme`"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README.read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def commands() -> list[str]:
    """Return the shell lines of the README's fenced blocks."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README.read_text(), re.S)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line and not line.startswith("#")})


@pytest.mark.parametrize("line", commands())
def test_commands_exist(line: str) -> None:
    """Each names a target of the Makefile, a script, a module or a program, and files that the tree has."""
    words = [word for word in shlex.split(line) if not re.match(r"^[A-Z_]+=", word)]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
        return
    for word in words:
        if word.endswith((".py", ".yaml", ".sbatch")):
            assert (ROOT / word).is_file(), f"{line}: no {word}"
    if "-m" in words:
        module = words[words.index("-m") + 1].replace(".", "/")
        assert (ROOT / f"{module}.py").is_file() or (ROOT / module / "__main__.py").is_file(), line
    assert words[0] in {"make", "python", "deepspeed", "torchrun", "sbatch", "git", "cd", "pip", "tensorboard"}, line


def write() -> None:
    """Put the listing into README.md."""
    head, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{head}{BEGIN}\n{listing()}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    write()
    sys.exit(subprocess.call(["git", "diff", "--stat", "README.md"], cwd=ROOT))
