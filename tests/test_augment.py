"Augmentation: every layer by one geometry, heights that scale, radar that stays radar, and the same draw in every process."
import math
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rs_mtl.core import IGNORE, LAYERS, BandError, ConfigError, DataError, valid_key
from rs_mtl.data.augment import (AUGMENTS, TURNS, Augment, Augmented, Geometry, blurred, cutmix, day, draw_geometry, draw_mix, known, relit, speckle, strong, then, turn, turned,
                                 undo, weak, zoomed)
from rs_mtl.data.datasets import Kept
from rs_mtl.worlds.city import City
from rs_mtl.worlds.light import direct_light


def numbered(h: int, w: int, ratio: tuple[int, int] | None = None, extra: bool = True) -> dict:
    "A sample whose every layer tells the number of its pixel, and whose every validity is a pattern of that number."
    def ids(p: int = 1, q: int = 1) -> torch.Tensor: return torch.arange(h*p//q*(w*p//q)).view(h*p//q, w*p//q)
    n = ids()
    sample = {'image': torch.stack([n, n + .5, n + .25]).float(), 'sar': torch.stack([-n - 1., -n - 2.]), 'height': n[None]/4., 'clear': torch.stack([n, n, n]).float(), 'cloud_impact': n[None]/(h*w)}
    sample |= {valid_key(k): (n % (3 + i) != 0)[None] for i, k in enumerate(sample)}
    m = ids(*ratio) if ratio else n
    sample |= {'mask': m % 200, 'valid_mask': (m % 7 != 0)[None]}
    return sample | ({'item': 5, 'place': 'a', 'sun': torch.tensor([150., 40.])} if extra else {})


def check_aligned(out: dict) -> None:
    "Every layer shows the same pixels at the same places."
    n = out['image'][0].long()
    assert torch.equal(out['image'][1], n + .5) and torch.equal(out['sar'][1], -n - 2.) and torch.equal(out['clear'][2].long(), n) and torch.equal(out['height'][0], n/4.)
    for i, k in enumerate(('image', 'sar', 'height', 'clear', 'cloud_impact')): assert torch.equal(out[valid_key(k)][0], n % (3 + i) != 0), k
    if out['mask'].shape == n.shape: assert torch.equal(out['mask'], n % 200) and torch.equal(out['valid_mask'][0], n % 7 != 0)


# -- turns --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('a', range(8))
def test_each_of_the_eight_turns_moves_every_layer_alike_and_can_be_undone(a):
    sample = numbered(6, 6)
    geometry = Geometry((6, 6), (0, 0, 6, 6), (6, 6), a)
    out = geometry(sample)
    check_aligned(out)
    assert torch.equal(out['image'].flatten(1).sort().values, sample['image'].flatten(1))  # nothing is lost or made
    back = replace(geometry, element=undo(a))(out)
    for k, v in sample.items():
        assert torch.equal(back[k], v) if isinstance(v, torch.Tensor) else back[k] == v
    for b in range(8):
        assert torch.equal(replace(geometry, element=b)(out)['height'], replace(geometry, element=then(a, b))(sample)['height']), (a, b)


def test_the_eight_turns_are_eight_and_each_is_what_its_number_says():
    x = torch.tensor([[1, 2], [3, 4]])
    seen = {tuple(turn(x, k).flatten().tolist()) for k in range(8)}
    assert len(seen) == 8
    assert turn(x, 1).tolist() == [[2, 4], [1, 3]] and turn(x, 4).tolist() == [[2, 1], [4, 3]] and turn(x, 2).tolist() == [[4, 3], [2, 1]]


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 40), w=st.integers(1, 40), seed=st.integers(0, 2**40), turns=st.sampled_from(sorted(TURNS)))
def test_samples_of_any_shape_keep_it_and_their_layers_stay_aligned(h, w, seed, turns):
    out = Augment(turns)(numbered(h, w), seed)
    assert out['image'].shape == (3, h, w) and out['mask'].shape == (h, w) and out['place'] == 'a' and out['sun'].tolist() == [150., 40.]
    check_aligned(out)


