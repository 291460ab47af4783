"The page about a run, in a browser without a network: it must show what it was given, say what it lacks, and read the values under the pointer."
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('rasterio')
from rasterio.transform import from_origin

from rs_mtl.apply.report import unpacked, write_report
from rs_mtl.core import DatasetNotFoundError, write_json
from rs_mtl.data.rasters import write_raster

BROWSER = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
PLACE = {'crs': 'EPSG:32632', 'transform': from_origin(691_000, 5_335_000, .5, .5)}
LEGEND = {'nodata': 255, 'classes': ['grass', 'roof'], 'palette': [(0, 200, 0), (200, 0, 0)]}


@pytest.fixture
def run(tmp_path) -> Path:
    "A run whose scene is grass on the left and a roof of 12.3 m on the right; the net says 10 m and grass everywhere."
    mask, height = np.zeros((200, 300), 'uint8'), np.zeros((200, 300), 'float32')
    mask[:, 150:], height[:, 150:] = 1, 12.3
    image = np.random.default_rng(0).random((3, 200, 300), 'float32')
    folder = tmp_path/'a run'/'maps'
    write_raster(folder/'image.tif', image, PLACE, bands=['red', 'green', 'blue'])
    write_raster(folder/'truth_classes.tif', mask, PLACE, **LEGEND)
    write_raster(folder/'classes.tif', mask*0, PLACE, **LEGEND)
    write_raster(folder/'truth_height.tif', height, PLACE, nodata=-9999)
    write_raster(folder/'height.tif', height*0 + 10, PLACE, nodata=-9999)
    write_json(folder.parent/'metrics.json', {'values': {'miou': .25, 'iou': {'grass': .5, 'roof': 0.}, 'height_rmse': None}, 'protocol': {'pooling': 'all pixels'}})
    (folder.parent/'history.csv').write_text('epoch,loss\n1,2\n2,1\n')
    return folder.parent


def test_the_page_is_one_file_that_fetches_nothing(run):
    html = write_report(run).read_text()
    bare = re.sub(r'base64,[A-Za-z0-9+/=]+', '', html)
    assert not re.findall(r'https?:|url\((?!data:)|@import|(?:src|href)="(?!data:)', bare)
    assert '25.0%' in html and 'all pixels' in html and 'Not in this report' not in html


def test_what_a_run_lacks_is_said_and_nothing_raises(run):
    for name in ('metrics.json', 'history.csv', 'maps/truth_height.tif', 'maps/truth_classes.tif', 'maps/image.tif', 'maps/classes.tif', 'maps/height.tif'):
        (run/name).unlink()
        assert 'Not in this report' in write_report(run).read_text() or name == 'maps/truth_height.tif'
    text = write_report(run).read_text()
    assert all(w in text for w in ('metrics.json', 'history.csv', 'predicted maps', 'image of the scene'))
    with pytest.raises(DatasetNotFoundError): write_report(run/'nowhere')


def test_names_from_files_cannot_become_markup(run):
    evil = '</script><script>alert(1)</script>'
    write_raster(run/'maps'/'classes.tif', np.zeros((200, 300), 'uint8'), PLACE, nodata=255, classes=[evil, 'x'], palette=[(1, 2, 3), (4, 5, 6)])
    write_json(run/'metrics.json', {'values': {'iou': {evil: .5}}, 'protocol': {evil: evil}})
    assert evil not in write_report(run, title=evil).read_text()


def test_the_scene_may_lie_elsewhere(run, tmp_path):
    for old, new in (('image', 'image'), ('truth_classes', 'mask'), ('truth_height', 'height')):
        (tmp_path/'town').mkdir(exist_ok=True)
        shutil.move(run/'maps'/f'{old}.tif', tmp_path/'town'/f'{new}.tif')
    without = write_report(run).read_text()
    given = write_report(run, {n: tmp_path/'town'/f'{n}.tif' for n in ('image', 'mask', 'height')}).read_text()
    write_json(run/'maps'/'scene.json', {n: f'../../town/{n}.tif' for n in ('image', 'mask', 'height')})
    listed = write_report(run).read_text()
    assert 'the image of the scene' in without and 'the image of the scene' not in given and 'true classes' in given and listed == given


