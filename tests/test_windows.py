"Windows over many scenes: each pixel once, the same for the same seed in every set-up, rare classes met, empty places left out, and no file left open."
import gc
import os
import pickle
import signal
import time

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Send, forkserver, tiny
from torch.utils.data import DataLoader

from rs_mtl.core import IGNORE, BandError, ConfigError, DataError
from rs_mtl.data.grid import Source
from rs_mtl.data.rasters import FILES, write_raster
from rs_mtl.data.scene import Scene
from rs_mtl.data.windows import Cells, Places, Windows, grid_windows, index_scene, random_windows, tile_raster
from rs_mtl.training.checkpoint import read_pair
from rs_mtl.training.fit import fit
from rs_mtl.training.runtime import open_loader, read

PLACE = {'crs': 'EPSG:32632', 'transform': rasterio.transform.from_origin(5e5, 5.3e6, 1, 1)}
SIZES = st.integers(1, 40)


@pytest.fixture(autouse=True)
def quiet(monkeypatch): monkeypatch.setenv('RS_MTL_PROGRESS', '0')

def make(folder, i=0, shape=(90, 120), mask=None, valid=None, extra=(), **kwargs):
    "A scene whose image says where each pixel lies: scene, row and column."
    y, x = np.mgrid[:shape[0], :shape[1]]
    image = np.stack([np.full(shape, i), y, x]).astype('float32')/1024  # as if it were reflectance
    ok = np.ones(shape, bool) if valid is None else valid
    files = {'image': write_raster(folder/f'image{i}.tif', image, PLACE, nodata=-1, valid=ok, bands=('scene', 'row', 'column'))}
    mask = (x // 7 % 2).astype('uint8') if mask is None else mask
    files['mask'] = write_raster(folder/f'mask{i}.tif', mask, PLACE, nodata=IGNORE, classes=kwargs.pop('classes', ('ground', 'roof')), palette=((0, 0, 0), (9, 9, 9), (5, 5, 5), (7, 7, 7))[:mask.max() % IGNORE + 1])
    return Scene(files, **kwargs)

@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scenes')
    return [make(folder, i, s) for i, s in enumerate([(90, 120), (64, 64), (200, 33), (20, 300)])]

def seen(sample):
    "The scene, row and column of the first pixel of a sample, told by its first valid one."
    row, col = sample['valid_image'][0].nonzero()[0].tolist()
    i, r, c = (1024*sample['image'][:, row, col]).int().tolist()
    return i, r - row, c - col


# plans

@settings(max_examples=250, deadline=None)
@given(h=SIZES, w=SIZES, size=st.tuples(SIZES, SIZES))
def test_grid_windows_cover_every_pixel_exactly_once_in_their_valid_part(h, w, size):
    count = np.zeros((h, w), int)
    for _, r, c in grid_windows([(h, w)], size): count[r:r + size[0], c:c + size[1]] += 1
    assert (count == 1).all()

@settings(max_examples=250, deadline=None)
@given(shapes=st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4), size=st.tuples(SIZES, SIZES), data=st.data())
def test_overlapping_grid_windows_cover_every_pixel_with_the_fewest_windows_and_in_the_order_of_a_loop(shapes, size, data):
    stride = tuple(data.draw(st.integers(1, s)) for s in size)
    plan, byhand = grid_windows(shapes, size, stride), []
    for i, shape in enumerate(shapes):
        starts = []
        for n, s, t in zip(shape, size, stride):  # go on until the end is reached
            a = [0]
            while a[-1] + s < n: a.append(a[-1] + t)
            starts.append(a)
        byhand += [(i, r, c) for r in starts[0] for c in starts[1]]
        count = np.zeros(shape, int)
        for _, r, c in plan[plan[:, 0] == i]: count[r:r + size[0], c:c + size[1]] += 1
        assert count.min() >= 1
    assert list(map(tuple, plan.tolist())) == byhand

@settings(max_examples=200, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(4, 60), st.integers(4, 60)), min_size=1, max_size=5), k=st.tuples(st.integers(1, 8), st.integers(1, 8)),
       step=st.integers(1, 4), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_random_windows_lie_inside_on_whole_steps_and_are_the_same_again(shapes, k, step, seed, epoch):
    size = tuple(step*i for i in k)
    plan = random_windows(shapes, size, 50, seed, epoch, step)
    assert np.array_equal(plan, random_windows(shapes, size, 50, seed, epoch, step)) and plan.shape == (50, 3)
    shape = np.array(shapes)[plan[:, 0]]
    assert (plan[:, 1:] >= 0).all() and (plan[:, 1:] % step == 0).all()
    assert ((plan[:, 1:] + size <= shape) | (plan[:, 1:] == 0) & (shape < size)).all()