def test_all_allowed_turns_are_drawn_about_equally_often():
    for turns, shape, expected in (('d4', (8, 8), set(range(8))), ('d4', (8, 9), {0, 2, 4, 6}), ('mirror', (8, 8), {0, 4}), ('none', (8, 8), {0})):
        drawn = [Augment(turns).geometry({'image': torch.zeros(1, *shape)}, (0, 0, i)).element for i in range(800)]
        assert set(drawn) == expected
        assert max(drawn.count(k) for k in expected) < 1.5*800/len(expected)


@pytest.mark.parametrize('element', range(8))
@pytest.mark.parametrize('azimuth', [20., 140., 250.])
def test_a_turned_picture_is_the_picture_of_a_turned_sun(element, azimuth):
    height = np.zeros((48, 48), np.float32)
    height[15:30, 20:26] = 9
    lit = turn(torch.from_numpy(direct_light(height, azimuth, 42.)), element)
    again = torch.from_numpy(direct_light(turn(torch.from_numpy(height), element).contiguous().numpy(), turned(azimuth, element), 42.))
    wrong = torch.from_numpy(direct_light(turn(torch.from_numpy(height), element).contiguous().numpy(), turned(azimuth, element) + 90, 42.))
    assert (lit - again).abs().mean() < .012 < .04 < (lit - wrong).abs().mean()


