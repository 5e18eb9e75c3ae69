"""Compare the rows of a study with the paper and with the baseline arm, paired by seed, as a table."""

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

    published, theirs: the paper's number, and its difference from the paper's baseline.
    ours, seeds: our mean, and the number of seeds.
    difference, interval: from the baseline arm, paired by seed; None without pairs, the interval also for a single
        pair.
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
        """Whether ours differs from the baseline in the same direction as the paper's: yes, no, or not told apart."""
        if not self.theirs or self.interval is None:
            return NONE
        low, high = self.interval
        if low <= 0 <= high:
            return "not told apart"
        return "yes" if (low > 0) == (self.theirs > 0) else "no"


def check_protocols(study: Study, results: Sequence[rows.Row]) -> None:
    """Check that all rows were measured with one protocol.

    Between arms the entries in `differs` may differ, within an arm nothing.  Raises UserError naming the key.
    """
    first: dict[Arm, rows.Row] = {}
    for row in results:
        arm = study.arm(row)
        for other, free in ((first.setdefault(arm, row), ()), (results[0], study.differs)):
            keys = [key for key in protocol.protocol_differences(row, other) if key.removeprefix("score/") not in free]
            keys = [key for key in keys if rows.format_cell(row.get(key)) != rows.format_cell(other.get(key))]
            if keys:
                values = [rows.format_cell(one.get(keys[0])) or "unset" for one in (other, row)]
                raise UserError(
                    f"{study.folder}: two protocols, not one: {keys[0]} is {values[0]} for {_of(study, other)} and "
                    f"{values[1]} for {_of(study, row)}; measure both alike, or add it to `differs` of study.yaml "
                    "if it is the question"
                )


def _of(study: Study, row: rows.Row) -> str:
    return f"{', '.join(study.arm(row))} seed {row.get('seed')}"


def comparisons(study: Study, results: Sequence[rows.Row], planned: Sequence[Arm] = ()) -> list[Comparison]:
    """Compare each metric of each arm.

    Arms are in the order baseline, planned, measured, published. The first metric has a line for every arm, the others
    only for arms with a number.  Raises UserError as `check_protocols` does.
    """
    check_protocols(study, results)
    base = study.arm(study.baseline)
    known = [base, *planned, *map(study.arm, results), *map(study.arm, study.published)]
    lines = [_line(study, arm, metric, results) for metric in study.metrics for arm in dict.fromkeys(known)]
    first = next(iter(study.metrics))
    return [line for line in lines if line.seeds or line.published is not None or line.metric == first]


def _line(study: Study, arm: Arm, metric: str, results: Sequence[rows.Row]) -> Comparison:
    base = study.arm(study.baseline)
    ours, reference = by_seed(study, arm, metric, results), by_seed(study, base, metric, results)
    name = study.metrics[metric]
    numbers = {study.arm(one): rows.parse_number(one.get(name)) for one in study.published} if name else {}
    published, other = numbers.get(arm), numbers.get(base)
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


def by_seed(study: Study, arm: Arm, metric: str, results: Sequence[rows.Row]) -> dict[str, float]:
    """Return seed -> the number of an arm."""
    values = {
        rows.format_cell(row.get("seed")): rows.parse_number(row.get(metric))
        for row in results
        if study.arm(row) == arm
    }
    return {seed: value for seed, value in values.items() if value is not None}


def markdown(study: Study, lines: Sequence[Comparison]) -> str:
    """Format the table as Markdown, with a line below it on what the numbers are."""
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
    for line in lines:
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


def count_verdicts(lines: Sequence[Comparison]) -> str:
    """Summarize in words how many of the paper's differences are reproduced."""
    verdicts = [line.verdict for line in lines if line.verdict != NONE]
    counts = {word: verdicts.count(word) for word in ("yes", "no", "not told apart")}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or NONE


def replace_block(text: str, name: str, inside: str) -> str:
    """Replace what is between `<!-- name -->` and `<!-- /name -->`.  Raises UserError if the marks are missing."""
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not marks.search(text):
        raise UserError(f"no <!-- {name} --> and <!-- /{name} --> to write between")
    return marks.sub(lambda match: f"{match[1]}{inside}\n{match[2]}", text, count=1)


def read_block(text: str, name: str) -> str | None:
    """Return what is between the marks, or None."""
    match = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    return match[1].removesuffix("\n") if match else None


def overview(studies: Mapping[str, tuple[Study, Sequence[Comparison]]], base: str = "") -> str:
    """Format the table of studies; base: path of their folder, relative to the file that contains the table."""
    out = ["| study | paper | question | arms | seeds | scale | as in the paper? |", "|---|---|---|---|---|---|---|"]
    for name, (study, lines) in studies.items():
        arms = {line.arm for line in lines if line.seeds}
        seeds = max((line.seeds for line in lines), default=0)
        cells = (
            f"[{name}]({base}{name}/README.md)",
            study.paper.partition(":")[0] or NONE,
            study.question,
            str(len(arms)),
            str(seeds),
        )
        out.append("| " + " | ".join((*cells, study.scale if arms else "not run", count_verdicts(lines))) + " |")
    return "\n".join(out)
