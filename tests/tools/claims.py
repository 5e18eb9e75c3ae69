"""Every number that a README claims, beside the csv that it is from: python tests/tools/claims.py

claims.txt lists the claims: a line `# README csv` (or a kind of number that is not measured by us, see KINDS), then for
each claim a piece of the README's text, and below it, after `=`, one expression for each number in that text. This
command evaluates them (a number with % as a part of 1) and writes claims.csv. It exits with 1 if a number differs from
its csv, if a text is not in its README exactly once, or if a README has a number that is neither in claims.txt nor of a
kind that is allowed.

An expression is arithmetic in numbers and in these functions of the csv's rows: at{column|key=value, ...} is the only
such row's value; mean, min, max, median, sum{column|...} are of a column over such rows; count{|...} is their number,
count{column|...} that of distinct values; diff, low and high{column|arm|baseline} are the mean of arm - baseline,
paired by seed, and its 95% interval; slope{y|x|...} is that of the least-squares line. An empty expression stands for a
number that is no measurement. A csv may also be a .json file: one row, with a dot between the keys of its levels.
"""

import csv
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))
LISTED, TABLE = Path(__file__).with_name("claims.txt"), Path(__file__).with_name("claims.csv")
KINDS = ("setting", "paper", "aim", "arithmetic")  # instead of a csv: chosen, published, wanted, computed in the text
READMES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("README.md"), *ROOT.glob("tests/README.md"), *ROOT.glob("ldm/**/README.md"),
                 *ROOT.glob("experiments/**/*.md"))
)  # fmt: skip
NUMBER = re.compile(r"(?<![\w.])[-+]?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(e-?\d+)?(?![\w]*\d)")
SKIPPED = (  # parts of a README that hold no claim, or are generated and compared with their csv by another test
    r"```.*?```",
    r"^(?: {4}[^\n]*\n)+",
    r"^\| \d+ \| (?=[`\[])",  # a level of ldm/README.md
    r"<!-- (\w+) -->.*?<!-- /\1 -->",
    r"`[^`]*`",
    r"\]\([^)]*\)",
)
ALLOWED = (  # numbers that are names or settings wherever they stand
    r"\b(?:et al\.|[A-Z][^\W\d]+,?) (?:19|20)\d\d[ab]?\b",
    r"\b(?:19|20)\d\d[ab]?(?=[;,)])",
    r"\b(?:tab|fig|eq|app|sec|section|algorithm|appendix)s?\.? [A-Z]?\.?\d[\d.]*",
    r"\b(?:SD|Diffusion|seeds?|rank|step|scale|strength|transformers|LDM|float|row|factor) \d[\d.,]*"
    r"(?: (?:and|to|or) \d[\d.,]*)*",
    r"\bf = \d+|\bt = \d[\d./]*|\beta = \d[\d.]*|\bn = \d[\d,]*",
    r"\b\d[\d,]*(?: x \d+)+",
    r"\b\d[\d,]*(?:-step)?(?=(?: \w+)? (?:px|steps?|images?|samples|seeds|evaluations|pixels|channels|classes|"
    r"layers|tokens|captions|processes|threads?|cores|jobs|features|prompts|parameters|epochs?|levels|emoji|shards)\b"
    r"(?!/s| (?:per|a) second))",
    r"\[[-\d., ]+\]",
    r"\b95%(?= intervals?)",
)


@dataclass(frozen=True)
class Claim:
    """text: of a README.  source: a csv, relative to the README's folder or to the root, or one of KINDS."""

    readme: str
    source: str
    text: str
    expressions: tuple[str, ...]

    @property
    def numbers(self) -> list[str]:
        """The numbers of the text as written, with % where it follows."""
        text = plain(self.text)
        return [match[0] + "%" * text.startswith("%", match.end()) for match in NUMBER.finditer(text)]


