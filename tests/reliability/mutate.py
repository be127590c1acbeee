"""Mutation testing: how many small changes of the source does a test notice?

    python -m tests.reliability.mutate --mutants 300

Draws mutants at random from the bodies of all functions of the modules below, all places alike. The tests are run once
to see which lines each of them reaches. For each mutant, a forked process replaces the code of the changed function
and runs the tests that reach the changed statement, fast ones first. A mutant is killed if one of them fails or takes
far longer than before. The existing tools import the package once per mutant, which takes longer than most tests.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import json
import os
import random
import signal
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from operator import setitem
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import pytest
import torch

import lowrank_ops

PACKAGE = Path(lowrank_ops.__file__).parent
ROOMS = ["subspaces", "ranks", "factors", "layers", "checkpoint.py", "description.py"]
TESTS = [
    "tests/subspaces", "tests/factors", "tests/ranks", "tests/layers", "tests/search/test_search.py", "tests/report",
    "tests/test_checkpoint.py", "tests/test_golden_files.py", "tests/test_folders.py", "tests/test_compress.py",
    "tests/test_compress_group.py", "tests/test_compress_channels.py", "tests/test_compress_device.py",
    "tests/test_correction.py", "tests/test_midpoint.py", "tests/test_bad_inputs.py", "tests/integrations",
    "tests/models/test_experts.py", "tests/models/test_channels_apart.py", "tests/models/test_unreachable_weights.py",
]  # fmt: skip
LEFT_OUT = "not demo_model and not autocast"  # take as long as all others together

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


class Mutant(NamedTuple):
    """One change in the body of a function of one file."""

    file: Path
    tree: ast.Module
    lines: tuple[int, int]  # of the statement
    node: Any
    put: Callable[[ast.AST], None]
    new: ast.AST
    after: str

    def row(self) -> dict[str, Any]:
        place = {"line": self.node.lineno, "column": self.node.col_offset, "before": shown(self.node)}
        return {"file": str(self.file.relative_to(PACKAGE)), **place, "after": self.after}

    def code(self) -> types.CodeType:
        """The code of the changed file, whose tree stays changed."""
        self.put(ast.copy_location(self.new, self.node))
        return compile(ast.fix_missing_locations(self.tree), str(self.file), "exec")


def shown(node: ast.AST) -> str:
    return ast.unparse(node).split("\n")[0]


def mutated(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Replacements of ``node``, with their source; all names stay, so that closures have the same cells."""
    new: Any = copy.deepcopy(node)
    if isinstance(new, ast.Compare):
        for i, operator in enumerate(new.ops):
            operators = [*new.ops[:i], COMPARISONS[type(operator)](), *new.ops[i + 1 :]]
            yield (other := ast.Compare(new.left, operators, new.comparators)), shown(other)
        return
    if isinstance(new, ast.Return) and new.value is not None:
        yield ast.Return(ast.IfExp(ast.Constant(True), ast.Constant(None), new.value)), "return None"
        return
    if isinstance(new, ast.Expr) and isinstance(new.value, ast.Call):
        yield ast.If(ast.Constant(False), [new], []), "pass"
        return
    if isinstance(new, ast.BinOp) and type(new.op) in OPERATORS:
        new.op = OPERATORS[type(new.op)]()
    elif isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
    elif isinstance(new, ast.UnaryOp):
        new = new.operand
    elif isinstance(new, (ast.IfExp, ast.If, ast.While)):
        new.test = ast.UnaryOp(ast.Not(), new.test)
    elif isinstance(new, ast.Constant) and isinstance(new.value, (bool, int, float)):
        new.value = not new.value if isinstance(new.value, bool) else new.value + 1
    else:
        return
    yield new, shown(new)


