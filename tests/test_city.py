"The synthetic city over many sizes, seeds and scales: its layers must agree, and nothing but the seed may decide."
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rs_mtl.core import IGNORE, valid_key
from rs_mtl.worlds.canvas import BUILDING, CAR, IMPERVIOUS, LOW, TREE
from rs_mtl.worlds.city import City, render
from rs_mtl.worlds.plan import Frame, Rect, cut

LAYERS = {'image': 4, 'sar': 2, 'clear': 4, 'cloud_impact': 1, 'height': 1}
SAMPLE = Path(__file__).resolve().parents[1]/'data'/'city'


def agree(s):
    h, m, ok = s['height'][0], s['mask'], s['valid_height'][0]
    assert h[((m == IMPERVIOUS) | (m == LOW)) & ok].abs().sum() == 0
    for label, low, high in ((BUILDING, 3, 40), (TREE, .5, 40), (CAR, 1, 3.5)):
        there = h[(m == label) & ok]
        assert not len(there) or low <= there.min() and there.max() <= high, (label, there.min(), there.max())


@settings(max_examples=25, deadline=None)
@given(h=st.integers(1, 90), w=st.integers(1, 90), seed=st.integers(0, 2**31), gsd=st.sampled_from([.1, .25, .5, 1., 2.]), cover=st.sampled_from([0., .5]))
def test_every_size_and_scale_gives_whole_samples(h, w, seed, gsd, cover):
    s = City(1, (h, w), seed, gsd, cover, border=1)[0]
    assert {k: tuple(s[k].shape) for k in LAYERS} == {k: (c, h, w) for k, c in LAYERS.items()} and s['mask'].shape == (h, w)
    for k in (*LAYERS, 'mask'): assert s[valid_key(k)].shape == (1, h, w) and s[valid_key(k)].dtype == torch.bool
    for k in LAYERS:
        assert s[k].dtype == torch.float32 and s[k].isfinite().all()
        assert (s[k]*~s[valid_key(k)]).abs().sum() == 0
    assert s['mask'].dtype == torch.int64 and set(s['mask'].unique().tolist()) <= {*range(6), IGNORE}
    assert torch.equal(s['mask'] == IGNORE, ~s['valid_mask'][0])
    agree(s)


@pytest.mark.parametrize('i', range(8))
def test_the_layers_of_a_scene_agree(i): agree(City(8, 256, seed=11)[i])


def test_without_clouds_clear_is_the_image_and_with_clouds_it_is_not():
    a, b = City(1, 96, seed=1)[0], City(1, 96, seed=1, cover=.6)[0]
    assert torch.equal(a['image'], a['clear']) and a['cloud_impact'].sum() == 0
    assert torch.equal(a['clear'], b['clear']) and torch.equal(a['mask'], b['mask'])
    changed = (b['image'] - b['clear']).abs().mean(0)
    assert changed[b['cloud_impact'][0] > .3].mean() > 10*changed[b['cloud_impact'][0] < .005].mean().nan_to_num(0)


def test_a_scene_depends_on_seed_and_index_alone():
    data = City(5, 64, seed=3, cover=.3)
    for loader in (DataLoader(data, 2, num_workers=0), DataLoader(data, 2, num_workers=2, multiprocessing_context='spawn')):
        for k, batch in enumerate(loader):
            for j in range(len(batch['mask'])):
                alone = City(99, 64, seed=3, cover=.3)[2*k + j]
                assert all(torch.equal(alone[n], batch[n][j]) for n in alone)
    assert torch.equal(data[-1]['image'], data[4]['image'])
    assert not torch.equal(data[0]['mask'], City(5, 64, seed=4)[0]['mask']) and not torch.equal(data[0]['mask'], data[1]['mask'])


