"Whole scenes: what must hold for any size, tile, overlap and batch, and what must not happen when a run dies."
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

rasterio = pytest.importorskip('rasterio')
from rasterio.transform import from_origin

from rs_mtl.apply.predict import blend_weights, fold_batch_norm, predict_scene, tile_starts
from rs_mtl.core import BandError, DataError
from rs_mtl.data.rasters import write_raster
from rs_mtl.data.scene import Scene

from tiny import forkserver, map_slowly

PLACE = {'crs': 'EPSG:32632', 'transform': from_origin(500_000, 5_300_000, .5, .5)}


class Same(nn.Module):
    "Returns what it is given, and a constant beside it."
    inputs = ('image',)

    def forward(self, batch):
        x = batch['image']
        return {'clear': x, 'height': torch.full_like(x[:, :1], 3.), 'mask': torch.cat([x[:, :1], 1 - x[:, :1]], 1)*9, 'aux_free': None}


class Around(nn.Module):
    "A mean over 5 x 5 pixels: a net with a small view."
    inputs = ('image',)

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, batch):
        self.seen.append(len(batch['image']))
        return {'height': nn.functional.avg_pool2d(batch['image'], 5, 1, 2, count_include_pad=False)}


def written(tmp, h, w, seed=0, hole=None, bands=1):
    image = np.random.default_rng(seed).random((bands, h, w), 'float32')
    if hole is not None: image[:, hole] = np.nan
    return image, {'image': write_raster(tmp/f'{h}x{w}.tif', image, PLACE, nodata=-1, overviews=False)}


def read(path):
    with rasterio.open(path) as src: return src.read()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), tile=st.integers(1, 600), overlap=st.floats(0, .9))
@example(n=512, tile=512, overlap=0.).via('crop equal to the stride')
@example(n=1, tile=1, overlap=.5).via('one pixel')
def test_windows_cover_every_pixel_and_their_weights_sum_to_one(n, tile, overlap):
    starts = tile_starts(n, tile, overlap)
    total = np.zeros(n)
    for s, w in zip(starts, blend_weights(n, tile, starts)):
        assert len(w) == min(tile, n) and (w > 0).all() and 0 <= s and s + len(w) <= n
        total[s:s + len(w)] += w.numpy()
    assert abs(total - 1).max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 600), w=st.integers(1, 600), tile=st.sampled_from([16, 64, 100, 256]), overlap=st.floats(0, .5), batch=st.integers(1, 5))
