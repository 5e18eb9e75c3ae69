"""Read torch's pickles with a restricted machine that builds containers and describes tensors, and can do nothing else.

Every opcode of the pickle language is one small function here. None imports, calls or looks up anything that the file
names: a global is represented by its name, calling one gives a Stub, and the few names of torch's own tensor
    constructors
give a TensorRecord, which describes where the numbers are. So a file that names `os.system` has no effect. (Python's
unpickler would run it; torch's weights_only refuses the whole file because of the Lightning classes that the released
latent diffusion checkpoints name.)
"""

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import torch
from torch import Tensor

MAX_PICKLE_BYTES = 1 << 28  # a large optimizer's pickle has about 2 MB
DTYPE = {
    **{
        "DoubleStorage": torch.float64,
        "FloatStorage": torch.float32,
        "HalfStorage": torch.float16,
        "BFloat16Storage": torch.bfloat16,
    },
    **{"LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8},
    **{"ByteStorage": torch.uint8, "BoolStorage": torch.bool, "UntypedStorage": torch.uint8},
}


@dataclass(frozen=True)
class Name:
    """A global, represented by its name only: module.attribute."""

    path: str


@dataclass(frozen=True, eq=False)
class Stub:
    """The result of calling a global: nothing but the global's name."""

    path: str


@dataclass(frozen=True)
class Storage:
    """A storage in the file: its key, dtype and number of elements."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor in the file: a strided view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, data: bytearray) -> Tensor:
        """Return the tensor as a view of its storage's bytes."""
        flat = torch.frombuffer(data, dtype=self.storage.dtype) if data else torch.empty(0, dtype=self.storage.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset)


def stored(storage: Any, offset: int, shape: tuple, stride: tuple, *rest: Any) -> TensorRecord:
    """Describe the tensor of torch._utils._rebuild_tensor_v2.  Raises ValueError if it exceeds its storage."""
    record = TensorRecord(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))
    last = record.offset + sum((size - 1) * step for size, step in zip(record.shape, record.stride, strict=True))
    empty = 0 in record.shape
    if min((record.offset, *record.shape, *record.stride)) < 0 or (
        not empty and (last >= storage.numel or math.prod(record.shape) > storage.numel)
    ):
        raise ValueError(f"a tensor of shape {list(record.shape)} in a storage of {storage.numel}")
    return record


def parameter(data: Any, *rest: Any) -> Any:
    """Return the data of torch._utils._rebuild_parameter."""
    return data


CALLS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": stored,
    "torch._utils._rebuild_parameter": parameter,
    "torch._utils._rebuild_parameter_with_state": parameter,
    "collections.OrderedDict": lambda *pairs: {},
}


