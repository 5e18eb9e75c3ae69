"""Convert state dicts between a published layout and ours with one table of names, losslessly in both directions."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from re import findall

import torch
from torch import Tensor, nn

from ldm.errors import UserError

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class KeyMapping:
    """A tensor of ours and the tensor of theirs that it equals, or those that it is stacked from along the first axis.

    trailing_ones: axes of length 1 at the end that theirs has more than ours (a 1x1 convolution where ours is linear),
        fewer if negative.
    transposed: theirs is the transpose.
    """

    ours: str
    theirs: tuple[str, ...]
    trailing_ones: int = 0
    transposed: bool = False

    def join(self, parts: list[Tensor]) -> Tensor:
        """Return our tensor, built from theirs."""
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensor = tensor.T if self.transposed else tensor
        return tensor.reshape(resized(tensor.shape, -self.trailing_ones))

    def split(self, tensor: Tensor) -> Iterable[Tensor]:
        """Return their tensors, split from ours."""
        tensor = tensor.reshape(resized(tensor.shape, self.trailing_ones))
        tensor = tensor.T if self.transposed else tensor
        return [tensor] if len(self.theirs) == 1 else tensor.chunk(len(self.theirs))


def resized(shape: torch.Size, ones: int) -> tuple[int, ...]:
    """Return a shape with `ones` more axes of length 1 at its end, or fewer if negative.

    Raises UserError if the axes to remove are longer.
    """
    if ones >= 0:
        return (*shape, *[1] * ones)
    if len(shape) < -ones or any(size != 1 for size in shape[ones:]):
        raise UserError(f"shape {list(shape)}: expected {-ones} axes of length 1 at its end")
    return tuple(shape[:ones])


def layer_rows(names: Mapping[str, str], ours: str, theirs: str, ones: int = 0) -> Iterator[KeyMapping]:
    """Yield the rows of weight and bias of each layer of a module.

    names: layer name of ours -> theirs.  ours, theirs: prefix of the module.  ones: trailing_ones of the weights.
    """
    for our_name, their_name in names.items():
        yield KeyMapping(f"{ours}{our_name}.weight", (f"{theirs}{their_name}.weight",), ones)
        yield KeyMapping(f"{ours}{our_name}.bias", (f"{theirs}{their_name}.bias",))


def import_state(table: Iterable[KeyMapping], state: State, what: str) -> dict[str, Tensor]:
    """Convert their state dict to ours; rows of which theirs has nothing are left out.

    what: name of the layout, for messages.
    Raises UserError for a name that is not in the table, and if only a part of a stacked tensor is present.
    """
    converted: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in table:
        present = [name for name in row.theirs if name in state]
        if not present:
            continue
        if missing := [name for name in row.theirs if name not in state]:
            raise UserError(f"{what}: {missing[0]} is missing, but {present[0]} is present")
        converted[row.ours] = row.join([state[name] for name in row.theirs])
        used.update(present)
    reject_unknown(state.keys() - used, what)
    return converted


def export_state(table: Iterable[KeyMapping], state: State, what: str) -> dict[str, Tensor]:
    """Convert our state dict to theirs.  Raises UserError for a tensor of ours without a name in the layout."""
    converted: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in table:
        if row.ours in state:
            converted.update(zip(row.theirs, row.split(state[row.ours]), strict=True))
            used.add(row.ours)
    reject_unknown(state.keys() - used, what)
    return converted


def reject_unknown(names: Iterable[str], what: str) -> None:
    """Raise UserError if there are names that a layout does not have."""
    if left := sorted(names):
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise UserError(f"{what}: unknown names {', '.join(left[:3])}{more}; expected only the names of this layout")


def count(pattern: str, names: Iterable[str]) -> int:
    """Return one more than the largest number that the pattern's group matches in the names; 0 without a match."""
    return max((int(number) + 1 for number in findall(pattern, "\n".join(names))), default=0)


def load_strict(module: nn.Module, state: State, what: str, optional: Collection[str] = ()) -> None:
    """Load a state dict that must have every weight of a module, in its shape, except optional names.

    A floating-point weight of the module must be floating-point in the state dict: integers, booleans and complex
    numbers are packed or other weights.  Raises UserError naming the first that does not fit.
    """
    expected = module.state_dict()
    if missing := sorted(expected.keys() - state.keys() - set(optional)):
        raise UserError(f"{what}: {len(missing)} weights are missing, the first is {missing[0]}")
    if other := sorted(state.keys() - expected.keys()):
        raise UserError(
            f"{what}: {len(other)} weights belong to another architecture than the config's, the first is {other[0]}"
        )
    for name, value in state.items():
        if expected[name].shape != value.shape:
            raise UserError(
                f"{what}: {name} is {list(value.shape)}, the config's model has {list(expected[name].shape)}"
            )
    require_floating({name: value for name, value in state.items() if expected[name].is_floating_point()}, what)
    module.load_state_dict({**expected, **state})


def require_floating(state: State, what: str) -> None:
    """Check that all tensors are floating-point, unlike quantized weights.  Raises UserError naming the first."""
    for name, value in state.items():
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(
                f"{what}: {name} is {kind}; expected floating-point weights, such as float32 or float16; "
                "convert the file"
            )


def strip_prefix(prefix: str, state: State) -> dict[str, Tensor]:
    """Return the part of a state dict whose names begin with `prefix`, without the prefix."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