@example(h=600, w=41, tile=64, overlap=.9, batch=2).via('the largest overlap')
@example(h=1, w=1, tile=64, overlap=.25, batch=1).via('a single pixel')
@example(h=512, w=1, tile=64, overlap=.25, batch=1).via('one column with an overview')
@example(h=300, w=7, tile=64, overlap=0, batch=3).via('narrower than a tile, no overlap')
def test_fault_44_a_net_that_returns_its_input_returns_the_scene_up_to_the_frame(tmp_path_factory, h, w, tile, overlap, batch):
    tmp, tile = tmp_path_factory.mktemp('same'), max(tile, min(h, w)//8)  # small windows in small scenes, or it takes for ever
    image, files = written(tmp, h, w)
    out = predict_scene(Same(), files, tmp/'out', tile, overlap, batch)
    assert abs(read(out['clear']) - image).max() < 1e-6
    assert abs(read(out['height']) - 3).max() < 3e-6
    assert set(out) == {'clear', 'height', 'mask'}
    sure = abs(image[0] - .5) > 1e-6
    assert (read(out['mask'])[0] == (image[0] < .5))[sure].all()


def test_fault_44_the_result_does_not_depend_on_the_batch_size(tmp_path):
    _, files = written(tmp_path, 200, 333)
    results = []
    for batch in (1, 3, 7):
        net = Around()
        results.append(read(predict_scene(net, files, tmp_path/str(batch), 64, .25, batch)['height']))
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_fault_44_tiles_agree_with_one_big_window_where_the_overlap_exceeds_the_view(tmp_path):
    image, files = written(tmp_path, 210, 250)
    whole = Around()({'image': torch.from_numpy(image)[None]})['height'][0].numpy()
    assert abs(read(predict_scene(Around(), files, tmp_path/'o', 96, .5)['height']) - whole).max() < 5e-3


def test_fault_45_nodata_in_is_nodata_out_and_empty_tiles_skip_the_net(tmp_path):
    hole = np.zeros((600, 520), bool)
    hole[:140, :200] = hole[200, 250] = True
    image, files = written(tmp_path, 600, 520, hole=hole)

    class Counting(Same):
        asked = 0

        def forward(self, batch):
            Counting.asked += len(batch['image'])
            assert torch.isfinite(batch['image']).all()
            return super().forward(batch)

    out = predict_scene(Counting(), files, tmp_path/'o', 64, .25, 4, probabilities=True)
    for name, path in out.items():
        with rasterio.open(path) as src:
            assert np.array_equal(src.read_masks(1) == 0, hole), name
            assert (src.crs.to_epsg(), src.transform) == (32632, PLACE['transform'])
    assert abs(read(out['clear'])[0] - image[0])[~hole].max() < 1e-6
    full = [not hole[r:r + 64, c:c + 64].all() for r in tile_starts(600, 64, .25) for c in tile_starts(520, 64, .25)]
    assert Counting.asked == sum(full) < len(full) - 6
    found = {}
    for name, path in out.items():
        with rasterio.open(path) as src: found[name] = (src.dtypes[0], src.nodata, src.count, src.block_shapes[0], src.overviews(1))
    assert found == {'clear': ('float32', -9999, 1, (256, 256), [2]), 'height': ('float32', -9999, 1, (256, 256), [2]),
                     'mask': ('uint8', 255, 1, (256, 256), [2]), 'probabilities': ('uint8', 255, 2, (256, 256), [2])}


def test_uncertainty_is_the_entropy_of_what_is_written_and_turns_do_not_move_a_symmetric_net(tmp_path):
    hole = np.zeros((130, 170), bool); hole[20:40, 30:90] = True
    image, files = written(tmp_path, 130, 170, hole=hole)
    plain = predict_scene(Same(), files, tmp_path/'plain', 64, probabilities=True, uncertainty=True)
    p = read(plain['probabilities'])*.004
    entropy = -(np.where(p > 0, p*np.log(np.maximum(p, 1e-9)), 0)).sum(0)/np.log(2)
    assert abs(read(plain['uncertainty'])[0]*.004 - entropy)[~hole].max() < .03     # both in steps of .004; a step near 0 and 1 changes the entropy by more
    turned = predict_scene(Same(), files, tmp_path/'turned', 64, uncertainty=True, turns=True)
    for name in turned: assert abs(read(turned[name]).astype(float) - read(plain[name]))[:, ~hole].max() <= (1 if name == 'uncertainty' else 1e-5), name   # pixel by pixel: no direction
    with rasterio.open(turned['uncertainty']) as src: assert np.array_equal(src.read_masks(1) == 0, hole)

class Eastward(nn.Module):
    "Reads the neighbour in the west: an answer that depends on direction."
    inputs = ('image',)
    def forward(self, batch): return {'height': batch['image'].roll(1, -1)}

def test_turns_average_what_depends_on_direction(tmp_path):
    image, files = written(tmp_path, 64, 64)
    out = read(predict_scene(Eastward(), files, tmp_path/'o', 64, turns=True)['height'])[0, 1:-1, 1:-1]
    x = image[0]
    assert abs(out - (x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:])/4).max() < 1e-6


