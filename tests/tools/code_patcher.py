"""Puts the code of a mutant into the functions of this process."""

import ast
import gc
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from mutation import Mutant, Project, functions


class CodePatcher:
    """Puts the code of a mutant into the functions that exist, so that every reference to them runs it."""

    def __init__(self, project: Project):
        self.project = project
        self.original: dict[Path, dict[tuple[str, int], types.CodeType]] = {}
        self.live: dict[tuple[str, int, str], list[types.FunctionType]] = defaultdict(list)
        for thing in gc.get_objects():
            if type(thing) is types.FunctionType and thing.__code__.co_filename.startswith(str(project.source)):
                code = thing.__code__
                self.live[code.co_filename, code.co_firstlineno, code.co_name].append(thing)

    def patch(self, mutant: Mutant) -> int:
        """Change the functions of the mutant; returns how many there were."""
        file = self.project.source / mutant.file
        if file not in self.original:
            self.original[file] = dict(codes(compile(file.read_text(), str(file), "exec")))
        tree = mutant.build()
        new = dict(codes(compile(tree, str(file), "exec")))
        changed = 0
        for (name, number), code in self.original[file].items():
            if name != mutant.function and not mutant.function.startswith(f"{name}."):
                continue
            for function in self.live[str(file), code.co_firstlineno, code.co_name]:
                replacement = new[name, number]
                if replacement.co_freevars != code.co_freevars:
                    replacement = with_free_variables(tree, str(file), name, number, code.co_freevars)
                function.__code__ = replacement
                changed += 1
        return changed


def codes(code: types.CodeType, prefix: str = "") -> Iterator[tuple[tuple[str, int], types.CodeType]]:
    """Yield ((name, number), code) of everything compiled inside a code object; number counts equal names."""
    counts: dict[str, int] = defaultdict(int)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            name = f"{prefix}{const.co_name}"
            yield (name, counts[name]), const
            counts[name] += 1
            yield from codes(const, f"{name}.")


def with_free_variables(
    tree: ast.Module, file: str, name: str, number: int, variables: tuple[str, ...]
) -> types.CodeType:
    """Compile a function so that it has the free variables of the original, which a live function cannot change."""
    node = [node for function, node in functions(tree) if function == name][number]
    names: list[ast.expr] = [ast.Name(variable, ast.Load()) for variable in variables]
    node.body.append(ast.If(ast.Constant(False), [ast.Expr(ast.Tuple(names, ast.Load()))], []))
    return dict(codes(compile(ast.fix_missing_locations(tree), file, "exec")))[name, number]
