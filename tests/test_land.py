"""The country at ten metres: one world, the contract of samples, and confusions that need two sensors."""
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rs_mtl.core import IGNORE, ConfigError
from rs_mtl.worlds.land import CLASSES, PALETTE, WATER, Land, _links, speckle
from rs_mtl.worlds.noise import fractal, points

PRIOR = np.array([.3464, .0470, .0585, .1428, .3785, .0096, .0172])  # published for WHU-OPT-SAR


def equal(a, b):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), origin=st.tuples(*[st.integers(-10**6, 10**6)] * 2), cut=st.tuples(*[st.integers(0, 60)] * 2), size=st.tuples(*[st.integers(1, 40)] * 2))
def test_a_window_is_part_of_the_country(seed, origin, cut, size):
    ds = Land(1, seed=seed, unlabelled=.1)
    whole = ds.window(origin, 100, cover=.4)
    part = ds.window((origin[0] + cut[0], origin[1] + cut[1]), size, cover=.4)
    for k in whole:
        inside = whole[k][..., cut[0]:cut[0] + size[0], cut[1]:cut[1] + size[1]]
        if k in ('mask', 'valid_mask'): assert torch.equal(part[k], inside), k
        else: torch.testing.assert_close(part[k], inside, atol=1e-4, rtol=0)


def test_a_sample_keeps_the_contract():
    ds = Land(3, size=(70, 90), seed=5, cover=.6, unlabelled=.3)
    s = ds[0]
    shapes = {'image': (4, 70, 90), 'sar': (2, 70, 90), 'mask': (70, 90), 'clear': (4, 70, 90), 'cloud_impact': (1, 70, 90)}
    assert {k: tuple(v.shape) for k, v in s.items() if not k.startswith('valid_')} == shapes
    for k in shapes:
        assert s[k].dtype == (torch.int64 if k == 'mask' else torch.float32) and torch.isfinite(s[k]).all()
        assert s[f'valid_{k}'].shape == (1, 70, 90) and s[f'valid_{k}'].dtype == torch.bool
    assert set(s['mask'].unique().tolist()) <= {*range(7), IGNORE}
    assert torch.equal(s['valid_mask'][0], s['mask'] != IGNORE) and s['valid_image'].all()
    assert 0 <= s['clear'].min() and s['clear'].max() <= 1 and -31 < s['sar'].min() and s['sar'].max() < 25
    assert len(ds) == 3 and len(ds.classes) == len(ds.palette) == 7 and ds.bands == ('blue', 'green', 'red', 'nir') and ds.sar_bands == ('VV', 'VH')
    assert ds.gsd == 10. and ds.name == 'land' and CLASSES[5] == 'road' and PALETTE[5] == (0, 255, 255)


def test_a_sample_is_the_same_each_time_and_unlike_the_others():
    ds = Land(4, 64, seed=9, cover=(.2, .8), sky=('broken', 'thin'))
    equal(ds[1], ds[1]); equal(ds[1], Land(4, 64, seed=9, cover=(.2, .8), sky=('broken', 'thin'))[1]); equal(ds[-1], ds[3])
    equal(ds[2], pickle.loads(pickle.dumps(ds))[2])
    assert not torch.equal(ds[0]['sar'], ds[1]['sar']) and not torch.equal(ds[0]['sar'], Land(4, 64, seed=10)[0]['sar'])
    for i in (4, -5):
        with pytest.raises(IndexError): ds[i]


def test_workers_give_the_samples_of_the_main_process():
    ds = Land(6, 48, seed=2, cover=.4)
    alone, shared = (list(DataLoader(ds, 2, num_workers=n)) for n in (0, 2))
    for a, b in zip(alone, shared, strict=True): equal(a, b)
    assert alone[0]['image'].shape == (2, 4, 48, 48) and alone[0]['mask'].shape == (2, 48, 48)


def test_clouds_change_the_image_only():
    clear, cloudy = (Land(2, 96, seed=3, cover=c)[0] for c in (0., .7))
    for k in ('sar', 'mask', 'clear'): assert torch.equal(clear[k], cloudy[k])
    assert torch.equal(clear['image'], clear['clear']) and (clear['cloud_impact'] == 0).all()
    untouched = cloudy['cloud_impact'][0] == 0
    assert torch.equal(cloudy['image'][:, untouched], cloudy['clear'][:, untouched]) and (cloudy['cloud_impact'] > .5).any()