# -- layers of other pixels -----------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 6), w=st.integers(1, 6), ratio=st.sampled_from([(3, 10), (1, 2), (2, 5), (1, 10)]), seed=st.integers(0, 999), data=st.data())
def test_a_coarser_label_stays_on_its_ground(h, w, ratio, seed, data):
    p, q = ratio
    sample = numbered(h*q, w*q, ratio)
    size = (data.draw(st.integers(1, h))*q, data.draw(st.integers(1, w))*q)
    out = Augment(size=size)(sample, seed)
    assert out['image'].shape[1:] == size and out['mask'].shape == (size[0]*p//q, size[1]*p//q)
    check_aligned(out)
    fine = out['image'][0].long()
    row, col = fine//(w*q)*p//q, fine % (w*q)*p//q                                         # the coarse pixel that each fine one lies in (by its first corner)
    number = row*(w*q*p//q) + col
    corner = out['mask'].repeat_interleave(q, 0).repeat_interleave(q, 1)[::p, ::p]         # the coarse map on the fine grid, by corners
    if p == 1: assert torch.equal(corner, number % 200)
    else:  # several coarse pixels share a block of the step: compare the blocks
        blocks = lambda x, k: x.unfold(0, k, k).unfold(1, k, k).flatten(2)
        coarse_ids = torch.arange(h*p*w*p).view(h*p, w*p) % 200
        where = blocks(fine, q).amin(2)
        for (i, j) in np.ndindex(*where.shape):
            r, c = int(where[i, j])//(w*q)//q, int(where[i, j]) % (w*q)//q
            assert blocks(out['mask'], p)[i, j].sort().values.tolist() == coarse_ids[r*p:r*p + p, c*p:c*p + p].flatten().sort().values.tolist()


def test_zoom_off_step_sizes_and_odd_ratios_are_refused_in_words():
    with pytest.raises(ConfigError, match='zoom=None'): Augment(zoom=(1., 1.2))(numbered(20, 20, (3, 10)), 0)
    with pytest.raises(ConfigError, match='multiples of 10'): Augment(size=15)(numbered(20, 20, (3, 10)), 0)
    for shape in ((19, 20), (20, 10), (40, 41)):
        with pytest.raises(DataError, match='beside a layer of'): Augment()({'image': torch.zeros(2, 20, 20), 'height': torch.zeros(1, *shape)}, 0)


@pytest.mark.parametrize(('change', 'words'), [
    ({'dem': torch.zeros(1, 8, 8)}, "'dem' of shape"), ({'valid_dem': torch.zeros(1, 8, 8)}, "'valid_dem'"), ({'image': torch.zeros(2, 3, 8, 8)}, 'one sample, no batch'), ({'mask': torch.zeros(1, 8, 8)}, r'\(rows, columns\) for mask'),
    ({'valid_sar': torch.ones(1, 8, 8, dtype=torch.bool)}, "without 'sar'"), ({'valid_image': torch.ones(1, 8, 7, dtype=torch.bool)}, 'its validity')])
def test_what_cannot_be_turned_with_the_rest_is_refused(change, words):
    with pytest.raises(DataError, match=words): Augment()({'image': torch.zeros(2, 8, 8)} | change, 0)


def test_any_subset_of_layers_goes_through():
    sample = numbered(10, 10, extra=False)
    for name in LAYERS:
        out = Augment(strength=1., zoom=(1., 1.3))({k: sample[k]/100 if k in ('image', 'clear') else sample[k] for k in (name, valid_key(name))}, 3)
        assert out[name].shape == sample[name].shape and out[name].dtype == sample[name].dtype and out[valid_key(name)].dtype == torch.bool
        assert Augment(strength=1.)({name: sample[name].clamp(0, 1)}, 3)[name].shape == sample[name].shape     # without validity
    with pytest.raises(DataError, match='without layers'): Augment()({'item': 3}, 0)


# -- zoom -----------------------------------------------------------------------------------------------------------------------

@settings(max_examples=80, deadline=None)
@given(n=st.integers(4, 40), m=st.integers(4, 60), seed=st.integers(0, 10**6), share=st.floats(0, .4))
def test_fault_03_no_height_is_made_of_data_and_hole_and_heights_grow_with_the_zoom(n, m, seed, share):
    g = torch.Generator().manual_seed(seed)
    valid = torch.rand(1, n, n, generator=g) >= share
    sample = {'height': torch.where(valid, 20., -9999.), 'valid_height': valid, 'image': torch.where(valid, .3, 0.).repeat(2, 1, 1), 'valid_image': valid, 'sar': torch.where(valid, -12., 0.), 'valid_sar': valid}
    out = zoomed(sample, (m, m))
    ok = out['valid_height']
    assert torch.allclose(out['height'][ok], torch.tensor(20*m/n), rtol=1e-4) and (n == m or not out['height'][~ok].any())
    assert torch.allclose(out['image'][:, ok[0]], torch.tensor(.3), rtol=1e-4) and torch.allclose(out['sar'][ok], torch.tensor(-12.), rtol=1e-4) and not out['sar'][~ok].any()
    centre = (2*torch.arange(m) + 1)*n//(2*m)
    assert not (ok & ~valid[:, centre[:, None], centre]).any()     # what lies in a hole is in the hole still
    if valid.all(): assert ok.all()


def test_fault_03_a_zoomed_hole_is_dilated_by_the_reach_of_the_kernel_and_no_more():
    valid = torch.ones(1, 20, 20, dtype=torch.bool)
    valid[0, 10, 10] = False
    for m, most in ((40, 4), (20, 1), (10, 3)):  # pixels across that may touch one source pixel
        holes = (~zoomed({'height': torch.ones(1, 20, 20), 'valid_height': valid}, (m, m))['valid_height'][0]).nonzero()
        assert 1 <= len(holes) <= most**2


def test_zoomed_labels_are_labels_and_lie_under_their_pixels():
    mask = torch.randint(0, 6, (16, 16), generator=torch.Generator().manual_seed(0))
    mask[3] = IGNORE
    for m in (9, 16, 24, 32, 47):
        out = zoomed({'mask': mask}, (m, m))['mask']
        assert set(out.flatten().tolist()) <= set(mask.flatten().tolist())
        centre = (2*np.arange(m) + 1)*16//(2*m)
        assert torch.equal(out, mask[centre[:, None], centre])


@pytest.mark.parametrize('size', [80, 160, 224])
def test_a_zoomed_world_casts_the_shadows_of_its_zoomed_heights_and_not_of_its_old_ones(size):
    town = City(1, 128, seed=5, holes=False)[0]
    lit = torch.from_numpy(direct_light(town['height'][0].numpy(), 150., 35.))[None]
    out = zoomed({'height': town['height'], 'image': lit}, (size, size))
    cast = lambda h: torch.from_numpy(direct_light(h[0].numpy(), 150., 35.))[None]
    error, unscaled = ((cast(h) - out['image']).abs().mean().item() for h in (out['height'], out['height']*128/size))
    assert error < .08 and error < .75*unscaled


def test_radar_is_averaged_as_power():
    sar = torch.zeros(1, 8, 8)
    sar[..., ::2] = -30.
    assert zoomed({'sar': sar}, (4, 4))['sar'][0, 1, 1:3].mean().item() == pytest.approx(10*math.log10(.5), abs=.4)  # the mean in dB would be -15


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(16, 48))
def test_a_drawn_zoom_lies_in_its_range_and_scales_the_heights_by_itself(seed, size):
    sample = {'height': torch.full((1, 64, 64), 10.), 'mask': torch.arange(4096).view(64, 64)}
    augment = Augment(size=size, zoom=(.8, 1.5))
    g = augment.geometry(sample, seed)
    s = size/g.window[2]
    assert .8/1.04 < s < 1.5*1.04 and g.window[2] == g.window[3]
    out = augment(sample, seed)
    assert torch.allclose(out['height'], torch.tensor(10*s)) and out['height'].shape == (1, size, size)
    where = out['mask']
    assert g.window[0] <= where.min()//64 and where.max()//64 < g.window[0] + g.window[2]


def test_a_window_that_the_sample_does_not_hold_is_refused():
    with pytest.raises(ConfigError, match='read larger samples'): Augment(zoom=(.5, .6))(numbered(20, 20), 0)
    with pytest.raises(ConfigError, match='30 x 30 pixels in a sample of 20 x 20'): Augment(size=30)(numbered(20, 20), 0)


# -- photometry -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def town(): return City(6, 96, seed=1, cover=.3)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**9), strength=st.floats(.05, 2.), drop=st.sampled_from([0., .5]), turns=st.sampled_from(sorted(TURNS)), size=st.sampled_from([None, 40]), zoom=st.sampled_from([None, (1., 1.4)]), item=st.integers(0, 5))
def test_strong_lies_pixel_by_pixel_on_weak(town, seed, strength, drop, turns, size, zoom, item):
    augment = Augment(turns, size, zoom, strength, drop, town.bands)
    sample = town[item]
    a, b = weak(sample, seed, augment), strong(sample, seed, augment)
    for k in sample:
        if k not in ('image', 'clear', 'sar'): assert torch.equal(a[k], b[k]), k
    assert not torch.equal(a['image'], b['image']) and not torch.equal(a['sar'], b['sar'])
    assert torch.equal(a['image'], augment.geometry(sample, seed)(sample)['image'])   # weak is geometry only
    hole = ~b['valid_image'].expand_as(b['image'])
    assert not b['image'][hole].any() and not b['clear'][hole].any()
    assert b['image'].min() >= 0 and b['image'].max() <= 1 and b['image'].isfinite().all() and b['sar'].isfinite().all()


def test_strong_changes_what_a_net_sees_by_much_and_forests_stay_dark(town):
    sample = town[0]
    changes = [(strong(sample, s)['image'] - weak(sample, s)['image']).abs().mean().item() for s in range(30)]
    assert np.mean(changes) > .1*sample['image'].mean() and np.std(changes) > .01
    for s in range(30):  # what was darker stays darker, by and large: ranks are kept
        a, b = weak(sample, s)['image'][3].flatten(), strong(sample, s)['image'][3].flatten()
        assert torch.corrcoef(torch.stack([a.argsort().argsort().float(), b.argsort().argsort().float()]))[0, 1] > .8


def test_clear_and_image_live_through_the_same_day(town):
    sample = City(1, 96, seed=4, holes=False)[0]           # no cloud: both are the same picture
    for s in range(8):
        out = Augment('none', strength=1.)(sample, s)
        assert abs(out['image'].mean() - out['clear'].mean()) < .002
        for band in range(4):                               # a curve: equal values stay equal, greater ones greater
            order = sample['clear'][band].flatten().argsort()
            assert (out['clear'][band].flatten()[order].diff() >= -1e-6).all()
        assert (out['image'] - out['clear']).abs().max() > 0


def test_no_photometry_touches_labels_or_heights_and_strength_0_touches_nothing(town):
    sample = town[2]
    out = Augment('none', strength=1., drop_band=1.)(sample, 0)
    for k in ('mask', 'height', 'cloud_impact', *(k for k in sample if k.startswith('valid_'))): assert torch.equal(out[k], sample[k])
    assert all(torch.equal(v, sample[k]) for k, v in Augment('none')(sample, 0).items())


def test_a_mirrored_frame_is_lit_like_the_scene_beside_it():
    image = torch.full((3, 40, 40), .2)
    valid = torch.ones(1, 40, 40, dtype=torch.bool)
    valid[..., 30:] = False                                 # filled up by the reader, and not to be believed
    out = replace(Augment('none', strength=1.))({'image': image, 'valid_image': valid}, 1)
    assert abs(out['image'][..., 30:].mean() - out['image'][..., :30].mean()) < .003 and abs(out['image'].mean() - .2) > .005


def test_values_outside_0_to_1_keep_their_own_range_and_nan_is_refused():
    image = torch.linspace(-.05, 1.4, 400).view(1, 20, 20)
    for s in range(20):
        out = Augment('none', strength=2.)({'image': image}, s)['image']
        assert out.min() >= -.05 - 1e-6 and out.max() <= 1.4 + 1e-6
    image[0, 3, 3] = float('nan')
    with pytest.raises(DataError, match='NaN'): Augment(strength=1.)({'image': image}, 0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), sigma=st.floats(.3, 3.), n=st.integers(1, 30))
