"""Does a test fail when the mathematics is wrong?  python tests/tools/mutate.py [file[:function] ...]

Every function of ldm/diffusion is broken in one place at a time: a sign flipped, a term or a factor dropped, a product
made a quotient, a
comparison or a condition turned round. For each the quick tests of tests/diffusion run until one fails. Writes
tests/tools/mutation.csv (the rows
of what is named) and lists the survivors; exit code 1 if there is one that EQUIVALENT does not explain.
"""

import ast
import copy
import csv
import gc
import os
import resource
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"

ROOT = Path(__file__).parents[2]
SOURCE, TESTS = ROOT / "ldm/diffusion", ROOT / "tests/diffusion"
# Where to look first: the test files that know most of a module, and the tests of a function, where the names differ.
FILES = {
    "denoiser": ["prediction"],
    "grids": ["times"],
    "correction": ["constraint", "recursion"],
    "sampler": ["reference", "recursion", "sampler"],
}
TESTS_OF = {
    "check_grid": "rejects",
    "time_pairs": "rejects",
    "add_churn": "churn or k_diffusion",
    "_unic": "unipc",
    "forward_variance": "posterior",
    "q_posterior": "posterior",
    "vlb_term": "vlb or bits",
    "gather": "objective",
}
PLUGINS = (
    "cacheprovider",
    "unraisableexception",
    "threadexception",
    "warnings",
)  # which a mutant's few seconds have no use for
SKIPPED_TESTS = ("test_rules.py", "test_repa.py")  # one reads source files, the other trains a run
SKIPPED_MODULES = ("prior_preservation.py", "repa.py")  # which train with a network or data of their own
MEMORY = 5 << 30  # bytes of address space, most of it shared libraries: a mutant that fills it is dead
SECONDS = 10, 90, 300  # of CPU time, by the end of each round of tests: a mutant that does not end is dead

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

# (file, function, mutant) -> why no test can tell it from the original.
EQUIVALENT: dict[tuple[str, str, str], str] = {}


def mutants(node: ast.expr) -> Iterator[ast.expr]:
    """Everything that one expression can be broken into."""
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


def places(tree: ast.Module) -> Iterator[tuple[str, list]]:
    """(function, path) of every expression inside a function body; a path is the fields and indices that lead to it."""

    def walk(node: ast.AST, path: list, function: str) -> Iterator[tuple[str, list]]:
        if isinstance(node, ast.JoinedStr | ast.arguments) or (
            isinstance(node, ast.FunctionDef) and node.name == "__repr__"
        ):
            return  # messages and defaults
        if isinstance(node, ast.expr) and function:
            yield function, path
        inside = f"{function}.{node.name}".lstrip(".") if isinstance(node, ast.FunctionDef | ast.ClassDef) else function
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for key, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST):
                    yield from walk(child, [*path, (name, key)], inside)

    yield from walk(tree, [], "")


def replaced(tree: ast.Module, path: list, new: ast.expr) -> ast.Module:
    tree = copy.deepcopy(tree)
    node: ast.AST = tree
    for name, key in path[:-1]:
        node = getattr(node, name) if key is None else getattr(node, name)[key]
    name, key = path[-1]
    if key is None:
        setattr(node, name, copy.deepcopy(new))
    else:
        getattr(node, name)[key] = copy.deepcopy(new)
    return ast.fix_missing_locations(tree)


def at(tree: ast.AST, path: list) -> ast.AST:
    for name, key in path:
        tree = getattr(tree, name) if key is None else getattr(tree, name)[key]
    return tree