def test_random_windows_fall_by_area_and_evenly_and_reach_both_ends():
    plan = random_windows([(100, 200), (100, 100), (50, 20)], 20, 40_000, seed=2)
    assert np.bincount(plan[:, 0])/40_000 == pytest.approx(np.array([20_000, 10_000, 1000])/31_000, abs=.01)
    rows = np.bincount(plan[plan[:, 0] == 0, 1], minlength=81)
    assert len(rows) == 81 and rows.min() > 0 and abs(rows/rows.sum() - 1/81).max() < .004  # from row 0 to row 80, none more often
    assert np.bincount(plan[plan[:, 0] == 2, 2]).tolist() == [(plan[:, 0] == 2).sum()]

def test_scenes_of_one_pixel_are_drawn_alike():
    "Where the running sum of the areas counts to three, an end that belongs to the wrong scene is seen."
    plan = random_windows([(1, 1), (1, 1), (1, 1)], 1, 3000)
    assert np.bincount(plan[:, 0], minlength=3)/3000 == pytest.approx(np.full(3, 1/3), abs=.04)

def test_epochs_and_seeds_do_not_share_windows():
    plans = [random_windows([(5000, 5000)], 256, 500, s, e) for s in range(4) for e in range(4)]
    assert len({p.tobytes() for p in plans}) == 16 and len(np.unique(np.concatenate(plans), axis=0)) > 7900  # (seed 1, epoch 0) is not (seed 0, epoch 1)

@pytest.mark.parametrize('call, words', [
    (lambda: grid_windows([(9, 9)], 4, 5), 'wider than the window'), (lambda: grid_windows([], 4), 'no scenes'), (lambda: grid_windows([(9, 9)], 0), 'size=0'),
    (lambda: grid_windows([(9, 9)], 4.5), 'whole pixels'), (lambda: grid_windows([(9, 9)], (4, 4, 4)), 'size='), (lambda: random_windows([(9, 9)], 4, 0), 'n=0'),
    (lambda: random_windows([(9, 9)], 4, 5, seed=-1), 'numbers from 0'), (lambda: random_windows([(90, 90)], 25, 5, step=10), 'take size=30'), (lambda: grid_windows([(90, 90)], 20, 5, step=10), 'take stride=10')])
def test_a_wrong_plan_says_why(call, words):
    with pytest.raises(ConfigError, match=words): call()


# reading

def test_what_is_read_is_what_was_planned(scenes):
    for data in (Windows(scenes, 16, n=60, seed=5), Windows(scenes, 16, n=60, balance=True), Windows(scenes, 16)):
        assert all(seen(data[i]) == data.where(i) == tuple(data.plan()[i]) for i in range(len(data)))

def test_a_grid_brings_every_pixel_of_every_scene_once(scenes):
    for edge in ('reflect', 'empty'):
        found = torch.cat([1024*s['image'][:, s['valid_image'][0]].T for s in Windows(scenes, (17, 31), edge=edge)]).int()
        assert len(found) == sum(h*w for h, w in (s.shape for s in scenes)) == len(torch.unique(found, dim=0))
        labelled = sum(int(s['valid_mask'].sum()) for s in Windows(scenes, (17, 31), edge=edge))
        assert labelled == len(found)

def test_fault_27_scene_smaller_than_the_window(scenes):
    data = Windows(scenes[3:], 64, n=20)  # 20 x 300
    for sample in data:
        assert sample['image'].shape == (3, 64, 64) and sample['valid_image'][:, :20].all() and not sample['valid_image'][:, 20:].any()
        assert torch.equal(1024*sample['image'][1, :, 0], torch.tensor([*range(20), *range(18, -1, -1), *range(1, 20), *range(18, 12, -1)]).float())  # its mirror image, again and again
        assert (sample['mask'][20:] == IGNORE).all()
    with pytest.raises(DataError, match=r"1 of 4 scenes are smaller.*image3.tif"): Windows(scenes, 33, n=5, strict=True)
    assert len(Windows(scenes, 20, n=5, strict=True)) == 5