def test_blur_averages_known_pixels_only(seed, sigma, n):
    g = torch.Generator().manual_seed(seed)
    x, seen = torch.rand(2, n, n, generator=g), torch.rand(1, n, n, generator=g) > .3
    out = blurred(torch.where(seen, x, 1e6), seen, sigma)
    if seen.any(): assert out[:, seen[0]].max() <= x[:, seen[0]].max() + 1e-5 and out[:, seen[0]].min() >= x[:, seen[0]].min() - 1e-5
    full = torch.ones_like(seen)
    r = math.ceil(2.5*sigma)
    w = torch.exp(-.5*(torch.arange(-r, r + 1.)/sigma)**2)
    both = torch.nn.functional.conv2d(torch.cat([x, full.float()])[:, None], (w[:, None]*w)[None, None], padding=r)[:, 0]
    assert torch.allclose(blurred(x, full, sigma), both[:-1]/both[-1:], atol=1e-5)


def test_haze_is_bluest_where_bands_are_named_and_wrong_names_are_refused():
    x, seen = torch.full((4, 8, 8), .1), torch.ones(1, 8, 8, dtype=torch.bool)
    added = [relit(x, day(x, seen, np.random.default_rng(s), 1., ('red', 'green', 'blue', 'nir'))).mean((1, 2)) for s in range(200)]
    red, green, blue, nir = torch.stack(added).mean(0)
    assert blue > green > red > nir
    with pytest.raises(BandError): Augment(strength=1., bands=('red', 'purple', 'blue', 'nir'))({'image': x}, 0)


