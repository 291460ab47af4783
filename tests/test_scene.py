"Scenes: windows at any place, alignment to a thousandth of a pixel, torn files, and worker processes."
import os
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

rasterio = pytest.importorskip('rasterio')
from affine import Affine

from rs_mtl.core import AlignmentError, BandError, ConfigError, DataError, LabelError, NodataError, RsMtlError
from rs_mtl.data import values as values_room
from rs_mtl.data.rasters import FILES, write_raster
from rs_mtl.data.samples import write_sample
from rs_mtl.data.grid import Source
from rs_mtl.data.scene import Scene

CORNER = Affine(.5, 0, 500_000, 0, -.5, 5_300_000)
PLACE = {'crs': 'EPSG:32632', 'transform': CORNER}


@pytest.fixture(scope='module')
def town(tmp_path_factory):
    "Three layers of 60 x 80 pixels whose values tell where they are; the height has a hole."
    tmp = tmp_path_factory.mktemp('town')
    rows, cols = np.indices((60, 80))
    image = np.stack([rows, cols]).astype('float32')/100
    height = (rows*2. + cols).astype('float32')
    height[10:20, 30:40] = np.nan
    mask = (rows + cols) % 5
    mask[:5] = 255
    files = {'image': write_raster(tmp/'image.tif', image, PLACE), 'height': write_raster(tmp/'height.tif', height, PLACE, nodata=-9999),
             'mask': write_raster(tmp/'mask.tif', mask.astype('uint8'), PLACE, nodata=255)}
    return files, image, height, mask


@settings(max_examples=150, deadline=None)
@given(row=st.integers(-90, 90), col=st.integers(-120, 120), h=st.integers(1, 150), w=st.integers(1, 150), edge=st.sampled_from(['reflect', 'empty', 'error']))
@example(row=-59, col=0, h=60, w=80, edge='reflect').via('all but one row outside')
@example(row=0, col=0, h=300, w=300, edge='reflect').via('a window larger than the scene, folded more than once')
def test_a_window_is_never_smaller_than_asked_and_what_lies_outside_is_not_valid(town, row, col, h, w, edge):
    files, image, height, mask = town
    scene = Scene(files)
    inside = 0 <= row and row + h <= 60 and 0 <= col and col + w <= 80
    if row >= 60 or row + h <= 0 or col >= 80 or col + w <= 0 or edge == 'error' and not inside:
        with pytest.raises(DataError): scene.read(row, col, h, w, edge=edge)
        return
    sample = scene.read(row, col, h, w, edge=edge)
    assert sample['image'].shape == (2, h, w) and sample['mask'].shape == (h, w) and sample['valid_height'].shape == (1, h, w)
    r, c = np.arange(row, row + h), np.arange(col, col + w)
    within = ((r >= 0) & (r < 60))[:, None] & ((c >= 0) & (c < 80))
    near = np.ix_(np.clip(r, 0, 59), np.clip(c, 0, 79))
    assert np.array_equal(sample['valid_image'][0].numpy(), within)
    assert np.array_equal(sample['valid_height'][0].numpy(), within & ~np.isnan(height[near]))
    assert np.array_equal(sample['mask'].numpy(), np.where(within, mask[near], 255))
    expected = np.where(within, image[:, near[0], near[1]], 0)
    assert np.array_equal(sample['image'].numpy()[:, within], expected[:, within])
    if edge == 'empty': assert not sample['image'][:, torch.from_numpy(~within)].any()
    else:
        p = np.pad(image, ((0, 0), (max(0, -row), max(0, row + h - 60)), (max(0, -col), max(0, col + w - 80))), mode='reflect')
        assert np.array_equal(sample['image'].numpy(), p[:, max(0, row):, max(0, col):][:, :h, :w])
    assert all(torch.isfinite(v).all() for v in sample.values() if v.is_floating_point())


@settings(max_examples=60, deadline=None)
@given(dx=st.floats(-3, 3), dy=st.floats(-3, 3), sx=st.sampled_from([1, 1, 1, 1.01, 2]), turn=st.sampled_from([0, 0, .1, 90]), flip=st.booleans())
@example(dx=.4, dy=0., sx=1, turn=0, flip=False).via('four tenths of a pixel')
@example(dx=0., dy=0., sx=1, turn=0, flip=True).via('south up')
@example(dx=.0004, dy=0., sx=1, turn=0, flip=False).via('below the tolerance')
def test_fault_08_a_shift_a_turn_another_pixel_size_or_a_flip_is_an_alignment_error(town, tmp_path_factory, dx, dy, sx, turn, flip):
    assume(not (.0009 < max(abs(dx - round(dx)), abs(dy - round(dy))) < .0011))
    files = town[0]
    there = CORNER @ Affine.translation(dx, dy) @ Affine.rotation(turn) @ Affine.scale(sx, -1 if flip else 1)
    other = write_raster(tmp_path_factory.mktemp('o')/'sar.tif', np.zeros((2, 60, 80), 'float32'), {'crs': 'EPSG:32632', 'transform': there})
    whole = all(abs(v - round(v)) < 1e-3 for v in (dx, dy)) and sx == 1 and not turn and not flip
    same = abs(dx) < 1e-3 and abs(dy) < 1e-3 and sx == 1 and not turn and not flip
    if same: Scene({'image': files['image'], 'sar': other})
    else:
        with pytest.raises(AlignmentError) as e: Scene({'image': files['image'], 'sar': other})
        assert 'sar.tif' in str(e.value) or 'row' in str(e.value)
        assert whole or ' px' in str(e.value)


def test_fault_09_off_by_one_needs_crop_to_common_and_then_each_layer_is_read_at_its_place(town, tmp_path):
    files, image, _, _ = town
    moved = write_raster(tmp_path/'sar.tif', image[:, 2:, 3:] + 7, {'crs': 'EPSG:32632', 'transform': CORNER @ Affine.translation(3, 2)})
    with pytest.raises(AlignmentError, match='crop_to_common'): Scene({'image': files['image'], 'sar': moved})
    scene = Scene({'image': files['image'], 'sar': moved}, crop_to_common=True)
    assert scene.shape == (58, 77) and scene.transform == CORNER @ Affine.translation(3, 2)
    sample = scene.read(5, 6, 20, 30)
    assert torch.allclose(sample['sar'], sample['image'] + 7)