@pytest.fixture(scope='module')
def many():
    "Pixels of 120 small samples: features (N,6), classes (N,), and the share of classes per sample."
    samples = [Land(120, 96, seed=21)[i] for i in range(120)]
    return torch.stack([torch.cat([s['image'], s['sar']]) for s in samples]).numpy(), torch.stack([s['mask'] for s in samples]).numpy()


def test_classes_are_as_unequal_as_in_the_real_data(many):
    share = np.stack([np.bincount(m.ravel(), minlength=7) / m.size for m in many[1]])
    assert (np.abs(np.log(share.mean(0) / PRIOR)) < np.log(2.2)).all(), share.mean(0)
    assert share[:, 0].std() > .15 and share[:, 4].std() > .15  # and no two samples alike


def patches(x, y, channels, radius, n, seed):
    "Random training pixels with everything around them that a small window shows."
    rng = np.random.default_rng(seed)
    h = x.shape[-1]
    i, r, c = rng.integers(len(x), size=n), rng.integers(radius, h - radius, n), rng.integers(radius, h - radius, n)
    steps = range(-radius, radius + 1)
    return np.concatenate([x[i, :, r + a, c + b][:, channels] for a in steps for b in steps], 1), y[i, r, c]


def accuracy(x, y, channels, radius):
    "Balanced accuracy of boosted trees on unseen samples."
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import balanced_accuracy_score
    model = HistGradientBoostingClassifier(max_iter=15, max_leaf_nodes=15, class_weight='balanced', random_state=0)
    model.fit(*patches(x[:80], y[:80], channels, radius, 9000, 0))
    f, t = patches(x[80:], y[80:], channels, radius, 9000, 1)
    return balanced_accuracy_score(t, model.predict(f))


def test_two_sensors_beat_each_alone_and_surroundings_beat_the_pixel(many):
    both, optical, radar = (accuracy(*many, channels, 1) for channels in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3], [4, 5]))
    assert both > optical + .03 and both > radar + .03, (both, optical, radar)
    assert both > accuracy(*many, [0, 1, 2, 3, 4, 5], 0) + .03


def test_what_the_sensors_see_lies_where_the_map_says():
    ds = Land(1, seed=1)
    s = ds.window((300, 5000), 400)
    for layer in (s['clear'][3], s['sar'][0]):  # water is dark in both
        dark = -(layer - layer.mean()) / layer.std()
        match = {(a, b): float(dark[8:-8, 8:-8][(s['mask'] == WATER)[8 + a:392 + a, 8 + b:392 + b]].mean()) for a in range(-2, 3) for b in range(-2, 3)}
        assert max(match, key=match.get) == (0, 0)


@pytest.mark.parametrize('seed', range(4))
def test_no_link_is_cut_off_by_its_box(seed):
    r, c = points(200, (-300, 10**6))
    r, c = r + np.clip(5 * fractal(200, (-300, 10**6), 36, 2, seed=1), -12, 12), c + np.clip(5 * fractal(200, (-300, 10**6), 36, 2, seed=2), -12, 12)
    near, whole = (_links(r, c, (-300, 10**6), 60, .5, bend, seed) for bend in (12, 300))
    np.testing.assert_array_equal(near[whole < 3], whole[whole < 3])
    assert (whole < 1).mean() > .005


def test_speckle_has_mean_one_and_the_variance_of_its_looks():
    for looks in (1, 3, 8):
        f = speckle((700, 700), (5, -9), looks, seed=looks)
        assert abs(f.mean() - 1) < .01 and abs(f.var() - 1 / looks) < .03 / looks + .005 and f.min() > 0


@pytest.mark.parametrize('gsd', [5., 20.])
def test_another_pixel_size_scales_the_country(gsd):
    fine, coarse = Land(30, 64, seed=1), Land(30, 64, seed=1, gsd=gsd)
    fine, coarse = (np.mean([(np.diff(ds[i]['mask'].numpy(), axis=0) != 0).mean() for i in range(30)]) for ds in (fine, coarse))
    assert (coarse > fine) == (gsd > 10)


@pytest.mark.parametrize('wrong', [dict(n=-1), dict(size=0), dict(size=(4, 0)), dict(gsd=.2), dict(cover=1.2), dict(cover=(.8, .2)), dict(sky='rain'),
                                   dict(sky=()), dict(looks=0), dict(noise=-1.), dict(unlabelled=1.)])
def test_impossible_countries_are_refused(wrong):
    with pytest.raises(ConfigError): Land(**({'n': 2} | wrong))


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    Land(1, 32, cover=.5)[0]
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
