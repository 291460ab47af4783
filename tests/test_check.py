"A check of a data set: what it counts agrees with NumPy, what is broken is named, and what is whole is left in peace."
import json
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

rasterio = pytest.importorskip('rasterio')
import layouts
from affine import Affine

from rs_mtl.apply.cli import main
from rs_mtl.core import ConfigError, DatasetNotFoundError
from rs_mtl.data.census import Spread, count_layer, fingerprints
from rs_mtl.data.check import check_dataset
from rs_mtl.data.datasets import get_table
from rs_mtl.data.grid import Source
from rs_mtl.data.layout import LayerTable
from rs_mtl.data.rasters import write_raster
from rs_mtl.data.tables import folder_table, open_table
from tiny import Squares

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')
PLACE = {'crs': 'EPSG:32632', 'transform': Affine(.5, 0, 500_000, 0, -.5, 5_300_000)}


def at(row=0, col=0): return {'crs': 'EPSG:32632', 'transform': PLACE['transform'] @ Affine.translation(col, row)}

def said(report, kind, level='problem'):
    "What a report says of one kind, in one text."
    return '\n'.join(f.what for f in report.findings if f.kind == kind and f.level == level)

def folder(root, n=6, size=40, seed=0, classes=3, spoil=lambda layer, k, x: x, dtype='float32', **more):
    "A folder of images, labels and heights side by side, and its table."
    g = np.random.default_rng(seed)
    for k in range(n):
        image, mask, height = g.uniform(.02, .6, (3, size, size)), g.integers(0, classes, (size, size)), g.gamma(2, 4, (size, size))
        for name, x, kind in (('image', image, dtype), ('mask', mask, 'uint8'), ('height', height, 'float32')):
            x = spoil(name, k, x.astype(kind))
            path = root/name/f'{k}.tif'
            path.parent.mkdir(parents=True, exist_ok=True)
            x = x[None] if x.ndim == 2 else x
            with rasterio.open(path, 'w', driver='GTiff', count=len(x), height=size, width=size, dtype=x.dtype, **at(0, 1000*k)) as dst: dst.write(x)
    layers = {n: LayerTable(f'{n}/{{place}}.tif', **more.get(n, {})) for n in ('image', 'mask', 'height')}
    return folder_table(layers, [f'class {i}' for i in range(classes)], splits={'train': 'rest', 'test': 'every 3rd'}, val=0)


# what is counted

