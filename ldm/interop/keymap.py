"""A table of names read both ways: from a published layout's state dict to ours, and back to the identical one."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from re import findall

import torch
from torch import Tensor, nn

from ldm.errors import UserError

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class KeyMapping:
    """A tensor of ours and the one of theirs that it is, or those that it is stacked of along the first axis.

    ones: axes of length 1 at the end that theirs has more than ours (a 1x1 convolution where ours is linear), fewer if negative.
    turned: theirs is the transpose.
    """

    ours: str
    theirs: tuple[str, ...]
    trailing_ones: int = 0
    transposed: bool = False

    def join(self, parts: list[Tensor]) -> Tensor:
        """Ours, of theirs."""
        one = torch.cat(parts) if len(parts) > 1 else parts[0]
        one = one.T if self.transposed else one
        return one.reshape(resized(one.shape, -self.trailing_ones))

    def split(self, whole: Tensor) -> Iterable[Tensor]:
        """Theirs, of ours."""
        whole = whole.reshape(resized(whole.shape, self.trailing_ones))
        whole = whole.T if self.transposed else whole
        return [whole] if len(self.theirs) == 1 else whole.chunk(len(self.theirs))


def resized(shape: torch.Size, ones: int) -> tuple[int, ...]:
    """A shape with `ones` more axes of length 1 at its end, or that many fewer. Raises UserError where those are longer."""
    if ones >= 0:
        return (*shape, *[1] * ones)
    if len(shape) < -ones or any(size != 1 for size in shape[ones:]):
        raise UserError(f"shape {list(shape)}: expected {-ones} axes of length 1 at its end")
    return tuple(shape[:ones])


def layer_rows(names: Mapping[str, str], ours: str, theirs: str, ones: int = 0) -> Iterator[KeyMapping]:
    """Weight and bias of each layer of a module, by its name in ours and in theirs; ours and theirs: the module's own names."""
    for mine, yours in names.items():
        yield KeyMapping(f"{ours}{mine}.weight", (f"{theirs}{yours}.weight",), ones)
        yield KeyMapping(f"{ours}{mine}.bias", (f"{theirs}{yours}.bias",))


def import_state(table: Iterable[KeyMapping], state: State, what: str) -> dict[str, Tensor]:
    """Our state dict of theirs; what: the layout's name. Rows that theirs has nothing of are left to whoever loads the result.

    Raises UserError for a name that the table does not have, and for a part that is missing beside another.
    """
    made: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in table:
        there = [name for name in row.theirs if name in state]
        if not there:
            continue
        if missing := [name for name in row.theirs if name not in state]:
            raise UserError(f"{what}: {missing[0]} is missing beside {there[0]}")
        made[row.ours] = row.join([state[name] for name in row.theirs])
        used.update(there)
    reject_unknown(state.keys() - used, what)
    return made


def export_state(table: Iterable[KeyMapping], state: State, what: str) -> dict[str, Tensor]:
    """Their state dict of ours. Raises UserError for a tensor of ours that the layout has no name for."""
    made: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in table:
        if row.ours in state:
            made.update(zip(row.theirs, row.split(state[row.ours]), strict=True))
            used.add(row.ours)
    reject_unknown(state.keys() - used, what)
    return made


def reject_unknown(names: Iterable[str], what: str) -> None:
    """Raises UserError if there are names that a layout has no place for."""
    if left := sorted(names):
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise UserError(
            f"{what}: no place for {', '.join(left[:3])}{more}; expected the names of this layout and no other"
        )


def count(pattern: str, names: Iterable[str]) -> int:
    """One more than the largest number that the pattern's group finds in the names; 0 where it finds none."""
    return max((int(found) + 1 for found in findall(pattern, "\n".join(names))), default=0)


def load_strict(module: nn.Module, state: State, what: str, optional: Collection[str] = ()) -> None:
    """Load a state dict into a module whose every weight it must hold, in its shape, but for optional names.

    A weight that is a floating-point number in the module must be one in the state dict: integers, booleans and complex numbers are
    packed or other weights, not these.  Raises UserError naming the first that does not fit.
    """
    live = module.state_dict()
    if missing := sorted(live.keys() - state.keys() - set(optional)):
        raise UserError(f"{what}: {len(missing)} weights are missing, the first is {missing[0]}")
    if other := sorted(state.keys() - live.keys()):
        raise UserError(
            f"{what}: {len(other)} weights belong to another architecture than the config's, the first is {other[0]}"
        )
    for name, value in state.items():
        if live[name].shape != value.shape:
            raise UserError(f"{what}: {name} is {list(value.shape)}, the config makes it {list(live[name].shape)}")
    require_floating({name: value for name, value in state.items() if live[name].is_floating_point()}, what)
    module.load_state_dict({**live, **state})


def require_floating(state: State, what: str) -> None:
    """Raises UserError naming the first tensor whose numbers are not floating-point, as those of quantized weights are not."""
    for name, value in state.items():
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(
                f"{what}: {name} is {kind}; expected floating-point weights, such as float32 or float16; convert the file"
            )


def strip_prefix(prefix: str, state: State) -> dict[str, Tensor]:
    """The part of a state dict whose names begin with prefix, without it."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
