"""Tests collected once and run in forked processes: which lines of ldm each executes, and which fails on a mutant.

A forked process has the collected tests and every import already, and what a mutant or a test breaks ends with it.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from code_patcher import CodePatcher
from line_coverage import Coverage, FunctionLines, LineTracer, digest, read_coverage, read_modules, write_coverage
from mutation import Mutant, Project

SLOW_FIXTURES = ("smoke", "lively", "prompted")  # which train a run first
LONGEST = 10  # seconds of CPU time: a test that takes longer is not used
PATIENCE = 120.0  # seconds: a test that sleeps longer is not used
MEMORY = 6 << 30  # bytes of address space that a mutant may add: one that fills it is dead
PLUGINS = ("cacheprovider", "unraisableexception", "threadexception", "warnings", "xdist")
OPTIONS = ["-q", "-s", "-o", "addopts=", "-m", "not slow", "--assert=plain"]
OPTIONS += [word for name in PLUGINS for word in ("-p", f"no:{name}")]


def import_all(names: list[str]) -> None:
    """Import what tests import while they run before any fork; what cannot be imported is left out."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def module_names(project: Project) -> list[str]:
    """Return the names of all modules of ldm."""
    return [
        ".".join(file.relative_to(project.root).with_suffix("").parts)
        for file in sorted(project.source.rglob("[!_]*.py"))
    ]


