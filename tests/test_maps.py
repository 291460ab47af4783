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


def fine(folder: Path) -> dict[str, str]:
    "Rasters of which each pixel differs from its neighbours, stored in numbers that are not their values."
    rng = np.random.default_rng(3)
    height, image = rng.uniform(0, 30, (300, 400)).astype('float32'), rng.uniform(.02, .4, (4, 300, 400)).astype('float32')
    classes = rng.integers(0, 3, (300, 400)).astype('uint8')
    classes[classes == 2] = 255
    height[120:180] = np.nan
    return {'image': str(write_raster(folder/'image.tif', image, PLACE, dtype='uint16', scale=1e-4, bands=['nir', 'red', 'green', 'blue'], nodata=0)),
            'classes': str(write_raster(folder/'classes.tif', classes, PLACE, nodata=255, classes=['water', 'roof'], palette=[(0, 114, 178), (213, 94, 0)])),
            'height': str(write_raster(folder/'height.tif', height, PLACE, valid=np.isfinite(height), nodata=-9999))}


@pytest.mark.parametrize('name', ['image', 'classes', 'height'])
def test_a_tile_has_the_pixels_of_the_raster_in_the_colours_of_the_overlay(tmp_path, name):
    pytest.importorskip('localtileserver', reason="the extra 'tiles' is not installed")
    import urllib.request

    import rasterio
    from matplotlib import colormaps
    from rasterio.warp import transform

    from rs_mtl.apply.figures import bulk
    from rs_mtl.apply.maps import show_map
    files = fine(tmp_path)
    view = show_map({name: files[name]}, side=200, tiles=True)       # the overlay has half of the raster's resolution
    layer, (d,) = view.stage.over[name], view.layers
    assert type(layer).__mro__[1].__name__ == 'TileLayer' and layer.url.startswith('http://127.0.0.1:')
    zoom, size = 19, 2*np.pi*6378137/2**19                            # a third of a pixel per pixel of the tile
    with rasterio.open(files[name]) as src:
        (x,), (y,) = transform(src.crs, 'EPSG:3857', *([v] for v in src.xy(150, 200)))
        tx, ty = int((x + np.pi*6378137)//size), int((np.pi*6378137 - y)//size)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(layer.url.format(z=zoom, x=tx, y=ty), timeout=60) as answer:
            from PIL import Image
            seen = np.asarray(Image.open(answer).convert('RGBA')).astype(int)
        at = (np.arange(256) + .5)/256*size
        xs, ys = np.meshgrid(tx*size - np.pi*6378137 + at, np.pi*6378137 - ty*size - at)
        cols, rows = ~src.transform @ np.array(transform('EPSG:3857', src.crs, xs.ravel(), ys.ravel()))
        inner = (np.abs(cols % 1 - .5) < .3) & (np.abs(rows % 1 - .5) < .3)  # not where the next pixel might be nearest
        rows, cols = (v[inner].astype(int).clip(0, n - 1) for v, n in ((rows, 300), (cols, 400)))
        raw = src.read()[:, rows, cols]
        valid, values = raw[0] != src.nodata, raw*src.scales[0] + src.offsets[0]
    seen = seen.reshape(-1, 4)[inner]
    if name == 'image':
        low, high = bulk(d.values[1:4], d.valid)
        want = ((values[1:4] - low)/(high - low)).clip(0, 1).T*255
    elif name == 'classes': want = np.array([(0, 114, 178), (213, 94, 0)])[raw[0].clip(0, 1)]
    else: want = colormaps['viridis'](((values[0] - d.range[0])/(d.range[1] - d.range[0])).clip(0, 1))[:, :3]*255
    assert inner.sum() > 10_000 and valid.mean() > .3 and (name == 'image' or valid.mean() < .9)
    assert (seen[:, 3] == np.where(valid, 255, 0)).mean() > .995, 'what has no data is transparent, and nothing else'
    assert (np.abs(seen[valid, :3] - want[valid]).max(1) <= 4).mean() > .99


def test_a_map_of_tiles_says_what_its_pictures_lack(tmp_path, monkeypatch):
    import sys
    import types

    import ipyleaflet

    from rs_mtl.apply.maps import draw_layer, show_map
    from rs_mtl.core import ConfigError
    files = rasters(tmp_path)
    monkeypatch.setitem(sys.modules, 'localtileserver', None)
    with pytest.raises(ConfigError, match=r"pip install 'rs_mtl\[tiles\]'"): show_map(files, tiles=True)
    asked = []
    def layer(client, attribution, indexes, vmin=None, vmax=None, colormap=None, nodata=None, **looks):
        asked.append((client, indexes, colormap, nodata))
        return ipyleaflet.TileLayer(url=f'http://127.0.0.1:1/{looks["name"]}/{{z}}/{{x}}/{{y}}.png', **looks)
    stub = types.SimpleNamespace(TileClient=lambda path, host: (path, host), get_leaflet_tile_layer=layer)
    monkeypatch.setitem(sys.modules, 'localtileserver', stub)
    view = show_map(files, compare=('image', 'classes'), opacity=.5, tiles=True, side=100)
    assert [a[0] for a in asked] == [(p, '127.0.0.1') for p in files.values()]
    assert [a[1] for a in asked] == [[1, 2, 3], [1], [1]] and asked[2][2:] == ('viridis', -9999)
    over = view.stage.over
    assert list(over) == list(files) and len({o.pane for o in over.values()}) == 3 and [o.opacity for o in over.values()] == [1, .5, .5]
    split = next(c for c in view.map.controls if type(c).__name__ == 'SplitMapControl')
    assert (split.left_layer, split.right_layer) == (over['image'], over['classes']) and not over['height'].visible
    assert max(d.valid.shape[1] for d in view.layers) <= 100 and len(view._repr_mimebundle_()['image/png']) < 200_000
    assert view.png() != show_map(files, side=100).png(), 'the picture of a saved notebook says that it is not at full resolution'
    with pytest.warns(UserWarning, match='at most 100 pixels a side'): view.save(tmp_path/'map.html')
    view.stage.put([draw_layer('height', files['height'], 50)])
    assert type(over['height']).__name__ == 'ImageOverlay', 'a layer that is drawn anew is no longer that of the file'


@needs_browser
def test_tiles_are_swiped_in_jupyterlab(tmp_path, lab):  # noqa: F811
    pytest.importorskip('localtileserver', reason="the extra 'tiles' is not installed")
    files = rasters(tmp_path)
    notebook(tmp_path/'map.ipynb', f'from rs_mtl.apply.maps import show_map\nview = show_map({files!r}, compare=("image", "classes"), tiles=True)\nview')
    with opened(lab, 'map.ipynb', wait='.leaflet-tile-loaded') as page:
        page.wait_for_timeout(3000)
        seen = colours(page.locator('.leaflet-container').first.screenshot(), 'map-tiles')
        asked = page.evaluate("[...document.querySelectorAll('.leaflet-pane[class*=rs] img.leaflet-tile')].map(i => new URL(i.src).hostname)")
    half = seen.shape[1]//2
    red, blue = like(seen, (255, 0, 0), 76), like(seen, (0, 0, 255), 76)
    assert red[:, :half].mean() > .15 and red[:, half + 20:].mean() < .02 and blue[:, half:].mean() > .15 and blue[:, :half - 20].mean() < .02
    assert set(asked) == {'127.0.0.1'}


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