def test_fault_10_rasters_of_two_places_are_an_error_at_construction(town, tmp_path):
    far = write_raster(tmp_path/'far.tif', np.zeros((2, 60, 80), 'float32'), {'crs': 'EPSG:32632', 'transform': CORNER @ Affine.translation(1000, 0)})
    for how in ({}, {'crop_to_common': True}, {'align': True}):
        with pytest.raises(AlignmentError, match='overlap'): Scene({'image': town[0]['image'], 'sar': far}, **how)
    elsewhere = write_raster(tmp_path/'elsewhere.tif', np.zeros((2, 60, 80), 'float32'), {'crs': 'EPSG:32733', 'transform': Affine(10, 0, 300_000, 0, -10, 7_000_000)})
    with pytest.raises(AlignmentError, match='does not overlap') as e: Scene({'image': town[0]['image'], 'sar': elsewhere}, align=True)
    assert 'elsewhere.tif' in str(e.value)


def test_fault_07_a_missing_crs_in_one_layer_is_an_error_unless_it_is_assumed(town, tmp_path):
    bare = write_raster(tmp_path/'bare.tif', np.zeros((2, 60, 80), 'float32'), {'transform': CORNER})
    with pytest.raises(AlignmentError, match='EPSG:32632') as e: Scene({'image': town[0]['image'], 'sar': bare})
    assert 'none' in str(e.value) and 'assume_crs' in str(e.value)
    assert Scene({'sar': bare, 'image': town[0]['image']}, assume_crs='EPSG:32632').crs.to_epsg() == 32632
    with pytest.raises(AlignmentError): Scene({'sar': bare, 'image': town[0]['image']}, assume_crs='EPSG:32633')


@pytest.mark.parametrize('layer', ['height', 'image', 'sar'])
@pytest.mark.parametrize('sentinel, dtype', [(-9999, 'float32'), (-32768, 'int16'), (-3.4028234663852886e38, 'float32'), (-99999, 'int32')])
def test_fault_02_undeclared_sentinels_are_an_error_and_can_be_declared(tmp_path, layer, sentinel, dtype):
    stored = np.full((20, 20), 5, dtype)
    if layer == 'sar': stored[:] = -5
    stored[:4] = sentinel
    path = write_raster(tmp_path/'dsm.tif', stored, PLACE)
    scales = {layer: 1}
    with pytest.raises(NodataError) as e: Scene({layer: path}, scales=scales).read()
    assert '20.0%' in str(e.value) and f'{sentinel:g}' in str(e.value) and 'dsm.tif' in str(e.value) and f"nodata={{'{layer}': {sentinel:g}}}" in str(e.value)
    sample = Scene({layer: path}, scales=scales, nodata={layer: sentinel}).read()
    assert not sample[f'valid_{layer}'][0, :4].any() and sample[f'valid_{layer}'][0, 4:].all()
    assert not sample[layer][:, :4].any() and (sample[layer][:, 4:] == stored[4, 0]).all()


def test_fault_02_minus_9999_millimetres_are_a_height_like_any_other(tmp_path):
    path = write_raster(tmp_path/'mm.tif', np.full((9, 9), -9999, 'int32'), PLACE)
    assert torch.allclose(Scene({'height': Source(path, scale=.001)}).read()['height'], torch.tensor(-9.999))


@pytest.mark.parametrize('wrong', [np.inf, 12_000., -51.])
def test_fault_05_heights_that_cannot_be_are_an_error_with_the_pixel_and_the_limits_are_an_argument(tmp_path, wrong):
    height = np.full((30, 40), 7, 'float32')
    height[11, 23] = wrong
    path = write_raster(tmp_path/'h.tif', height, PLACE)
    if np.isinf(wrong): return np.testing.assert_array_equal(Scene({'height': path}).read()['valid_height'][0], np.isfinite(height))
    with pytest.raises(DataError, match='row 11, column 23') as e: Scene({'height': path}).read(5, 5, 20, 30)
    assert f'{wrong:g} m' in str(e.value) and '-50 to 10000' in str(e.value) and 'h.tif' in str(e.value)
    assert Scene({'height': Source(path, limits=(-500, 20_000))}).read()['height'].flatten()[11*40 + 23] == wrong
    assert Scene({'height': Source(path, clip=(0, 100))}).read()['height'].max() <= 100


def test_fault_06_two_crs_are_an_error_that_names_both_and_align_is_explicit(town, tmp_path):
    from rasterio.warp import transform
    (x,), (y,) = transform('EPSG:32632', 'EPSG:32633', [500_000.], [5_300_000.])
    rows, cols = np.indices((900, 900))
    other = write_raster(tmp_path/'sar33.tif', -1 - (rows + cols).astype('float32')[None]/100, {'crs': 'EPSG:32633', 'transform': Affine(.5, 0, x - 200, 0, -.5, y + 200)})
    with pytest.raises(AlignmentError, match='EPSG:32633 and EPSG:32632') as e: Scene({'image': town[0]['image'], 'sar': other})
    assert 'align=True' in str(e.value) and 'sar33.tif' in str(e.value)
    scene = Scene({'image': town[0]['image'], 'sar': other}, align=True)
    assert scene.shape == (60, 80) and scene.crs.to_epsg() == 32632
    sample = scene.read()
    assert sample['valid_sar'].all()
    xs, ys = transform('EPSG:32632', 'EPSG:32633', *[v.ravel().tolist() for v in (500_000 + .5*(np.arange(80)[None] + .5 + 0*np.arange(60)[:, None]), 5_300_000 - .5*(np.arange(60)[:, None] + .5 + 0*np.arange(80)))])
    expected = -1 - ((np.array(xs) - x + 200)/.5 - .5 + (y + 200 - np.array(ys))/.5 - .5)/100
    assert abs(sample['sar'][0].numpy().ravel() - expected).max() < 2e-3


def test_nodata_that_the_stored_type_cannot_hold_hides_nothing(tmp_path):
    with rasterio.open(write_raster(tmp_path/'m.tif', np.full((9, 9), 241, 'uint8'), PLACE)) as src: assert src.nodata is None
    sample = Scene({'mask': tmp_path/'m.tif'}, nodata={'mask': -15}).read()  # -15 is 241 in a byte that wraps
    assert sample['valid_mask'].all()


