"The explorer by script, and its panel in a real JupyterLab with a real browser: a window is drawn, Predict pressed, the clouds are pulled, and the page looked at."
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('leafmap', reason="the extra 'maps' is not installed")
pytest.importorskip('rasterio')
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab import colours, lab, like, needs_browser, notebook, opened  # noqa: F401
from rasterio.transform import from_origin
from torch import nn

from rs_mtl.apply.answers import Window, between, metres_per_degree, pixel_area, predict_window, to_degrees
from rs_mtl.apply.explore import Explorer, explore
from rs_mtl.core import ConfigError, DataError, RsMtlError
from rs_mtl.data.grid import Grid
from rs_mtl.data.rasters import write_raster

ORANGE, BLUE = (213, 94, 0), (0, 114, 178)
PLACE = {'crs': 'EPSG:32632', 'transform': from_origin(691_000, 5_335_000, .5, .5)}
NETS = '''
import torch
from torch import nn

class Byhand(nn.Module):
    "Red is roof, everything else is ground; or the other way round. A roof is 12 m high."
    inputs, tasks = ('image',), ('mask', 'height')
    def __init__(self, wrong=False):
        super().__init__()
        self.wrong, self.config, self.meta = wrong, {}, {'classes': ('ground', 'roof'), 'palette': ((0, 114, 178), (213, 94, 0))}
    def forward(self, batch):
        red = 100*(batch['image'][:, :1] - batch['image'][:, 1:].amax(1, keepdim=True) - .05)
        return {'mask': torch.cat([red, -red] if self.wrong else [-red, red], 1), 'height': 12*torch.sigmoid(red)}
'''
exec(NETS)


def town(folder: Path, **changes) -> dict[str, str]:
    "A square red roof in the middle of a dark ground; half of the middle half of the scene."
    image, height = np.full((3, 240, 320), .1, 'float32'), np.zeros((240, 320), 'float32')
    image[0, 80:160, 120:200], height[80:160, 120:200] = .4, 12
    return {'image': str(write_raster(folder/'image.tif', image, PLACE | changes, bands=['red', 'green', 'blue'])), 'height': str(write_raster(folder/'height.tif', height, PLACE | changes, nodata=-9999)),
            'mask': str(write_raster(folder/'mask.tif', (height > 0).astype('uint8'), PLACE | changes, nodata=255, classes=['ground', 'roof'], palette=[BLUE, ORANGE]))}


@pytest.fixture
def x(tmp_path): return Explorer({'right': Byhand(), 'wrong': Byhand(True)}, town(tmp_path))  # noqa: F821


def corner(x: Explorer, row: float, col: float) -> tuple[float, float]: return tuple(to_degrees(x.scene, [(row, col)])[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(16, 64), st.sampled_from([0., .25, .5]))
def test_tiles_leave_no_trace(h, w, tile, overlap):
    class Same(nn.Module):
        def forward(self, batch): return {'height': batch['image'][:, :1]}
    image = torch.rand(2, h, w)
    assert torch.allclose(predict_window(Same(), {'image': image}, tile, overlap)['height'], image[:1], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.floats(-75, 75), st.floats(-170, 170), st.sampled_from(['EPSG:3857', 'EPSG:4326', 'utm']))
def test_a_pixel_has_the_same_ground_in_every_projection(lat, lon, crs):
    from rasterio.crs import CRS
    from rasterio.warp import transform
    code = (32600 if lat >= 0 else 32700) + int((lon + 180)//6) + 1
    crs = CRS.from_epsg(code) if crs == 'utm' else CRS.from_string(crs)
    (x0,), (y0,) = transform('EPSG:4326', crs, [lon], [lat])
    size = 1e-4 if crs.is_geographic else 10.
    grid = Grid(crs, from_origin(x0, y0, size, size), (10, 10))
    area = pixel_area(grid, Window(0, 0, 1, 1))
    e2, s = .00669437999014, np.sin(np.radians(lat))
    north, east = metres_per_degree(lat)
    if crs.is_geographic: want = 1e-8*north*east
    elif crs.to_epsg() == 3857:  # its scale is that of a sphere, on latitudes of an ellipsoid
        c = np.cos(np.radians(lat))
        want = 100*c*c*(1 - e2)/(1 - e2*s*s)**2
    else: want = 100.  # the scale of UTM differs from 1 by 0.1 % at most within its zone
    assert area == pytest.approx(want, rel=4e-3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 24), st.floats(0, 40)), min_size=1, max_size=20), st.integers(0, 5))