def test_a_dropped_band_is_flat_and_the_others_are_not(town):
    flat = [(strong(town[0], s, Augment(strength=.5, drop_band=1.))['image'].std((1, 2)) < 1e-6).tolist() for s in range(40)]
    assert all(sum(f) == 1 for f in flat) and {f.index(True) for f in flat} == {0, 1, 2, 3}


# -- radar ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('looks', [1., 4.4, 16.])
def test_speckle_is_additive_in_db_with_the_distribution_of_gamma_power(looks):
    stats = pytest.importorskip('scipy.stats')
    sar = torch.linspace(-25, 0, 2*200*200).view(2, 200, 200)
    noise = (speckle(sar, looks, np.random.default_rng(3)) - sar).double()
    natural = noise*math.log(10)/10 + math.log(looks)                                   # the logarithm of a gamma variable
    assert stats.kstest(natural.flatten()[::4].numpy(), stats.loggamma(looks).cdf).pvalue > .01
    assert (10**(noise/10)).mean().item() == pytest.approx(1, abs=.015)
    level = sar.flatten().double()
    assert abs(torch.corrcoef(torch.stack([level, noise.flatten()]))[0, 1]) < .02       # dark and bright ground alike: additive, not proportional
    halves = [noise.flatten()[level < -12.5].std().item(), noise.flatten()[level >= -12.5].std().item()]
    assert halves[0] == pytest.approx(halves[1], rel=.03)
    assert abs(torch.corrcoef(torch.stack([noise[0].flatten(), noise[1].flatten()]))[0, 1]) < .02


