"""Rewrite the sweeps among a command's overrides so that this command and Hydra's sweeper expand them to the same jobs.

Hydra's grammar of overrides: https://hydra.cc/docs/advanced/override_grammar/extended
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ldm.errors import UserError

Options = Callable[[str], Sequence[str]]  # config group -> its options, for glob()


def name_job(overrides: Iterable[str]) -> str:
    """Join the overrides of a sweep's job into its name in tables."""
    return " ".join(one for one in overrides if not one.startswith("dry_run="))


def list_values(override: Any, options: Options) -> list[str]:
    """List the values of a discrete sweep, written in the grammar, in the order of Hydra's basic sweeper.

    override: parsed by Hydra.  shuffle() gives another order at each call.  Raises UserError if there is no value.
    """
    from hydra.core.override_parser.types import Glob, RangeSweep
    from hydra.errors import HydraException

    line, value = override.input_line, override.value()
    if override.is_hydra_override():
        raise UserError(f"{line}: Hydra's own settings are the same for every job of a sweep")
    if isinstance(value, Glob):
        names = list(options(override.key_or_group))
        if not names:
            raise UserError(f"{line}: glob() selects options of a group, and {override.key_or_group} is not a group")
        if not (matches := value.filter(names)):
            raise UserError(f"{line}: no option matches (one of {', '.join(names)})")
        return [name if _is_word(name) else _quote(name) for name in matches]
    if isinstance(value, RangeSweep) and not all(
        x is None or math.isfinite(x) for x in (value.start, value.stop, value.step)
    ):
        raise UserError(f"{line}: a range needs finite numbers")
    try:
        values = list(override.sweep_string_iterator())
    except (HydraException, ValueError) as error:  # a step of 0
        raise UserError(f"{line}: {' '.join(str(error).split())}") from None
    if not values:
        raise UserError(f"{line}: a sweep over no value")
    return values


def take_first(override: Any, options: Options) -> str | None:
    """Return the override with the first of its values; None for an interval, from which a search samples."""
    if not override.is_sweep_override():
        return override.input_line
    return f"{override.get_key_element()}={list_values(override, options)[0]}" if override.is_discrete_sweep() else None


def write_sweep(
    params: Sequence[Any], typed: Sequence[Any], sweeper: Any, options: Options
) -> tuple[list[str], list[str]]:
    """Return the overrides to pass to Hydra, and all those that its sweeper then reads.

    Both lists are stable: reading them again gives the same jobs.

    params: the sweeper's own, from the config.  typed: from the command line.  sweeper: its config.
    Raises UserError as `write_out` does.
    """
    from hydra.core.override_parser.types import Glob

    def write(override: Any) -> str:
        if "optuna" in sweeper._target_:
            return write_search(override, options, "GridSampler" in str(sweeper.sampler))
        return write_out(override, options) if "basic" in sweeper._target_ else override.input_line

    for one in params:
        # The sweeper asserts that its params have no glob before it sees the override that replaces it.
        if isinstance(one.value(), Glob) and "optuna" in sweeper._target_:
            raise UserError(
                f"hydra.sweeper.params: {one.input_line}: Optuna's sweeper does not support glob(); write choice(...)"
            )
    before, after = [write(one) for one in params], [write(one) for one in typed]
    # Each replaces the param, in its position.
    changed = [line for one, line in zip(params, before, strict=True) if line != one.input_line]
    return changed + after, before + after


def write_out(override: Any, options: Options) -> str:
    """Expand glob() and shuffle(), which give other jobs when they are read again, to the list of their values.

    Other overrides are returned as typed. The list is a,b,c because choice() drops the quotes of a text, so that 'nan'
    would become a number.  Raises UserError for a sweep over no value, and for an interval, which has no list.
    """
    from hydra.core.override_parser.types import Glob

    line, value, key = override.input_line, override.value(), override.get_key_element()
    if override.is_hydra_override() or override.is_delete():
        return line
    if not override.is_sweep_override():  # shuffle([a,b]) is one value, a list in some order
        return f"{key}=choice({override.get_value_element_as_str()})" if re.search(r"\bshuffle\s*\(", line) else line
    if override.is_interval_sweep():
        raise UserError(
            f"{line}: an interval has no list of values, a search samples from it; "
            "add hydra/sweeper=optuna, or write values"
        )
    values = list_values(override, options)
    return f"{key}={','.join(values)}" if isinstance(value, Glob) or value.shuffle else line


def write_search(override: Any, options: Options, grid: bool) -> str:
    """Rewrite a sweep so that Optuna's sweeper samples from exactly the values that the grammar gives it.

    The sweeper includes the end of a range in its values, its grid leaves out the last one, it refuses glob() and a
    falling range, and passes text on without quotes. The order of the values has no meaning in a search, so shuffle()
    is dropped: the choices of a stored study must not change. Other overrides are returned as typed.

    grid: whether the sampler is a grid.  Raises UserError for a sweep over no value.
    """
    from hydra.core.override_parser.types import ChoiceSweep, RangeSweep, Transformer

    value, key = override.value(), override.get_key_element()
    if not override.is_sweep_override():
        return write_out(override, options)
    if override.is_interval_sweep():
        return override.input_line
    values = list_values(override, options)
    if isinstance(value, RangeSweep):
        numbers = list(value.range())
        values = [Transformer.str(number) for number in numbers]
        if not value.shuffle and not grid:
            first, last, step = map(Transformer.str, (min(numbers), max(numbers), abs(value.step)))
            return f"{key}=range({first},{last},{step})"
    elif isinstance(value, ChoiceSweep):
        texts = [(one, Transformer.str(one)) for one in value.list]
        values = [_quote(one) if isinstance(one, str) and one != text else text for one, text in texts]
    return f"{key}={','.join(values)}"


def _quote(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def _is_word(text: str) -> bool:
    """Return whether the grammar reads the text as a string without quotes."""
    return bool(re.fullmatch(r"[A-Za-z_][\w/-]*", text)) and text.lower() not in ("nan", "inf", "null", "true", "false")
