#!/usr/bin/env bash
# setuptools 84.2.1 and torch 2.14.1: importlib.util.find_spec("pip") makes torch.compile fail later in the process.
#
# Guess before the run: find_spec asks whether a module could be imported and changes nothing.
# Seen: setuptools' import hook takes the question for pip itself at work, and from then on `import distutils` gives the
# standard library's module. The first CPU kernel that Inductor compiles imports setuptools, which asserts that distutils
# is its own: InductorError: AssertionError: .../distutils/core.py, far from the question and without a hint of it.
# (Seen on Python 3.11; since 3.12 the standard library has no distutils.) To ask for pip without the side effect, use
# importlib.metadata.version("pip"). Needs a C++ compiler and Python's headers.
# Output: "compiled: ok" and "compiled after find_spec: backend='inductor' raised: AssertionError: .../distutils/core.py";
# exits with 1 otherwise.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 setuptools==84.2.1 numpy==2.2.6
export TORCHINDUCTOR_CACHE_DIR="$work/cache" TORCHINDUCTOR_COMPILE_THREADS=1
cat > "$work/compile.py" <<'PY'
import sys
from importlib.util import find_spec

if sys.argv[1:] == ["ask"]:
    find_spec("pip")
import torch

x = torch.randn(64)
try:
    y = torch.compile(lambda x: x.sin() + 1)(x)
    print("ok" if torch.allclose(y, x.sin() + 1) else "wrong")
except Exception as error:
    print(" ".join(str(error).split()))
PY
cd "$work"
before=$("$work/venv/bin/python" compile.py 2> /dev/null)
after=$("$work/venv/bin/python" compile.py ask 2> /dev/null)
echo "compiled: $before"
echo "compiled after find_spec: ${after:0:160}"
[ "$before" = ok ] && [[ "$after" == *AssertionError*distutils/core.py* ]]
