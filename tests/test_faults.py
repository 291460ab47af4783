"""The faults of this field that fall between two rooms, each a test named after it and its number; the others stand with the room they belong to,
and the last test here looks whether every number has one."""
import ast
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from rs_mtl.core import IGNORE, ConfigError, DataError, LabelError, create_model
from rs_mtl.data.check import check_dataset
from rs_mtl.data.rasters import write_raster
from rs_mtl.data.scene import Scene
from rs_mtl.data.tables import folder_table
from rs_mtl.models.net import MultiTaskNet, pad_to
from rs_mtl.training.losses import Objective, check_labels, cross_entropy, dice, height_loss, mask_loss
from rs_mtl.training.metrics import Scores, plain
from rs_mtl.training.runtime import open_loader, read

rasterio = pytest.importorskip('rasterio')
from affine import Affine

from tiny import Squares

HERE = Path(__file__).parent
PLACE = {'crs': 'EPSG:32632', 'transform': Affine(.5, 0, 500_000, 0, -.5, 5_300_000)}
NAMES = ('ground', 'roof', 'tree')


def gen(seed): return torch.Generator().manual_seed(seed)

def with_batch(sample): return {k: v[None] for k, v in sample.items()}

class Copy(MultiTaskNet):
    "Answers with its input: what the chores around a net do can then be seen pixel by pixel."
    def __init__(self, multiple=32, **config): super().__init__(**config); self.multiple = multiple
    def maps(self, streams): return {'clear': streams['image']}


# 1, 4: holes in heights

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), stored=st.sampled_from([np.nan, -9999.]))
@example(seed=0, share=1., stored=np.nan).via('nothing but holes')
@example(seed=0, share=0., stored=np.nan).via('no hole at all')
def test_fault_01_nan_in_the_height_model_is_not_valid_and_reaches_neither_loss_nor_gradient(tmp_path_factory, seed, share, stored):
    g = np.random.default_rng(seed)
    height = g.uniform(0, 30, (13, 17)).astype('float32')
    hole = g.random(height.shape) < share
    path = tmp_path_factory.mktemp('h')/'height.tif'
    with rasterio.open(path, 'w', driver='GTiff', height=13, width=17, count=1, dtype='float32', nodata=None if np.isnan(stored) else stored, **PLACE) as dst:
        dst.write(np.where(hole, stored, height).astype('float32'), 1)  # NaN with nothing in the file that says so, or a declared number
    batch = with_batch(Scene({'height': path}).read())
    assert torch.equal(batch['valid_height'][0, 0], torch.from_numpy(~hole)) and batch['height'].isfinite().all()
    pred = torch.from_numpy(g.uniform(0, 30, (1, 1, 13, 17)).astype('float32')).requires_grad_()
    loss = height_loss(pred, batch['height'], batch['valid_height'])
    loss.backward()
    assert loss.isfinite() and pred.grad.isfinite().all()
    assert (pred.grad[0, 0][torch.from_numpy(hole)] == 0).all() and (loss > 0) == bool((~hole).any())


@pytest.mark.parametrize('weighting', ['fixed', 'uncertainty'])
def test_fault_04_a_patch_without_one_valid_height_trains_the_classes_and_skips_the_height_this_step(tmp_path, weighting):
    hole = write_raster(tmp_path/'height.tif', np.full((16, 16), np.nan, 'float32'), PLACE, nodata=-9999)
    mask = write_raster(tmp_path/'mask.tif', np.random.default_rng(0).integers(0, 3, (16, 16), 'uint8'), PLACE)
    batch = with_batch(Scene({'height': hole, 'mask': mask}).read())
    out = {'mask': torch.randn(1, 3, 16, 16, generator=gen(0)).requires_grad_(), 'height': torch.rand(1, 1, 16, 16, generator=gen(1)).requires_grad_()}
    objective = Objective(('mask', 'height'), weighting=weighting)
    losses = objective(out, batch)
    losses['total'].backward()
    assert losses['height'] == 0 and (out['height'].grad == 0).all()
    assert losses['mask'] > 0 and (out['mask'].grad != 0).any() and losses['total'].isfinite()
    if weighting == 'uncertainty': assert objective.log_variance.grad[1] == 0 and objective.log_variance.grad[0] != 0