def places(node: ast.AST, statement: ast.stmt | None = None) -> Iterator[tuple[ast.stmt, ast.AST, Any]]:
    """Statements in functions, their nodes, and a function that replaces each; without annotations and messages."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or isinstance(node, (ast.Raise, ast.JoinedStr)):
            continue
        inside = statement or (isinstance(node, ast.FunctionDef) and field == "body")
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                of = child if inside and isinstance(child, ast.stmt) else statement
                if of:
                    yield of, child, partial(setattr, node, field) if index is None else partial(setitem, value, index)
                yield from places(child, of)


def mutants() -> Iterator[Mutant]:
    for room in ROOMS:
        for file in sorted((PACKAGE / room).glob("*.py")) or [PACKAGE / room]:
            tree = ast.parse(file.read_text())
            for statement, node, put in places(tree):
                for change in mutated(node):
                    yield Mutant(file, tree, (statement.lineno, statement.end_lineno), node, put, *change)


def functions_of(code: types.CodeType) -> Iterator[types.CodeType]:
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield part
            yield from functions_of(part)


def place_of(code: types.CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_name, code.co_firstlineno


class Mutation:
    """A plugin of pytest that runs the collected tests on mutants."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.seconds = options, dict[str, float]()  # of the processor, by test
        self.folder = Path(tempfile.mkdtemp(prefix="mutants"))
        self.functions = defaultdict[tuple[str, str, int], list[types.FunctionType]](list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            print(report.nodeid, report.longrepr, flush=True)
            os._exit(1)

    def run(self, items: list[pytest.Item], limit: float = 0, mutant: Mutant | None = None) -> bool:
        """Whether the tests pass in a forked process, which writes what they reach if there is no mutant."""
        process = os.fork()
        if not process:
            tracer = coverage.Coverage(self.folder / "coverage", include=[f"{PACKAGE}/*"], config_file=False)
            signal.setitimer(signal.ITIMER_PROF, limit)  # its signal ends the process
            if mutant:
                for stream in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
                for code in functions_of(mutant.code()):
                    for function in self.functions[place_of(code)]:
                        function.__code__ = code
            else:
                tracer.start()
            for item, following in zip(items, [*items[1:], None], strict=False):
                started = time.process_time()
                if not mutant:
                    tracer.switch_context(item.nodeid)
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                self.seconds[item.nodeid] = time.process_time() - started
            if not mutant:
                tracer.save()
                (self.folder / "seconds").write_text(json.dumps(self.seconds))
            os._exit(0)
        return os.waitpid(process, 0)[1] == 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        out, rows, items = self.options.out, [], {item.nodeid: item for item in session.items}
        for thing in gc.get_objects():
            if isinstance(thing, types.FunctionType):
                self.functions[place_of(thing.__code__)].append(thing)
        # Mutants run them in other orders, too.
        if not self.run(random.Random(0).sample(session.items, len(items))):
            pytest.exit("tests fail without a mutant")
        self.seconds |= json.loads((self.folder / "seconds").read_text())
        reached = coverage.CoverageData(str(self.folder / "coverage"))
        reached.read()
        found = list(mutants())
        print(f"{len(items)} tests, {sum(self.seconds.values()):.0f} s; {(number := len(found))} places", flush=True)
        random.Random(self.options.seed).shuffle(found)
        if self.options.again:
            rows = json.loads(out.read_text())["mutants"]
            found = [mutant for mutant in found if {**mutant.row(), "survived": True} in rows]
            rows = [row for row in rows if row not in [{**mutant.row(), "survived": True} for mutant in found]]
        for mutant in found[: self.options.mutants]:
            lines, (first, last) = reached.contexts_by_lineno(str(mutant.file)), mutant.lines
            names = {name for line in range(first, last + 1) for name in lines.get(line, ()) if name in items}
            taken, tests = 0.0, []
            for name in sorted(names, key=self.seconds.__getitem__):
                taken += self.seconds[name]
                tests += [items[name]] if taken < self.options.seconds else []
            survived = self.run(tests, 10 + 3 * self.options.seconds, mutant)
            rows.append({**mutant.row(), "survived": survived})
            print(sum(not row["survived"] for row in rows), len(rows), *rows[-1].values(), len(tests), flush=True)
            summary = {"places": number, "seed": self.options.seed, "mutants": rows, "time": time.ctime()}
            out.write_text(json.dumps(summary, indent=1) + "\n")
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20, help="tests of one mutant that take longer are left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("mutants.json"))
    parser.add_argument("--again", action="store_true", help="only the survivors in --out, after tests were added")
    options = parser.parse_args()
    torch.set_num_threads(1)
    arguments = ["-s", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", LEFT_OUT, *TESTS]
    return pytest.main(arguments, plugins=[Mutation(options)])


if __name__ == "__main__":
    raise SystemExit(main())
