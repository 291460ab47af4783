"conftest.py turns notebooks into tests; here it meets a small notebook with a passing, a failing and a left-out cell."
import json
from pathlib import Path

import pytest

pytest_plugins = ['pytester']
ROOT = Path(__file__).resolve().parents[1]
CONFIG = '[tool.nbdev]\nlib_name = "x"\nlib_path = "x"\nnbs_path = "nbs"\ntst_flags = "slow"\n\n[tool.pytest.ini_options]\ntestpaths = ["nbs"]\n'

GOOD = ['# A lesson\n\n```\n# no heading\n```', 'x = 1', '## First things', 'assert x == 1', 'x += 1\nassert x == 2', '## Left out', '#| eval: false\nassert x == 99',
        '## Takes long', '#| slow\nx += 10\nassert x == 12', '## `IN_TEST` and the folder\nSome words.',
        'import os, pathlib\nassert os.environ["IN_TEST"] == "1"\nassert pathlib.Path.cwd().name == "nbs"\npathlib.Path("ran").write_text(f"{pathlib.Path(\'ran\').exists()}{x}")',
        '## Not a test', 'def f():\n    assert False', 'import matplotlib, matplotlib.pyplot as plt\nassert matplotlib.get_backend().lower() == "agg"\nplt.figure()', 'assert not plt.get_fignums()']
BAD = ['## Before', 'assert True', '## Broken', 'y = 2\ndef g(z):\n    return 1 / z\nassert g(0) == y', '## After', 'assert True']
DIES = ['## Fine', 'assert True', '## Dies outside any test', 'None.nothing']
DRAWS = ['## A picture', 'import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.set_title(r"$\\frac$")\nassert fig']


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest((ROOT / 'conftest.py').read_text(encoding='utf-8'))
    pytester.makepyprojecttoml(CONFIG)
    pytester.mkdir('nbs')
    return pytester

def write(project: pytest.Pytester, name: str, cells: list[str], **metadata: object) -> None:
    "Cells that start with a # and a blank are words, others are code."
    def cell(n: int, source: str) -> dict:
        if source.startswith(('# ', '## ', '---')): return {'cell_type': 'markdown', 'id': f'c{n}', 'metadata': {}, 'source': source}
        return {'cell_type': 'code', 'id': f'c{n}', 'metadata': metadata, 'execution_count': None, 'outputs': [], 'source': source}
    path = project.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'cells': [cell(n, s) for n, s in enumerate(cells)], 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}))

def run(project: pytest.Pytester, *args: str) -> pytest.RunResult:
    return project.runpytest_subprocess('-p', 'no:cacheprovider', '-p', 'no:xdist', *args)


def test_cells_are_tests_named_after_headings_and_flags_are_honoured(project: pytest.Pytester):
    write(project, 'nbs/a.ipynb', GOOD)
    write(project, 'nbs/b.ipynb', ['---\nskip_exec: true\n---', 'assert False'])
    write(project, 'nbs/runs/r.ipynb', ['assert False'])
    write(project, 'nbs/benchmarks/p.ipynb', ['assert False'], tags=['parameters'])
    write(project, 'nbs/_draft.ipynb', ['assert False'])
    write(project, 'nbs/.ipynb_checkpoints/a.ipynb', ['assert False'])
    result = run(project, '-v')
    result.assert_outcomes(passed=6)
    names = [row.split('::')[1].split(' PASSED')[0] for row in result.outlines if 'PASSED' in row]
    assert names == ['First things', 'First things (2)', 'IN_TEST and the folder', 'Not a test', 'Not a test (2)', 'runs to the end']
    assert (project.path / 'nbs/ran').read_text() == 'False2', 'the notebook ran once, without its slow cell'

def test_slow_cells_run_when_asked_and_names_select(project: pytest.Pytester):
    write(project, 'nbs/a.ipynb', GOOD)
    run(project, '--slow', '--collect-only', '-q').stdout.fnmatch_lines(['nbs/a.ipynb::Takes long'])
    assert not (project.path / 'nbs/ran').exists(), 'collecting runs nothing'
    run(project, '--slow', 'nbs/a.ipynb', '-k', 'folder').assert_outcomes(passed=1, deselected=6)
    assert (project.path / 'nbs/ran').read_text() == 'False12', 'what stands before the chosen test has run'

def test_a_cell_that_hangs_says_where(project: pytest.Pytester):
    project.makeconftest((ROOT / 'conftest.py').read_text(encoding='utf-8').replace('CELL_SECONDS = 600', 'CELL_SECONDS = 2'))
    write(project, 'nbs/a.ipynb', ['## Waits', 'import time\ndef for_godot(): time.sleep(20)\nassert for_godot() is None'])
    result = run(project)
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(['*TimeoutError*', 'thread CaptureShell-loop:', '*in for_godot*'])

def test_a_failing_cell_is_shown_with_its_line_and_what_follows_is_not_passed(project: pytest.Pytester):
    write(project, 'nbs/bad.ipynb', BAD)
    write(project, 'nbs/dies.ipynb', DIES)
    write(project, 'nbs/draws.ipynb', DRAWS)
    result = run(project)
    result.assert_outcomes(passed=2, failed=6)
    result.stdout.fnmatch_lines(['bad.ipynb, cell 4, under "Broken"', '*   1 | y = 2', '*-->   4 | assert g(0) == y', '*ZeroDivisionError: division by zero'])
    result.stdout.fnmatch_lines(['not reached: bad.ipynb, cell 4, under "Broken" failed'])
    result.stdout.fnmatch_lines(['dies.ipynb, cell 4, under "Dies outside any test"', '-->   1 | None.nothing', '*AttributeError*'])
    result.stdout.fnmatch_lines(['draws.ipynb, cell 2, under "A picture"', '*ValueError*'])
    assert 'execnb' not in result.stdout.str(), 'the report starts at the cell'
