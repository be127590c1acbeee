"""Mutation testing: how many small changes of the source does a test notice?

    python -m tests.reliability.mutate --mutants 300

Draws mutants at random from the modules below, all places alike. On each it runs the tests beside the module, in a
forked process that has torch imported already; if they pass, also those of the modules that use it (USERS). A mutant
is killed if a test fails or the time is up. The existing tools import the package once per mutant, which takes longer
than the tests.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TESTS = {
    "subspaces": ["tests/subspaces", "tests/factors"],
    "ranks": ["tests/ranks", "tests/search/test_search.py"],
    "factors": ["tests/factors", "tests/subspaces"],
    "layers": ["tests/layers", "tests/ranks/test_latency.py"],
    "checkpoint.py": ["tests/test_checkpoint.py"],
    "description.py": ["tests/test_checkpoint.py"],
}
USERS = [
    "tests/test_compress.py", "tests/test_compress_group.py", "tests/test_compress_channels.py",
    "tests/test_compress_device.py", "tests/test_folders.py", "tests/models/test_channels_apart.py",
    "tests/test_golden_files.py", "tests/test_correction.py", "tests/test_midpoint.py", "tests/report",
    "tests/ranks/test_byte_budget.py", "tests/layers/test_eight_bit.py", "tests/layers/test_pivoted.py",
    "tests/integrations/test_eight_bit.py", "tests/integrations/test_transformers.py", "tests/models/test_experts.py",
]  # fmt: skip
LEFT_OUT = "not demo_model and not autocast"  # take as long as all others together
LIMIT = 120  # seconds of CPU for the tests of one mutant

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


class Mutant(NamedTuple):
    """One change of one file."""

    file: str  # relative to the package
    line: int
    before: str
    after: str
    source: str


def mutated(node: ast.AST) -> Iterator[ast.AST]:
    """Other nodes in place of ``node``."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare):
        for i, operator in enumerate(new.ops):
            yield ast.Compare(
                new.left, [*new.ops[:i], COMPARISONS[type(operator)](), *new.ops[i + 1 :]], new.comparators
            )
    elif isinstance(new, ast.BinOp) and type(new.op) in OPERATORS:
        yield ast.BinOp(new.left, OPERATORS[type(new.op)](), new.right)
    elif isinstance(new, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(new.op, ast.And) else ast.And(), new.values)
    elif isinstance(new, ast.UnaryOp):
        yield new.operand
    elif isinstance(new, ast.IfExp):
        yield ast.IfExp(ast.UnaryOp(ast.Not(), new.test), new.body, new.orelse)
    elif isinstance(new, (ast.If, ast.While)):
        new.test = ast.UnaryOp(ast.Not(), new.test)
        yield new
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        yield ast.Constant(not new.value)
    elif isinstance(new, ast.Constant) and isinstance(new.value, (int, float)):
        yield ast.Constant(new.value + 1)
    elif isinstance(new, ast.Return) and new.value is not None:
        yield ast.Return(ast.Constant(None))
    elif isinstance(new, ast.Expr) and isinstance(new.value, ast.Call):
        yield ast.Pass()


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Parent, field, index and child of every node whose change a test could notice: no annotations and messages."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or isinstance(node, (ast.Raise, ast.JoinedStr)):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                yield node, field, index, child
                yield from places(child)


def mutants_of(file: Path) -> Iterator[Mutant]:
    tree = ast.parse(file.read_text())
    for parent, field, index, child in list(places(tree)):
        for new in mutated(child):
            holder = getattr(parent, field)
            setattr(parent, field, new) if index is None else holder.__setitem__(index, new)
            source = ast.unparse(ast.fix_missing_locations(tree))
            setattr(parent, field, child) if index is None else holder.__setitem__(index, child)
            before, after = (ast.unparse(part).split("\n")[0] for part in (child, new))
            yield Mutant(str(file.relative_to(ROOT / "lowrank_ops")), child.lineno, before, after, source)


