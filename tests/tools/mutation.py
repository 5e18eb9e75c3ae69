"""What the functions of ldm can be broken into, one place at a time, and the committed lists of what became of it."""

import ast
import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from named_faults import FAULTS, Fault

# A file or a folder of ldm/ each, in the order of the table.
PACKAGES = (
    "training",
    "ema",
    "tensors",
    "condition",
    "model",
    "adapter",
    "autoencoder",
    "metrics",
    "evaluation",
    "sampling",
    "plan",
    "conditioner",
    "net",
    "checkpoint",
    "diffusion",
    "data",
)
EXCLUDED = (  # what only prints, logs or draws
    "training/loggers.py",
    "training/startup_report.py",
    "plan/__main__.py",
    "plan/table.py",
)
COLUMNS = ["file", "function", "mutant", "result", "killed by", "why"]
RESULTS = ("killed", "equivalent", "survived", "not run")
SILENT_CALLS = ("print", "info", "warning", "debug", "warn")  # whose arguments are messages

OTHER = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Project:
    """Where the source, the tests and the lists are. root: the folder of `ldm` and `tests`."""

    root: Path = Path(__file__).resolve().parents[2]

    @property
    def source(self) -> Path:
        return self.root / "ldm"

    @property
    def tests(self) -> Path:
        return self.root / "tests"

    @property
    def cache(self) -> Path:
        return self.root / ".mutation"

    def list_file(self, package: str) -> Path:
        """Return the csv file of a package's mutants."""
        return self.tests / "tools/mutation" / f"{package}.csv"

    @property
    def equivalent_file(self) -> Path:
        return self.tests / "tools/equivalent.csv"

    def files(self, package: str) -> list[Path]:
        """Return the source files of a package whose functions are broken."""
        module = self.source / f"{package}.py"
        every = [module] if module.exists() else sorted((self.source / package).glob("[!_]*.py"))
        return [file for file in every if self.name(file) not in EXCLUDED]

    def name(self, file: Path) -> str:
        return file.relative_to(self.source).as_posix()


@dataclass(frozen=True)
class Mutant:
    """One function broken in one place.

    file: relative to ldm/.  function: its name with the classes and functions around it.  text: `old  ->  new`.
    lines: first and last line of the place.  build: returns the broken
    module, once: it breaks the tree that the other mutants of the file share.
    """

    file: str
    function: str
    text: str
    lines: tuple[int, int]
    build: Callable[[], ast.Module] = field(compare=False)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.function, self.text


def break_expression(node: ast.expr) -> Iterator[ast.expr]:
    """Yield everything that one expression can be broken into."""
    if isinstance(node, ast.BinOp) and type(node.op) in OTHER:
        yield ast.BinOp(node.left, OTHER[type(node.op)](), node.right)
        if isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
            yield node.left
        if isinstance(node.op, ast.Add | ast.Mult):
            yield node.right
    elif (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub | ast.Not)
        and not isinstance(node.operand, ast.Constant)
    ):
        yield node.operand
    elif isinstance(node, ast.Compare):
        for k, op in enumerate(node.ops):
            if type(op) in OTHER:
                yield ast.Compare(node.left, [*node.ops[:k], OTHER[type(op)](), *node.ops[k + 1 :]], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(OTHER[type(node.op)](), node.values)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)


def normal_form(source: str) -> str:
    """Return source as each Python's ast.unparse has it, which differ in quotes and in `for (a, b) in`."""
    return re.sub(r"\bfor \(([^()]*)\) in\b", r"for \1 in", source.replace('"', "'"))


def is_message(node: ast.AST) -> bool:
    """Return whether what is inside only makes a message, a default or an annotation."""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name in SILENT_CALLS
    return isinstance(node, ast.JoinedStr | ast.arguments | ast.Raise) or (
        isinstance(node, ast.FunctionDef) and node.name == "__repr__"
    )


def expressions(tree: ast.Module) -> Iterator[tuple[str, list]]:
    """Yield (function, path) of every expression in a function; a path is the fields and indices that lead to it."""

    def walk(node: ast.AST, path: list, scopes: tuple[ast.AST, ...]) -> Iterator[tuple[str, list]]:
        if is_message(node):
            return
        if isinstance(node, ast.expr) and any(isinstance(scope, ast.FunctionDef) for scope in scopes):
            yield ".".join(scope.name for scope in scopes), path
        inside = (*scopes, node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else scopes
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for key, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST):
                    yield from walk(child, [*path, (name, key)], inside)

    yield from walk(tree, [], ())


def at(tree: ast.AST, path: list) -> ast.AST:
    for name, key in path:
        tree = getattr(tree, name) if key is None else getattr(tree, name)[key]
    return tree