def test_the_fourth_band_of_bytes_is_near_infrared_and_no_transparency(tmp_path):
    image = np.full((4, 30, 30), 100, 'uint8')
    image[3] = 0
    for bands in (['red', 'green', 'blue', 'nir'], ()):
        path = write_raster(tmp_path/'i.tif', image, PLACE, bands=bands)
        sample = Scene({'image': path}, scales={'image': 1/255}).read()
        assert sample['image'].shape[0] == 4 and sample['valid_image'].all()


def test_a_real_alpha_band_is_validity_and_no_data(tmp_path):
    with rasterio.open(tmp_path/'rgba.tif', 'w', driver='GTiff', height=20, width=20, count=4, dtype='uint8', photometric='rgb', alpha='yes', **PLACE) as dst:
        dst.write(np.full((3, 20, 20), 50, 'uint8'), [1, 2, 3])
        dst.write(np.where(np.arange(20) < 8, 0, 255).astype('uint8')[None].repeat(20, 0), 4)
    sample = Scene({'image': tmp_path/'rgba.tif'}, scales={'image': 1/255}).read()
    assert sample['image'].shape[0] == 3 and not sample['valid_image'][0, :, :8].any() and sample['valid_image'][0, :, 8:].all()


@pytest.mark.parametrize('bad', ['empty', 'html', 'folder', 'missing', 'loop', 'text.png', 'link'])
def test_fault_23_what_is_no_raster_is_a_data_error_with_its_path(tmp_path, bad):
    path = tmp_path/f'{bad}.tif'
    if bad == 'empty': path.touch()
    elif bad == 'html': path.write_text('<html>not found</html>')
    elif bad == 'folder': path.mkdir()
    elif bad == 'loop': path.symlink_to(path)
    elif bad == 'link': path.symlink_to(tmp_path/'gone.tif')
    elif bad == 'text.png': path.write_bytes(b'\x89PNG\r\n\x1a\n cut')
    with pytest.raises(DataError) as e: Scene({'image': path})
    assert str(path) in str(e.value) and 'what to do' in str(e.value)


def test_fault_23_a_tiff_with_another_ending_is_read(town, tmp_path):
    for name in ('image.dat', 'image'): assert torch.equal(Scene({'image': (tmp_path/name).write_bytes(town[0]['image'].read_bytes()) and tmp_path/name}).read()['image'], Scene({'image': town[0]['image']}).read()['image'])


@pytest.mark.parametrize('share', [.98, .6, .2])
def test_fault_22_a_truncated_tiff_is_found_by_verify_full_with_its_path(tmp_path, share):
    path = write_raster(tmp_path/'t.tif', np.random.default_rng(0).random((2, 700, 700), 'float32'), PLACE, overviews=False)
    Scene({'sar': path}).verify(full=True)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size*share)])
    with pytest.raises(DataError, match='t.tif'): Scene({'sar': path}).verify(full=True)
    with pytest.raises(DataError, match='t.tif') as e: Scene({'sar': path}).read()
    assert 'what to do' in str(e.value)


def test_the_remains_of_a_killed_writer_do_not_pass_for_a_map_of_class_0(tmp_path):
    code = ("import rasterio, numpy as np, os, sys\nd = rasterio.open(sys.argv[1], 'w', driver='GTiff', height=2000, width=2000, count=1, dtype='uint8', tiled=True, compress='deflate')\n"
            "d.write(np.ones((1, 300, 2000), 'uint8'), window=((0, 300), (0, 2000)))\nos.kill(os.getpid(), 9)")
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code, tmp_path/'killed.tif'])
    assert rasterio.open(tmp_path/'killed.tif').shape == (2000, 2000)  # it opens, that is the trap
    for full in (False, True):
        with pytest.raises(DataError, match='never written'): Scene({'mask': tmp_path/'killed.tif'}).verify(full)


def test_wrong_layers_are_refused_by_name_band_count_and_kind(town, tmp_path):
    files = town[0]
    with pytest.raises(ConfigError, match="did you mean 'height'"): Scene({'hight': files['height']})
    with pytest.raises(BandError, match='2 bands'): Scene({'height': files['image']})
    with pytest.raises(LabelError): Scene({'mask': files['height']})
    with pytest.raises(LabelError): Scene({'mask': write_raster(tmp_path/'big.tif', np.full((5, 5), 300, 'uint16'), PLACE)}).read()
    with pytest.raises(RsMtlError): Scene({})


class Windows(torch.utils.data.Dataset):
    def __init__(self, scene): self.scene = scene
    def __len__(self): return 24
    def __getitem__(self, i): return self.scene.read(i, i, 20, 20) | {'pid': torch.tensor(os.getpid())}


@pytest.mark.parametrize('how', ['fork', 'spawn'])
def test_a_scene_that_was_read_travels_to_workers(town, how):
    scene = Scene(town[0])
    scene.read(0, 0, 9, 9)  # a file is open in this process
    batches = list(torch.utils.data.DataLoader(Windows(scene), 4, num_workers=2, multiprocessing_context=how))
    assert torch.equal(torch.cat([b['image'] for b in batches]), torch.stack([scene.read(i, i, 20, 20)['image'] for i in range(24)]))
    assert os.getpid() not in torch.cat([b['pid'] for b in batches])


FORKED = '''
import multiprocessing, os, sys
import numpy as np
os.environ['GDAL_NUM_THREADS'] = 'ALL_CPUS'   # as a tile server leaves it behind
from rs_mtl.data.rasters import write_raster
from rs_mtl.data.scene import Scene
folder, what = sys.argv[1:]
place = {'crs': 'EPSG:32633', 'transform': (1., 0., 0., 0., -1., 2000.)}
values = np.random.default_rng(0).random((3, 1024, 1024), np.float32)
file = write_raster(f'{folder}/parent.tif', values, place)
def child():
    if what == 'read': assert np.array_equal(Scene({'image': file}).read()['image'].numpy(), values)
    else: write_raster(f'{folder}/child.tif', values, place)
Scene({'image': file}).read()
process = multiprocessing.get_context('fork').Process(target=child)
process.start()
process.join(60)
if process.is_alive(): process.kill(); sys.exit('the child waits for ever')
sys.exit(process.exitcode)
'''