def test_between_pixels_a_plane_stays_a_plane_and_a_hole_a_hole(points, seed):
    rows, cols = np.indices((24, 40)) + .5
    plane, at = 3*rows - 2*cols, np.array(points)
    inner = np.clip(at, .5, (23.5, 39.5))
    assert np.allclose(between(plane, inner), 3*inner[:, 0] - 2*inner[:, 1], atol=1e-9)
    holed = plane.copy()
    hole = np.random.default_rng(seed).random(plane.shape) < .2
    holed[hole] = np.nan
    found, (r, c) = between(holed, inner), np.minimum(inner.astype(int), (23, 39)).T
    assert np.isnan(found[hole[r, c] & (np.abs(inner - np.floor(inner) - .5) < .4).all(1)]).all(), 'a pixel without value is never filled from beside it'
    kept = np.isfinite(found)
    assert np.allclose(found[kept], between(plane, inner)[kept]), 'and never mixed with what is beside it'
    assert np.isnan(between(plane, at + 100)).all()


def test_areas_and_scores_are_those_of_the_town(x):
    w = x.pick((corner(x, 200, 80), corner(x, 40, 240)))
    assert w.row <= 40 and w.col <= 80 and 160 <= w.height <= 172 and 160 <= w.width <= 172  # north is not quite up in this CRS
    x.predict(['right', 'wrong'])
    roof = {r['net']: r for r in x.areas() if r['class'] == 'roof'}
    assert roof['right']['pixels'] == 80*80 and roof['right']['m2'] == pytest.approx(1600, rel=2e-3) and roof['right']['true share'] == roof['right']['share'] == 6400/(w.height*w.width)
    assert roof['wrong']['pixels'] == w.height*w.width - 6400
    assert [s['right pixels'] for s in x.scores()] == [1., 0.]
    assert all(s['height MAE'] < .2 for s in x.scores())


def test_a_profile_is_as_long_as_the_line_and_as_high_as_the_roof(x):
    x.pick((corner(x, 230, 10), corner(x, 10, 310)))
    x.predict(['right'])
    p = x.profile([corner(x, 120, 20), corner(x, 120, 300)])
    assert p.distance[-1] == pytest.approx(140, rel=1e-3) and set(p.heights) == {'right', 'true'}
    on = p.distance[p.heights['true'] > 6]
    assert (on.min(), on.max()) == (pytest.approx(50, abs=.5), pytest.approx(90, abs=.5))
    assert np.nanmax(np.abs(p.heights['right'] - p.heights['true'])) < .5
    half = x.profile([corner(x, 120, 20), corner(x, 120, 500)])
    assert np.isnan(half.heights['true'][half.distance > 160]).all() and np.isfinite(half.heights['true'][half.distance < 140]).all()


