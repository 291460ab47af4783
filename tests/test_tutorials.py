"The tutorials as a reader meets them: in JupyterLab, in a browser, run from the top; the page is looked at and not only the absence of errors."
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest

pytest.importorskip('leafmap', reason="the extra 'maps' is not installed")
from lab import colours, lab, needs_browser, opened  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted(p.stem for p in (ROOT/'nbs'/'tutorials').glob('*.ipynb'))
STATE = '''() => {
  const panel = jupyterapp.shell.currentWidget, code = [...panel.content.model.cells].filter(c => c.type === 'code' && c.sharedModel.source.trim());
  const outputs = code.flatMap(c => c.outputs.toJSON());
  return {idle: panel.sessionContext.session.kernel.status === 'idle', left: code.filter(c => c.executionCount === null).length,
          errors: outputs.filter(o => o.output_type === 'error').map(o => `${o.ename}: ${o.evalue}`), pictures: outputs.filter(o => o.data && (o.data['image/png'] || o.data['text/html'])).length};
}'''


@pytest.fixture
def desk(tmp_path, monkeypatch):
    "The tutorials without their outputs, beside the sample data and the results that they show; kernels take the small parameters of the tests."
    monkeypatch.setenv('IN_TEST', '1')
    monkeypatch.delenv('MPLBACKEND', raising=False)  # figures belong on the page
    for part in ('data', 'nbs/benchmarks/results'): shutil.copytree(ROOT/part, tmp_path/part)  # what they read
    (tmp_path/'nbs'/'tutorials').mkdir()
    for name in TUTORIALS:
        nb = nbformat.read(ROOT/'nbs'/'tutorials'/f'{name}.ipynb', 4)
        for cell in nb.cells:
            if cell.cell_type == 'code': cell.outputs, cell.execution_count = [], None
        nbformat.write(nb, tmp_path/'nbs'/'tutorials'/f'{name}.ipynb')
    return tmp_path


def run_through(page, seconds=540):
    "Wait until every cell has run; what the page holds then."
    for _ in range(seconds*2):
        state = page.evaluate(STATE)
        if state['errors'] or state['idle'] and not state['left']: break
        page.wait_for_timeout(500)
    page.wait_for_timeout(1500)
    return page.evaluate(STATE)


@needs_browser
@pytest.mark.parametrize('name', [t for t in TUTORIALS if t != 'from_scene_to_map'])
def test_a_tutorial_runs_through_in_jupyterlab_and_leaves_pictures(desk, lab, name):  # noqa: F811
    with opened(lab, f'nbs/tutorials/{name}.ipynb', wait='.jp-OutputArea-output') as page:
        state = run_through(page)
        assert state['errors'] == [] and not state['left'] and state['pictures'] >= 2, state
        pictures = page.locator('.jp-OutputArea-output img')
        pictures.last.scroll_into_view_if_needed()
        seen = colours(pictures.last.screenshot(), f'tutorial-{name}')
        assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 30, 'a picture with something on it'


@needs_browser
def test_from_scene_to_map_runs_through_and_its_map_and_its_explorer_do_what_they_say(desk, lab):  # noqa: F811
    with opened(lab, 'nbs/tutorials/from_scene_to_map.ipynb', size=(1400, 1100)) as page:
        state = run_through(page)
        assert state['errors'] == [] and not state['left'], state
        stage = page.locator('.leaflet-container').first
        stage.scroll_into_view_if_needed()
        page.wait_for_timeout(1500)
        look = lambda name, of=stage: colours(of.screenshot(), f'tutorial-{name}')
        before, box = look('map'), stage.bounding_box()
        middle, strip = before.shape[1]//2, slice(before.shape[1]//2 + 8, before.shape[1]//2 + 110)
        rows = slice(30, before.shape[0]//2 - 40)                                        # above the handle and the controls below
        page.mouse.move(box['x'] + middle, box['y'] + box['height']/2)
        page.mouse.down()
        page.mouse.move(box['x'] + middle + 120, box['y'] + box['height']/2, steps=8)
        page.mouse.up()
        page.wait_for_timeout(800)
        after = look('map-swiped')
        changed = (np.abs(after - before).max(-1) > 25)[rows]
        assert changed[:, strip].mean() > .5 and changed[:, :middle - 20].mean() < .02, 'left of where the divider was nothing changed, right of it the image took the place of the classes'
        handle = stage.locator('.widget-hbox:has(> .widget-checkbox)').filter(has_text='image').locator('.noUi-handle')
        handle.focus()
        page.keyboard.press('Home')
        page.wait_for_timeout(800)
        faded = (np.abs(look('map-faded') - after).max(-1) > 25)[rows]
        assert faded[:, middle - 110:middle - 8].mean() > .5 and faded[:, middle + 140:].mean() < .02, 'the slider of the image fades the image, and nothing else'

        explorer = page.locator('.leaflet-container').last
        explorer.scroll_into_view_if_needed()
        page.wait_for_timeout(1500)
        seen = look('explorer', explorer)
        assert page.locator('.leaflet-sbs-divider').count() == 2, 'two nets lie left and right of a divider'
        page.locator('.widget-dropdown:has-text("Against") select').last.select_option('–')
        page.locator('button:has-text("Predict")').last.click()
        page.wait_for_selector('[role=status]:has-text("fair weather answered in"):not(:has-text("all weather"))', timeout=180_000)
        page.wait_for_selector('button:has-text("Predict"):enabled', timeout=90_000)
        page.wait_for_timeout(1500)
        alone, half = look('explorer-alone', explorer), seen.shape[1]//2
        changed = np.abs(alone - seen).max(-1) > 25
        assert page.locator('.leaflet-sbs-divider').count() == 1 and changed[:, half + 8:half + 100].mean() > .02 + changed[:, half - 100:half - 8].mean(), 'asked alone, the first net answers on both sides of where the divider was'
        page.screenshot(path=desk/'page.png')
        colours((desk/'page.png').read_bytes(), 'tutorial-page')