def survives(file: Path, tree: ast.Module, function: str = "") -> bool:
    """True if all tests pass with this module in place of the file's; run in a forked process, where nothing of ldm is
    imported yet.

    The tests that name the function come first: most mutants end there, in a second.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        import ldm.diffusion

        name = f"ldm.diffusion.{file.stem}"
        module = types.ModuleType(name)
        module.__file__ = str(file)
        sys.modules[name] = module
        setattr(ldm.diffusion, file.stem, module)
        exec(compile(tree, str(file), "exec"), module.__dict__)
        near = [str(TESTS / f"test_{name}.py") for name in FILES.get(file.stem, [file.stem])]
        every = [str(f) for f in sorted(TESTS.glob("test_*.py")) if f.name not in SKIPPED_TESTS]
        named = function.split(".")[0]
        options = ["-x", "-q", "-o", "addopts=", "-m", "not slow", "--assert=plain"]
        options += [word for name in PLUGINS for word in ("-p", f"no:{name}")]
        rounds = zip(SECONDS, ([*near, "-k", TESTS_OF.get(named, named)], near, every), strict=True)
        for seconds, tests in rounds if function else [(SECONDS[-1], every)]:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
            code = int(pytest.main([*options, *tests]))
            if code not in (0, 5):  # 5: no test has that name
                os._exit(code)
        os._exit(0)
    except BaseException:
        os._exit(3)


def warm_up() -> None:
    """Import what is slow once, before forking."""
    import diffusers
    import hydra.utils  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch

    gc.freeze()
    torch.set_num_threads(1)
    for name in (
        "DDIM",
        "DDPM",
        "PNDM",
        "DPMSolverMultistep",
        "UniPCMultistep",
        "EulerDiscrete",
        "HeunDiscrete",
        "EulerAncestralDiscrete",
    ):
        getattr(diffusers, f"{name}Scheduler")
    assert diffusers.FlowMatchEulerDiscreteScheduler
    assert diffusers.FlowMatchHeunDiscreteScheduler
    assert not [m for m in sys.modules if m.startswith("ldm.diffusion")]


def save(name: str, only: str, rows: list[list[str]]) -> None:
    """Put the rows of a file, or of one function in it, in place of those that tests/tools/mutation.csv has."""
    table = ROOT / "tests/tools/mutation.csv"
    old = list(csv.reader(table.open()))[1:] if table.exists() else []
    rows = sorted([*(r for r in old if r[0] != name or not chosen(r[1], only)), *rows], key=lambda r: r[0])
    with table.open("w", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows([["file", "function", "mutant", "result", "why"], *rows])


def chosen(function: str, only: str) -> bool:
    return not only or function.split(".")[0] == only


def main(names: list[str]) -> int:
    warm_up()
    names = names or [file.name for file in sorted(SOURCE.glob("[!_]*.py")) if file.name not in SKIPPED_MODULES]
    whole = SOURCE / names[0].partition(":")[0]
    if not survives(whole, ast.parse(whole.read_text())):
        print("the tests fail before anything is broken; run pytest tests/diffusion first")
        return 2
    rows: list[list[str]] = []
    for name in names:
        file, only = SOURCE / name.partition(":")[0], name.partition(":")[2]
        tree, before = ast.parse(file.read_text()), len(rows)
        for function, path in places(tree):
            if not chosen(function, only):
                continue
            node = at(tree, path)
            for new in mutants(node):
                text = f"{ast.unparse(node)}  ->  {ast.unparse(new)}"
                alive = survives(file, replaced(tree, path, new), function)
                why = EQUIVALENT.get((file.name, function, text), "")
                result = ("equivalent" if why else "survived") if alive else "killed"
                rows.append([file.name, function, text, result, why])
                if alive:
                    print(f"{result}: {file.name}:{node.lineno} {function}: {text} {why}", flush=True)
        print(f"{name}: {len(rows) - before} mutants", flush=True)
        save(file.name, only, rows[before:])
    killed, equivalent = (sum(r[3] == kind for r in rows) for kind in ("killed", "equivalent"))
    print(f"{len(rows)} mutants, {killed} killed, {equivalent} equivalent, {len(rows) - killed - equivalent} survived")
    return int(killed + equivalent < len(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
