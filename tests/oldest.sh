#!/usr/bin/env bash
# Unit tests on the oldest versions that setup.py admits: tests/oldest.sh [PYTHON] [pytest arguments]
# Their environment is $VENV_OLDEST (default .venv-oldest), remade when a lower bound changes; allow 7 GB of disk.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3.11}
venv=${VENV_OLDEST:-.venv-oldest}

# setup.py is read, not run: a bare Python has no setuptools. Of the extra `dev` what only reads the code is left out.
pins=$("$python" - <<'PYTHON'
import ast, re, sys

lists = {
    node.targets[0].id: ast.literal_eval(node.value)
    for node in ast.parse(open("setup.py").read()).body
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
}
tests = [name for name in lists["EXTRAS"]["dev"] if not name.startswith(("ruff", "import-linter", "mypy", "types-"))]
for requirement in [*lists["INSTALL"], *lists["EXTRAS"]["tools"], *tests]:
    bound = re.fullmatch(r"([\w.-]+(?:\[[\w,-]+\])?)>=([\w.]+)(,.*)?", requirement)
    if not bound:
        sys.exit(f"setup.py: {requirement!r} has no lower bound; write NAME>=VERSION")
    print(f"{bound[1]}=={bound[2]}")
PYTHON
)

ready=$venv/.ready-$(sha256sum <<<"$pins" | cut -c1-12)
if [[ ! -e $ready ]]; then
  rm -rf "$venv"
  trap 'rm -rf "$venv"' EXIT # half an environment is worse than none
  "$python" -m venv "$venv"
  # one resolution over all pins: a clash between two bounds is an error here
  mapfile -t wanted <<<"$pins"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${wanted[@]}"
  touch "$ready"
  trap - EXIT
fi

echo "oldest versions: ${pins//$'\n'/ }"
export PYTHONPATH=$PWD DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
# torch 2.6 would start two compilers beside every rank, half a gigabyte each, which nothing here uses
export TORCHINDUCTOR_COMPILE_THREADS=1
# all but what looks at the repository only; with it whole runs, every ZeRO stage and the real launcher among them
"$venv/bin/python" -m pytest -q -m 'not slow' tests --ignore=tests/test_layout.py --ignore=tests/test_packaging.py \
  --ignore=tests/test_readme.py --ignore=tests/test_shell.py "${@:2}"