class ForkedTests:
    """A pytest session whose tests run in forked processes, each for one purpose.

    loop: what to do once the tests are collected.  budget: seconds of tests that a mutant is given, as measured on the
    original.
    """

    def __init__(self, project: Project, loop: Callable[["ForkedTests"], None], budget: float):
        self.project, self.loop, self.budget = project, loop, budget
        self.coverage = read_coverage(project)
        self.modules = set(read_modules(project))
        self.items: dict[str, Any] = {}
        self.killers: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.function_lines = FunctionLines(project)

    def run(self, files: list[Path]) -> int:
        """Collect the tests of files and call `loop`; returns pytest's exit code."""
        import_all([*sorted(self.modules), *module_names(self.project)])
        return int(pytest.main([*OPTIONS, "--rootdir", str(self.project.root), *map(str, files)], plugins=[self]))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_make_collect_report(self, collector: Any) -> Generator[None, Any, None]:
        if not isinstance(collector, pytest.Module):
            yield
            return
        tracer = LineTracer(self.project.source)
        tracer.start()
        outcome = yield
        tracer.stop()
        name, now = self.file_of(collector.nodeid), digest(collector.path)
        if not outcome.get_result().passed:
            return
        if name not in self.coverage or self.coverage[name].digest != now:
            self.coverage[name] = Coverage(now, {}, self.function_lines.of(tracer.lines))

    def pytest_runtestloop(self, session: Any) -> bool:
        if session.testsfailed:
            raise session.Failed("not all test files can be imported")
        self.session = session
        self.items = {item.nodeid: item for item in session.items}
        self.measure()
        self.patcher = CodePatcher(self.project)
        gc.collect()
        gc.freeze()
        self.loop(self)
        return True

    def file_of(self, nodeid: str) -> str:
        return nodeid.partition("::")[0]

    def measure(self) -> None:
        """Run each test that is not yet measured alone, and record its seconds and lines; failing ones have none."""
        last = time.monotonic()
        for nodeid, item in self.items.items():
            tests = self.coverage[self.file_of(nodeid)].tests
            if nodeid in tests:
                continue
            tests[nodeid] = 0.0, {}
            if set(SLOW_FIXTURES) & set(item.fixturenames):
                continue
            end = time.monotonic() + PATIENCE
            output = self.fork(partial(self._measured, item), lambda end=end: end)[1]
            if output:
                found = json.loads(output)
                tests[nodeid] = found["seconds"], found["lines"]
                new = set(found["modules"]) - self.modules
                self.modules |= new
                import_all(sorted(new))
            else:
                print(f"not used: {nodeid}", flush=True)
            if time.monotonic() - last > 60:
                last = time.monotonic()
                write_coverage(self.project, self.coverage, sorted(self.modules))
        write_coverage(self.project, self.coverage, sorted(self.modules))

    def _measured(self, item: Any) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (LONGEST, resource.RLIM_INFINITY))
        before, tracer, started = set(sys.modules), LineTracer(self.project.source), time.process_time()
        tracer.start()
        passed = self._passes(item, None)
        tracer.stop()
        if not passed:
            return
        tests = str(self.project.tests)
        modules = [
            name
            for name in set(sys.modules) - before
            if not str(getattr(sys.modules[name], "__file__", None) or tests).startswith(tests)
        ]
        self.write(
            json.dumps(
                {
                    "seconds": time.process_time() - started,
                    "lines": self.function_lines.of(tracer.lines),
                    "modules": modules,
                }
            )
        )

    def _passes(self, item: Any, following: Any) -> bool:
        reports = runtestprotocol(item, log=False, nextitem=following)
        return len(reports) == 3 and all(report.passed for report in reports)

    def write(self, text: str) -> None:
        """Send text from a forked process to the one that forked it."""
        data = text.encode()
        while data:
            data = data[os.write(self.pipe, data) :]

    def fork(self, work: Callable[[], Any], deadline: Callable[[], float]) -> tuple[int, str]:
        """Run `work` in a forked process with a temporary folder; returns its exit code and what it wrote.

        deadline: returns the time, by time.monotonic, at which the process is killed.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        folder = tempfile.mkdtemp(prefix="mutant")
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.setpgid(0, 0)
                os.close(reading)
                self.pipe = writing
                quiet = os.open(os.devnull, os.O_RDWR)
                for stream in (0, 1, 2):
                    os.dup2(quiet, stream)
                os.chdir(folder)
                (Path(folder) / "tmp").mkdir()
                self.session.config._tmp_path_factory._basetemp = Path(folder) / "tmp"
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                os.chdir(self.project.root)
                work()
                os._exit(0)
            except BaseException:
                os._exit(3)
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
        os.close(writing)
        output = self.output = bytearray()
        while time.monotonic() < deadline():
            ready, _, _ = select.select([reading], [], [], 0.2)
            data = os.read(reading, 1 << 20) if ready else b""
            output += data
            # a process that a test left running may have the pipe open
            if not data and (ready or os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
                break
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
        os.close(reading)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        shutil.rmtree(folder, ignore_errors=True)
        return code, output.decode()

    def tests_of(self, mutant: Mutant, offset: int) -> list[str]:
        """Return the tests that execute the place of a mutant, the most promising first, within the budget.

        offset: the first line of the mutant's function. Tests of its function, if none executes the place.
        """
        name = f"{mutant.file}::{mutant.function}"
        lines = set(range(mutant.lines[0] - offset, mutant.lines[1] - offset + 1))
        folder = f"tests/{Path(mutant.file).parent.as_posix()}/"
        near, far = [], []
        for coverage in self.coverage.values():
            for nodeid, (seconds, executed) in coverage.tests.items():
                if nodeid in self.items and name in executed:
                    cost = seconds * (0.3 if nodeid.startswith(folder) else 1.0) + 1e-4 * len(executed)
                    (near if lines & set(executed[name]) else far).append((cost, seconds, nodeid))
        repeats: dict[str, int] = defaultdict(int)
        order = []
        for cost, seconds, nodeid in sorted(near or far):
            repeats[nodeid.partition("[")[0]] += 1
            order.append((repeats[nodeid.partition("[")[0]] > 2, cost, seconds, nodeid))
        total, chosen = 0.0, []
        for _, _, seconds, nodeid in sorted(order):
            total += seconds
            if total > self.budget and chosen:
                break
            chosen.append(nodeid)
        first = [nodeid for nodeid in self.killers[mutant.file, mutant.function] if nodeid in chosen]
        return first + [nodeid for nodeid in chosen if nodeid not in first]

    def collected_by(self, mutant: Mutant) -> list[str]:
        """Return the test files that call the mutant's function while they are imported."""
        name = f"{mutant.file}::{mutant.function}"
        return [file for file, coverage in self.coverage.items() if name in coverage.collected]

    def killer(self, mutant: Mutant, offset: int) -> str:
        """Return the first test that fails on the mutant, or an empty string."""
        tests = self.tests_of(mutant, offset)
        while tests:
            code, name = self._run_on(mutant, partial(self._run_tests, tests))
            if not code:
                break
            if name == tests[0] or not name or self._run_on(mutant, partial(self._run_tests, [name]))[0]:
                kills = self.killers[mutant.file, mutant.function]
                if name in kills:
                    kills.remove(name)
                kills.insert(0, name)
                return name
            tests = tests[tests.index(name) + 1 :]  # it fails after the others, not by itself
        files = self.collected_by(mutant)
        code, name = self._run_on(mutant, lambda: self._collect_again(files)) if files else (0, "")
        return name if code else ""

    def _run_on(self, mutant: Mutant, work: Callable[[], None]) -> tuple[int, str]:
        """Run `work` on the mutant in a forked process; returns its exit code and the last test it began."""

        def patched() -> None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            if not self.patcher.patch(mutant):
                return
            work()

        started = time.monotonic()

        def deadline() -> float:
            names = self.output.decode().split("\n")[:-1]
            return started + 120 + sum(20 + 10 * self.seconds(name) for name in names)

        code, output = self.fork(patched, deadline)
        names = output.split("\n")[:-1]
        return code, names[-1] if names else ""

    def seconds(self, nodeid: str) -> float:
        coverage = self.coverage.get(self.file_of(nodeid))
        return coverage.tests.get(nodeid, (1.0, {}))[0] if coverage else 1.0

    def begin(self, nodeid: str) -> None:
        """Say which test begins, and limit its CPU time: a mutant that does not end is dead."""
        self.write(f"{nodeid}\n")
        spent = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(spent.ru_utime + spent.ru_stime + 3 + 10 * self.seconds(nodeid))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))

    def _run_tests(self, tests: list[str]) -> None:
        items = [self.items[nodeid] for nodeid in tests]
        for item, following in zip(items, [*items[1:], None], strict=True):
            self.begin(item.nodeid)
            if not self._passes(item, following):
                os._exit(1)

    def _collect_again(self, files: list[str]) -> None:
        """Import the test files anew, now that ldm is broken, and run them."""
        tests = f"{self.project.tests}{os.sep}"
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None) or ""
            if file.startswith(tests) and "tools" not in file:
                del sys.modules[name]
        for file in files:
            self.begin(file)
            paths = ["--rootdir", str(self.project.root), str(self.project.root / file)]
            code = int(pytest.main([*OPTIONS, "-x", *paths], plugins=[Announcer(self)]))
            if code not in (0, 5):
                os._exit(1)


class Announcer:
    """A plugin that says which test begins, and leaves out those that need a trained run."""

    def __init__(self, forked: ForkedTests):
        self.forked = forked

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if self.forked.seconds(item.nodeid) and item.nodeid in self.forked.items]

    def pytest_runtest_setup(self, item: Any) -> None:
        self.forked.begin(item.nodeid)
