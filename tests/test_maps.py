"The map in a real JupyterLab with a real browser: rasters are seen where they lie, and the swipe and the sliders are there."
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('leafmap', reason="the extra 'maps' is not installed")
pytest.importorskip('rasterio')
from rasterio.transform import from_origin

from rs_mtl.data.rasters import write_raster

BROWSER = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
needs_browser = pytest.mark.skipif(BROWSER is None, reason='no Chromium on this machine: install the package chromium to run the browser tests')
PLACE = {'crs': 'EPSG:32632', 'transform': from_origin(691_000, 5_335_000, .5, .5)}


def rasters(folder: Path) -> dict[str, str]:
    "A red image, a blue class raster and a height ramp, so that a screenshot can tell them apart."
    image = np.zeros((3, 400, 500), 'float32')
    image[0], image[0, :4] = 1, 0
    mask = np.zeros((400, 500), 'uint8')
    height = np.linspace(0, 20, 500, dtype='float32')[None].repeat(400, 0)
    return {'image': str(write_raster(folder/'image.tif', image, PLACE, bands=['red', 'green', 'blue'])),
            'classes': str(write_raster(folder/'classes.tif', mask, PLACE, nodata=255, classes=['water'], palette=[(0, 0, 255)])),
            'height': str(write_raster(folder/'height.tif', height, PLACE, nodata=-9999))}


def notebook(path: Path, *cells: str) -> None:
    code = [{'cell_type': 'code', 'execution_count': None, 'id': f'c{i}', 'metadata': {}, 'outputs': [], 'source': c} for i, c in enumerate(cells)]
    path.write_text(json.dumps({'cells': code, 'metadata': {'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}}, 'nbformat': 4, 'nbformat_minor': 5}))


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab of its own, without any of the user's settings; yields its address."
    pytest.importorskip('jupyterlab')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    scratch = {k: str(tmp_path/k.lower()) for k in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR')}
    command = [sys.executable, '-m', 'jupyterlab', '--allow-root', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', "--IdentityProvider.token=", '--ServerApp.password=',
               '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', f'--ServerApp.root_dir={tmp_path}']
    server = subprocess.Popen(command, env=os.environ | scratch, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f'http://127.0.0.1:{port}'
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f'{address}/api', timeout=1)
                break
            except OSError:
                assert server.poll() is None, 'JupyterLab ended at once'
                time.sleep(.25)
        else: pytest.fail('JupyterLab did not come up in 30 s')
        yield address
    finally:
        server.terminate()
        server.wait(20)


def colours(png: bytes) -> np.ndarray:
    import io

    from PIL import Image
    return np.asarray(Image.open(io.BytesIO(png)).convert('RGB')).astype(int)


@needs_browser
def test_a_swipe_map_shows_both_rasters_in_jupyterlab_without_a_network(tmp_path, lab):
    playwright = pytest.importorskip('playwright.sync_api')
    files = rasters(tmp_path)
    notebook(tmp_path/'map.ipynb', f'from rs_mtl.apply.maps import show_map\nshow_map({files!r}, compare=("image", "classes"))')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={'width': 1300, 'height': 900})
        page.goto(f'{lab}/lab/tree/map.ipynb')
        page.wait_for_selector('.jp-Notebook', timeout=40_000)
        page.wait_for_timeout(1500)
        page.keyboard.press('Escape')
        page.click('.lm-MenuBar-itemLabel:text("Run")')
        page.click('.lm-Menu-item:has-text("Run All Cells")')
        page.wait_for_selector('.leaflet-image-layer', timeout=60_000)
        page.wait_for_timeout(3000)
        shot = page.locator('.leaflet-container').first.screenshot(path=os.environ.get('RS_MTL_SHOT'))
        assert page.locator('.leaflet-image-layer').count() == 2
        assert page.locator('text=water').count() >= 1  # the legend has the class name
        assert page.locator('.leaflet-container .widget-slider').count() == 2
        browser.close()
    seen = colours(shot)
    half = seen.shape[1]//2
    red = (seen[..., 0] > 180) & (seen[..., 1] < 90) & (seen[..., 2] < 90)
    blue = (seen[..., 2] > 180) & (seen[..., 0] < 90) & (seen[..., 1] < 90)
    assert red[:, :half].mean() > .15 and red[:, half + 20:].mean() < .02, 'the image belongs to the left of the divider'
    black = (seen < 40).all(-1)
    assert black.mean() < .02, 'what the warp left empty must be transparent'
    assert blue[:, half:].mean() > .15 and blue[:, :half - 20].mean() < .02, 'the classes belong to the right of the divider'


def test_layers_lie_where_the_raster_says(tmp_path):
    from rasterio.warp import transform_bounds

    from rs_mtl.apply.maps import draw_layer
    files = rasters(tmp_path)
    west, south, east, north = transform_bounds('EPSG:32632', 'EPSG:4326', 691_000, 5_335_000 - 200, 691_250, 5_335_000)
    for name, path in files.items():
        d = draw_layer(name, path, 500)
        assert np.abs(np.subtract(d.bounds, ((south, west), (north, east)))).max() < 1e-5, name
    ramp = draw_layer('height', files['height'], 500)
    row = ramp.values[0][ramp.valid.shape[0]//2]
    assert np.all(np.diff(row[20:-20]) > 0)  # west to east, not mirrored


def test_classes_are_never_mixed_and_nodata_is_transparent(tmp_path):
    from rs_mtl.apply.maps import draw_layer
    mask = np.where(np.indices((300, 300)).sum(0) % 2, 5, 1).astype('uint8')
    mask[:80] = 255
    path = write_raster(tmp_path/'classes.tif', mask, PLACE, nodata=255, overviews=False)
    d = draw_layer('classes', path, 170)
    assert set(np.unique(d.values[0][d.valid])) <= {1, 5}
    alpha = d.picture()[..., 3]
    assert (alpha[:30, 20:-20] == 0).all() and (alpha[80:-20, 20:-20] == 255).all()


def test_the_fallback_picture_and_the_html_stay_small(tmp_path):
    from rs_mtl.apply.maps import show_map
    view = show_map(rasters(tmp_path))
    bundle = view._repr_mimebundle_()
    assert {'image/png', 'application/vnd.jupyter.widget-view+json', 'text/plain'} <= set(bundle)
    assert len(bundle['image/png']) < 200_000
    overlays = [layer for layer in view.map.layers if type(layer).__name__ == 'ImageOverlay']
    assert [o.name for o in overlays] == ['image', 'classes', 'height'] and all(o.url.startswith('data:image/') for o in overlays)
    assert len({o.pane for o in overlays}) == 3