def read_claims(path: Path = LISTED) -> Iterator[Claim]:
    """Parse claims.txt. Raises ValueError for a claim without its line of expressions."""
    readme = source = text = ""
    for line in path.read_text().splitlines():
        if line.startswith("# "):
            _, readme, source = line.split(maxsplit=2)
        elif line.startswith("="):
            if not text:
                raise ValueError(f"{path.name}: {line}: no text above it")
            yield Claim(readme, source, text, tuple(part.strip() for part in line[1:].split(";")))
            text = ""
        elif line.strip():
            if text:
                raise ValueError(f"{path.name}: {text}: no expressions below it")
            text = line.strip()
            if source in KINDS and source != "arithmetic":
                yield Claim(readme, source, text, ())
                text = ""


def plain(text: str) -> str:
    """Return a README's text with runs of white space as one space, and blanks in the place of what holds no claim."""
    for pattern in SKIPPED:
        text = re.sub(pattern, lambda match: " " * len(match[0]), text, flags=re.DOTALL | re.MULTILINE)
    return text


def squeeze(text: str) -> str:
    return " ".join(text.split())


@cache
def rows_of(path: Path) -> list[dict[str, str]]:
    if path.suffix == ".json":
        return [flatten(json.loads(path.read_text()))]
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def flatten(values: dict, prefix: str = "") -> dict[str, str]:
    """Return nested values as one row, with the keys of the levels joined by dots."""
    row = {}
    for key, value in values.items():
        row |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: str(value)}
    return row


def source_path(claim: Claim) -> Path:
    beside = (ROOT / claim.readme).parent / claim.source
    return beside if beside.is_file() else ROOT / claim.source


def select(rows: Sequence[dict[str, str]], where: str) -> list[dict[str, str]]:
    """Return the rows for which every `key=value` of `where`, separated by `, `, holds; also key>=number."""
    keys = "|".join(map(re.escape, rows[0]))
    for part in filter(None, re.split(rf", (?=(?:{keys})[<>]?=)", where)):
        key, sign, value = re.fullmatch(rf"({keys})(>=|<=|=)(.*)", part).groups()
        test: Callable[[str], bool] = {
            "=": lambda cell, value=value: cell == value,
            ">=": lambda cell, value=value: float(cell) >= float(value),
            "<=": lambda cell, value=value: float(cell) <= float(value),
        }[sign]
        rows = [row for row in rows if test(row[key])]
    if not rows:
        raise ValueError(f"no row with {where}")
    return list(rows)


def aggregate(rows: Sequence[dict[str, str]], name: str, argument: str) -> float:
    """Evaluate one function of an expression, name{argument}."""
    column, *wheres = (part.strip() for part in argument.split("|"))
    if name in ("diff", "low", "high"):
        arm, base = ({row["seed"]: float(row[column]) for row in select(rows, where)} for where in wheres)
        differences = [arm[seed] - base[seed] for seed in base]
        if name == "diff":
            return statistics.mean(differences)
        from ldm.metrics.interval import paired

        return paired(differences)[name == "high"]
    if name == "slope":
        x, where = wheres
        found = select(rows, where)
        return statistics.linear_regression(*([float(row[key]) for row in found] for key in (x, column))).slope
    found = select(rows, wheres[0] if wheres else "")
    if name == "count":
        return len({row[column] for row in found} if column else found)
    values = [float(row[column]) for row in found if row[column] != ""]
    if name == "at":
        if len(values) != 1:
            raise ValueError(f"at{{{argument}}}: {len(values)} rows")
        return values[0]
    return {"mean": statistics.mean, "min": min, "max": max, "sum": sum, "median": statistics.median}[name](values)


def evaluate(claim: Claim, expression: str) -> float:
    """Evaluate an expression of a claim on its csv."""
    rows = [] if claim.source in KINDS else rows_of(source_path(claim))
    call = partial(aggregate, rows)
    code = re.sub(r"(\w+)\{([^{}]*)\}", lambda match: f"call({match[1]!r}, {match[2]!r})", expression)
    return float(eval(code, {"__builtins__": {}}, {"call": call, "min": min, "max": max, "round": round}))


