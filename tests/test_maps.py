"The map in a real JupyterLab with a real browser: rasters are seen where they lie, and the swipe and the sliders are there."
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('leafmap', reason="the extra 'maps' is not installed")
pytest.importorskip('rasterio')
from rasterio.transform import from_origin

from rs_mtl.data.rasters import write_raster
from lab import colours, lab, like, needs_browser, notebook, opened  # noqa: F401

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


@needs_browser
def test_a_swipe_map_shows_both_rasters_in_jupyterlab_without_a_network(tmp_path, lab):  # noqa: F811
    files = rasters(tmp_path)
    notebook(tmp_path/'map.ipynb', f'from rs_mtl.apply.maps import show_map\nview = show_map({files!r}, compare=("image", "classes"))\nview')
    with opened(lab, 'map.ipynb') as page:
        box = page.locator('.leaflet-container').first
        seen = colours(box.screenshot(), 'map-swipe')
        assert page.locator('.leaflet-image-layer').count() == 3
        assert page.locator('text=water').count() >= 1  # the legend has the class name
        assert page.locator('.leaflet-container .widget-slider').count() == 3
        page.locator('.leaflet-container select').nth(1).select_option('height')  # another pair
        page.wait_for_timeout(2500)
        other = colours(box.screenshot(), 'map-other')
    half = seen.shape[1]//2
    red, blue = like(seen, (255, 0, 0), 76), like(seen, (0, 0, 255), 76)
    assert red[:, :half].mean() > .15 and red[:, half + 20:].mean() < .02, 'the image belongs to the left of the divider'
    black = (seen < 40).all(-1)
    assert black.mean() < .02, 'what the warp left empty must be transparent'
    assert blue[:, half:].mean() > .15 and blue[:, :half - 20].mean() < .02, 'the classes belong to the right of the divider'
    assert like(other, (0, 0, 255), 76)[:, half:].mean() < .02, 'the classes have left the map'
    assert like(other, (253, 231, 37), 60)[:, half:].sum() > 500 and like(other, (255, 0, 0), 76)[:, :half - 20].mean() > .15, 'yellow heights are on the right, the image is still on the left'


@needs_browser
def test_a_saved_map_opens_offline_and_is_drawn(tmp_path):
    playwright = pytest.importorskip('playwright.sync_api')
    from rs_mtl.apply.maps import show_map
    from lab import BROWSER, FLAGS
    page_file = show_map(rasters(tmp_path), compare=('image', 'classes')).save(tmp_path/'map.html')
    asked: list[str] = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={'width': 900, 'height': 800})
        page.on('request', lambda r: asked.append(r.url))
        page.goto(page_file.as_uri())
        page.wait_for_selector('#viewer[data-ready]', timeout=20_000)
        page.wait_for_timeout(500)
        seen = colours(page.locator('canvas').screenshot(), 'map-page')
        page.locator('select.right').select_option('height')
        page.wait_for_timeout(300)
        other = colours(page.locator('canvas').screenshot())
        browser.close()
    assert not [u for u in asked if not u.startswith(('file:', 'data:', 'blob:'))]
    half = seen.shape[1]//2
    assert like(seen, (255, 0, 0), 60)[:, :half - 20].mean() > .2 and like(seen, (0, 0, 255), 60)[:, half + 20:].mean() > .2
    assert like(other, (0, 0, 255), 60)[:, half + 20:].mean() < .02 and like(other, (253, 231, 37), 60)[:, half + 20:].sum() > 500


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