@pytest.mark.parametrize('what', ['read', 'write'])
def test_a_forked_child_does_not_wait_for_threads_that_stayed_behind(tmp_path, what):
    done = subprocess.run([sys.executable, '-c', FORKED, str(tmp_path), what], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_threads_read_at_once_and_get_what_they_asked_for(town):
    scene, wrong = Scene(town[0]), []

    def work(k):
        for i in range(60):
            got = scene.read((i*k) % 40, i % 60, 20, 20)['image']
            if not np.array_equal(got.numpy(), town[1][:, (i*k) % 40:(i*k) % 40 + 20, i % 60:i % 60 + 20]): wrong.append((i, k))
    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 3, 7, 11)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong
    assert len(pickle.dumps(scene)) < 20_000
    scene.close()
    assert not [k for k in FILES.idle if k[0] in map(str, town[0].values())]


@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 70), w=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_sample_comes_back_from_its_files(tmp_path_factory, h, w, seed):
    g = torch.Generator().manual_seed(seed)
    valid = torch.rand(1, h, w, generator=g) > .2
    mask = torch.randint(0, 6, (h, w), generator=g)
    mask[torch.rand(h, w, generator=g) < .1] = 255
    sample = {'image': torch.rand(4, h, w, generator=g)*valid, 'valid_image': valid, 'sar': torch.rand(2, h, w, generator=g)*30 - 30, 'mask': mask,
              'height': torch.rand(1, h, w, generator=g)*90*valid, 'valid_height': valid, 'cloud_impact': torch.rand(1, h, w, generator=g)}
    back = Scene(write_sample(tmp_path_factory.mktemp('s'), sample, PLACE, ['red', 'green', 'blue', 'nir'])).read()
    assert torch.equal(back['mask'], mask) and torch.equal(back['valid_image'], valid) and torch.equal(back['valid_height'], valid)
    for name, step in (('image', .004), ('sar', .25), ('height', .01), ('cloud_impact', .004)):
        assert (back[name] - sample[name]).abs().max() <= step*.501, name
    assert back['image'].dtype == torch.float32 and back['mask'].dtype == torch.int64 and back['valid_sar'].all()


# Alignment: a plane is what bilinear interpolation and averaging leave as it is, so every pixel has an oracle.

def plane(x, y): return 20 + .02*(x - 500_000) + .03*(5_300_000 - y)


def centres(t, shape):
    c, r = np.meshgrid(np.arange(shape[1]) + .5, np.arange(shape[0]) + .5)
    return t.a*c + t.b*r + t.c, t.d*c + t.e*r + t.f


@settings(max_examples=30, deadline=None)
@given(dx=st.floats(-20, 20), dy=st.floats(-20, 20), size=st.sampled_from([.25, .9, 1, 1.2, 2, 3.3]), turn=st.sampled_from([0., 0., 12.5, 90., 200.]), flip=st.booleans(),
       none=st.sampled_from(['declared', 'source', 'nan']), seed=st.integers(0, 99))