def test_fault_01_nan_in_the_height_model_is_counted_by_check(tmp_path):
    for k in range(3):
        height = np.random.default_rng(k).uniform(0, 30, (20, 20)).astype('float32')
        height[:k] = np.nan
        with rasterio.open(tmp_path/f'{k}.tif', 'w', driver='GTiff', height=20, width=20, count=1, dtype='float32', **PLACE) as dst: dst.write(height, 1)
    counts = check_dataset(folder_table({'height': '{place}.tif'}, splits={'train': 'rest'}, val=0), tmp_path).counts['layers']['height']
    assert counts['nan'] == 60 and counts['without_data'] == pytest.approx(60/1200) and counts['bands']['height 1']['min'] >= 0


# 16, 18, 19, 20, 21: classes

@settings(max_examples=60, deadline=None)
@given(classes=st.integers(2, 255), value=st.integers(-40_000, 70_000), count=st.integers(1, 9))
@example(classes=6, value=6, count=1).via('one class too many')
@example(classes=6, value=-1, count=3).via('the minus one of other packages')
def test_fault_16_a_class_that_does_not_exist_is_counted_and_never_clipped_into_the_last_one(classes, value, count):
    mask = torch.zeros(3, 5, dtype=torch.int64)
    mask.view(-1)[:count] = value
    logits = torch.zeros(1, classes, 3, 5)
    if 0 <= value < classes or value == IGNORE:
        assert torch.equal(check_labels(mask, classes), mask) and cross_entropy(logits, mask[None]).isfinite()
        return
    for what in (lambda: check_labels(mask, classes, 'tile_7'), lambda: cross_entropy(logits, mask[None]), lambda: dice(logits, mask[None]),
                 lambda: Scores(['mask'], [str(i) for i in range(classes)]).update({'mask': logits}, {'mask': mask[None]})):
        with pytest.raises(LabelError, match=rf'{value} \({count} pixels\)') as e: what()
        assert f'0 to {classes - 1}' in str(e.value)


def seventh_class(i, s):
    if i == 5: s['mask'][:2, :3] = 7
    return s

@pytest.mark.parametrize('workers', [0, 2])
def test_fault_16_the_loader_finds_it_with_the_item_before_a_gpu_sees_the_batch(workers):
    with open_loader(Squares(8, spoil=seventh_class), [[0, 1], [4, 5]], workers, classes=2) as loader, pytest.raises(DataError, match=r'item 5 .*7 \(6 pixels\)'):
        list(read(loader))


@pytest.mark.parametrize('loss', [cross_entropy, dice, mask_loss])
def test_fault_18_a_label_that_is_all_ignore_costs_nothing_and_scores_nothing(tmp_path, loss):
    path = write_raster(tmp_path/'mask.tif', np.full((9, 9), IGNORE, 'uint8'), PLACE, nodata=IGNORE)
    batch = with_batch(Scene({'mask': path}).read())
    assert not batch['valid_mask'].any()
    logits = torch.randn(1, 3, 9, 9, generator=gen(0)).requires_grad_()
    value = loss(logits, batch['mask'], batch['valid_mask'])
    value.backward()
    assert value == 0 and (logits.grad == 0).all()
    scores = Scores(['mask'], NAMES)
    scores.update({'mask': logits}, batch)
    assert scores.compute()['values']['pixels'] == 0  # counted: nothing was scored
    other = {'mask': torch.zeros(1, 9, 9, dtype=torch.int64)}
    scores.update({'mask': nn.functional.one_hot(other['mask'], 3).movedim(-1, 1).float()}, other)
    assert scores.compute()['values']['miou'] == 1  # and what was all ignore did not lower it


def test_fault_19_a_class_that_never_occurs_is_nan_and_the_mean_is_over_the_others_and_says_so():
    truth = torch.tensor([[[0, 0, 1, 1]]])
    pred = nn.functional.one_hot(torch.tensor([[[0, 1, 1, 1]]]), 3).movedim(-1, 1).float()
    scores = Scores(['mask'], NAMES)
    scores.update({'mask': pred}, {'mask': truth})
    found = scores.compute()
    assert np.isnan(found['values']['iou']['tree']) and found['values']['miou'] == pytest.approx((1/2 + 2/3)/2)
    assert 'over the classes that occur' in found['protocol']['mask']


def test_fault_19_a_split_without_a_class_is_a_warning_of_check(tmp_path):
    for k in range(4): write_raster(tmp_path/f'{k}.tif', np.random.default_rng(k).integers(0, 2 if k == 3 else 3, (20, 20), 'uint8'), {})
    table = folder_table({'mask': '{place}.tif'}, NAMES, splits={'train': ['0', '1'], 'val': ['2'], 'test': ['3']})
    (found,) = check_dataset(table, tmp_path).findings
    assert found.level == 'warning' and "the class 'tree' does not occur in test" in found.what and 'nan' in found.todo