def test_step_is_heeded_also_where_only_a_scene_knows_it(scenes, tmp_path):
    data = Windows(scenes, 20, n=200, step=10)
    assert (data.plan()[:, 1:] % 10 == 0).all() and len(np.unique(data.plan()[:, 1])) > 5
    known = make(tmp_path)
    known.step = 5
    assert Windows([known], 20, n=5, step=4).step == 20 and (Windows([known], 20, n=50, balance=True).plan()[:, 1:] % 5 == 0).all()
    with pytest.raises(ConfigError, match='take size=20'): Windows([known], 16, n=5)

def test_a_coarser_mask_is_balanced_too(tmp_path):
    "Labels of 10 m beside an image of 3 m: every window on whole label pixels, the only labelled field found."
    labels = np.zeros((24, 36), 'uint8'); labels[10:12, 20:23] = 1
    image = write_raster(tmp_path/'i.tif', np.zeros((80, 120), 'float32'), {'crs': 'EPSG:32632', 'transform': rasterio.transform.from_origin(5e5, 5.3e6, 3, 3)})
    mask = write_raster(tmp_path/'m.tif', labels, {'crs': 'EPSG:32632', 'transform': rasterio.transform.from_origin(5e5, 5.3e6, 10, 10)}, classes=('field', 'pond'))
    scene = Scene({'image': image, 'mask': Source(mask, ratio=(3, 10))})
    data = Windows([scene], 30, n=40, balance=True, min_valid={'mask': .5})
    samples = list(data)
    assert all(s['mask'].shape == (9, 9) and s['image'].shape == (1, 30, 30) for s in samples) and (data.plan()[:, 1:] % 10 == 0).all()
    assert .3 < np.mean([bool((s['mask'] == 1).any()) for s in samples])


# balance

def rare(folder, i, at, shape=(300, 400)):
    mask = np.zeros(shape, 'uint8'); mask[:, 200:] = 1; mask[at[0], at[1]] = 2; mask[:5] = IGNORE
    return make(folder, i, shape, mask, classes=('sea', 'land', 'lighthouse'))

def test_a_class_of_one_pixel_is_found_and_met_as_often_as_the_others(tmp_path):
    scenes = [rare(tmp_path, 0, (299, 399)), make(tmp_path, 1, (300, 400), np.zeros((300, 400), 'uint8'), classes=('sea', 'land', 'lighthouse'))]
    data = Windows(scenes, 32, n=300, balance=True, seed=1)
    met = np.array([[bool((s['mask'] == k).any()) for k in range(3)] for s in data])
    assert .25 < met[:, 2].mean() < .42 and met.any(1).all()
    plain = np.array([bool((s['mask'] == 2).any()) for s in Windows(scenes, 32, n=300, seed=1)])
    assert plain.mean() < .02

def test_within_a_class_every_pixel_is_looked_for_alike(tmp_path):
    mask = np.full((128, 128), IGNORE, 'uint8'); mask[:64, :16] = 0; mask[64:, 112:] = 0; mask[100, :8] = 1
    data = Windows([make(tmp_path, 0, (128, 128), mask)], 16, n=4000, balance=True)
    _, _, kind = data._planned()
    rows = data.plan()[kind == 0, 1]
    assert (rows < 56).mean() == pytest.approx(.5, abs=.04)