@dataclass
class PickleMachine:
    """A pickle machine: a stack, the positions of its marks, and a memo."""

    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, file: IO[bytes]) -> Any:
        """Return the value of the next pickle.  Raises ValueError or IndexError if it is not a complete pickle."""
        start = file.tell()
        for op, arg, position in pickletools.genops(file):
            if op.name == "STOP":
                return self.stack.pop()
            if op.name not in OPS:
                raise ValueError(f"opcode {op.name}")
            if position is not None and position - start > MAX_PICKLE_BYTES:
                raise ValueError(f"more than {MAX_PICKLE_BYTES >> 20} MiB of pickle")
            OPS[op.name](self, arg)
        raise ValueError("it has no end")

    def since_mark(self) -> list[Any]:
        """Pop and return what was pushed since the last mark."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def take(self, count: int) -> list[Any]:
        """Pop and return the last `count` values."""
        if len(self.stack) < count:
            raise ValueError("an empty stack")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def push(self, value: Any) -> None:
        self.stack.append(value)


def called(function: Any, arguments: Any) -> Any:
    """Return what represents function(*arguments)."""
    if not isinstance(function, Name):
        return Stub("a call of a call")
    call = CALLS.get(function.path)
    return call(*arguments) if call else Stub(function.path)


def as_key(key: Any) -> Any:
    """Return a dictionary key; values that are not plain become a Stub, for hashing nested tuples may never end."""
    return key if key is None or isinstance(key, str | int | float | bytes | Name) else Stub("key")


def require_str(value: Any) -> str:
    """Return a string.  Raises ValueError for another type: the text of nested tuples may never end either."""
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__} instead of a name")
    return value


def filled(target: Any, pairs: list[Any]) -> None:
    """Set items of a dict, given as alternating keys and values; other targets ignore them."""
    if isinstance(target, dict):
        target.update(zip(map(as_key, pairs[::2]), pairs[1::2], strict=True))


def extended(target: Any, values: list[Any]) -> None:
    """Append values to a list; other targets ignore them."""
    if isinstance(target, list):
        target.extend(values)


def persistent(pid: Any) -> Storage:
    """Return the storage of a persistent id of torch."""
    kind, dtype, key, _, numel, *_ = pid
    if kind != "storage" or not isinstance(dtype, Name) or dtype.path.rpartition(".")[2] not in DTYPE:
        raise ValueError("a reference to something other than a storage of torch")
    return Storage(require_str(key), DTYPE[dtype.path.rpartition(".")[2]], int(numel))


def _mark(m: PickleMachine, arg: Any) -> None:
    m.marks.append(len(m.stack))


def _global(m: PickleMachine, arg: Any) -> None:
    m.push(Name(arg.replace(" ", ".", 1)))


def _stack_global(m: PickleMachine, arg: Any) -> None:
    m.push(Name(".".join(map(require_str, m.take(2)))))


def _put(m: PickleMachine, arg: Any) -> None:
    m.memo[int(arg)] = m.stack[-1]


def _pop(m: PickleMachine, arg: Any) -> None:
    if m.marks and m.marks[-1] == len(m.stack):
        m.marks.pop()
    else:
        m.take(1)


def _setitem(m: PickleMachine, arg: Any) -> None:
    pair = m.take(2)
    filled(m.stack[-1], pair)


def _setitems(m: PickleMachine, arg: Any) -> None:
    pairs = m.since_mark()
    filled(m.stack[-1], pairs)


def _append(m: PickleMachine, arg: Any) -> None:
    value = m.take(1)
    extended(m.stack[-1], value)


def _appends(m: PickleMachine, arg: Any) -> None:
    values = m.since_mark()
    extended(m.stack[-1], values)


def _dict(m: PickleMachine, arg: Any) -> None:
    items: dict = {}
    filled(items, m.since_mark())
    m.push(items)


def _tuple(count: int) -> Callable[[PickleMachine, Any], None]:
    return lambda m, arg: m.push(tuple(m.take(count)))


def _reduce(m: PickleMachine, arg: Any) -> None:
    m.push(called(*m.take(2)))


def _new_with(m: PickleMachine, arg: Any) -> None:
    function, arguments, _ = m.take(3)
    m.push(called(function, arguments))


def _object(m: PickleMachine, arg: Any) -> None:
    function, *arguments = m.since_mark()
    m.push(called(function, arguments))


def _instance(m: PickleMachine, arg: Any) -> None:
    m.push(called(Name(arg.replace(" ", ".", 1)), m.since_mark()))


_LITERALS = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8"
)
_TEXTS = "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8"
OPS: Mapping[str, Callable[[PickleMachine, Any], Any]] = {
    **dict.fromkeys((*_LITERALS.split(), *_TEXTS.split()), PickleMachine.push),
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, arg: None),
    "NONE": lambda m, arg: m.push(None),
    "NEWTRUE": lambda m, arg: m.push(True),
    "NEWFALSE": lambda m, arg: m.push(False),
    "EMPTY_LIST": lambda m, arg: m.push([]),
    "EMPTY_DICT": lambda m, arg: m.push({}),
    "EMPTY_TUPLE": lambda m, arg: m.push(()),
    "EMPTY_SET": lambda m, arg: m.push([]),  # as a list, so that its items need not be hashed
    **dict.fromkeys(("LIST", "FROZENSET"), lambda m, arg: m.push(m.since_mark())),
    "TUPLE": lambda m, arg: m.push(tuple(m.since_mark())),
    **{f"TUPLE{count}": _tuple(count) for count in (1, 2, 3)},
    **{
        "DICT": _dict,
        "SETITEM": _setitem,
        "SETITEMS": _setitems,
        "APPEND": _append,
        "APPENDS": _appends,
        "ADDITEMS": _appends,
    },
    **{
        "MARK": _mark,
        "POP": _pop,
        "POP_MARK": lambda m, arg: m.since_mark(),
        "DUP": lambda m, arg: m.push(m.stack[-1]),
    },
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, arg: m.push(m.memo[int(arg)])),
    "MEMOIZE": lambda m, arg: _put(m, len(m.memo)),
    **{"GLOBAL": _global, "STACK_GLOBAL": _stack_global, "INST": _instance, "OBJ": _object, "NEWOBJ_EX": _new_with},
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _reduce),
    "BUILD": lambda m, arg: m.take(1),
    "BINPERSID": lambda m, arg: m.push(persistent(m.take(1)[0])),
}