@example(dx=.5, dy=.5, size=1, turn=0., flip=False, none='declared', seed=0).via('half a pixel')
@example(dx=0., dy=0., size=1, turn=0., flip=True, none='source', seed=0).via('south up')
@example(dx=0., dy=0., size=.25, turn=12.5, flip=False, none='declared', seed=0).via('a footprint that touches the file from outside')
def test_fault_03_no_value_comes_from_a_mix_of_data_and_nodata(town, tmp_path_factory, dx, dy, size, turn, flip, none, seed):
    "Fault 8 too: shift, scale, rotation and south-up rasters are laid onto the scene where they belong."
    tmp = tmp_path_factory.mktemp('a')
    there = CORNER @ Affine.translation(40 + dx, 30 + dy) @ Affine.rotation(turn) @ Affine.scale(size, -size if flip else size) @ Affine.translation(-40, -40)
    height = plane(*centres(there, (80, 80))).astype('float32')
    holes = np.random.default_rng(seed).random((80, 80)) < .02
    stored = np.where(holes, np.nan if none == 'nan' else -9999, height).astype('float32')
    mask = np.where(holes, 255, np.arange(80)[:, None]//8*2 % 254).astype('uint8')
    assume(not (turn == 0 and not flip and size == 1 and abs(dx - round(dx)) < 2e-3 and abs(dy - round(dy)) < 2e-3))
    where = {'crs': 'EPSG:32632', 'transform': there}
    with rasterio.open(tmp/'h.tif', 'w', driver='GTiff', height=80, width=80, count=1, dtype='float32', nodata=-9999 if none == 'declared' else None, **where) as dst: dst.write(stored, 1)
    files = {'image': town[0]['image'], 'height': Source(tmp/'h.tif', nodata=-9999 if none == 'source' else None), 'mask': write_raster(tmp/'m.tif', mask, where, nodata=255)}
    scene = Scene(files, align=True)
    assert scene.shape == (60, 80) and scene.transform == CORNER
    sample = scene.read()
    x, y = centres(CORNER, (60, 80))
    valid = sample['valid_height'][0].numpy()
    inv = ~there
    col, row = inv.a*x + inv.b*y + inv.c, inv.d*x + inv.e*y + inv.f
    inside = (col > .51) & (col < 79.49) & (row > .51) & (row < 79.49)
    # averaged over a footprint that cuts pixels: a tenth of a pixel of slope; at the rim, where part of the footprint lies outside: half the footprint
    far = 1.5/size  # pixels of the file from its rim
    tolerance = np.where(inside & (size > 1/3), 1e-3, np.where((col > far) & (col < 80 - far) & (row > far) & (row < 80 - far), .5*size*.05*.1, max(size, 1)*.5*.05*.75))
    assert (abs(sample['height'][0].numpy() - plane(x, y)) <= tolerance)[valid].all()
    beyond = (col < -.01) | (col > 80.01) | (row < -.01) | (row > 80.01)
    assert not valid[beyond].any() and not sample['height'][0].numpy()[~valid].any()
    r, c = np.clip(row, .5, 79.49) - .5, np.clip(col, .5, 79.49) - .5
    r0, c0 = np.floor(r).astype(int).clip(0, 78), np.floor(c).astype(int).clip(0, 78)
    weight = sum(holes[r0 + i, c0 + j]*abs(1 - i - (r - r0))*abs(1 - j - (c - c0)) for i in (0, 1) for j in (0, 1))  # of missing pixels among the four
    assert not (valid & (weight > 2e-6) & inside).any()
    if size >= 1: assert not (inside & (weight < 1e-9) & ~valid).any()  # and not more is lost than the kernel reaches
    at = np.floor(row).clip(0, 79).astype(int), np.floor(col).clip(0, 79).astype(int)
    sure = inside & (abs(row - np.rint(row)) > 1e-5) & (abs(col - np.rint(col)) > 1e-5)
    assert np.array_equal(sample['mask'].numpy()[sure], mask[at][sure]) and (sample['mask'].numpy()[beyond] == 255).all()
    window = scene.read(13, 21, 30, 40)
    assert torch.equal(window['mask'], sample['mask'][13:43, 21:61]) and torch.equal(window['valid_height'], sample['valid_height'][:, 13:43, 21:61])
    assert torch.allclose(window['height'], sample['height'][:, 13:43, 21:61], atol=1e-4)


def test_fault_03_the_trap_of_gdal_half_a_pixel_from_an_undeclared_sentinel(town, tmp_path):
    from rasterio.warp import Resampling, reproject
    height = np.full((60, 80), 50, 'float32')
    height[20:30, 20:30] = -9999
    there = CORNER @ Affine.translation(.5, 0)
    out = np.zeros((60, 80), 'float32')
    reproject(height, out, src_transform=there, dst_transform=CORNER, src_crs='EPSG:32632', dst_crs='EPSG:32632', resampling=Resampling.bilinear)
    assert ((out > -9000) & (out < 0)).any()  # what happens without looking
    path = write_raster(tmp_path/'h.tif', height, {'crs': 'EPSG:32632', 'transform': there})
    with pytest.raises(NodataError, match='-9999'): Scene({'image': town[0]['image'], 'height': path}, align=True).read()
    got = Scene({'image': town[0]['image'], 'height': path}, align=True, nodata={'height': -9999}).read()
    assert got['height'][got['valid_height']].eq(50).all() and not got['valid_height'][0, 20:30, 20:31].any()


def test_align_takes_a_named_grid_and_reads_a_shift_by_whole_pixels_as_it_is(town, tmp_path):
    moved = write_raster(tmp_path/'sar.tif', town[1] - 7, {'crs': 'EPSG:32632', 'transform': CORNER @ Affine.translation(3, -2)})
    scene = Scene({'image': town[0]['image'], 'sar': moved}, align=True)
    sample = scene.read()
    assert scene.layers['sar'].onto is None and not sample['valid_sar'][0, :, :3].any() and not sample['valid_sar'][0, 58:].any() and not sample['sar'][:, 58:].any()
    assert np.array_equal(sample['sar'][:, :58, 3:], town[1][:, 2:, :77] - 7)
    other = Scene({'image': town[0]['image'], 'sar': moved}, align='sar')
    assert other.transform == CORNER @ Affine.translation(3, -2) and not other.read()['valid_image'][0, :2].any()
    with pytest.raises(ConfigError, match="did you mean 'sar'"): Scene({'image': town[0]['image'], 'sar': moved}, align='sarr')
    with pytest.raises(ConfigError, match='align and crop_to_common'): Scene(town[0], align=True, crop_to_common=True)
    bare = write_raster(tmp_path/'bare.tif', town[1], {'transform': CORNER @ Affine.translation(.5, 0)})
    with pytest.raises(AlignmentError, match='assume_crs'): Scene({'image': town[0]['image'], 'sar': bare}, align=True)


def test_a_scene_far_coarser_than_a_layer_reads_it_in_pieces(town, tmp_path, monkeypatch):
    from rs_mtl.data import warp
    fine = write_raster(tmp_path/'h.tif', plane(*centres(CORNER @ Affine.scale(1/8), (480, 640))).astype('float32'), {'crs': 'EPSG:32632', 'transform': CORNER @ Affine.scale(1/8)})
    scene = Scene({'image': town[0]['image'], 'height': fine}, align=True)
    whole, shapes, read = scene.read()['height'], [], warp.part_of
    monkeypatch.setattr(warp, '_MOST', 5000)
    monkeypatch.setattr(warp, 'part_of', lambda *a: shapes.append(a) or read(*a))
    assert torch.equal(scene.read()['height'], whole) and len(shapes) > 50
    assert torch.allclose(whole[0].double(), torch.from_numpy(plane(*centres(CORNER, (60, 80)))), atol=1e-4)


# Sources: what a stored number means.

@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(['uint8', 'uint16', 'int16', 'int32', 'uint32', 'float32', 'float64']), scale=st.sampled_from([None, 1, .004, (.5, 2., .25)]), offset=st.sampled_from([None, 0, -3.5]),
       nodata=st.sampled_from([None, 0, 7, -5, 2.5, np.nan]), order=st.sampled_from([(), (1, 2, 3), (3, 1, 2), (2, 2, 1)]), seed=st.integers(0, 99))
def test_a_source_reads_what_numpy_computes(tmp_path_factory, dtype, scale, offset, nodata, order, seed):
    stored = np.random.default_rng(seed).integers(0, 60, (3, 12, 15)).astype(dtype)
    path = write_raster(tmp_path_factory.mktemp('s')/'i.tif', stored, PLACE)
    if scale is None and dtype[0] in 'iu': scale = 1
    got = Scene({'image': Source(path, index=order, scale=scale, offset=offset, nodata=nodata, limits=(-1e9, 1e9))}).read()
    picked = stored[[i - 1 for i in order] or slice(None)].astype('float64')
    valid = ~(picked == nodata).any(0) if nodata is not None else np.ones((12, 15), bool)
    expected = picked*np.broadcast_to(1 if scale is None else scale, 3)[:, None, None] + (offset or 0)
    assert np.array_equal(got['valid_image'][0].numpy(), valid)
    assert np.allclose(got['image'].numpy(), np.where(valid, expected, 0), atol=1e-4) and got['image'].dtype == torch.float32


def test_nodata_of_32_bit_integers_hides_its_own_value_only(tmp_path):
    stored = np.array([[2147483647, 2147483646, 5]], 'int32')  # as float32 the first two are one number
    got = Scene({'image': Source(write_raster(tmp_path/'i.tif', stored, PLACE), scale=1e-9, nodata=2147483647)}).read()
    assert got['valid_image'].flatten().tolist() == [False, True, True]