def _key(row: dict[str, str]) -> tuple[str, str, str]:
    return row["file"], row["before"], row["after"]


def run_tests(folder: Path, tests: list[str]) -> tuple[bool, float]:
    """Whether the tests pass in a forked process, and its CPU seconds."""
    started = os.times()
    process = os.fork()
    if not process:
        import pytest

        os.chdir(folder)
        os.setpgid(0, 0)
        sys.path.insert(0, str(folder))
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            signal.setitimer(signal.ITIMER_PROF, LIMIT)  # its signal ends the process
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", LEFT_OUT, *tests])
        (folder / "output.txt").write_text(output.getvalue())
        os._exit(min(int(code), 1))
    _, status = os.waitpid(process, 0)
    ended = os.times()
    seconds = ended.children_user - started.children_user + ended.children_system - started.children_system
    return status == 0, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a room, such as ranks, or files of rooms, such as channels.py")
    parser.add_argument("--tests", nargs="+", help="the tests to run, instead of those of the rooms and their users")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("mutants.json"))
    parser.add_argument("--again", action="store_true", help="only the survivors in --out, after tests were added")
    options = parser.parse_args()
    import hypothesis  # noqa: F401  # once, not in every process
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    folder = Path(tempfile.mkdtemp(prefix="mutants"))
    for part in ROOT.iterdir():
        if part.name in ("lowrank_ops", "tests"):
            shutil.copytree(part, folder / part.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif not part.name.startswith("."):
            (folder / part.name).symlink_to(part)
    of_files = str(options.only).endswith(".py") and options.only not in TESTS
    tests = {room: paths for room, paths in TESTS.items() if of_files or options.only in (None, room)}
    found = []
    for room in tests:
        files = [ROOT / "lowrank_ops" / room] if room.endswith(".py") else (ROOT / "lowrank_ops" / room).glob("*.py")
        files = sorted(file for file in files if not of_files or file.name == options.only)
        found += [(room, mutant) for file in files for mutant in mutants_of(file)]
    users = USERS
    if options.tests:
        tests, users = dict.fromkeys(tests, options.tests), []
    for room, paths in ({"given": options.tests} if options.tests else {**tests, "users": users}).items():
        passed, seconds = run_tests(folder, paths)
        print(f"{room}: tests pass {passed}, {seconds:.0f} s", flush=True)
        if not passed:
            print((folder / "output.txt").read_text()[-3000:])
            return 1
    random.Random(options.seed).shuffle(found)
    places, rows, drawn = len(found), [], found[: options.mutants]
    if options.again:
        before = json.loads(options.out.read_text())
        places, rows = before["places"], [row for row in before["mutants"] if not row["survived"]]
        survivors = [row for row in before["mutants"] if row["survived"]]
        alike = [
            [(abs(m.line - row["line"]), i) for i, (_, m) in enumerate(found) if (m.file, *m[2:4]) == _key(row)]
            for row in survivors
        ]
        drawn = [found[min(near)[1]] for near in alike if near]
        rows += [row for row, near in zip(survivors, alike, strict=True) if not near]
    for room, mutant in drawn:
        target = folder / "lowrank_ops" / mutant.file
        original = target.read_text()
        target.write_text(mutant.source)
        survived, seconds = run_tests(folder, tests[room])
        if survived and users:
            survived, more = run_tests(folder, users)
            seconds += more
        target.write_text(original)
        rows.append({**mutant._asdict(), "survived": survived, "seconds": round(seconds, 1)})
        del rows[-1]["source"]
        killed = sum(not row["survived"] for row in rows)
        print(
            f"{killed}/{len(rows)} {'SURVIVED' if survived else 'killed'} {mutant.file}:{mutant.line} "
            f"{mutant.before} -> {mutant.after} ({seconds:.0f} s)",
            flush=True,
        )
        options.out.write_text(
            json.dumps({"places": places, "seed": options.seed, "mutants": rows, "time": time.ctime()}, indent=1)
        )
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