def test_what_the_predict_notebook_leaves_is_found(run):
    for old, new in (('image', 'image'), ('truth_classes', 'mask'), ('truth_height', 'height')):
        (run/'scene').mkdir(exist_ok=True)
        shutil.move(run/'maps'/f'{old}.tif', run/'scene'/f'{new}.tif')
    write_json(run/'scene.json', {'name': 'predict', 'values': {'miou': .123}, 'protocol': {}})
    html = write_report(run).read_text()
    assert 'Not in this report' not in html and 'Scores on this scene' in html and '12.3%' in html and 'true height' in html


def test_heights_survive_their_packing():
    from rs_mtl.apply.report import _packed
    h = np.random.default_rng(0).uniform(-50, 900, (40, 50))
    assert np.abs(unpacked(_packed(h, h > -100)) - h).max() <= .0501
    assert np.isnan(unpacked(_packed(h, h > 1e9))).all()


@pytest.mark.skipif(BROWSER is None, reason='no Chromium on this machine: install the package chromium to run the browser tests')
def test_the_map_on_the_page_works_offline_by_mouse_and_keyboard(run):
    playwright = pytest.importorskip('playwright.sync_api')
    page_file = write_report(run)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_context(offline=True, viewport={'width': 1000, 'height': 900}).new_page()
        said: list[str] = []
        page.on('console', lambda m: said.append(m.text))
        page.on('pageerror', lambda e: said.append(str(e)))
        page.goto(page_file.as_uri())
        page.wait_for_selector('#viewer[data-ready]')
        page.wait_for_timeout(300)
        canvas = page.locator('canvas')
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        middle = box['x'] + box['width']/2, box['y'] + box['height']/2

        def read(dx, dy=0.):
            page.mouse.move(middle[0] + dx, middle[1] + dy)
            return page.locator('.read').inner_text()

        def colour(dx):
            import io

            from PIL import Image
            shot = Image.open(io.BytesIO(canvas.screenshot())).convert('RGB')
            return shot.getpixel((round(shot.width/2 + dx), round(shot.height/3)))

        assert 'grass (true), grass (predicted)' in read(-30) and '0.0 m (true), 10.0 m (predicted)' in read(-30)
        assert 'roof (true), grass (predicted)' in read(30) and '12.3 m (true)' in read(30)
        east = float(re.search(r'EPSG:32632 ([\d.]+)', read(0)).group(1))
        assert abs(east - 691_075) < .6  # the middle of 300 pixels of half a metre
        page.select_option('.left', 'true classes')
        page.select_option('.right', 'predicted classes')
        page.locator('.handle').focus()
        assert colour(100) == (0, 200, 0)      # predicted: grass
        for _ in range(30): page.keyboard.press('ArrowRight')  # the divider to the right end: all truth
        assert colour(100) == (200, 0, 0)
        page.mouse.move(*middle)
        page.mouse.wheel(0, -1000)
        assert abs(float(re.search(r'EPSG:32632 ([\d.]+)', read(0)).group(1)) - east) < .6  # zooms about the pointer
        assert abs(float(re.search(r'EPSG:32632 ([\d.]+)', read(80)).group(1)) - east) < 20
        page.mouse.move(*middle)
        page.mouse.down()
        page.mouse.move(middle[0] + 60, middle[1])
        page.mouse.up()
        assert float(re.search(r'EPSG:32632 ([\d.]+)', read(0)).group(1)) < east - 1  # dragged to the right
        assert said == []
        page.set_viewport_size({'width': 380, 'height': 700})
        page.wait_for_timeout(200)
        assert page.evaluate('document.documentElement.scrollWidth') <= 380  # nothing sticks out on a phone
        browser.close()


def test_a_page_that_cannot_be_written_leaves_the_old_one(run, monkeypatch):
    old = write_report(run).read_bytes()
    monkeypatch.setattr('os.replace', lambda *a: (_ for _ in ()).throw(OSError('disk')))
    with pytest.raises(OSError): write_report(run, title='new')
    assert (run/'report.html').read_bytes() == old and not list(run.glob('.*part*'))
