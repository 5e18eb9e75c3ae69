"""What Weights & Biases wrote for a run without a network."""

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

BLOCK, HEADER = (
    32768,
    struct.Struct("<IHB"),
)  # LevelDB's log: checksum, length, and whether whole, first, middle or last


def records(path: Path) -> Iterator[object]:
    """What a .wandb file holds: protobuf messages in LevelDB's log format behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data.startswith(b":W&B")
    at, parts = 7, b""
    while at + HEADER.size <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER.size:
            at += left
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        parts += data[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def nested(items: Iterable) -> dict:
    """Values by their keys, which may be several, one within the other."""
    found: dict = {}
    for item in items:
        place, keys = found, list(item.nested_key) or [item.key]
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = json.loads(item.value_json)
    return found


def read(path: Path) -> dict:
    """A run: its group, id and tags, its config, the rows of its history, its summary and its exit code."""
    found: dict = {"history": [], "config": {}, "summary": {}}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"group": record.run.run_group, "id": record.run.run_id, "tags": list(record.run.tags)}
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            found["history"].append(nested(record.history.item))
        elif kind == "summary":
            found["summary"] |= nested(record.summary.update)
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found
