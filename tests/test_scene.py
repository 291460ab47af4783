"Scenes: windows at any place, alignment to a thousandth of a pixel, torn files, and worker processes."
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

rasterio = pytest.importorskip('rasterio')
from affine import Affine

from rs_mtl.core import AlignmentError, BandError, ConfigError, DataError, LabelError, NodataError, RsMtlError
from rs_mtl.data.rasters import FILES, write_raster
from rs_mtl.data.samples import write_sample
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
def test_a_shift_a_turn_another_pixel_size_or_a_flip_is_an_alignment_error(town, tmp_path_factory, dx, dy, sx, turn, flip):
    assume(not (.0009 < max(abs(dx - round(dx)), abs(dy - round(dy))) < .0011))
    files = town[0]
    there = CORNER @ Affine.translation(dx, dy) @ Affine.rotation(turn) @ Affine.scale(sx, -1 if flip else 1)
    other = write_raster(tmp_path_factory.mktemp('o')/'sar.tif', np.zeros((2, 60, 80), 'float32'), {'crs': 'EPSG:32632', 'transform': there})
    same = abs(dx) < 1e-3 and abs(dy) < 1e-3 and sx == 1 and not turn and not flip
    if same: Scene({'image': files['image'], 'sar': other})
    else:
        with pytest.raises(AlignmentError) as e: Scene({'image': files['image'], 'sar': other})
        assert 'sar.tif' in str(e.value) or 'row' in str(e.value)


def test_off_by_one_needs_crop_to_common_and_then_each_layer_is_read_at_its_place(town, tmp_path):
    files, image, _, _ = town
    moved = write_raster(tmp_path/'sar.tif', image[:, 2:, 3:] + 7, {'crs': 'EPSG:32632', 'transform': CORNER @ Affine.translation(3, 2)})
    with pytest.raises(AlignmentError, match='crop_to_common'): Scene({'image': files['image'], 'sar': moved})
    scene = Scene({'image': files['image'], 'sar': moved}, crop_to_common=True)
    assert scene.shape == (58, 77) and scene.transform == CORNER @ Affine.translation(3, 2)
    sample = scene.read(5, 6, 20, 30)
    assert torch.allclose(sample['sar'], sample['image'] + 7)


def test_rasters_of_two_places_are_an_error_at_construction(town, tmp_path):
    far = write_raster(tmp_path/'far.tif', np.zeros((2, 60, 80), 'float32'), {'crs': 'EPSG:32632', 'transform': CORNER @ Affine.translation(1000, 0)})
    for crop in (False, True):
        with pytest.raises(AlignmentError, match='overlap'): Scene({'image': town[0]['image'], 'sar': far}, crop_to_common=crop)


def test_a_missing_crs_in_one_layer_is_an_error_unless_it_is_assumed(town, tmp_path):
    bare = write_raster(tmp_path/'bare.tif', np.zeros((2, 60, 80), 'float32'), {'transform': CORNER})
    with pytest.raises(AlignmentError, match='EPSG:32632') as e: Scene({'image': town[0]['image'], 'sar': bare})
    assert 'none' in str(e.value) and 'assume_crs' in str(e.value)
    assert Scene({'sar': bare, 'image': town[0]['image']}, assume_crs='EPSG:32632').crs.to_epsg() == 32632
    with pytest.raises(AlignmentError): Scene({'sar': bare, 'image': town[0]['image']}, assume_crs='EPSG:32633')


def test_undeclared_sentinels_in_heights_are_an_error_and_can_be_declared(tmp_path):
    height = np.full((20, 20), 5, 'float32')
    height[:4] = -9999
    path = write_raster(tmp_path/'dsm.tif', height, PLACE)
    with pytest.raises(NodataError, match='-9999') as e: Scene({'height': path}).read()
    assert '20.0%' in str(e.value)
    sample = Scene({'height': path}, nodata={'height': -9999}).read()
    assert not sample['valid_height'][0, :4].any() and sample['height'].min() == 0 and sample['height'].max() == 5


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


@pytest.mark.parametrize('bad', ['empty', 'html', 'folder', 'missing', 'loop', 'text.png'])
def test_what_is_no_raster_is_a_data_error_with_its_path(tmp_path, bad):
    path = tmp_path/f'{bad}.tif'
    if bad == 'empty': path.touch()
    elif bad == 'html': path.write_text('<html>not found</html>')
    elif bad == 'folder': path.mkdir()
    elif bad == 'loop': path.symlink_to(path)
    elif bad == 'text.png': path.write_bytes(b'\x89PNG\r\n\x1a\n cut')
    with pytest.raises(DataError) as e: Scene({'image': path})
    assert str(path) in str(e.value) and 'what to do' in str(e.value)


@pytest.mark.parametrize('share', [.98, .6, .2])
def test_a_truncated_tiff_is_found_by_verify_full_with_its_path(tmp_path, share):
    path = write_raster(tmp_path/'t.tif', np.random.default_rng(0).random((2, 700, 700), 'float32'), PLACE, overviews=False)
    Scene({'sar': path}).verify(full=True)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size*share)])
    with pytest.raises(DataError, match='t.tif'): Scene({'sar': path}).verify(full=True)


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
