"""What do averages of weights do, ours and those of three libraries? python experiments/averages/table.py

Writes averages.csv and the table of README.md. Every cell is measured: the decay of an update is what it leaves of an
average of 1 if the weights are 0.
"""

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

HERE = Path(__file__).parent
TABLE, README = HERE / "averages.csv", HERE / "README.md"
UPDATES = (1, 2, 10, 100, 1000, 100_000)
DECAY = 0.9999


class Module(nn.Module):
    """A trainable weight, a frozen one, a buffer of floats and one of integers, one number each."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(1, dtype=dtype), requires_grad=False)
        self.register_buffer("floats", torch.ones(1, dtype=dtype))
        self.register_buffer("integers", torch.full((1,), 1000))

    @torch.no_grad()
    def fill(self, value: float) -> None:
        """Set every number to `value`, the integers to a thousand times that."""
        for tensor in (self.weight, self.frozen, self.floats):
            tensor.fill_(value)
        self.integers.fill_(int(1000 * value))


class Average(NamedTuple):
    """An average of a module's weights.

    update: () -> None.  averaged: () -> the module to sample with, by name of its tensors.  count: sets the number of
    updates so far.  saved: () -> the names of what is saved beside tensors of the module.
    """

    update: Callable[[], None]
    averaged: Callable[[], dict[str, torch.Tensor]]
    count: Callable[[int], None]
    saved: Callable[[], list[str]]


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def ours(module: Module, kind: str, **options: Any) -> Average:
    """Ours: the count is part of a checkpoint's state."""
    from ldm import ema

    average = getattr(ema, kind)(module, **options)

    def averaged() -> dict[str, torch.Tensor]:
        with average.swapped_in():
            return tensors(module)

    return Average(average.update, averaged, lambda n: setattr(average, "updates", n), lambda: ["updates"])


def of_torch(module: Module, **options: Any) -> Average:
    """torch's AveragedModel, by get_ema_multi_avg_fn."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY), **options)
    return Average(
        lambda: average.update_parameters(module),
        lambda: tensors(average.module),
        lambda n: average.n_averaged.fill_(n),
        lambda: [name for name in average.state_dict() if not name.startswith("module.")],
    )


def of_diffusers(module: Module, **options: Any) -> Average:
    """diffusers' EMAModel, copied into the module for sampling."""
    from diffusers.training_utils import EMAModel

    average = EMAModel(module.parameters(), decay=DECAY, **options)

    def averaged() -> dict[str, torch.Tensor]:
        other = copy.deepcopy(module)
        average.copy_to(other.parameters())
        return tensors(other)

    return Average(
        lambda: average.step(module.parameters()),
        averaged,
        lambda n: setattr(average, "optimization_step", n),
        lambda: [name for name in average.state_dict() if name == "optimization_step"],
    )


def of_ema_pytorch(module: Module, kind: str = "EMA", **options: Any) -> Average:
    """ema-pytorch's EMA, and KarrasEMA of its post-hoc average."""
    from ema_pytorch import post_hoc_ema
    from ema_pytorch.ema_pytorch import EMA

    average = {"EMA": EMA, "KarrasEMA": post_hoc_ema.KarrasEMA}[kind](module, **options)

    def count(n: int) -> None:
        average.step.fill_(n)
        average.initted.fill_(n > 0)

    return Average(
        average.update,
        lambda: tensors(average.ema_model),
        count,
        lambda: [name for name in average.state_dict() if name == "step"],
    )


class Row(NamedTuple):
    """A row: its name, its options as they are typed, and how it is made."""

    average: str
    options: str
    make: Callable[[Module], Average]