def test_what_augment_does_to_radar_is_speckle_and_an_offset_per_band_and_nothing_else():
    stats = pytest.importorskip('scipy.stats')
    sar = torch.linspace(-25, 0, 2*160*160).view(2, 160, 160)
    for seed in range(6):
        noise = (Augment('none', strength=1.)({'sar': sar}, seed)['sar'] - sar).double()
        offset = (10**(noise/10)).mean((1, 2)).log10()*10
        assert offset.abs().max() < 1.6
        spread = ((noise - offset[:, None, None])*math.log(10)/10).var().item()
        looks = np.linspace(7.5, 66, 1200)[np.abs(_trigamma(np.linspace(7.5, 66, 1200)) - spread).argmin()]
        natural = (noise - offset[:, None, None])*math.log(10)/10 + math.log(looks)
        assert 7.6 < looks < 65.9 and stats.kstest(natural.flatten()[::8].numpy(), stats.loggamma(looks).cdf).pvalue > 1e-3


def _trigamma(x): return torch.polygamma(1, torch.from_numpy(x)).numpy()


def test_the_optical_draws_never_reach_the_radar_nor_the_other_way_round(town):
    sample = town[3]
    for seed in range(6):
        both = Augment(strength=1., drop_band=.5)(sample, seed)
        assert torch.equal(both['sar'], Augment(strength=1.)({k: sample[k] for k in ('sar', 'valid_sar')}, seed)['sar'])
        assert torch.equal(both['image'], Augment(strength=1., drop_band=.5)({k: v for k, v in sample.items() if k not in ('sar', 'valid_sar')}, seed)['image'])
    gains = []
    for seed in range(200):  # over many draws, brighter pictures do not come with brighter radar
        out = Augment('none', strength=1.)({'image': torch.full((1, 8, 8), .3), 'sar': torch.zeros(1, 8, 8)}, seed)
        gains.append([out['image'].mean().item(), out['sar'].mean().item()])
    assert abs(np.corrcoef(np.array(gains).T)[0, 1]) < .2


def test_radar_without_data_stays_without():
    valid = torch.ones(1, 12, 12, dtype=torch.bool)
    valid[0, :4] = False
    out = Augment('none', strength=1.)({'sar': torch.where(valid, -10., 0.).repeat(2, 1, 1), 'valid_sar': valid}, 0)
    assert not out['sar'][:, :4].any() and (out['sar'][:, 4:] != -10).all()
    with pytest.raises(ConfigError, match='looks=0'): speckle(torch.zeros(1, 2, 2), 0, np.random.default_rng(0))