def test_files_are_stacked_band_after_band_and_lie_on_one_grid(town, tmp_path):
    a = write_raster(tmp_path/'a.tif', np.stack([np.full((60, 80), v, 'uint16') for v in (1, 2)]), PLACE, bands=['b2', 'b3'])
    band = np.full((60, 80), 3., 'float32')
    band[4, 5] = -1
    b = write_raster(tmp_path/'b.tif', band, PLACE, nodata=-1, bands=['b4'])
    scene = Scene({'image': [a, b], 'mask': town[0]['mask']}, scales={'image': 1})
    assert scene.bands == ('b2', 'b3', 'b4') and scene.read()['image'][:, 9, 9].tolist() == [1, 2, 3]
    assert scene.read()['valid_image'].sum() == 60*80 - 1 and not scene.read()['image'][:, 4, 5].any()  # missing in one is missing
    assert Scene({'image': Source((a, b), index=(3, 1), scale=1)}).read()['image'][:, 9, 9].tolist() == [3, 1]
    assert pickle.loads(pickle.dumps(scene)).verify(full=True).bands == scene.bands
    with pytest.raises(BandError, match='has 3 bands'): Scene({'image': Source((a, b), index=(4,), scale=1)})
    moved = write_raster(tmp_path/'c.tif', band, {'crs': 'EPSG:32632', 'transform': CORNER @ Affine.translation(1, 0)})
    short = write_raster(tmp_path/'d.tif', band[:59], PLACE)
    for odd in (moved, short):
        with pytest.raises(AlignmentError, match='stacked') as e: Scene({'image': Source((a, odd), scale=1)})
        assert odd.name in str(e.value) and 'a.tif' in str(e.value)


def test_a_layer_with_a_ratio_comes_with_its_own_pixels_and_the_scene_says_the_step(tmp_path):
    image = write_raster(tmp_path/'i.tif', np.random.default_rng(0).random((3, 100, 200), 'float32'), PLACE)
    codes = np.arange(30*60).reshape(30, 60).astype('uint16')
    there = {'crs': 'EPSG:32632', 'transform': CORNER @ Affine.scale(10/3)}
    label = Source(write_raster(tmp_path/'l.tif', codes, there), ratio=(3, 10), codes={i: i % 5 for i in range(1800)})
    scene = Scene({'mask': label, 'image': image}, classes=list('abcde'))
    assert scene.step == 10 and scene.shape == (100, 200) and scene.gsd == .5
    sample = scene.read(20, 50, 40, 30)
    assert sample['image'].shape == (3, 40, 30) and sample['mask'].shape == (12, 9) and np.array_equal(sample['mask'], codes[6:18, 15:24] % 5)
    for bad in ((25, 50, 40, 30), (20, 50, 45, 30), (20, 51, 40, 30)):
        with pytest.raises(DataError, match='multiples of 10') as e: scene.read(*bad)
        assert 'scene.step' in str(e.value)
    assert scene.read(25, 51, 7, 7, layers=['image'])['image'].shape == (3, 7, 7)
    over = scene.read(-20, 190, 40, 30, edge='reflect')
    assert over['mask'].shape == (12, 9) and (over['mask'][:6] == 255).all() and np.array_equal(over['mask'][6:, :3], codes[:6, 57:] % 5)
    with pytest.raises(AlignmentError): Scene({'image': image, 'mask': Source(label.path, ratio=(3, 9), codes=label.codes)})
    with pytest.raises(AlignmentError): Scene({'image': image, 'mask': Source(write_raster(tmp_path/'s.tif', codes[:29], there), ratio=(3, 10))})
    with pytest.raises(ConfigError, match='ratio'): Scene({'mask': label})
    moved = write_raster(tmp_path/'m.tif', codes % 5, {'crs': 'EPSG:32632', 'transform': CORNER @ Affine.translation(.8, 0) @ Affine.scale(10/3)})
    onto = Scene({'image': image, 'mask': Source(moved, ratio=(3, 10))}, align=True).read(0, 0, 40, 30)
    assert np.array_equal(onto['mask'], codes[:12, :9] % 5)


def test_pictures_without_a_place_are_compared_by_their_shapes(tmp_path):
    from PIL import Image
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype('uint8')).save(tmp_path/'i.png')
    Image.fromarray((np.arange(12*18).reshape(12, 18) % 3).astype('uint8')).save(tmp_path/'l.png')
    scene = Scene({'image': Source(tmp_path/'i.png', scale=1/255), 'mask': Source(tmp_path/'l.png', ratio=(3, 10))})
    assert scene.step == 10 and scene.gsd is None and scene.read(10, 20, 30, 40)['mask'].shape == (9, 12)
    with pytest.raises(AlignmentError, match='cover'): Scene({'image': Source(tmp_path/'i.png', scale=1/255), 'mask': tmp_path/'l.png'})


# Labels

@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(['uint8', 'int8', 'uint16', 'int16', 'int32', 'uint32']), n=st.integers(1, 9), seed=st.integers(0, 999))
def test_codes_become_classes_in_every_integer_type(tmp_path_factory, dtype, n, seed):
    g = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    codes = g.choice(np.unique(g.integers(info.min, info.max, 60)), n, replace=False)
    table = {int(c): int(v) for c, v in zip(codes, g.choice([0, 1, 2, 3, 255], n))}
    stored = g.choice(codes, (9, 11)).astype(dtype)
    got = Scene({'mask': Source(write_raster(tmp_path_factory.mktemp('m')/'m.tif', stored, PLACE), codes=table)}).read()
    assert np.array_equal(got['mask'].numpy(), np.vectorize(table.get)(stored)) and torch.equal(got['valid_mask'][0], got['mask'] != 255)
    odd = next(v for v in range(info.min, info.max) if v not in table)
    stored[3, 4] = stored[5, 6] = odd
    path = write_raster(tmp_path_factory.mktemp('m')/'odd.tif', stored, PLACE)
    with pytest.raises(LabelError, match=f'{odd} in 2 pixels, first at row 3, column 4') as e: Scene({'mask': Source(path, codes=table)}).read(1, 2, 8, 9)
    assert 'odd.tif' in str(e.value) and "unknown='ignore'" in str(e.value)
    assert Scene({'mask': Source(path, codes=table, unknown='ignore')}).read()['mask'][3, 4] == 255


