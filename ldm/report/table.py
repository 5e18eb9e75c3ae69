"""What the rows of a study say: each arm beside the paper's and beside the baseline arm, paired by seed, as a table of words."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from ldm.errors import UserError
from ldm.evaluation import protocol
from ldm.metrics.interval import paired
from ldm.report import rows
from ldm.report.study import Arm, Study

NONE = "–"


@dataclass(frozen=True)
class Comparison:
    """One metric of one arm.

    published, theirs: the paper's number, and how it differs from its baseline's.  ours, seeds: the mean, and over how many seeds.
    difference, interval: from the baseline arm, paired by seed; None where there is none, or but one pair.
    """

    arm: Arm
    metric: str
    published: float | None
    theirs: float | None
    ours: float | None
    seeds: int
    difference: float | None
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """Whether ours differs from the baseline as the paper's does: yes, no, or not told apart."""
        if not self.theirs or self.interval is None:
            return NONE
        low, high = self.interval
        if low <= 0 <= high:
            return "not told apart"
        return "yes" if (low > 0) == (self.theirs > 0) else "no"


def check_protocols(study: Study, found: Sequence[rows.Row]) -> None:
    """Raises UserError, naming the key, where two rows were not measured by one protocol.

    Between arms what is asked may differ (`differs`), within an arm nothing.
    """
    first: dict[Arm, rows.Row] = {}
    for row in found:
        arm = study.arm(row)
        for other, free in ((first.setdefault(arm, row), ()), (found[0], study.differs)):
            keys = [key for key in protocol.protocol_differences(row, other) if key.removeprefix("score/") not in free]
            if keys and (
                keys := [key for key in keys if rows.format_cell(row.get(key)) != rows.format_cell(other.get(key))]
            ):
                one, two = (
                    rows.format_cell(other.get(keys[0])) or "nothing said",
                    rows.format_cell(row.get(keys[0])) or "nothing said",
                )
                raise UserError(
                    f"{study.folder}: two protocols, not one: {keys[0]} is {one} for {_of(study, other)} and {two} for {_of(study, row)}; "
                    f"measure both alike, or name it in `differs` of study.yaml if it is what is asked"
                )


def _of(study: Study, row: rows.Row) -> str:
    return f"{', '.join(study.arm(row))} seed {row.get('seed')}"


def comparisons(study: Study, found: Sequence[rows.Row], planned: Sequence[Arm] = ()) -> list[Comparison]:
    """Each metric of each arm, the baseline first, then as planned, as measured and as published; of the first metric all, of others what
    has a number.  Raises UserError as admitted does.
    """
    check_protocols(study, found)
    base = study.arm(study.baseline)
    known = [base, *planned, *map(study.arm, found), *map(study.arm, study.published)]
    every = [_line(study, arm, metric, found) for metric in study.metrics for arm in dict.fromkeys(known)]
    return [
        line for line in every if line.seeds or line.published is not None or line.metric == next(iter(study.metrics))
    ]


def _line(study: Study, arm: Arm, metric: str, found: Sequence[rows.Row]) -> Comparison:
    base = study.arm(study.baseline)
    ours, reference = by_seed(study, arm, metric, found), by_seed(study, base, metric, found)
    name = study.metrics[metric]
    said = {study.arm(one): rows.parse_number(one.get(name)) for one in study.published} if name else {}
    published, other = said.get(arm), said.get(base)
    theirs = published - other if published is not None and other is not None and arm != base else None
    pairs = [value - reference[seed] for seed, value in ours.items() if seed in reference and arm != base]
    interval = paired(pairs) if len(pairs) > 1 else None
    return Comparison(
        arm,
        metric,
        published,
        theirs,
        mean(ours.values()) if ours else None,
        len(ours),
        mean(pairs) if pairs else None,
        interval,
    )


def by_seed(study: Study, arm: Arm, metric: str, found: Sequence[rows.Row]) -> dict[str, float]:
    """Seed -> the number of an arm."""
    values = {
        rows.format_cell(row.get("seed")): rows.parse_number(row.get(metric)) for row in found if study.arm(row) == arm
    }
    return {seed: value for seed, value in values.items() if value is not None}


def markdown(study: Study, shown: Sequence[Comparison]) -> str:
    """The table, and below it what it is of."""
    heads = (
        *study.axes,
        "metric",
        "paper",
        "paper's difference",
        "ours",
        "difference",
        "95% interval",
        "as in the paper?",
        "seeds",
        "scale",
    )
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for line in shown:
        name = study.metrics[line.metric]
        metric = f"{line.metric} ({name})" if name and name != line.metric else line.metric
        low, high = line.interval or (None, None)
        reach = f"{format_signed(low)} to {format_signed(high)}" if line.interval else NONE
        state = study.scale if line.seeds else "not run"
        numbers = (
            format_number(line.published),
            format_signed(line.theirs),
            format_number(line.ours),
            format_signed(line.difference),
            reach,
            line.verdict,
        )
        out.append(
            "| " + " | ".join((*(cell or NONE for cell in line.arm), metric, *numbers, str(line.seeds), state)) + " |"
        )
    base = ", ".join(f"{axis} {cell}" for axis, cell in zip(study.axes, study.arm(study.baseline), strict=True))
    below = f"Differences are from {base}, paired by seed, with Student's interval of their mean."
    of = f" Paper: {study.paper}." if study.paper else ""
    return "\n".join([*out, "", f"{below}{of}{f' Ours: {study.setting}.' if study.setting else ''}"])


def format_number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def format_signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.3g}"


def count_verdicts(shown: Sequence[Comparison]) -> str:
    """In words, how many of the paper's differences show."""
    said = [line.verdict for line in shown if line.verdict != NONE]
    counts = {word: said.count(word) for word in ("yes", "no", "not told apart")}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or NONE


def replace_block(text: str, name: str, inside: str) -> str:
    """A text with what is between `<!-- name -->` and `<!-- /name -->` replaced. Raises UserError where the marks are missing."""
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not marks.search(text):
        raise UserError(f"no <!-- {name} --> and <!-- /{name} --> to write between")
    return marks.sub(lambda found: f"{found[1]}{inside}\n{found[2]}", text, count=1)


def read_block(text: str, name: str) -> str | None:
    """What stands between the marks, or None."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    return found[1].removesuffix("\n") if found else None


def overview(studies: Mapping[str, tuple[Study, Sequence[Comparison]]], base: str = "") -> str:
    """The table of studies; base: where they are, from where the table stands."""
    out = ["| study | paper | question | arms | seeds | scale | as in the paper? |", "|---|---|---|---|---|---|---|"]
    for name, (study, shown) in studies.items():
        arms = {line.arm for line in shown if line.seeds}
        seeds = max((line.seeds for line in shown), default=0)
        cells = (
            f"[{name}]({base}{name}/README.md)",
            study.paper.partition(":")[0] or NONE,
            study.question,
            str(len(arms)),
            str(seeds),
        )
        out.append("| " + " | ".join((*cells, study.scale if arms else "not run", count_verdicts(shown))) + " |")
    return "\n".join(out)