def replace(tree: ast.Module, path: list, new: ast.expr) -> ast.Module:
    """Put another expression at `path` of the module, which is changed by it."""
    node = at(tree, path[:-1])
    name, key = path[-1]
    if key is None:
        setattr(node, name, new)
    else:
        getattr(node, name)[key] = new
    return ast.fix_missing_locations(tree)


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield every function with its name; outer ones come before those inside."""

    def walk(node: ast.AST, scopes: tuple[str, ...]) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                if isinstance(child, ast.FunctionDef):
                    yield ".".join((*scopes, child.name)), child
                yield from walk(child, (*scopes, child.name))
            else:
                yield from walk(child, scopes)

    yield from walk(tree, ())


def first_line(function: ast.FunctionDef) -> int:
    return min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])


def fault_mutant(source: str, tree: ast.Module, fault: Fault) -> Mutant:
    """Return the mutant of a named fault. Raises ValueError unless its old text is once in its function."""
    spans = [node for name, node in functions(tree) if name == fault.function]
    lines = source.splitlines(keepends=True)
    for node in spans:
        before = "".join(lines[: first_line(node) - 1])
        inside = "".join(lines[first_line(node) - 1 : node.end_lineno])
        if inside.count(fault.old) != 1:
            continue
        start = len(before) + inside.index(fault.old)
        broken = source[:start] + fault.new + source[start + len(fault.old) :]
        first = source[:start].count("\n") + 1
        text = normal_form(" ".join(f"{fault.name}: {fault.old}  ->  {fault.new}".split()))
        last = first + fault.old.rstrip().count("\n")
        return Mutant(fault.file, fault.function, text, (first, last), partial(ast.parse, broken))
    raise ValueError(f"{fault.file}:{fault.function}: {fault.old!r} is not in it exactly once")


def file_mutants(project: Project, file: Path) -> list[Mutant]:
    """Return the mutants of a source file: the named faults, then each expression's, in the order of the source."""
    source = file.read_text()
    tree, name = ast.parse(source), project.name(file)
    mutants = [fault_mutant(source, tree, fault) for fault in FAULTS if fault.file == name]
    repeated: Counter[tuple[str, str]] = Counter()
    for function, path in expressions(tree):
        node = at(tree, path)
        for new in break_expression(node):  # type: ignore[arg-type]
            text = normal_form(f"{ast.unparse(node)}  ->  {ast.unparse(new)}")
            repeated[function, text] += 1
            if repeated[function, text] > 1:
                text += f"  ({repeated[function, text]})"

            def build(path: list = path, new: ast.expr = new) -> ast.Module:
                return replace(tree, path, new)

            span = (node.lineno, node.end_lineno)  # type: ignore[attr-defined]
            mutants.append(Mutant(name, function, text, span, build))
    return mutants


def package_mutants(project: Project, package: str) -> list[Mutant]:
    return [mutant for file in project.files(package) for mutant in file_mutants(project, file)]


def read_rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def row_key(row: dict[str, str]) -> tuple[str, str, str]:
    return row["file"], row["function"], row["mutant"]


def read_proofs(project: Project) -> dict[tuple[str, str, str], str]:
    """Map each mutant that no test can tell from the original to the proof of it."""
    return {row_key(row): row["why"] for row in read_rows(project.equivalent_file)}


def read_list(project: Project, package: str) -> dict[tuple[str, str, str], dict[str, str]]:
    """Read a package's list, with today's proofs; a mutant whose proof is withdrawn has survived."""
    proofs = read_proofs(project)
    rows = {row_key(row): row for row in read_rows(project.list_file(package))}
    for key, row in rows.items():
        if row["result"] in ("equivalent", "survived"):
            row["result"], row["why"] = ("equivalent", proofs[key]) if key in proofs else ("survived", "")
    return rows


def write_list(project: Project, package: str, rows: dict[tuple[str, str, str], dict[str, str]]) -> None:
    """Write a row for each of the package's present mutants, in the order of the source; one without is not run."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for mutant in package_mutants(project, package):
        unknown = dict(zip(COLUMNS, (*mutant.key, "not run", "", ""), strict=True))
        writer.writerow(rows.get(mutant.key, unknown))
    project.list_file(package).parent.mkdir(parents=True, exist_ok=True)
    project.list_file(package).write_text(out.getvalue())


def summary(project: Project) -> str:
    """Return the table of mutants and what became of them by package, in Markdown."""
    lines = [f"| package | mutants | {' | '.join(RESULTS)} |", "|---|---:" + "|---:" * len(RESULTS) + "|"]
    total: Counter[str] = Counter()
    for package in PACKAGES:
        if project.list_file(package).exists():
            counts = Counter(row["result"] for row in read_list(project, package).values())
            total += counts
            lines.append(table_row(f"`{package}`", counts))
    return "\n".join([*lines, table_row("all", total)])


def table_row(name: str, counts: Counter[str]) -> str:
    return f"| {name} | {counts.total():,} | " + " | ".join(f"{counts[result]:,}" for result in RESULTS) + " |"


def staleness(project: Project, package: str) -> list[str]:
    """Return what differs between a package's list and the mutants of its present source."""
    present = [mutant.key for mutant in package_mutants(project, package)]
    listed = [row_key(row) for row in read_rows(project.list_file(package))]
    missing, left = set(present) - set(listed), set(listed) - set(present)
    found = [f"not in the list: {' '.join(key)}" for key in sorted(missing)]
    found += [f"no longer in the source: {' '.join(key)}" for key in sorted(left)]
    return found or ([] if listed == present else ["in another order than the source"])