@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(st.integers(2, 50), st.integers(2, 50)), size=st.tuples(st.integers(1, 60), st.integers(1, 60)), cell=st.integers(1, 20), step=st.sampled_from([1, 1, 2]), seed=st.integers(0, 999))
def test_the_class_that_was_looked_for_is_in_the_window(shape, size, cell, step, seed):
    shape, size = np.array(shape)//step*step + (0, 0), np.array(size)*step
    cell = min(cell, int(size.min()//step))*step or step
    mask = np.random.default_rng(seed).choice([0, 1, 2, IGNORE], p=[.02, .01, .01, .96], size=shape)
    fake = _Fake(mask, np.ones(shape, bool))
    cells = index_scene(fake, cell, (), True, step)
    if not len(cells.at): return
    places = Places(shape[None], [cells], size, step, {}, True)
    assert places.kinds.tolist() == np.unique(mask[mask != IGNORE]).tolist()
    kind = np.arange(60) % len(places.kinds)
    windows = places.windows(np.random.default_rng(seed), kind)
    room = np.maximum(shape - size, 0)
    for (_, r, c), k in zip(windows, kind):
        assert (mask[r:r + size[0], c:c + size[1]] == places.kinds[k]).any() and 0 <= r <= room[0] and 0 <= c <= room[1] and r % step == c % step == 0

class _Fake:
    "What the index asks of a scene."
    def __init__(self, mask, valid): self.mask, self.valid, self.shape, self.reads = mask, valid, mask.shape, 0
    def read(self, row, col, height, width, layers):
        self.reads += 1
        assert row + height <= self.shape[0] and col + width <= self.shape[1]
        cut = slice(row, row + height), slice(col, col + width)
        return {'mask': torch.from_numpy(self.mask[cut].astype('int64')), 'valid_image': torch.from_numpy(self.valid[cut])[None]}

@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(st.integers(2, 50), st.integers(2, 50)), cell=st.integers(1, 3), seed=st.integers(0, 999))
def test_the_estimate_of_the_valid_share_is_exact_on_whole_cells_of_unbroken_rows(shape, cell, seed):
    columns = np.random.default_rng(seed).random(shape[1]) < .5
    valid = np.broadcast_to(np.repeat(columns[::cell], cell)[:shape[1]], shape).copy()  # the same in all rows, so that a band of rows tells all
    shapes = np.array([shape, shape])
    cells = [index_scene(_Fake(np.zeros(shape, int), v), cell, ('image',), False) for v in (valid, ~valid)]
    windows = random_windows(shapes, (cell, 2*cell), 40, seed)
    windows[:, 1:] = windows[:, 1:]//cell*cell
    estimate = Places(shapes, cells, np.array([cell, 2*cell]), 1, {'image': 1e-9}, False).share(windows, 'image')
    truth = [(valid if s == 0 else ~valid)[r:r + cell, c:c + 2*cell].sum()/(2*cell*cell) for s, r, c in windows]
    assert estimate == pytest.approx(np.array(truth), abs=1e-9)

def test_what_cannot_be_found_is_said(tmp_path):
    scene = make(tmp_path, classes=('ground', 'roof', 'whale', 'unicorn'))
    with pytest.warns(UserWarning, match="'whale', 'unicorn' cannot be balanced"): data = Windows([scene], 16, n=5, balance=True)
    assert data.places.kinds.tolist() == [0, 1]
    blank = make(tmp_path, 1, mask=np.full((90, 120), IGNORE, 'uint8'))
    with pytest.warns(UserWarning, match=r'1 of 2 scenes.*image1.tif'): Windows([make(tmp_path, 2), blank], 16, n=5, balance=True)
    with pytest.raises(DataError, match='no scene has a window.*image1.tif'): Windows([blank], 16, n=5, balance=True)

def test_the_index_is_read_once_per_scene_and_travels(tmp_path):
    fake = _Fake(np.zeros((90, 90), int), np.ones((90, 90), bool))
    first, reads = index_scene(fake, 8), fake.reads
    assert index_scene(fake, 8) is first and fake.reads == reads
    again = pickle.loads(pickle.dumps(first))
    assert isinstance(again, Cells) and np.array_equal(again.at, first.at) and index_scene(fake, 9) is not first
    data = Windows([make(tmp_path)], 16, n=9, balance=True, min_valid=.5)
    assert np.array_equal(pickle.loads(pickle.dumps(data)).plan(), data.plan())


# enough data

def half(shape=(300, 400)):
    valid = np.zeros(shape, bool); valid[:, 150:] = True
    return valid

@pytest.mark.parametrize('balance', [False, True])
def test_windows_hold_as_much_data_as_was_promised(tmp_path, balance):
    mask = np.zeros((300, 400), 'uint8'); mask[40:44, 152:156] = 1  # the roof stands at the edge of the data
    scenes = [make(tmp_path, 0, (300, 400), mask, half()), make(tmp_path, 1, (300, 400), valid=np.zeros((300, 400), bool))]
    with pytest.warns(UserWarning, match=r'1 of 2 scenes have no window.*image1.tif.*') as said: data = Windows(scenes, 48, n=150, min_valid={'image': .8}, balance=balance)
    assert len(said) == 1
    share = [s['valid_image'].float().mean() for s in data]
    assert min(share) >= .8 and min(share) < .99  # some reach over the edge of the data, as far as they may
    if balance: assert np.mean([bool((s['mask'] == 1).any()) for s in data]) > .4

def test_an_estimate_that_was_wrong_is_found_out_and_drawn_again_the_same_way(tmp_path):
    valid = np.ones((300, 400), bool)
    valid[np.arange(300) % 12 >= 3] = False      # the index looks at the first rows of a cell of 12 and believes
    valid[:, 200:] = True
    data = Windows([make(tmp_path, 0, (300, 400), valid=valid)], 48, n=60, min_valid=.6)
    samples = list(data)
    moved = [i for i, s in enumerate(samples) if seen(s) != data.where(i)]
    assert len(moved) > 5 and all(s['valid_image'].float().mean() >= .6 for s in samples)
    again = pickle.loads(pickle.dumps(data))
    assert all(torch.equal(again[i]['image'], samples[i]['image']) for i in moved)
    assert all(any(seen(samples[i]) == data.where(i, k) for k in range(1, 20)) for i in moved)

def test_after_so_many_draws_the_error_names_the_scene(tmp_path):
    valid = np.arange(300)[:, None]//3 % 4 == np.zeros(400, int)
    data = Windows([make(tmp_path, 0, (300, 400), valid=valid)], 48, n=3, min_valid=.6)
    with pytest.raises(DataError, match=r"window 0: 20 places hold too little data, the last at row \d+, column \d+ of .*image0.tif"): data[0]
    with pytest.raises(DataError, match='no scene has a window'): Windows([make(tmp_path, 1, valid=np.arange(120)[None] < 20*np.ones((90, 1)))], 48, n=3, min_valid={'image': .9})

@pytest.mark.parametrize('kwargs, words', [
    ({'balance': True}, 'pass n='), ({'min_valid': .5}, 'pass n='), ({'n': 3, 'stride': 4}, 'one of them'), ({'n': 3, 'min_valid': {'imagee': .5}}, "'imagee'"), ({'n': 3, 'min_valid': 1.5}, '1.5'),
    ({'edge': 'wrap'}, "edge='wrap'"), ({'n': 0}, 'n=0'), ({'layers': ['image', 'sar']}, 'sar is not in all'), ({'step': 0}, 'step=0'), ({'n': 3, 'seed': -1}, 'numbers from 0')])
def test_wrong_arguments_say_what_is_right(scenes, kwargs, words):
    with pytest.raises(ConfigError, match=words): list(Windows(scenes, 16, **kwargs))

def test_scenes_that_do_not_go_together_are_told_apart(scenes, tmp_path):
    other = make(tmp_path, 7, classes=('ground', 'tower'))
    with pytest.raises(BandError, match="classes of .*image7.tif.*'tower'.*image0.tif.*'roof'"): Windows([scenes[0], other], 16)
    with pytest.raises(ConfigError, match='mask is not in all'): Windows([scenes[0], Scene({'image': scenes[1].layers['image'].path})], 16)
    assert len(Windows([scenes[0], Scene({'image': scenes[1].layers['image'].path})], 64, layers=['image'])) == 4 + 1
    with pytest.raises(ConfigError, match='balance without a mask'): Windows([Scene({'image': scenes[0].layers['image'].path})], 16, n=4, balance=True)
    with pytest.raises(ConfigError, match='no scenes'): Windows([], 16)
    coarse = PLACE | {'transform': rasterio.transform.from_origin(5e5, 5.3e6, 2, 2)}
    files = [write_raster(tmp_path/f'{i}.tif', np.zeros((32, 32), 'float32'), p) for i, p in enumerate((PLACE, coarse))]
    with pytest.warns(UserWarning, match='from 1 to 2 m'): Windows([Scene({'image': f}) for f in files], 16)


# workers

def walk(data, workers, context=None, persistent=False, epochs=3):
    "What a loader reads in each epoch."
    loader = DataLoader(data, batch_size=4, num_workers=workers, persistent_workers=persistent, multiprocessing_context=context)
    out = []
    for epoch in range(epochs):
        data.set_epoch(epoch)
        out.append(torch.cat([b['image'] for b in loader]))
    del loader
    gc.collect()
    return out

@pytest.mark.parametrize('kwargs', [{}, {'balance': True, 'min_valid': .5}])
def test_every_set_up_of_workers_reads_the_same_and_each_epoch_is_new(scenes, kwargs):
    plain = walk(Windows(scenes, 16, n=16, seed=3, **kwargs), 0)
    assert not torch.equal(plain[0], plain[1]) and not torch.equal(plain[1], plain[2])
    for workers, context, persistent in [(1, 'fork', False), (2, 'fork', True), (4, 'fork', True)]:
        found = walk(Windows(scenes, 16, n=16, seed=3, **kwargs), workers, context, persistent)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)), (workers, context, persistent)