@settings(max_examples=80, deadline=None)
@given(dtype=st.sampled_from(['uint8', 'int8', 'uint16', 'int16', 'int32', 'float32', 'float64']), n=st.integers(1, 300), seed=st.integers(0, 999), scale=st.sampled_from([1., .1, 1e-4, -2.]), offset=st.sampled_from([0., -.1, 5.]), pieces=st.integers(1, 4))
def test_a_spread_agrees_with_numpy_however_it_was_added_up(dtype, n, seed, scale, offset, pieces):
    g = np.random.default_rng(seed)
    x = (g.normal(0, 10**g.uniform(-3, 4), n) if dtype.startswith('f') else g.integers(np.iinfo(dtype).min//2 if dtype == 'int32' else np.iinfo(dtype).min, np.iinfo(dtype).max//2 if dtype == 'int32' else np.iinfo(dtype).max, n, endpoint=True)).astype(dtype)
    spread = Spread()
    for part in np.array_split(x, pieces):
        other = Spread()
        other.add(part, scale, offset)
        spread.merge(other)
    v = x.astype('float64')*scale + offset
    assert spread.n == n and spread.low == v.min() and spread.high == v.max()
    assert np.isclose(spread.mean, v.mean(), rtol=1e-9, atol=1e-9*abs(v).max()) and np.isclose(spread.std, v.std(), rtol=1e-5, atol=1e-5*abs(v).max())
    shares = (.1, 25, 50, 75, 99.9)
    tolerance = 0 if np.dtype(dtype).itemsize <= 2 else .004*abs(scale)*abs(x.astype('float64')).max()
    assert np.allclose(spread.percentile(*shares), np.percentile(v, shares, method='inverted_cdf'), rtol=1e-9, atol=tolerance + 1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), dr=st.integers(-24, 24), dc=st.integers(-24, 24), kind=st.sampled_from(['uint8', 'uint16', 'float32']))
@example(seed=0, dr=24, dc=24, kind='uint8').via('a corner of 40 x 40 pixels in common')
def test_shared_ground_is_known_again_at_its_shift_and_strangers_are_not(seed, dr, dc, kind):
    g = np.random.default_rng(seed)
    ground = (g.integers(0, 250, (120, 120)) if kind != 'float32' else g.normal(0, 1, (120, 120))).astype(kind)
    a, b, stranger = fingerprints(ground[24:88, 24:88], 8), fingerprints(ground[24 + dr:88 + dr, 24 + dc:88 + dc], 8), fingerprints(g.permutation(ground.ravel()).reshape(120, 120)[:64, :64], 8)
    shared, i, j = np.intersect1d(a[:, 0], b[:, 0], return_indices=True)
    assert len(shared) >= 3 and (a[i, 1:].astype(int) - b[j, 1:].astype(int) == (dr, dc)).all()
    assert not len(np.intersect1d(a[:, 0], stranger[:, 0]))


def test_marks_and_counts_do_not_depend_on_the_strips_in_which_a_file_is_read(tmp_path, monkeypatch):
    x = np.random.default_rng(0).integers(0, 255, (300, 200), 'uint8')
    path = write_raster(tmp_path/'x.tif', x, PLACE)
    whole = count_layer('a', 'image', Source(path, scale=1), marks=4000)
    monkeypatch.setattr('rs_mtl.data.census._strips', lambda shape, *_: [(r, min(r + 37, shape[0])) for r in range(0, shape[0], 37)])
    parts = count_layer('a', 'image', Source(path, scale=1), marks=4000)
    order = lambda t: t.prints[np.lexsort(t.prints.T)]
    assert np.array_equal(order(whole), order(parts)) and np.array_equal(order(whole), (m := fingerprints(x, 60000//4000))[np.lexsort(m.T)])
    assert whole.digest == parts.digest and whole.spreads[0].mean == parts.spreads[0].mean == x.mean()


def test_memory_does_not_grow_with_the_scene(tmp_path):
    table = folder_table({'height': 'h/{place}.tif'}, splits={'train': 'rest'}, val=0)
    (tmp_path/'h').mkdir()
    with rasterio.open(tmp_path/'h/big.tif', 'w', driver='GTiff', height=6000, width=3000, count=1, dtype='float32', compress='lzw', **PLACE) as dst:
        for r in range(0, 6000, 500): dst.write(np.full((500, 3000), r/500, 'float32') + np.arange(3000, dtype='float32')/3000, 1, window=((r, r + 500), (0, 3000)))
    tracemalloc.start()
    report = check_dataset(table, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not report.problems and report.counts['layers']['height']['pixels'] == 18_000_000
    assert peak < 110e6  # of 72 MB of pixels, eight million bytes at a time and what counting makes of those


def test_workers_and_whole_reading_give_the_same_report(tmp_path):
    table = folder(tmp_path)
    one, two = (check_dataset(table, tmp_path, workers=w) for w in (0, 3))
    assert one.counts == two.counts and one.findings == two.findings and not one.findings
    quick = check_dataset(table, tmp_path, quick=True)
    assert quick.counts['classes'] == one.counts['classes']  # files of 40 rows are read whole anyway


def test_counts_are_those_of_a_loop_over_the_data_set(tmp_path):
    def holes(layer, k, x):
        if layer == 'height': x[:k, :] = np.nan
        if layer == 'mask': x[-2:] = 255
        return x
    table = folder(tmp_path, spoil=holes)
    report = check_dataset(table, tmp_path)
    assert not report.problems
    for split in ('train', 'test'):
        data = open_table(table, tmp_path, split, crop=40, grid=True)
        masks = torch.stack([data[i]['mask'] for i in range(len(data))])
        n = [int((masks == c).sum()) for c in range(3)]
        assert [report.counts['classes'][f'class {c}'][split] for c in range(3)] == pytest.approx([c/sum(n) for c in n])
        assert report.counts['classes']['ignored'][split] == pytest.approx(float((masks == 255).float().mean()))
    height = report.counts['layers']['height']
    assert height['nan'] == sum(range(6))*40 and height['without_data'] == pytest.approx(sum(range(6))*40/(6*1600))
    values = torch.cat([s['height'][s['valid_height']] for split in ('train', 'test') for s in open_table(table, tmp_path, split, crop=40, grid=True)])
    assert height['bands']['height 1']['mean'] == pytest.approx(float(values.mean()), rel=1e-5) and height['bands']['height 1']['max'] == pytest.approx(float(values.max()))


# what is judged: one broken thing at a time

def swap(layer, change, only=None):
    return lambda name, k, x: change(x) if name == layer and only in (None, k) else x

BROKEN = {  # what was done -> (how, keywords of the table, kind, level, what must be said)
    'heights in decimetres': (swap('height', lambda x: x*20), {}, 'range', 'warning', 'looks like decimetres'),
    'heights in centimetres': (swap('height', lambda x: x*100), {}, 'range', 'warning', 'looks like centimetres'),
    'elevations above the sea': (swap('height', lambda x: x + 300), {}, 'range', 'warning', 'above the sea'),
    'an undeclared hole': (swap('height', lambda x: np.where(np.arange(40) < 4, -9999, x).astype(x.dtype), 2), {}, 'missing data', 'problem', '1 of 6 places holds -9999 in 10.00%'),
    'an undeclared hole of the largest float': (swap('height', lambda x: np.where(np.arange(40) < 4, -3.4e38, x).astype(x.dtype), 2), {}, 'missing data', 'problem', 'e+38'),
    'heights below the limits': (swap('height', lambda x: np.where(np.arange(40) < 1, -80, x).astype(x.dtype), 0), {}, 'range', 'problem', '-80'),
    'an empty height model': (swap('height', lambda x: x*0, 4), {}, 'missing data', 'warning', '1 of 6 places is one number everywhere (0 in 4)'),
    'all heights NaN': (swap('height', lambda x: x*np.nan, 1), {}, 'missing data', 'warning', 'has no data at all: 1'),
    'reflectance times ten thousand': (swap('image', lambda x: x*1e4), {}, 'range', 'problem', 'reflectance lies in 0..1'),
    'scaled twice': (swap('image', lambda x: x*1e-2), {}, 'range', 'warning', 'never exceeds'),
    'an image of zeros': (swap('image', lambda x: x*0, 3), {}, 'missing data', 'problem', 'is 0 everywhere: 3'),
    'a border of zeros': (swap('image', lambda x: np.where(np.arange(40) < 10, 0, x).astype(x.dtype), 3), {}, 'missing data', 'warning', 'is 0 in every band, and counts as data: 3 (25%)'),
    'a constant band': (swap('image', lambda x: np.where(np.arange(3)[:, None, None] == 1, .5, x).astype(x.dtype)), {}, 'range', 'problem', 'image 2 is 0.5 everywhere'),
    'a class that nobody listed': (swap('mask', lambda x: np.where(np.arange(40)[:, None] == 7, 9, x).astype(x.dtype), 5), {}, 'labels', 'problem', '9 (40 pixels in 1 label, first in 5 at row 7, column 0)'),
    'a code that nobody listed': (swap('mask', lambda x: (x + 1)*10), {'mask': {'codes': {10: 0, 20: 1}}}, 'labels', 'problem', '30 ('),
    'a label that is all ignore': (swap('mask', lambda x: x*0 + 255, 0), {}, 'classes', 'warning', '1 of 6 labels is ignored as a whole: 0'),
    'saturated bytes': (lambda n, k, x: np.minimum(x.astype('float32')*800, 255).astype('uint8') if n == 'image' else x, {'image': {'scale': 1/255}}, 'range', 'warning', 'is saturated'),
    'bands in another order': (lambda n, k, x: x, {'image': {'bands': ('blue', 'green', 'red')}}, 'range', 'problem', 'names its bands red, green, blue, and they are read as blue, green, red'),
}

@pytest.mark.parametrize('what', BROKEN)
def test_a_broken_folder_is_named_by_its_fault(tmp_path, what):
    spoil, more, kind, level, words = BROKEN[what]
    table = folder(tmp_path, spoil=spoil, **more)
    if 'order' in what:
        for f in (tmp_path/'image').iterdir():
            with rasterio.open(f, 'r+') as dst: dst.descriptions = ('red', 'green', 'blue')
    report = check_dataset(table, tmp_path)
    assert words in said(report, kind, level), report.to_text()
    others = [f for f in report.findings if f.kind != kind and not ('all ignore' in what and f.kind == 'files')]
    assert not [f for f in others if f.level == 'problem'], report.to_text()


SAR = {'linear power': (lambda x: 10**(x/10), {}, 'problem', 'set power=True'), 'power with zeros': (lambda x: np.where(np.arange(40) < 3, 0, 10**(x/10)), {'power': True}, 'problem', 'power of 0 or less'),
       'power that is said to be one': (lambda x: 10**(x/10), {'power': True}, '', ''), 'bytes with their range': (lambda x: np.clip(x + 12, 0, 255), {'limits': (0, 255)}, '', ''),
       'decibels': (lambda x: x, {}, '', ''), 'decibels scaled by a hundred': (lambda x: x*100, {}, 'warning', 'dB (0.1 to 99.9 %)')}

@pytest.mark.parametrize('what', SAR)
def test_backscatter_is_judged_by_its_unit(tmp_path, what):
    change, more, level, words = SAR[what]
    for k in range(3):
        x = change(np.random.default_rng(k).normal(-12, 3, (2, 40, 40))).astype('float32')
        layouts.tiff(tmp_path/f'{k}.tif', x, **at(0, 100*k))
    report = check_dataset(folder_table({'sar': LayerTable('{place}.tif', **more)}, splits={'train': 'rest'}, val=0), tmp_path)
    assert [f.level for f in report.findings] == [level]*bool(level) and words in (str(report.findings[0]) if level else ''), report.to_text()


# files and leaks

def test_files_that_are_missing_torn_or_other_than_the_rest_are_named(tmp_path):
    table = folder(tmp_path, n=12, size=64)
    (tmp_path/'mask/3.tif').unlink()
    for name, share in (('5', .5), ('6', 0)): (f := tmp_path/f'image/{name}.tif').write_bytes(f.read_bytes()[:int(f.stat().st_size*share)])
    layouts.tiff(tmp_path/'height/7.tif', np.ones((64, 63), 'float32') + np.arange(63), **at(0, 7000))
    layouts.tiff(tmp_path/'height/8.tif', np.ones((64, 64), 'float32') + np.arange(64), crs='EPSG:32633', transform=at(0, 8000)['transform'])
    layouts.tiff(tmp_path/'height/9.tif', np.ones((64, 64), 'float32') + np.arange(64), **at(0, 9000.4))
    report = check_dataset(table, tmp_path)
    assert '1 of 12 places has no mask: mask/3.tif' in said(report, 'missing')
    assert 'image/5.tif' in said(report, 'unreadable') and '1 more image files: 6' in said(report, 'unreadable')
    assert {'7', '8', '9'} == {p for f in report.problems if f.kind == 'alignment' for p in f.places}
    assert '7: 64x63 pixels' in said(report, 'files', 'warning') and '8: CRS EPSG:32633' in said(report, 'files', 'warning')
    assert report.counts['layers']['image']['unreadable'] == 2 and report.exit_code() == 1


def test_a_file_whose_writer_was_killed_is_not_taken_for_zeros(tmp_path):
    table = folder(tmp_path, n=3)
    with rasterio.open(tmp_path/'height/1.tif', 'w', driver='GTiff', height=512, width=512, count=1, dtype='float32', tiled=True, sparse_ok=True, **at(0, 1000)) as dst: dst.write(np.ones((1, 256, 512), 'float32'), window=((0, 256), (0, 512)))
    assert 'never written' in said(check_dataset(table, tmp_path), 'unreadable')


@pytest.mark.parametrize('place', [True, False])
@pytest.mark.parametrize('shift', [(0, 0), (0, 20), (12, -16), (0, 40)])
def test_patches_of_two_splits_that_share_ground_are_a_leak_with_and_without_coordinates(tmp_path, place, shift):
    ground = np.random.default_rng(0).integers(1, 250, (120, 200), 'uint8')
    for k, (r, c) in enumerate([(40, 40), (40 + shift[0], 40 + shift[1]), (0, 150)]):
        layouts.tiff(tmp_path/f'{k}.tif', ground[r:r + 40, c:c + 40], **(at(r, c) if place else {}))
    report = check_dataset(folder_table({'image': '{place}.tif'}, scales={'image': 1/255}, splits={'train': ['0', '2'], 'test': ['1']}, val=0), tmp_path)
    assert bool(said(report, 'leak')) == (shift != (0, 40)), report.to_text()  # side by side is no overlap
    if shift not in ((0, 0), (0, 40)):
        assert f'0 and 1 ({(40 - abs(shift[0]))*(40 - abs(shift[1]))/1600:.0%})' in said(report, 'leak') or f'1 and 0 ({(40 - abs(shift[0]))*(40 - abs(shift[1]))/1600:.0%})' in said(report, 'leak')
    assert {p for f in report.problems for p in f.places} <= {'0', '1'}
    if shift == (0, 0): assert 'the same to the last pixel' in said(report, 'leak')


def test_places_in_two_projections_are_compared_on_the_ground(tmp_path):
    g = np.random.default_rng(0)
    for k, (epsg, x, y) in enumerate([(32632, 700_000, 5_400_000), (32633, 258_700, 5_402_000), (32633, 400_000, 5_400_000)]):
        layouts.tiff(tmp_path/f'{k}.tif', g.integers(1, 250, (300, 300), 'uint8'), crs=f'EPSG:{epsg}', transform=Affine(10, 0, x, 0, -10, y))
    report = check_dataset(folder_table({'image': '{place}.tif'}, scales={'image': 1/255}, splits={'train': ['0'], 'test': ['1', '2']}, val=0), tmp_path)
    assert {p for f in report.problems for p in f.places} == {'0', '1'} and 'overlap on the ground' in said(report, 'leak')


def test_calm_water_and_plain_fields_are_no_leak(tmp_path):
    for k in range(4): layouts.tiff(tmp_path/f'{k}.tif', np.stack([np.full((60, 60), 80 + k//2), np.tile([90, 90, 91, 91], (60, 15))]).astype('uint8'))
    report = check_dataset(folder_table({'image': '{place}.tif'}, scales={'image': 1/255}, splits={'train': ['0', '2'], 'test': ['1', '3']}, val=0), tmp_path)
    assert 'show the same pixels' not in said(report, 'leak')


def test_a_place_in_two_splits_and_a_class_that_one_lacks(tmp_path):
    table = folder(tmp_path, spoil=swap('mask', lambda x: np.where(x == 2, 0, x).astype(x.dtype), 2))
    report = check_dataset(table, tmp_path, splits={'train': ['0', '1'], 'test': ['2']})
    assert "'class 2' does not occur in test" in said(report, 'classes', 'warning') and '3 of 6 places stand in no split: 3, 4, 5' in said(report, 'files', 'warning')
    assert report.exit_code() == 0 and report.exit_code(strict=True) == 1
    twice = check_dataset(table, tmp_path, splits={'train': ['0', '1'], 'test': ['1', '2']})
    assert "1 of folder is in 'train' and in 'test'" in said(twice, 'leak')
    gone = check_dataset(table, tmp_path, splits={'train': ['0', '17'], 'test': ['2']})
    assert '1 name in the lists of the splits answers to no file: 17' in said(gone, 'missing')
    with pytest.raises(ConfigError, match="no split 'val'"): check_dataset(table, tmp_path, split='val')


# data sets and worlds

def test_data_sets_that_are_open_already_are_checked_by_their_files_or_samples(tmp_path):
    table = folder(tmp_path)
    by_file = check_dataset({s: open_table(table, tmp_path, s, crop=40) for s in ('train', 'test')})
    assert by_file.counts == check_dataset(table, tmp_path).counts and not by_file.findings
    same = open_table(table, tmp_path, 'train', crop=40)
    assert 'stands in' in said(check_dataset({'train': same, 'test': same}), 'leak')
    def seven(i, s):
        if i == 3: s['mask'][0, :5] = 7
        return s
    report = check_dataset({'train': Squares(6), 'test': Squares(6, seed=1, spoil=seven)})
    assert '7 (5 pixels in 1 label, first in test 3 at row 0, column 0)' in said(report, 'labels')
    assert 'the same to the last pixel' in said(check_dataset({'train': Squares(3), 'test': Squares(3)}), 'leak')
    with pytest.raises(ConfigError, match='no items'): check_dataset(Squares(0))


def test_a_synthetic_world_passes():
    report = check_dataset('land', quick=True)
    assert not report.problems and report.counts['places'] == {'train': 8, 'val': 8, 'test': 8}


# the seven layouts, whole and broken

def _vaihingen(root):
    label = next(root.glob('gts_for_participants/*area7.tif'))
    with rasterio.open(label, 'r+') as dst: x = dst.read(); x[:, 3, 4:6] = [[254], [1], [1]]; dst.write(x)  # as after a detour through JPEG
    (root/'nDSM/dsm_09cm_matching_area5_normalized.jpg').unlink()
    return get_table('vaihingen'), [('labels', '(254, 1, 1) (2 pixels in 1 label, first in 7 at row 3, column 4)'), ('missing', 'nDSM/dsm_09cm_matching_area5_normalized.jpg')]

def _potsdam(root):
    f = root/'2_Ortho_RGB/top_potsdam_6_9_RGB.tif'
    f.write_bytes(f.read_bytes()[:2000])
    table = get_table('potsdam').changed(height={'pattern': '1_DSM_normalisation/dsm_potsdam_{row:02}_{col:02}_normalized_ownapproach.jpg'})
    return table, [('unreadable', 'top_potsdam_6_9_RGB.tif'), ('missing data', 'is one number everywhere (0 in 2_10)')]

def _whu_opt_sar(root):
    with rasterio.open(root/'lbl/NH49E004021.tif', 'r+') as dst: dst.write(dst.read()//10)  # as some loaders leave it
    shutil.copy(root/'optical/NH49E001014.tif', root/'optical/NH49E004021.tif')
    return get_table('whu_opt_sar'), [('missing', '95 names in the lists of the splits answer to no file'), ('labels', 'first in NH49E004021'), ('leak', 'NH49E001014 (test), NH49E004021 (train) is the same to the last pixel')]

def _eerds(root):
    for f in (root/'sar').glob('*.tif'):
        layouts.tiff(f, (10**np.random.default_rng(0).normal(-1.2, .3, (24, 32))).astype('float32'))
    table = get_table('eerds').changed(classes=('a', 'b', 'c'), palette=((1, 0, 0), (2, 0, 0), (3, 0, 0)), image={'scale': 1/255}, mask={'codes': {1: 0, 2: 1, 3: 2}})
    return table, [('range', 'dB are negative nearly everywhere')]

def _m3mcr(root):
    f = next((root/'train').glob('S1_fall/S1_fall_1/*.tif'))
    with rasterio.open(f) as src: x, crs, t = src.read(), src.crs, src.transform
    layouts.tiff(f, x[:, :80, :80], crs=crs, transform=t)
    np.save(next((root/'train').glob('cloudmask_spring/*/*.npy')), np.array([{'a': 1}], dtype=object))
    return get_table('m3mcr'), [('alignment', 'fall_1_p_457'), ('unreadable', 'no NumPy array')]

def _luojiaset(root):
    for f in root.glob('0-20%/s2/*.tif'): shutil.copy(f, f.parents[1]/'s2_cloudy'/f.name.replace('_s2_', '_s2_cloudy_'))
    return get_table('luojiaset'), [('duplicate', 'image and clear are the same to the last pixel in 2 places'), ('leak', 'overlap on the ground')]

def _sen12mscr(root):
    f = next(root.glob('ROIs1158_spring_s1/s1_1/*.tif'))
    with rasterio.open(f) as src: x, crs, t = src.read(), src.crs, src.transform
    x[:, :40] = -9999
    layouts.tiff(f, x, crs=crs, transform=t)
    f = next(root.glob('ROIs1970_fall_s2/s2_3/*.tif'))
    f.write_bytes(b'<html>login</html>')
    return get_table('sen12mscr'), [('missing data', '-9999 in 15.62%'), ('unreadable', 's2_3')]

BREAK = {n: globals()[f'_{n}'] for n in ('vaihingen', 'potsdam', 'whu_opt_sar', 'eerds', 'm3mcr', 'luojiaset', 'sen12mscr')}

@pytest.mark.parametrize('name', BREAK)
def test_each_public_layout_broken_in_a_typical_way_is_named(tmp_path, name):
    few = {'places': ('NH49E004021', 'NH49E005014', 'NH49E001014', 'NH50E007004', 'NH49E006014')} if name == 'whu_opt_sar' else {}  # a hundred take long to write
    root = getattr(layouts, name)(tmp_path/name, **few)
    table, words = BREAK[name](root)
    report = check_dataset(table, root)
    for kind, text in words: assert text in said(report, kind) + said(report, kind, 'warning'), report.to_text()
    assert report.exit_code() == 1
    if name in ('vaihingen', 'potsdam', 'whu_opt_sar'): assert {f.kind for f in report.problems} <= {kind for kind, _ in words}, report.to_text()  # and nothing else

@pytest.mark.parametrize('name', ['potsdam', 'm3mcr'])
def test_a_whole_layout_has_no_problems(tmp_path, name):
    report = check_dataset(name, getattr(layouts, name)(tmp_path/name))
    assert not report.problems, report.to_text()
    if name == 'potsdam': assert '4_12 (mask) is known to be faulty' in said(report, 'known', 'warning')


# how it is told

def test_the_command_line_prints_writes_and_exits_as_it_says(tmp_path, capsys):
    folder(tmp_path/'data')
    toml = tmp_path/'mine.toml'
    toml.write_text('classes = ["a", "b", "c"]\n[image]\npattern = "image/{place}.tif"\n[mask]\npattern = "mask/{place}.tif"\n[splits]\ntrain = "rest"\ntest = "every 3rd"\n')
    argv = ['check', str(toml), str(tmp_path/'data')]
    assert main(argv) == 0 and 'mine in' in (out := capsys.readouterr().out) and 'class  ' in out and 'PROBLEM' not in out
    own = ['check', 'own', str(tmp_path/'data'), '--image', 'image/{place}.tif', '--mask', 'mask/{place}.tif', '--classes', 'a,b', '--codes', '0=a,1=1,2=ignore', '--strict']
    assert main([*own, '--json', str(tmp_path/'r.json'), '--figure', str(tmp_path/'f.png')]) == 0
    found = json.loads((tmp_path/'r.json').read_text())
    assert found['problems'] == [] and found['classes']['ignored']['train'] > .3 and (tmp_path/'f.png').stat().st_size > 5000
    (tmp_path/'data/image/4.tif').write_bytes(b'')
    assert main(argv) == 1 and 'PROBLEM (unreadable)' in capsys.readouterr().out
    layouts.tiff(tmp_path/'data/image/4.tif', np.full((3, 40, 40), .3, 'float32'), **at(0, 4000))
    assert main(argv) == 0 and main([*argv, '--strict']) == 1
    for wrong in (['check', 'nothing', '.'], ['check', str(toml), str(tmp_path/'nowhere')], ['check', 'vaihingen'], ['check', str(tmp_path/'no.toml'), '.']): assert main(wrong) == 2
    with pytest.raises(SystemExit, match='2'): main(['check', 'city', '--quik'])
    assert "did you mean '--quick'?" in capsys.readouterr().err


def test_text_html_and_picture_tell_the_same_and_names_are_no_markup(tmp_path):
    table = folder(tmp_path, spoil=swap('image', lambda x: x*1e4)).changed(name='<script>')
    report = check_dataset(table, tmp_path)
    page, text = report._repr_html_(), report.to_text()
    assert '<script>' not in page and '&lt;script&gt;' in page
    for f in report.findings: assert f.what in text and f.what.replace('<', '&lt;') in page.replace('&#x27;', "'")
    assert report.figure()._repr_png_()[:4] == b'\x89PNG'


def test_a_wrong_folder_or_a_missing_one_is_an_error_and_no_report(tmp_path):
    with pytest.raises(DatasetNotFoundError, match='there is no such folder'): check_dataset('vaihingen', tmp_path/'none')
    with pytest.raises(ConfigError, match='no folder was named'): check_dataset('vaihingen')
    with pytest.raises(ConfigError, match="did you mean 'vaihingen'"): check_dataset('vaihngen', tmp_path)