# -- batches --------------------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 7), h=st.integers(1, 4), w=st.integers(1, 4), seed=st.integers(0, 10**6), ratio=st.sampled_from([None, (3, 10)]))
def test_a_pasted_box_brings_all_its_layers_and_leaves_the_rest(n, h, w, seed, ratio):
    samples = [{k: v + 10_000*i if k in ('image', 'clear') else v - 10_000*i if k == 'sar' else v + 2_500*i if k == 'height' else v for k, v in numbered(10*h, 10*w, ratio).items() if k not in ('place', 'sun')} | {'item': i} for i in range(n)]
    batch = torch.utils.data.default_collate(samples)
    before = {k: v.clone() for k, v in batch.items()}
    mix = draw_mix(batch, seed)
    out = mix(batch)
    assert all(torch.equal(batch[k], before[k]) for k in batch) and torch.equal(out['item'], batch['item'])
    assert all(i != p for i, p in enumerate(mix.partner)) and sorted(mix.partner) == list(range(n))
    for i in range(n):
        owner = (out['image'][i, 0].long())//10_000
        r, c, bh, bw = mix.boxes[i]
        box = torch.zeros(10*h, 10*w, dtype=torch.bool)
        box[r:r + bh, c:c + bw] = True
        assert torch.equal(owner, torch.where(box, mix.partner[i], i)) and 0 < bh*bw
        one = {k: v[i] for k, v in out.items() if k != 'item'}
        number = one['image'][0].long() - 10_000*owner
        assert torch.equal(one['sar'][0], -1. - number - 10_000*owner) and torch.equal(one['height'][0], number/4. + 2500*owner)
        for j, k in enumerate(('image', 'sar', 'height', 'clear', 'cloud_impact')): assert torch.equal(one[valid_key(k)][0], number % (3 + j) != 0)
    if ratio: assert all(v % 10 == 0 for b in mix.boxes for v in b)
    logits = torch.rand(n, 5, 10*h, 10*w)
    pseudo = mix({'mask': logits})['mask']
    for i in range(n):
        r, c, bh, bw = mix.boxes[i]
        assert torch.equal(pseudo[i, :, r:r + bh, c:c + bw], logits[mix.partner[i], :, r:r + bh, c:c + bw])


def test_boxes_take_about_the_share_that_was_asked_for():
    batch = {'image': torch.zeros(64, 1, 100, 100)}
    shares = [b[2]*b[3]/1e4 for s in range(5) for b in draw_mix(batch, s, (.1, .5)).boxes]
    assert .09 < min(shares) and max(shares) < .52 and .25 < np.mean(shares) < .35
    for share in ((0., .5), (.5, .2), (.5, 1.5)):
        with pytest.raises(ConfigError, match='share='): draw_mix(batch, 0, share)
    with pytest.raises(ConfigError, match='a batch of 1'): cutmix({'image': torch.zeros(1, 1, 8, 8)}, 0)
    with pytest.raises(DataError, match='the batch that it was drawn for'): draw_mix(batch, 0)({'image': torch.zeros(3, 1, 100, 100)})


# -- data sets ------------------------------------------------------------------------------------------------------------------

class Numbers(torch.utils.data.Dataset):
    "Small, and quick to send to a worker."
    classes, bands, name = ('a', 'b'), ('red', 'green', 'blue'), 'numbers'
    epoch = 0
    def set_epoch(self, epoch): self.epoch = epoch
    def __len__(self): return 12
    def __getitem__(self, i):
        s = numbered(8, 8, extra=False)
        return {k: v/64 if k in ('image', 'clear') else v for k, v in s.items()} | {'item': i}


def everything(data, workers, epochs=(0, 1, 0), **how) -> list[torch.Tensor]:
    loader = DataLoader(data, batch_size=4, num_workers=workers, persistent_workers=workers > 0, **how)
    found = []
    for e in epochs:
        data.set_epoch(e)
        found.append(torch.cat([b['image'] for b in loader]))
    return found


@pytest.mark.parametrize(('workers', 'context'), [(1, 'fork'), (2, 'fork'), (1, 'spawn')])
def test_items_depend_on_seed_epoch_and_number_and_on_no_worker(workers, context):
    data = Augmented(Numbers(), Augment(strength=1.), seed=3)
    here, there = everything(data, 0), everything(data, workers, multiprocessing_context=context)
    for a, b in zip(here, there): assert torch.equal(a, b)
    assert not torch.equal(here[0], here[1]) and torch.equal(here[0], here[2])   # running workers heard of the epoch, twice
    assert not torch.equal(here[0], everything(Augmented(Numbers(), Augment(strength=1.), seed=4), 0)[0])


def test_items_may_be_read_in_any_order_and_from_behind():
    data = Augmented(Numbers(), 'full', seed=0)
    forward = [data[i]['image'] for i in range(12)]
    assert all(torch.equal(data[i]['image'], forward[i]) for i in random.Random(0).sample(range(12), 12)) and torch.equal(data[-1]['image'], forward[11])
    assert not any(torch.equal(forward[0], f) for f in forward[1:])              # the same sample inside, another draw for each number
    with pytest.raises(IndexError): data[12]