@pytest.mark.parametrize('context, persistent', [('spawn', True), ('forkserver', False)])
def test_workers_that_start_from_nothing_read_the_same_too(scenes, context, persistent):
    forkserver()
    plain = walk(Windows(scenes, 16, n=8, seed=3), 0, epochs=2)
    found = walk(Windows(scenes, 16, n=8, seed=3), 2, context, persistent, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))

def test_a_copy_that_came_through_pickle_reaches_its_running_workers_as_well(scenes):
    data = pickle.loads(pickle.dumps(Windows(scenes, 16, n=8, seed=3)))
    found = walk(data, 2, 'fork', True, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(found, walk(Windows(scenes, 16, n=8, seed=3), 0, epochs=2), strict=True))

def test_the_global_generators_are_left_alone(scenes):
    before, here = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(Windows(scenes, 16, n=8, balance=True, min_valid=.5))
    assert torch.equal(before, torch.get_rng_state()) and np.array_equal(here, np.random.get_state()[1])

def open_files(pid='self'):
    "The files of a disk that a process holds open; batches on their way between processes are no files, and come and go."
    links = [f'/proc/{pid}/fd/{n}' for n in os.listdir(f'/proc/{pid}/fd')]
    targets = [os.readlink(p) for p in links if os.path.islink(p)]
    return sorted(t for t in targets if t.startswith('/') and not t.startswith(('/dev', '/proc', '/torch_')))

