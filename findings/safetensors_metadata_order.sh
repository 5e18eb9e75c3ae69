#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors with the same metadata are written as different bytes.
#
# Guess before the run: a file is a function of its content, as of tensors alone it is: one digest for fifty saves.
# Seen: the order of the metadata's keys in the header is drawn anew for each save: with three keys all six orders
# appear, with one key (or none) a single one. A digest of the file therefore tells nothing about whether the weights
# of two saves are equal, and caches or artifact stores that go by it keep every copy; compare tensors and metadata.
# Output: "no metadata: 1 digest", "1 key: 1 digest", "3 keys: several digests, equal content"; exits with 1 otherwise.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.2.6
"$work/venv/bin/python" - <<'PY'
import hashlib
import json
import sys

import numpy as np
from safetensors.numpy import load, save

tensors = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(2, np.float32)}


def metadata_of(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def saves(metadata):
    files = [save(tensors, metadata) for _ in range(50)]
    for data in files:
        assert all(np.array_equal(value, tensors[name]) for name, value in load(data).items())
        assert metadata is None or metadata_of(data) == metadata
    return len({hashlib.sha256(data).hexdigest() for data in files})


none, one, three = saves(None), saves({"step": "3"}), saves({"step": "3", "format": "pt", "model": "unet"})
print(f"no metadata: {none} digest")
print(f"1 key: {one} digest")
print("3 keys: " + (f"several digests ({three}), equal content" if three > 1 else "one digest"))
sys.exit(0 if (none, one) == (1, 1) and three > 1 else 1)
PY