def test_fault_16_a_class_beyond_the_list_is_an_error_with_counts_and_pixel(town, tmp_path):
    path = write_raster(tmp_path/'m.tif', np.where(np.indices((20, 20))[0] == 7, 6, 1).astype('int16'), PLACE)
    with pytest.raises(LabelError, match='6 in 20 pixels, first at row 7, column 0') as e: Scene({'mask': path}, classes=['road', 'house', 'tree']).read()
    assert '0..2' in str(e.value)
    negative = write_raster(tmp_path/'n.tif', np.full((5, 5), -3, 'int16'), PLACE)
    with pytest.raises(LabelError, match='-3 in 25 pixels'): Scene({'mask': negative}).read()
    assert (Scene({'mask': negative}, nodata={'mask': -3}).read()['mask'] == 255).all()
    with pytest.raises(ConfigError, match='class 5'): Scene({'mask': Source(path, codes={1: 0, 6: 5})}, classes=['road', 'house'])
    with pytest.raises(ConfigError, match='2 colours for 3 classes'): Scene({'mask': path}, classes=list('abc'), palette=[(1, 2, 3)]*2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), h=st.integers(2, 40), w=st.integers(2, 40))
def test_fault_17_an_unknown_colour_is_an_error_with_colour_count_and_first_pixel(tmp_path_factory, seed, h, w):
    g, tmp = np.random.default_rng(seed), tmp_path_factory.mktemp('c')
    colours = {(255, 255, 255): 0, (0, 0, 255): 1, (0, 255, 255): 2, (0, 255, 0): 3, (255, 255, 0): 4, (255, 0, 0): 255}
    index = g.integers(0, 6, (h, w))
    picture = np.array(list(colours))[index].transpose(2, 0, 1).astype('uint8')
    truth = np.array(list(colours.values()))[index]
    source = Source(write_raster(tmp/'label.tif', picture, PLACE), colours=colours)
    assert np.array_equal(Scene({'mask': source}).read()['mask'].numpy(), truth)
    picture[:, h//2, w//2] = (252, 255, 0)
    source = Source(write_raster(tmp/'4_12.tif', picture, PLACE), colours=colours)
    with pytest.raises(LabelError) as e: Scene({'mask': source}).read()
    assert f'(252, 255, 0) in 1 pixels, first at row {h//2}, column {w//2}' in str(e.value) and '4_12.tif' in str(e.value)
    truth[h//2, w//2] = 255
    got = Scene({'mask': Source(source.path, colours=colours, unknown='ignore')}).read()
    assert np.array_equal(got['mask'].numpy(), truth) and not got['valid_mask'][0, h//2, w//2]


# What numbers can hardly mean

@pytest.fixture
def fresh(monkeypatch): monkeypatch.setattr(values_room, '_said', set())


def test_fault_11_bands_that_do_not_fit_the_net_are_an_error_before_anything_is_written(town, tmp_path):
    from rs_mtl import create_model, predict_scene
    net = create_model('plain', bands=4, classes=3, encoder='resnet18')
    with pytest.raises(BandError, match='4') as e: predict_scene(net, {'image': town[0]['image']}, tmp_path/'out', 32)
    assert 'what to do' in str(e.value) and not list(tmp_path.glob('out/*.tif'))


def test_fault_12_bands_in_the_order_blue_green_red_are_a_warning(tmp_path, fresh):
    path = write_raster(tmp_path/'bgr.tif', np.full((3, 9, 9), .1, 'float32'), PLACE, bands=['Blue', 'Green', 'Red'])
    with pytest.warns(UserWarning, match=r'Blue, Green, Red.*index=\(3, 2, 1\)') as seen: Scene({'image': path})
    Scene({'image': path})
    assert len(seen) == 1 and 'bgr.tif' in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert Scene({'image': Source(path, index=(3, 2, 1))}).bands == ('Red', 'Green', 'Blue')
        Scene({'image': write_raster(tmp_path/'rgb.tif', np.zeros((3, 9, 9), 'float32'), PLACE, bands=['red', 'green', 'blue'])})
    with pytest.warns(UserWarning, match='the Source calls them'): Scene({'image': Source(write_raster(tmp_path/'n.tif', np.zeros((2, 9, 9), 'float32'), PLACE, bands=['nir', 'red']), bands=('red', 'nir'))})


def test_fault_12_statistics_five_sigma_off_name_the_band(town):
    stats = {'image': ([.3, .4], [.02, .2])}
    sample = Scene(town[0]).read()  # means .295 and .395
    assert values_room.suspicious_bands(sample, stats) == []
    swapped = values_room.suspicious_bands({'image': sample['image'].flip(0)}, {'image': ([.3, .395], [.01, .2])})
    assert [(f['layer'], f['band']) for f in swapped] == [('image', 0)] and swapped[0]['sigma'] == pytest.approx(9.5, abs=.01)
    sample['image'][:, :30] = 1e6
    sample['valid_image'][:, :30] = False
    assert values_room.suspicious_bands(sample, {'image': ([.445, .4], [.02, .2])}) == []  # only valid pixels count
    batch = {k: torch.stack([v, v]) for k, v in sample.items()}
    assert len(values_room.suspicious_bands(batch, {'image': ([4, 4], [.1, .1])})) == 2
    with pytest.raises(BandError): values_room.suspicious_bands(sample, {'image': ([0], [1])})


@pytest.mark.parametrize('stored, how, said', [
    (np.full((3, 40, 40), 9000, 'uint16'), {'scale': 1/255}, 'up to 35.29'), (np.full((3, 40, 40), 180, 'float32'), {}, 'up to 180'),
    (np.full((3, 40, 40), .4, 'float32'), {'scale': 1/255}, 'up to 0.4 are stored, and scaled'), (np.full((3, 40, 40), 90, 'uint8'), {'scale': 1e-4}, 'never exceed')])
def test_fault_13_numbers_of_another_scale_are_one_warning_with_their_range(tmp_path, fresh, stored, how, said):
    path = write_raster(tmp_path/'i.tif', stored, PLACE)
    with pytest.warns(UserWarning, match=said) as seen:
        scene = Scene({'image': Source(path, **how)})
        for k in range(5): scene.read(k, k, 32, 32)
    assert len(seen) == 1 and 'i.tif' in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Scene({'image': Source(path, scale=1)}).read()  # taken as they are, on purpose


def test_fault_14_linear_power_for_db_and_db_for_linear_power_are_errors(tmp_path):
    power = np.random.default_rng(0).gamma(4, .02, (2, 60, 80)).astype('float32')
    linear, db = write_raster(tmp_path/'linear.tif', power, PLACE), write_raster(tmp_path/'db.tif', 10*np.log10(power), PLACE)
    with pytest.raises(BandError, match='no negative value') as e: Scene({'sar': linear}).read()
    assert 'power=True' in str(e.value) and 'limits=' in str(e.value) and 'linear.tif' in str(e.value)
    with pytest.raises(BandError, match='leave power=True out'): Scene({'sar': Source(db, power=True)}).read()
    assert torch.allclose(Scene({'sar': Source(linear, power=True)}).read()['sar'], Scene({'sar': db}).read()['sar'], atol=1e-4)
    assert torch.equal(Scene({'sar': Source(linear, limits=(0, 10))}).read()['sar'], torch.from_numpy(power))  # no radar in dB, and said so
    with pytest.raises(DataError, match='0 to 0.1'): Scene({'sar': Source(linear, limits=(0, .1))}).read()


def test_fault_14_zeros_before_the_logarithm_need_a_floor(tmp_path):
    power = np.full((1, 20, 30), .1, 'float32')
    power[0, 7, 11:13] = 0
    path = write_raster(tmp_path/'p.tif', power, PLACE)
    with pytest.raises(DataError, match='2 values.*row 7, column 11') as e: Scene({'sar': Source(path, power=True)}).read(3, 3, 10, 20)
    assert 'floor_db' in str(e.value) and 'nodata=0' in str(e.value)
    floored = Scene({'sar': Source(path, power=True, floor_db=-35)}).read()
    assert floored['sar'].min().item() == pytest.approx(-35) and floored['sar'].max().item() == pytest.approx(-10) and floored['valid_sar'].all()
    missing = Scene({'sar': Source(path, power=True, nodata=0)}).read()
    assert (~missing['valid_sar']).sum() == 2 and torch.isfinite(missing['sar']).all()


def test_transparency_that_is_near_infrared_is_a_warning_and_can_be_read(tmp_path, fresh):
    with rasterio.open(tmp_path/'rgbn.tif', 'w', driver='GTiff', height=20, width=20, count=4, dtype='uint8', **PLACE) as dst:
        dst.write(np.random.default_rng(0).integers(1, 255, (4, 20, 20)).astype('uint8'))
    with pytest.warns(UserWarning, match='band 4 is declared as transparency'): assert len(Scene({'image': Source(tmp_path/'rgbn.tif', scale=1/255)}).read()['image']) == 3
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        got = Scene({'image': Source(tmp_path/'rgbn.tif', scale=1/255, index=(1, 2, 3, 4))}).read()
    assert len(got['image']) == 4 and got['valid_image'].all()


def test_a_mask_inside_the_file_is_validity(tmp_path):
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(tmp_path/'m.tif', 'w', driver='GTiff', height=20, width=20, count=2, dtype='float32', **PLACE) as dst:
        dst.write(np.ones((2, 20, 20), 'float32'))
        dst.write_mask(np.arange(400).reshape(20, 20) % 7 != 0)
    got = Scene({'sar': Source(tmp_path/'m.tif', limits=(0, 2))}).read()
    assert np.array_equal(got['valid_sar'][0].numpy(), np.arange(400).reshape(20, 20) % 7 != 0)


# Where rasters lie, and how many are open

def test_a_vrt_a_cog_an_archive_and_memory_are_read_like_a_file(town, tmp_path):
    import tarfile
    import zipfile

    import rasterio.shutil
    image = town[0]['image']
    expected = Scene({'image': image}).read(7, 9, 30, 40)['image']
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.write(image, 'in/image.tif')
    with tarfile.open(tmp_path/'a.tar', 'w') as t: t.add(image, 'in/image.tif')
    rasterio.shutil.copy(image, tmp_path/'i.vrt', driver='VRT')
    rasterio.shutil.copy(image, tmp_path/'cog.tif', driver='COG')
    with rasterio.MemoryFile(image.read_bytes()) as memory:
        for path in (f'/vsizip/{tmp_path}/a.zip/in/image.tif', f'zip://{tmp_path}/a.zip!in/image.tif', f'/vsitar/{tmp_path}/a.tar/in/image.tif', tmp_path/'i.vrt', tmp_path/'cog.tif', memory.name):
            scene = Scene({'image': path, 'mask': town[0]['mask']}).verify(full=True)
            assert torch.equal(pickle.loads(pickle.dumps(scene)).read(7, 9, 30, 40)['image'], expected), path
        scene.close()
    with pytest.raises(DataError, match='two slashes'): Scene({'image': tmp_path.joinpath(f'/vsizip/{tmp_path}/a.zip/none.tif')})
    (tmp_path/'gone.vrt').write_text((tmp_path/'i.vrt').read_text().replace('image.tif', 'gone.tif'))
    with pytest.raises(DataError, match='gone.vrt'): Scene({'image': tmp_path/'gone.vrt'}).verify()


def test_a_file_that_was_written_anew_is_not_taken_for_the_old_one(tmp_path):
    for k in (-1, -2):
        path = write_raster(tmp_path/'s.tif', np.full((2, 9, 9), k, 'float32'), PLACE)
        assert (Scene({'sar': path}).read()['sar'] == k).all()


def test_two_thousand_scenes_do_not_exhaust_the_open_files(tmp_path):
    code = """
import os, resource, sys, threading
from pathlib import Path
import numpy as np
from rs_mtl.data.rasters import FILES, write_raster
from rs_mtl.data.scene import Scene
tmp = Path(sys.argv[1])
write_raster(tmp/'0.tif', np.full((2, 9, 9), -7, 'float32'))
for i in range(1, 2000): os.link(tmp/'0.tif', tmp/f'{i}.tif')
scenes = [Scene({'sar': tmp/f'{i}.tif'}) for i in range(2000)]
resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))
def work(k):
    for s in scenes[k::4]: good.append(bool((s.read()['sar'] == -7).all()))
good = []
threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
for t in threads: t.start()
for t in threads: t.join()
print(len(good), all(good), FILES.count, len(os.listdir('/proc/self/fd')) < 60)
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, tmp_path], capture_output=True, text=True)
    assert done.stdout.split() == ['2000', 'True', '10', 'True'], done.stderr[-2000:]
