"""Notebooks as pytest tests: each cell that asserts is a test named after its heading, and `runs to the end` holds the rest.

The cells of a notebook run in order, in one namespace, in this process (torch is imported once for all notebooks), in the folder
of the notebook, with IN_TEST=1. nbdev's own rules say which cells run (`#| eval: false`, `#| slow` and other `tst_flags`, `skip_exec`).
A cell runs once: each test runs what stands before it, as far as that has not run yet.
"""
import ast
import linecache
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault('MPLBACKEND', 'Agg')  # pictures are drawn, no window is opened

CELL_SECONDS = 600  # a cell that takes longer hangs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--slow', action='store_true', help='run what is marked slow too: notebook cells with `#| slow`, tests with @pytest.mark.slow')


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line('markers', 'slow: takes longer than a test should; left out unless --slow is given')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption('--slow'): return
    for item in items:
        if item.get_closest_marker('slow'): item.add_marker(pytest.mark.skip(reason='slow: run it with --slow'))


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> 'Notebook | None':
    if file_path.suffix == '.ipynb' and collected(file_path): return Notebook.from_parent(parent, path=file_path)
    return None


def collected(path: Path) -> bool:
    "Run notebooks, and benchmarks that take parameters, belong to papermill; what starts with a dot or an underscore is not ours."
    if any(part.startswith(('.', '_')) for part in path.parts[-2:]) or 'runs' in path.parts[-2:-1]: return False
    return not ('benchmarks' in path.parts[-2:-1] and '"parameters"' in path.read_text(encoding='utf-8'))


def asserts(source: str) -> bool:
    "Whether a cell checks something itself: an `assert`, or a call of a `test_…` function, outside the functions it defines."
    try: tree = ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', source, flags=re.M))
    except SyntaxError: return bool(re.search(r'^\s*(assert\b|test_\w+\()', source, flags=re.M))
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda): continue
        if isinstance(node, ast.Assert): return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, 'id', getattr(node.func, 'attr', ''))
            if name.startswith('test_') or name == 'ExceptionExpected': return True
        todo += ast.iter_child_nodes(node)
    return False


def last_heading(markdown: str) -> str | None:
    "The last heading of a markdown cell, as plain words."
    plain = re.sub(r'^(```|~~~).*?^\1', '', markdown, flags=re.M | re.S)  # a comment in a code block is no heading
    found = re.findall(r'^#{1,6}\s+(.+?)\s*#*$', plain, flags=re.M)
    return re.sub(r'[`*]|\[|\]\([^)]*\)|::', '', found[-1]).strip() if found else None


class CellFailed(Exception):
    "A cell raised; the message is the whole report."


class Notebook(pytest.File):
    "One notebook: a shell that is started with the first cell and closed after the last test."
    shell: Any = None
    failed = ''       # the report of the cell that raised, if any
    reported = False  # whether some test has shown that report already
    done = 0          # cells run so far

    def collect(self) -> Iterator['Cell']:
        from fastcore.nbio import read_nb
        from nbdev.config import get_config
        from nbdev.test import nb_test_cells
        flags = get_config(self.path.parent).tst_flags or []
        flags = flags.split() if isinstance(flags, str) else list(flags)
        self.cells = nb_test_cells(self.path, flags, flags if self.config.getoption('--slow') else [])
        if not self.cells: return
        self.headings, heading = {}, self.path.stem
        for i, cell in enumerate(read_nb(self.path).cells):
            if cell.cell_type == 'markdown': heading = last_heading(cell.source) or heading
            self.headings[i] = heading
        seen: dict[str, int] = {}
        for n, cell in enumerate(self.cells):
            if not asserts(cell.source): continue
            name = self.headings[cell.idx_]
            seen[name] = seen.get(name, 0) + 1
            yield Cell.from_parent(self, name=name if seen[name] == 1 else f'{name} ({seen[name]})', last=n)
        yield Cell.from_parent(self, name='runs to the end', last=len(self.cells) - 1)

    def run_to(self, last: int) -> None:
        "Run the cells up to and with `last` that have not run yet."
        from execnb.shell import CaptureShell
        with working_in(self.path.parent):
            if self.shell is None: self.shell = CaptureShell(self.path, mpl_format=None)
            while self.done <= last and not self.failed:
                cell = self.cells[self.done]
                self.shell.run(cell.source, timeout=CELL_SECONDS)
                error = self.shell.exc
                if error is None:
                    try: draw_figures()
                    except Exception as e: error = e  # noqa: BLE001 - whatever drawing raises is the cell's fault
                if error is not None: self.failed = report(self, cell, error)
                else: self.done += 1

    def teardown(self) -> None:
        if self.shell is not None: self.shell.close()
        self.shell = None
        if core := sys.modules.get('rs_mtl.core'): core.show_progress(None)  # a notebook's silence ends with it


class Cell(pytest.Item):
    "One cell that asserts, or the end of the notebook."
    def __init__(self, *, last: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.last = last

    def runtest(self) -> None:
        nb: Notebook = self.parent  # type: ignore[assignment]
        nb.run_to(self.last)
        if nb.done > self.last: return
        if nb.reported: raise CellFailed(f'not reached: {where(nb, nb.cells[nb.done])} failed')
        nb.reported = True
        raise CellFailed(nb.failed)

    def repr_failure(self, excinfo: pytest.ExceptionInfo, style: Any = None) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, CellFailed) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, f'{self.path.name}: {self.name}'


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    "The folder of the notebook, and IN_TEST=1, for as long as its cells run."
    before, in_test = Path.cwd(), os.environ.get('IN_TEST')
    os.chdir(folder)
    os.environ['IN_TEST'] = '1'
    try: yield
    finally:
        os.chdir(before)
        if in_test is None: del os.environ['IN_TEST']
        else: os.environ['IN_TEST'] = in_test


def draw_figures() -> None:
    "Draw what a cell left open, as Jupyter would (a picture can fail only when it is drawn), then close it."
    plt = sys.modules.get('matplotlib.pyplot')
    if plt is None: return
    try:
        for number in plt.get_fignums(): plt.figure(number).canvas.draw()
    finally: plt.close('all')


def where(nb: Notebook, cell: Any) -> str:
    return f'{nb.path.name}, cell {cell.idx_ + 1}, under "{nb.headings[cell.idx_]}"'


def report(nb: Notebook, cell: Any, error: BaseException) -> str:
    "Where it happened, the cell with the line marked, and the traceback from the cell on."
    tb, line = error.__traceback__, getattr(error, 'lineno', None) if isinstance(error, SyntaxError) else None
    while tb is not None and not in_cell(tb.tb_frame.f_code.co_filename): tb = tb.tb_next
    if tb is not None: line = tb.tb_lineno
    rows = [f'{"-->" if n == line else "   "} {n:3} | {row}' for n, row in enumerate(cell.source.splitlines(), 1)]
    trace = ''.join(traceback.format_exception(type(error), error, tb))
    return '\n'.join([where(nb, cell), '', *rows, '', trace.rstrip(), *(waiting() if isinstance(error, TimeoutError) else ())])


def waiting() -> Iterator[str]:
    "What every thread is doing: a cell that hangs can only be understood while it does."
    names = {t.ident: t.name for t in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        yield f'\nthread {names.get(ident, ident)}:\n' + ''.join(traceback.format_stack(frame)[-12:]).rstrip()


def in_cell(filename: str) -> bool:
    "Whether code stands in a notebook cell: known to the line cache, and in no file."
    return filename in linecache.cache and not os.path.exists(filename)