def test_pixels_without_data_are_in_no_area_no_profile_and_no_layer(tmp_path):
    files = town(tmp_path)
    image = np.full((3, 240, 320), .1, 'float32')
    image[0, 80:160, 120:200], image[:, :, 160:] = .4, -1
    x = Explorer(Byhand(), files | {'image': str(write_raster(tmp_path/'holed.tif', image, PLACE, bands=['red', 'green', 'blue'], nodata=-1))})  # noqa: F821
    x.pick((corner(x, 230, 10), corner(x, 10, 310)))
    x.cover = .6
    x.predict()
    w = x.window
    assert sum(r['pixels'] for r in x.areas()) == w.height*(160 - w.col)
    p = x.profile([corner(x, 120, 100), corner(x, 120, 250)])
    name = next(n for n in p.heights if n != 'true')
    assert np.isnan(p.heights[name][p.distance > 31]).all() and np.isfinite(p.heights[name][p.distance < 29]).all()
    drawn = {d.name: d for d in x.layers()}
    for n in ('classes', 'height', 'uncertainty', 'image seen'): assert not drawn[n].valid[:, -drawn[n].valid.shape[1]//3:].any(), n
    x.pick((corner(x, 230, 200), corner(x, 10, 310)))
    with pytest.raises(DataError, match='a window without data'): x.predict()


def test_an_answer_counts_for_its_window_and_its_sky_only(x):
    x.pick_at(corner(x, 120, 160), 64)
    first = x.predict(['right'])['right']
    assert set(x.answers) == {'right'}
    for change in (lambda: setattr(x, 'cover', .3), lambda: setattr(x, 'seed', 5), lambda: setattr(x, 'sky', 'thin'), lambda: x.pick_at(corner(x, 100, 160), 64)):
        change()
        assert x.answers == {}
        with pytest.raises(ConfigError, match='no net was asked'): x.areas()
        x.predict()
    x.cover = 0
    x.pick_at(corner(x, 120, 160), 64)
    assert np.array_equal(x.predict()['right'].mask, first.mask)


def test_clouds_cost_what_they_cover_and_their_truth_is_known(x):
    x.pick((corner(x, 230, 10), corner(x, 10, 310)))
    lost = []
    for cover in (0, .3, .9):
        x.cover = cover
        x.predict(['right'])
        lost.append((float(x.truth()['cloud_impact'].mean()) if cover else 0., x.scores()[0]['right pixels']))
    (a, all_right), (b, some), (c, few) = lost
    assert a < b < c and all_right == 1. and few < 1.
    sample = x.sample()
    assert torch.equal(sample['clear'], x.scene.read(*[n - d for n, d in zip(x.window[:2], (32, 32))], *[n + 64 for n in x.window[2:]], edge='reflect')['image'])


@pytest.mark.parametrize('act, says', [
    (lambda x: x.pick(((0, 0), (1, 1))), 'a rectangle'), (lambda x: x.pick(((2, 2), (1, 1))), 'south-west and north-east'), (lambda x: x.pick_at((0, 0), 64), 'outside of the scene'),
    (lambda x: x.predict(), 'no window was picked'), (lambda x: x.areas(), 'no net was asked'), (lambda x: x.net('rihgt'), "did you mean 'right'"),
    (lambda x: x.pick((corner(x, 102, 100), corner(x, 100, 102))), 'at least 8 x 8'), (lambda x: setattr(x, 'cover', 1.2), 'a share from 0 to 1'),
    (lambda x: (x.pick_at(corner(x, 120, 160), 64), x.predict(), x.profile([corner(x, 1, 1)])), 'at least two'),
    (lambda x: Explorer({}, x.scene), 'no net in'), (lambda x: Explorer({'a': 3}, x.scene), 'a int where a net is expected'), (lambda x: Explorer(Byhand(), x.scene, sky='thikc'), "did you mean 'thick'"),  # noqa: F821
])
def test_faults_say_what_to_do(x, act, says):
    with pytest.raises(RsMtlError) as e:
        if says == 'no window was picked': Explorer(Byhand(), x.scene).predict()  # noqa: F821
        act(x)
    assert says in str(e.value)


def test_a_map_without_its_extra_names_the_extra(tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'ipyleaflet', None)
    with pytest.raises(ConfigError, match=r"rs_mtl\[maps\]"): explore(Byhand(), town(tmp_path))  # noqa: F821


def test_an_error_nobody_thought_of_is_shown_in_the_panel_and_the_button_comes_back(tmp_path):
    class Broken(nn.Module):
        inputs, tasks = ('image',), ('mask',)
        def forward(self, batch): raise ZeroDivisionError('a slip')
    panel = explore(Broken(), town(tmp_path))
    panel.pick_at(corner(panel.explorer, 120, 160), 64)
    panel.controls.go.click()
    assert 'ZeroDivisionError: a slip' in panel.controls.said.value and not panel.controls.go.disabled and panel.controls.bar.layout.visibility == 'hidden'
    with pytest.raises(ZeroDivisionError): panel.predict()


def test_warnings_of_a_net_are_shown_in_the_panel(tmp_path):
    import warnings
    class Doubtful(Byhand):  # noqa: F821
        def forward(self, batch):
            warnings.warn('bands in another order?', stacklevel=1)
            return super().forward(batch)
    panel = explore(Doubtful(), town(tmp_path))
    panel.pick_at(corner(panel.explorer, 120, 160), 64)
    panel.controls.go.click()
    assert 'answered in' in panel.controls.said.value and 'bands in another order?' in panel.controls.said.value


def test_a_saved_notebook_keeps_a_picture_and_what_was_chosen_stays_chosen(tmp_path):
    panel = explore({'right': Byhand(), 'wrong': Byhand(True)}, town(tmp_path))  # noqa: F821
    bundle = panel._repr_mimebundle_()
    assert {'image/png', 'application/vnd.jupyter.widget-view+json', 'text/plain'} <= set(bundle)
    panel.pick_at(corner(panel.explorer, 120, 160), 128)
    panel.predict(['right', 'wrong'])
    assert panel.stage.pair == ('classes · right', 'classes · wrong')
    panel.stage.swipe()
    panel.stage.over['height · right'].visible, panel.stage.over['height · right'].opacity = True, .3
    panel.pick_at(corner(panel.explorer, 100, 160), 128)
    assert list(panel.stage.drawn) == ['image']  # what was said about another window is gone
    panel.predict(['right'])
    assert panel.stage.over['height · right'].visible and panel.stage.over['height · right'].opacity == .3
    assert 'classes · wrong' not in panel.stage.drawn
    assert panel.save(tmp_path/'map.html').stat().st_size > 20_000


def drag(page, *points) -> None:
    "Press at the first point, move over the others, let go at the last."
    page.mouse.move(*points[0])
    page.mouse.down()
    for p in points[1:]: page.mouse.move(*p, steps=6)
    page.mouse.up()


@needs_browser
def test_a_window_is_drawn_predicted_faded_swiped_clouded_and_followed_in_jupyterlab(tmp_path, lab):  # noqa: F811
    expect = pytest.importorskip('playwright.sync_api').expect
    files = town(tmp_path)
    notebook(tmp_path/'explore.ipynb', NETS, f"import rs_mtl\nfrom rs_mtl.apply.explore import explore\npanel = explore({{'right': Byhand(), 'wrong': Byhand(True)}}, {files!r})\npanel")
    with opened(lab, 'explore.ipynb', size=(1400, 1200)) as page:
        stage = page.locator('.leaflet-container').first
        box = stage.bounding_box()
        look = lambda name: colours(stage.screenshot(), f'explore-{name}')[:, :-230]  # without the legend, which has the same colours
        before = look('scene')
        red = np.argwhere((before[..., 0] > 200) & (before[..., 1] < 90))          # the roof of the image
        (top, left), (bottom, right) = red.min(0), red.max(0)
        at = lambda row, col: (box['x'] + float(col), box['y'] + float(row))
        far = (bottom - top)*.4
        assert like(before, ORANGE).mean() < .002 and like(before, BLUE).mean() < .002

        page.click('.leaflet-draw-draw-rectangle')
        drag(page, at(top - far, left - far), at(bottom + far, right + far))
        page.wait_for_selector('text=/Window of [0-9]+/', timeout=90_000)  # not the advice of the beginning, which also ends on Predict
        page.click('button:has-text("Predict")')
        page.wait_for_selector('text=answered in', timeout=90_000)
        page.wait_for_timeout(1000)
        seen = look('classes')
        roof = np.argwhere(like(seen, ORANGE))
        assert np.abs(roof.min(0) - (top, left)).max() < 8 and np.abs(roof.max(0) - (bottom, right)).max() < 8, 'the class roof lies on the roof'
        ground = np.argwhere(like(seen, BLUE, 25))
        assert len(ground) > .5*len(roof) and np.abs(np.percentile(ground, 1, 0) - (top - far, left - far)).max() < 25, 'and ends where the window ends'
        table = page.locator('table').first.inner_text()
        assert 'roof' in table and 'm²' in table and 'true' in table
        assert page.locator('.leaflet-container >> text=height in m').count() == 1 and page.locator('.leaflet-container >> text=roof').count() == 1

        row = page.locator('.widget-hbox:has(> .widget-checkbox)').filter(has_text='classes · right').last
        handle = row.locator('.noUi-handle')
        handle.focus()
        page.keyboard.press('Home')                                                  # to the left: transparent
        page.wait_for_timeout(800)
        assert like(look('faded'), ORANGE).sum() < .05*len(roof), 'the slider fades the classes'
        page.keyboard.press('End')
        page.wait_for_timeout(800)
        assert like(look('back'), ORANGE).sum() > .9*len(roof)

        page.locator('.jupyter-widgets select').nth(1).select_option('wrong')
        page.click('button:has-text("Predict")')
        page.wait_for_selector('text=wrong answered in', timeout=90_000)
        page.wait_for_selector('.leaflet-sbs-divider', timeout=90_000)
        page.wait_for_timeout(2000)
        seen, half = look('swipe'), int(box['width']/2)
        split = lambda s, c: (like(s, ORANGE)[top + 8:top + 28, left + 8:c - 6].mean(), like(s, BLUE, 25)[top + 8:top + 28, c + 6:right - 8].mean())  # above the handle; the sides of the roof slant by 3 pixels
        assert min(split(seen, half)) > .85, 'one net is left of the divider, the other right of it'
        quarter = int(right - left)//4
        drag(page, (box['x'] + half, box['y'] + box['height']/2), (box['x'] + half + quarter, box['y'] + box['height']/2))
        for _ in range(20):   # a busy machine draws late
            page.wait_for_timeout(500)
            moved = look('swiped')
            if min(split(moved, half + quarter)) > .85: break
        assert min(split(moved, half + quarter)) > .85 and like(moved, ORANGE).sum() != like(seen, ORANGE).sum(), 'the divider went where the mouse went'

        clouds = page.locator('.widget-slider').filter(has_text='Clouds')
        clear, wanted = page.locator('table').last.inner_text(), re.compile(r'right answered in .*wrong answered in .*under clouds of (\d+)')
        bar, knob = clouds.locator('.noUi-base').bounding_box(), clouds.locator('.noUi-handle').bounding_box()
        level = knob['y'] + knob['height']/2
        drag(page, (knob['x'] + knob['width']/2, level), (bar['x'] + bar['width']*.6, level))
        says = page.locator('.jupyter-widgets [role=status]').first
        expect(says).to_have_text(wanted, timeout=90_000)
        assert 50 <= int(wanted.search(says.inner_text())[1]) <= 70, 'the clouds are where the mouse let the slider go'
        page.wait_for_timeout(2000)
        clouded, under = look('clouds'), page.locator('table').last.inner_text()
        shares = [[float(v) for v in re.findall(r'([\d.]+)%', next(r for r in text.splitlines() if r.startswith('right pixels')))] for text in (clear, under)]
        assert shares[0] == [100, 0] and shares[1][0] < 99 and shares[1][1] > 1, 'both nets answered again, and clouds cost the one what they give the other'
        inner = (slice(top, bottom), slice(left, right))
        assert (like(clouded, ORANGE) | like(clouded, BLUE, 25))[inner].mean() > .75, 'the classes of both are still on the map, around the handle'
        for c0, c1 in ((left, half - 6), (half + 6, right)): assert np.abs(clouded - seen)[top:bottom, c0:c1].max(-1).mean() > 20, 'and on both sides of the divider others than before'
        clouds.locator('.noUi-handle').focus()
        page.keyboard.press('Home')                                                  # a clear sky again
        expect(says).not_to_contain_text('under clouds', timeout=90_000)
        page.wait_for_timeout(2000)
        assert np.abs(look('clear-again') - seen)[inner].max(-1).mean() < 3, 'and all is as it was'

        page.click('.leaflet-draw-draw-polyline')
        middle, ends = (top + bottom)/2, (left - far/2, right + far/2)
        for col in (*ends, ends[1]):
            page.mouse.click(*at(middle + 30, col))
            page.wait_for_timeout(500)
        page.wait_for_selector('img[alt="heights along the line"]', timeout=90_000)

        page.click('.leaflet-draw-draw-rectangle')
        drag(page, (box['x'] + box['width'] - 60, box['y'] + 12), (box['x'] + box['width'] - 20, box['y'] + 50))
        page.wait_for_selector('.jupyter-widgets [role=alert]', timeout=90_000)
        said = page.locator('.jupyter-widgets [role=alert]').inner_text()
        assert all(w in said for w in ('beside the scene', 'expected', 'what to do')) and page.locator('button:has-text("Predict")').is_enabled()
        page.screenshot(path=tmp_path/'page.png')
        colours((tmp_path/'page.png').read_bytes(), 'explore-page')