ROWS = [
    Row("ours", "ema=constant", lambda m: ours(m, "ConstantEMA", decay=DECAY)),
    Row("ours", "ema=ldm (warmup)", lambda m: ours(m, "ConstantEMA", decay=DECAY, warmup=True)),
    Row("ours", "ema=power (sigma_rel=0.05)", lambda m: ours(m, "PowerEMA", sigma_rel=0.05)),
    Row("torch AveragedModel", "", of_torch),
    Row("torch AveragedModel", "use_buffers=True", lambda m: of_torch(m, use_buffers=True)),
    Row("diffusers EMAModel", "", of_diffusers),
    Row("diffusers EMAModel", "min_decay=0.9999", lambda m: of_diffusers(m, min_decay=DECAY)),
    Row(
        "diffusers EMAModel",
        "use_ema_warmup=True, power=3/4",
        lambda m: of_diffusers(m, use_ema_warmup=True, power=3 / 4),
    ),
    Row("diffusers EMAModel", "update_after_step=50", lambda m: of_diffusers(m, update_after_step=50)),
    Row("ema-pytorch EMA", "", of_ema_pytorch),
    Row(
        "ema-pytorch EMA",
        "update_every=1, update_after_step=0",
        lambda m: of_ema_pytorch(m, update_every=1, update_after_step=0),
    ),
    Row(
        "ema-pytorch EMA",
        "update_every=1, update_after_step=0, min_value=0.9999",
        lambda m: of_ema_pytorch(m, update_every=1, update_after_step=0, min_value=DECAY),
    ),
    Row(
        "ema-pytorch KarrasEMA",
        "sigma_rel=0.05, update_every=1",
        lambda m: of_ema_pytorch(m, "KarrasEMA", sigma_rel=0.05, update_every=1),
    ),
]


def decay_of(make: Callable[[Module], Average], update: int) -> float:
    """Return what the update of that number, counted from 1, leaves of an average of 1 if the weights are 0."""
    module = Module()
    average = make(module)
    average.count(update - 1)
    module.fill(0.0)
    average.update()
    return float(average.averaged()["weight"])


def treatment(start: float, end: float, value: float) -> str:
    """Return how a tensor that went from `start` to `end` was treated."""
    return {start: "as at the start", end: "current"}.get(value, "averaged")


def measure(row: Row) -> dict[str, str]:
    """Return a row of the table."""
    values = {"average": row.average, "options": row.options}
    values |= {f"decay at {update}": f"{decay_of(row.make, update):.10g}" for update in UPDATES}
    module = Module()
    average = row.make(module)
    module.fill(0.0)
    for _ in range(1000):
        average.update()
    values["first weights after 1000"] = f"{float(average.averaged()['weight']):.6g}"
    module = Module()
    average = row.make(module)
    average.update()
    average.count(100_000)
    module.fill(0.0)
    average.update()
    last = average.averaged()
    for title, name, scale in (
        ("frozen", "frozen", 1),
        ("float buffers", "floats", 1),
        ("integer buffers", "integers", 1000),
    ):
        values[title] = treatment(scale, 0, float(last[name]))
    low = Module(torch.bfloat16)
    average = row.make(low)
    average.update()
    average.count(100_000)
    low.fill(0.5)
    for _ in range(100):
        average.update()
    moved = shadow_of(average, low)
    values["bfloat16 weights"] = "averaged" if moved < 1 else "never move"
    values["saved count"] = ", ".join(average.saved())
    return values


def shadow_of(average: Average, module: Module) -> float:
    """Return the average weight, in the dtype in which it is averaged."""
    owner = getattr(average.update, "__self__", None)
    shadow = getattr(owner, "shadow", None)
    return float(shadow["weight"] if shadow else average.averaged()["weight"])


def markdown(rows: list[dict[str, str]]) -> str:
    """Return the table of README.md."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])


def with_table(text: str, rows: list[dict[str, str]]) -> str:
    """Return the text of README.md with its table replaced."""
    before, _, rest = text.partition("<!-- table -->\n")
    return f"{before}<!-- table -->\n{markdown(rows)}\n<!-- /table -->{rest.partition('<!-- /table -->')[2]}"


def read() -> list[dict[str, str]]:
    """Read averages.csv."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Measure the averages; write averages.csv and the table of README.md."""
    made = [measure(row) for row in ROWS]
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, made[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)
    README.write_text(with_table(README.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