def test_epoch_reaches_the_data_set_inside_and_attributes_come_out():
    data = Augmented(Numbers(), 'geometry')
    data.set_epoch(3)
    assert data.dataset.epoch == 3 and data.epoch == 3 and data.classes == ('a', 'b') and len(data) == 12 and data.augment.bands == ('red', 'green', 'blue')
    names = {Augmented(Numbers(), a).treatment for a in ('geometry', 'full', Augment('mirror'), Augment(size=4), Augment(zoom=(1., 1.1)), Augment(drop_band=.1))}
    assert len(names) == 6 and all(n.startswith('augmented') for n in names) and Augmented(Numbers(), 'full').name == 'numbers'   # a run that is resumed with another one shall notice
    copy = pickle.loads(pickle.dumps(data))
    copy.set_epoch(4)
    assert copy._epoch.is_shared() and data.epoch == 3   # workers of the copy hear of its epoch, and of no other
    copy.set_epoch(3)
    assert torch.equal(copy[5]['image'], data[5]['image']) and copy.epoch == 3
    assert not hasattr(data, 'palette') and not hasattr(Augmented.__new__(Augmented), 'dataset')
    for wrong in (lambda: Augmented(Numbers(), 'none'), lambda: Augmented(Numbers(), None), lambda: Augmented(Numbers(), 'fulll'), lambda: Augmented(Numbers(), 'full', seed=-1), lambda: data.set_epoch(-1)):
        with pytest.raises(ConfigError): wrong()


def test_the_kept_sample_inside_is_never_changed_and_the_global_generators_are_not_touched(town):
    kept = Kept(town)
    before = [{k: v.clone() for k, v in kept[i].items()} for i in range(6)]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    data = Augmented(kept, Augment(strength=1., drop_band=.5, zoom=(1., 1.2)), seed=1)
    for e in range(3):
        data.set_epoch(e)
        for i in range(6): data[i]
    cutmix(torch.utils.data.default_collate(before), 0)
    assert all(torch.equal(kept[i][k], v) for i, s in enumerate(before) for k, v in s.items())
    assert torch.equal(states[0], torch.get_rng_state()) and np.array_equal(states[1], np.random.get_state()[1]) and states[2] == random.getstate()


@pytest.mark.parametrize(('field', 'value'), [('turns', 'D4'), ('zoom', (1.2, .8)), ('zoom', (0, 1)), ('zoom', (1., math.inf)), ('strength', -1), ('strength', 3), ('strength', math.nan), ('drop_band', 2), ('size', 0)])
def test_wrong_arguments_are_named(field, value):
    with pytest.raises(ConfigError, match=f'{field}='): Augment(**{field: value})


def test_every_named_augmentation_can_be_used(town):
    for name, augment in AUGMENTS.items():
        if augment is not None: assert Augmented(town, name)[0].keys() == town[0].keys()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_a_gpu_the_same_is_done(town):
    augment = Augment(strength=1., zoom=(1., 1.3), drop_band=.5)
    for i in range(3):
        here, there = augment(town[i], i), augment({k: v.cuda() for k, v in town[i].items()}, i)
        for k, v in here.items():
            assert there[k].is_cuda and there[k].dtype == v.dtype
            assert (there[k].cpu() == v).float().mean() > .999 if v.dtype in (torch.bool, torch.int64) else torch.allclose(there[k].cpu(), v, atol=2e-3), k


def test_known_is_what_is_valid_or_filled():
    x, valid = torch.tensor([[[0., .5, .5, 0.]]]), torch.tensor([[[True, True, False, False]]])
    assert known({'image': x, 'valid_image': valid}, 'image').flatten().tolist() == [True, True, True, False]
    assert known({'height': x, 'valid_height': valid}, 'height').flatten().tolist() == [True, True, False, False]
    assert draw_geometry(np.random.default_rng(0), (4, 4), turns='none') == Geometry((4, 4), (0, 0, 4, 4), (4, 4), 0)