def test_drawing_leaves_the_global_random_state_alone():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    City(1, 32, cover=.5)[0]
    assert torch.equal(state, torch.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()


def test_holes_can_be_switched_off_and_are_there_otherwise():
    assert all(v.all() for s in City(12, 64, holes=False) for k, v in s.items() if k.startswith('valid_'))
    rims = [~s['valid_image'].all() for s in City(24, 64)]
    failures = [(s['valid_image'] & ~s['valid_height']).float().mean() for s in City(24, 96)]
    assert 2 < sum(rims) < 16 and 2 < sum(f > 0 for f in failures) and max(failures) < .2


def test_a_border_around_classes_is_as_wide_as_asked():
    plain, one, three = (City(1, 96, seed=5, holes=False, border=b)[0]['mask'] for b in (0, 1, 3))
    assert (plain != IGNORE).all() and 0 < (one == IGNORE).sum() < (three == IGNORE).sum()
    inside = torch.nn.functional.unfold(plain[None, None].float(), 3, padding=0).view(9, 94, 94)
    cross = inside[[1, 3, 4, 5, 7]]
    assert torch.equal(one[1:-1, 1:-1] == IGNORE, (cross != cross[2]).any(0))   # a pixel of another class above, below, left or right
    assert torch.equal(plain[three != IGNORE], three[three != IGNORE])


def test_shadows_fall_away_from_the_sun_and_grow_when_it_sinks():
    from rs_mtl.worlds.light import direct_light
    scene = render(np.random.default_rng(2), (160, 160), .5)
    low, high = (1 - direct_light(scene['height'], scene['sun'][0], e, .5) for e in (30, 60))
    assert low.sum() > 1.5*high.sum() > 0
    image, lit = scene['image'][0], direct_light(scene['height'], *scene['sun'], .5)  # type: ignore[misc]
    street = scene['mask'] == IMPERVIOUS
    assert image[street & (lit == 0)].mean() < .6*image[street & (lit == 1)].mean()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), p=st.floats(-300, 300), q=st.floats(-300, 300))
def test_the_frame_leads_back_and_never_hides_what_is_in_sight(seed, p, q):
    frame = Frame(np.random.default_rng(seed), (40., 30.))
    x, y = frame.to_ground(p, q)
    assert np.allclose(frame.to_plan(np.float64(x), np.float64(y)), (p, q), atol=.1)
    assert frame.near(p, q, abs(x - 40) + .1, abs(y - 30) + .1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), w=st.floats(20, 900), h=st.floats(20, 900))
def test_cutting_loses_no_land_and_leaves_no_block_too_long(seed, w, h):
    streets, blocks = cut(np.random.default_rng(seed), Rect(0, 0, w, h))
    area = lambda r: r.size[0]*r.size[1]
    assert math.isclose(sum(map(area, blocks)) + sum(area(s.area) for s in streets), w*h, rel_tol=1e-9)
    assert all(max(b.size) <= 130 and min(b.size) > 0 for b in blocks)


def test_large_scenes_cost_by_area_and_hold_together():
    s = City(1, (500, 700), seed=8)[0]
    agree(s)
    assert set(s['mask'].unique().tolist()) - {IGNORE} == set(range(6))


def test_the_committed_sample_is_what_is_drawn_today(tmp_path):
    rasterio = pytest.importorskip('rasterio')
    from rs_mtl.data.samples import write_city
    write_city(tmp_path)
    names = sorted(p.name for p in SAMPLE.glob('*.tif'))
    assert names == sorted(p.name for p in tmp_path.glob('*.tif')) and sum(p.stat().st_size for p in SAMPLE.glob('*.tif')) < 3e6
    for name in names:
        with rasterio.open(SAMPLE/name) as old, rasterio.open(tmp_path/name) as new:
            assert (old.shape, old.crs, old.transform, old.nodata, old.dtypes, old.scales, old.descriptions) == (new.shape, new.crs, new.transform, new.nodata, new.dtypes, new.scales, new.descriptions)
            a, b = old.read().astype(float), new.read().astype(float)
        # another processor may round the last digit differently
        assert (abs(a - b) <= 1).mean() > .999, f'{name}: run write_city(\'data/city\') again and commit it'