def rasters_open(pid='self'):
    "The rasters that a process holds open."
    return [t for t in open_files(pid) if t.endswith('.tif')]

@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='open files are counted in /proc')
def test_no_file_is_left_open_after_epochs_with_and_without_workers(scenes):
    FILES.close()  # what other tests have read
    data = Windows(scenes, 16, n=40, seed=1)
    loader = DataLoader(data, batch_size=4, num_workers=2, persistent_workers=True)
    assert sum(1 for _ in loader) == 10
    main, workers = open_files(), [w.pid for w in loader._iterator._workers]
    before = [open_files(p) for p in workers]
    for e in (1, 2, 3):
        data.set_epoch(e)
        assert sum(1 for _ in loader) == 10
    assert open_files() == main and [open_files(p) for p in workers] == before
    assert all(len(rasters_open(p)) <= 2*len(scenes) for p in workers) and not rasters_open()
    loader._iterator._shutdown_workers()
    del loader
    gc.collect()
    rest = open_files()
    walk(data, 0, epochs=1)
    held = rasters_open()
    walk(data, 0, epochs=3)
    assert sorted(rasters_open()) == sorted(held) and 0 < len(held) <= 2*len(scenes)
    data.close()
    assert not rasters_open() and open_files() == rest
    for _ in range(3): walk(data, 2, 'fork', epochs=1)
    assert open_files() == rest

@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='open files are counted in /proc')
def test_more_scenes_than_a_process_may_hold_open(tmp_path):
    import resource
    scene = make(tmp_path)
    scenes = [pickle.loads(pickle.dumps(scene)) for _ in range(400)]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 300, limit[1]))
    try: assert len(list(Windows(scenes, 90))) == 800
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, limit)