def test_a_scene_without_any_data_is_an_error_and_leaves_no_file(tmp_path):
    _, files = written(tmp_path, 80, 80, hole=np.ones((80, 80), bool))
    with pytest.raises(DataError, match='no pixel'): predict_scene(Same(), files, tmp_path/'o', 64)
    assert not list((tmp_path/'o').glob('*')) if (tmp_path/'o').exists() else True


def test_a_truncated_scene_raises_with_its_path_and_leaves_the_old_maps(tmp_path):
    _, files = written(tmp_path, 900, 900)
    out = predict_scene(Same(), files, tmp_path/'o', 256)
    before = {p: p.read_bytes() for p in out.values()}
    blob = files['image'].read_bytes()
    files['image'].write_bytes(blob[:len(blob)//2])
    with pytest.raises(DataError, match='900x900.tif'): predict_scene(Same(), files, tmp_path/'o', 256)
    assert {p: p.read_bytes() for p in (tmp_path/'o').iterdir()} == before


def test_a_net_that_fails_midway_leaves_nothing(tmp_path):
    class Breaks(Same):
        left = 25

        def forward(self, batch):
            self.left -= 1
            if self.left < 0: raise KeyboardInterrupt
            return super().forward(batch)

    _, files = written(tmp_path, 400, 400)
    with pytest.raises(KeyboardInterrupt): predict_scene(Breaks(), files, tmp_path/'o', 64)
    assert list((tmp_path/'o').iterdir()) == []


def test_fault_43_kill_9_at_any_moment_leaves_nothing_under_the_final_name_and_the_next_run_is_as_if_nothing_had_been(tmp_path):
    _, files = written(tmp_path, 400, 400)
    context, moments = forkserver(), random.Random(0)

    def begun(out):
        child = context.Process(target=map_slowly, args=(str(files['image']), str(out)))
        child.start()
        while child.is_alive() and not list(out.glob('.*.part*')): time.sleep(.002)   # it has begun to write
        return child, time.perf_counter()

    child, start = begun(tmp_path/'whole')
    child.join()
    whole, lasts = {p.name: p.read_bytes() for p in (tmp_path/'whole').iterdir()}, time.perf_counter() - start
    assert set(whole) == {'height.tif', 'classes.tif'}
    killed, left = 0, set()
    for n in range(6):
        out = tmp_path/f'o{n}'
        child, start = begun(out)
        time.sleep(lasts*(n + moments.random())/6)                                    # from the first windows to the last bytes
        child.kill()
        child.join()
        if child.exitcode == -signal.SIGKILL:
            killed += 1
            left |= {p.name.rpartition('-')[0] for p in out.iterdir() if p.name.startswith('.')}
        assert all(p.read_bytes() == whole[p.name] for p in out.iterdir() if not p.name.startswith('.'))  # nothing, or all of it
        if n % 2:                                                                     # and then as if it had not been
            again, _ = begun(out)
            again.join()
            assert {p.name: p.read_bytes() for p in out.iterdir()} == whole, 'the maps of an undisturbed run, and nothing beside them'
    assert killed >= 2 and left, 'at least some died while they wrote'


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    _, files = written(tmp_path, 700, 700, bands=3)
    code = 'import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n' + textwrap.dedent('''
        import sys, torch, rs_mtl
        from rs_mtl.apply.predict import predict_scene
        class Same(torch.nn.Module):
            def forward(self, batch): return {'clear': batch['image']}
        predict_scene(Same(), {'image': sys.argv[1]}, sys.argv[2], 128)
    ''')
    done = subprocess.run([sys.executable, '-c', code, files['image'], tmp_path/'o'], capture_output=True, text=True)
    assert done.returncode != 0 and 'cannot be written' in done.stderr, done.stderr
    assert list((tmp_path/'o').iterdir()) == []


MEMORY = textwrap.dedent('''
    import resource, sys, torch, rs_mtl
    from rs_mtl.apply.predict import predict_scene
    torch.set_num_threads(1)
    class Two(torch.nn.Module):
        inputs = ('image',)
        def forward(self, batch): return {'mask': torch.cat([batch['image'], 1 - batch['image']], 1), 'height': batch['image']}
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    predict_scene(Two(), {'image': sys.argv[1]}, sys.argv[3], 256)   # everything is imported and warm
    start = peak()
    predict_scene(Two(), {'image': sys.argv[2]}, sys.argv[3], 256)
    print(start, peak())
''')


def test_fault_43_memory_follows_the_width_and_not_the_area(tmp_path):
    _, small = written(tmp_path, 1024, 1024)
    # forty times the area at the same width: the scene and its maps are 360 MB
    long = {'image': write_raster(tmp_path/'long.tif', np.zeros((1, 40*1024, 1024), 'float32'), PLACE, overviews=False)}
    env = os.environ | {'OMP_NUM_THREADS': '1', 'RS_MTL_PROGRESS': '0', 'MALLOC_ARENA_MAX': '2'}
    done = subprocess.run([sys.executable, '-c', MEMORY, small['image'], long['image'], tmp_path/'o'], capture_output=True, text=True, env=env, check=True)
    start, end = map(float, done.stdout.split())
    assert end - start < 60, f'{end - start:.0f} MB more'


def test_folding_batch_norm_keeps_the_answer():
    from rs_mtl import create_model
    net = create_model('plain', bands=4, classes=6, tasks=('mask', 'height'))
    batch = {'image': torch.rand(2, 4, 96, 96, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        net(batch)
        net.eval()
        before = net(batch)
        folded = fold_batch_norm(net, batch)
        after = net(batch)
    assert folded >= 20
    for name in before: assert (before[name] - after[name]).abs().max() <= 1e-4*before[name].abs().max()


def test_the_net_that_was_handed_in_is_left_as_it_was(tmp_path):
    from rs_mtl import create_model
    _, files = written(tmp_path, 300, 300, bands=4)
    net = create_model('plain', bands=4, classes=6, tasks=('mask', 'height')).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    predict_scene(net, Scene(files), tmp_path/'o', 128)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_bar_counts_tiles_and_tells_the_time_left(tmp_path, monkeypatch, capsys):
    from rs_mtl import core
    monkeypatch.setattr(core, '_shown', True)
    seen = []
    real = core.progress
    monkeypatch.setattr('rs_mtl.apply.predict.progress', lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    _, files = written(tmp_path, 200, 200)
    start = time.time()
    predict_scene(Same(), files, tmp_path/'o', 64, 0)
    assert seen[0].n == seen[0].total == 16 and seen[0].start_t >= start - 1


def small_net(bands=3):
    import rs_mtl
    torch.manual_seed(0)
    return rs_mtl.create_model('plain', bands=bands, classes=3, encoder='resnet10t', width=8, full=8, detail=4)

def test_fault_11_a_scene_of_other_bands_is_named_with_its_path_though_the_net_has_no_names_for_them(tmp_path):
    with pytest.raises(BandError, match='40x40.tif') as e: predict_scene(small_net(4), written(tmp_path, 40, 40, bands=3)[1], tmp_path/'maps')
    assert 'the 4 bands' in str(e.value) and 'index=' in str(e.value) and not (tmp_path/'maps').exists()

def test_fault_12_numbers_unlike_those_of_the_training_are_warned_of_and_others_are_not(tmp_path, recwarn):
    net, (_, files) = small_net(), written(tmp_path, 40, 40, bands=3)      # uniform between 0 and 1
    net.set_stats({'image': ([.5]*3, [.3]*3)})
    predict_scene(net, files, tmp_path/'maps')
    assert not [w for w in recwarn if 'sigma' in str(w.message)]
    net.set_stats({'image': ([.5, .05, .5], [.3, .01, .3])})                # the second band was much darker there
    with pytest.warns(UserWarning, match='band 2 of image .* sigma'): predict_scene(net, files, tmp_path/'maps')