@pytest.mark.parametrize('classes', [256, 300, 1000])
def test_fault_20_ignore_cannot_be_one_of_the_classes_and_construction_says_so(classes):
    with pytest.raises(ConfigError, match='255 means ignore'): create_model('plain', classes=classes, encoder='resnet10t')
    with pytest.raises(ConfigError, match='255 means ignore'): Scores(['mask'], [str(i) for i in range(classes)])
    assert create_model('plain', classes=255, encoder='resnet10t', width=8, tasks=('mask',)).config['classes'] == 255


@pytest.mark.filterwarnings('ignore:The ``compute`` method')
@pytest.mark.parametrize('shown', ['never called', 'all invalid'])
def test_fault_21_a_score_over_no_pixel_is_nan_and_neither_0_nor_1(shown):
    scores = Scores(['mask', 'height', 'clear', 'cloud_impact'], NAMES)
    x = torch.zeros(1, 1, 4, 4)
    if shown == 'all invalid':
        scores.update({'mask': torch.zeros(1, 3, 4, 4), 'height': x, 'clear': x, 'cloud_impact': x},
                      {'mask': torch.full((1, 4, 4), IGNORE), **dict.fromkeys(('height', 'clear', 'cloud_impact'), x), **{f'valid_{k}': x.bool() for k in ('height', 'clear', 'cloud_impact')}})
    values = scores.compute()['values']
    numbers = {k: v for k, v in values.items() if isinstance(v, float)}
    assert {'miou', 'mf1', 'oa', 'height_mae', 'height_rmse', 'height_delta1', 'clear_psnr', 'clear_mae', 'cloud_impact_mae'} <= set(numbers)
    assert all(np.isnan(v) for v in numbers.values()), numbers
    assert all(np.isnan(v) for k in ('iou', 'f1') for v in values[k].values())
    assert plain(values)['miou'] is None  # JSON has no word for it, and 0 would be one


# 27, 28: sizes

@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 40), w=st.integers(1, 40), size=st.integers(1, 64), seed=st.integers(0, 99))
@example(h=1, w=1, size=64, seed=0).via('a single pixel, mirrored sixty-three times')
def test_fault_27_an_image_smaller_than_the_patch_is_mirrored_and_the_padding_is_not_valid(tmp_path_factory, h, w, size, seed):
    g, tmp = np.random.default_rng(seed), tmp_path_factory.mktemp('small')
    image, mask = g.random((2, h, w), 'float32'), g.integers(0, 3, (h, w), 'uint8')
    scene = Scene({'image': write_raster(tmp/'image.tif', image, PLACE), 'mask': write_raster(tmp/'mask.tif', mask, PLACE)})
    if size > min(h, w):
        with pytest.raises(DataError, match='edge='): scene.read(0, 0, size, size)  # never smaller than asked, in silence
    batch = with_batch(scene.read(0, 0, size, size, edge='reflect'))
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[:h, :w] = True
    assert batch['image'].shape == (1, 2, size, size) and batch['mask'].shape == (1, size, size)
    assert torch.equal(batch['valid_image'][0, 0], inside) and torch.equal(batch['valid_mask'][0, 0], inside) and (batch['mask'][0][~inside] == IGNORE).all()
    assert np.array_equal(batch['image'][0].numpy(), np.pad(image, ((0, 0), (0, max(0, size - h)), (0, max(0, size - w))), 'reflect')[:, :size, :size])
    logits = torch.randn(1, 3, size, size, generator=gen(seed)).requires_grad_()
    loss = mask_loss(logits, batch['mask'], batch['valid_mask'])
    loss.backward()
    alone = mask_loss(logits[..., :min(h, size), :min(w, size)], torch.from_numpy(mask[:size, :size].astype('int64'))[None])
    assert torch.allclose(loss, alone, atol=1e-5) and (logits.grad[0][:, ~inside] == 0).all()  # the padding teaches nothing
    assert Copy(bands=2, tasks=('clear',))(batch)['clear'].shape == (1, 2, size, size)