@pytest.mark.parametrize('workers', [0, 2])
def test_fault_40_a_file_that_fails_in_mid_epoch_is_named(tmp_path, workers):
    scenes = [make(tmp_path, i, (256, 256)) for i in range(3)]
    whole = (tmp_path/'image1.tif').read_bytes()
    (tmp_path/'image1.tif').write_bytes(whole[:len(whole)*6//10])
    data = Windows([Scene({k: l.path for k, l in s.layers.items()}) for s in scenes], 64, n=40)
    with pytest.raises(DataError, match='image1.tif') as e, open_loader(data, [[i] for i in range(40)], workers, 2) as loader: list(read(loader))
    assert 'of \'windows\'' in str(e.value)


# training

def test_fit_gives_each_epoch_its_windows_and_a_stopped_run_sees_the_same_ones_again(tmp_path, scenes):
    class Noted(Windows):
        "Notes every window that was read, in this process."
        def __init__(self, *args, spoil=None, **kwargs): super().__init__(*args, **kwargs); self.read, self.spoil = [], spoil
        def __getitem__(self, i):
            self.read.append((self.epoch, i, *self.where(i)))
            sample = super().__getitem__(i)
            sample = {'image': 10*sample['image'][1:2], 'mask': sample['mask'], 'height': 50*sample['image'][2:]}
            return self.spoil(i, sample) if self.spoil else sample
    def train(out, spoil=None, resume=False):
        data = Noted(scenes[:1], 24, n=16, seed=4, balance=True, spoil=spoil)
        data.set_epoch(7)  # whatever it was used for before
        run = fit(tiny(), data, epochs=3, batch_size=4, lr=.02, device='cpu', out=out, resume=resume)
        return run, data.read
    whole, all_read = train(tmp_path/'whole')
    seen_in = [{(i, *w) for e, i, *w in all_read[-48:] if e == epoch} for epoch in range(3)]
    assert [len(s) for s in seen_in] == [16]*3 and {e for e, *_ in all_read[:-48]} == {0}
    assert not {w[1:] for w in seen_in[0]} & {w[1:] for w in seen_in[1]} or seen_in[0] != seen_in[1]
    stopped, first = train(tmp_path/'half', Send(signal.SIGTERM, len(all_read) - 48 + 22))  # in the second batch of the second epoch
    assert stopped.stopped and stopped.epoch == 1 and stopped.done == 2
    _, second = train(tmp_path/'half', resume=True)
    assert first[-24:] + second[-24:] == all_read[-48:]
    weights = [read_pair(tmp_path/d, 'state')[0] for d in ('whole', 'half')]
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])

def test_fit_with_workers_learns_the_same_from_windows(scenes):
    class Ready(Windows):
        def __getitem__(self, i):
            sample = super().__getitem__(i)
            return {'image': 10*sample['image'][1:2], 'mask': sample['mask'], 'height': 50*sample['image'][2:]}
    nets = []
    for workers in (0, 2):
        net = tiny()
        fit(net, Ready(scenes[:1], 24, n=8, seed=4), epochs=3, batch_size=4, lr=.02, device='cpu', workers=workers)
        nets.append(net.state_dict())
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])


# many scenes

def test_thousands_of_scenes_are_planned_without_a_loop():
    "Ten times the scenes may not cost a hundred times: a loop over scenes or windows would cost seconds here."
    shapes = np.random.default_rng(0).integers(200, 3000, (20_000, 2))
    start = time.perf_counter()
    plan = random_windows(shapes, 256, 100_000)
    grid = grid_windows(shapes, 256)
    assert time.perf_counter() - start < 2 and plan.shape == (100_000, 3) and grid[-1, 0] == 19_999
    assert np.array_equal(np.bincount(grid[:, 0]), (-(-shapes//256)).prod(1))

def test_a_tiled_copy_says_the_same(tmp_path):
    path = tmp_path/'a.tif'
    values = np.random.default_rng(0).integers(0, 5000, (4, 300, 500)).astype('uint16')
    with rasterio.open(path, 'w', driver='GTiff', height=300, width=500, count=4, dtype='uint16', nodata=0, blockysize=1, compress='lzw', photometric='minisblack', alpha='no', **PLACE) as dst:
        dst.write(values); dst.scales, dst.offsets, dst.descriptions = (1e-4,)*4, (-.1,)*4, ('red', 'green', 'blue', 'nir')
        dst.update_tags(when='2026')
    with rasterio.open(path) as a, rasterio.open(tile_raster(path, tmp_path/'out'/'b.tif')) as b:
        assert np.array_equal(a.read(), b.read()) and b.block_shapes == [(256, 256)]*4 and a.block_shapes[0][0] == 1
        for what in ('nodata', 'crs', 'transform', 'scales', 'offsets', 'descriptions', 'colorinterp', 'dtypes'): assert getattr(a, what) == getattr(b, what), what
        assert b.tags()['when'] == '2026'
    one, two = (Scene({'image': p}).read(10, 20, 100, 90) for p in (path, tmp_path/'out'/'b.tif'))
    assert all(torch.equal(one[k], two[k]) for k in one)
    with pytest.raises(DataError, match='nothing.tif'): tile_raster(tmp_path/'nothing.tif', tmp_path/'c.tif')
    assert [p.name for p in (tmp_path/'out').iterdir()] == ['b.tif'] and not (tmp_path/'c.tif').exists()