def half_unit(number: str) -> float:
    """Return half a unit of a number's last written place."""
    mantissa, _, exponent = number.lower().partition("e")
    places = len(mantissa.partition(".")[2])
    return 0.5 * 10.0 ** (int(exponent or 0) - places)


def agrees(number: str, value: float) -> bool:
    """Whether a written number is `value` rounded to its places; a half may go either way."""
    if number.endswith("%"):
        number, value = number[:-1], 100 * value
    written = float(number.replace(",", ""))
    return abs(written - value) <= half_unit(number) * (1 + 1e-6) + 1e-12 * abs(value)


def check(claim: Claim) -> Iterator[dict[str, str]]:
    """Return a row for each number of a claim, with the value that its csv gives and whether they agree."""
    numbers = claim.numbers
    if claim.source in KINDS and not claim.expressions:
        yield from ({"readme": claim.readme, "number": n, "csv": claim.source, "expression": "", "value": "",
                     "agrees": "yes", "text": claim.text} for n in numbers)  # fmt: skip
        return
    if len(numbers) != len(claim.expressions):
        raise ValueError(f"{claim.readme}: {claim.text}: {numbers}, {len(claim.expressions)} expressions")
    for number, expression in zip(numbers, claim.expressions, strict=True):
        value = evaluate(claim, expression) if expression else None
        source = claim.source if claim.source in KINDS else source_path(claim).relative_to(ROOT).as_posix()
        yield {
            "readme": claim.readme,
            "number": number,
            "csv": source if expression else "setting",
            "expression": expression,
            "value": "" if value is None else f"{value:.6g}",
            "agrees": "yes" if value is None or agrees(number, value) else "NO",
            "text": claim.text,
        }


def body(readme: str) -> str:
    """Return the part of a README that may hold claims, on one line."""
    return squeeze(plain((ROOT / readme).read_text()))


def misplaced(readme: str, claims: Sequence[Claim]) -> list[str]:
    """Return the texts of claims that are not in their README exactly once."""
    text = body(readme)
    return [one.text for one in claims if one.readme == readme and text.count(squeeze(plain(one.text))) != 1]


def unlisted(readme: str, claims: Sequence[Claim]) -> list[str]:
    """Return the numbers of a README that no claim and no allowed pattern covers, each with the text around it."""
    text = body(readme)
    patterns = [*ALLOWED, *(re.escape(squeeze(plain(one.text))) for one in claims if one.readme == readme)]
    covered = [match.span() for pattern in patterns for match in re.finditer(pattern, text)]
    return [
        text[max(0, match.start() - 50) : match.start()] + f"<{match[0]}>" + text[match.end() : match.end() + 30]
        for match in NUMBER.finditer(text)
        if not any(start <= match.start() and match.end() <= end for start, end in covered)
    ]


def main() -> int:
    claims = list(read_claims())
    rows = [row for claim in claims for row in check(claim)]
    with open(TABLE, "w", newline="") as file:
        table = csv.DictWriter(file, ("readme", "number", "csv", "expression", "value", "agrees", "text"))
        table.writeheader()
        table.writerows(rows)
    wrong = [row for row in rows if row["agrees"] != "yes"]
    lost = [f"{readme}: not once in it: {one}" for readme in READMES for one in misplaced(readme, claims)]
    missing = [f"{readme}: not listed: {one}" for readme in READMES for one in unlisted(readme, claims)]
    for row in wrong:
        print(f"{row['readme']}: {row['number']} is {row['value']} in {row['csv']}: {row['text']}")
    print(*lost, *missing, sep="\n")
    print(f"{len(rows)} numbers, {len(wrong)} differ from their csv, {len(lost)} texts lost, {len(missing)} not listed")
    return int(bool(wrong or lost or missing))


if __name__ == "__main__":
    sys.exit(main())