def test_fault_28_every_side_from_1_to_300_comes_back_at_its_size_and_with_its_pixels():
    net, g = Copy(bands=2, tasks=('clear',)), gen(0)
    x = torch.rand(1, 2, 300, 300, generator=g)
    for n in range(1, 301):
        for h, w in ((n, 301 - n), (n, n % 7 + 1)):
            assert torch.equal(net({'image': x[..., :h, :w]})['clear'], x[..., :h, :w]), (h, w)
            assert [s % 32 for s in pad_to(x[..., :h, :w], 32).shape[-2:]] == [0, 0]


@settings(max_examples=25, deadline=None)
@given(h=st.integers(1, 300), w=st.integers(1, 300))
@example(h=1, w=1)
@example(h=299, w=31)
def test_fault_28_a_real_net_answers_every_odd_size(h, w):
    with torch.no_grad(): out = small_net()({'image': torch.rand(1, 3, h, w, generator=gen(h))})
    assert out['mask'].shape == (1, 3, h, w) and out['height'].shape == (1, 1, h, w) and all(m.isfinite().all() for m in out.values())

@functools.cache
def small_net():
    "Built once, since building takes longer than asking."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model('plain', bands=3, classes=3, encoder='mobilenetv3_small_050', width=8, detail=4, full=8).eval()


# 29: what a batch norm cannot do

@pytest.mark.parametrize('size', [1, 20, 32])
def test_fault_29_one_item_under_batch_norm_is_an_error_with_the_advice(size):
    class Deep(Copy):
        def __init__(self): super().__init__(bands=2, tasks=('clear',)); self.norm = nn.BatchNorm2d(2)
        def maps(self, streams): return {'clear': self.norm(nn.functional.adaptive_avg_pool2d(streams['image'], 1)).expand_as(streams['image'])}
    x = torch.rand(2, 2, size, size)
    for net in (Deep(), create_model('plain', bands=2, classes=3, encoder='resnet10t', width=8)):
        with pytest.raises(ConfigError) as e: net.train()({'image': x[:1]})
        assert 'batch_size >= 2' in e.value.todo and 'Expected more than 1 value' not in str(e.value)
        net({'image': x})
        net.eval()({'image': x[:1]})

@pytest.mark.parametrize('empty', [(0, 1, 8, 8), (2, 0, 8, 8), (2, 1, 0, 8)])
def test_fault_29_an_empty_modality_is_an_error_that_names_it(empty):
    net = create_model('plain', bands=2, sar_bands=1, classes=3, tasks=('mask',), encoder='resnet10t', width=8)
    with pytest.raises(DataError, match='sar'): net({'image': torch.rand(2, 2, 8, 8), 'sar': torch.rand(*empty)})
    with pytest.raises(DataError, match="no 'sar'"): net({'image': torch.rand(2, 2, 8, 8)})


# and all of them together

ELSEWHERE = {  # training and checkpoints were tested by what they promise before the list had its numbers: file and a word of the test's name
    30: ('fit', 'a_nan_loss_names_step_task_rate_and_items'), 31: ('fit', 'a_nan_in_one_task_can_be_left_out_on_purpose'), 32: ('losses', 'a_task_whose_loss_stays_zero_gets_no_infinite_weight'),
    34: ('fit', 'sets_smaller_than_a_batch'), 35: ('fit', 'kill_9_at_random_moments'), 36: ('fit', 'a_disk_that_fills_up'), 37: ('fit', 'two_processes_with_the_same_folder'),
    38: ('fit', 'resume_with_other_settings_lists_them'), 39: ('fit', 'a_signal_finishes_the_step'), 40: ('fit', 'a_worker_that_is_killed'), 41: ('checkpoint', 'a_pickle_with_a_payload'),
    42: ('checkpoint', 'other_shapes_are_named_and_never_dropped')}

@functools.cache
def names_of_tests():
    "File -> names of its tests."
    return {path.stem.removeprefix('test_'): [n.name for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(n, ast.FunctionDef) and n.name.startswith('test_')]
            for path in sorted(HERE.glob('test_*.py'))}

@pytest.mark.parametrize('number', [*range(1, 30), *range(43, 47)])
def test_every_fault_of_data_scenes_and_notebooks_has_a_test_named_after_it(number):
    named = [f'{file}::{n}' for file, names in names_of_tests().items() for n in names if re.match(rf'test_fault_{number:02}_[a-z]', n)]
    assert named, f'no test_fault_{number:02}_… in tests/'

@pytest.mark.parametrize('number', sorted(ELSEWHERE))
def test_every_fault_of_training_has_a_test(number):
    file, word = ELSEWHERE[number]
    assert any(word in n for n in names_of_tests()[file]), f'fault {number}: no test of {word!r} in tests/test_{file}.py'
