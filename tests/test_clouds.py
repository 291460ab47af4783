"""Clouds keep books: what is returned explains the image, windows agree, and the cover keeps its word."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_mtl.core import BandError, ConfigError, DataError
from rs_mtl.worlds.clouds import SENSORS, SKIES, Layer, band_optics, simulate_clouds, towards_sun

quick = settings(max_examples=25, deadline=None)
skies = st.sampled_from([s for s in SKIES if s != 'clear'])
seeds = st.integers(0, 2**40)


def ground(bands=4, size=(40, 56), seed=0):
    return np.random.default_rng(seed).uniform(0, .5, (bands, *size)).astype(np.float32)


@quick
@given(sky=skies, seed=seeds, cover=st.floats(0, 1), bands=st.sampled_from(sorted(SENSORS)), noise=st.sampled_from([0., .01]),
       sun=st.tuples(st.floats(0, 360), st.floats(10, 90)), shadow=st.floats(0, 1))
def test_the_returned_parts_explain_the_image_exactly(sky, seed, cover, bands, noise, sun, shadow):
    x = ground(bands).astype(np.float64)
    o = simulate_clouds(x, seed, cover, sky, noise=noise, sun=sun, shadow=shadow)
    y = o['transmittance'] * o['light'] * x + (1 - o['transmittance']) * o['end_member'] + o['noise']
    np.testing.assert_allclose(o['image'], y, atol=1e-12)
    np.testing.assert_allclose(o['shadow'], o['light'].mean(0, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(o['cloud_impact'], 1 - o['shadow'] * o['transmittance'].mean(0, keepdims=True), atol=1e-6)
    for k in ('transmittance', 'light', 'cloud_impact'): assert o[k].min() >= 0 and o[k].max() <= 1
    assert o['cloud_impact'].shape == o['shadow'].shape == (1, *x.shape[1:]) and o['transmittance'].shape == x.shape


@quick
@given(sky=st.sampled_from(sorted(SKIES)), seed=seeds, bands=st.sampled_from(sorted(SENSORS)))
def test_no_cover_leaves_the_image_untouched(sky, seed, bands):
    x = ground(bands)
    o = simulate_clouds(x, seed, 0., sky)
    np.testing.assert_array_equal(o['image'], x)
    assert (o['cloud_impact'] == 0).all() and (o['transmittance'] == 1).all() and (o['shadow'] == 1).all()


@quick
@given(sky=skies, seed=seeds, covers=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_more_cover_never_clears_a_place(sky, seed, covers):
    less, more = (simulate_clouds(ground(), seed, c, sky) for c in sorted(covers))
    assert (more['transmittance'] <= less['transmittance'] + 1e-6).all()
    assert (more['cloud_impact'] >= less['cloud_impact'] - 1e-6).all()


@pytest.mark.parametrize('sky', ['thin', 'thick', 'broken', 'haze', 'mixed'])
def test_full_cover_leaves_no_gap(sky):
    o = simulate_clouds(ground(size=(200, 200)), 3, 1., sky)
    assert (o['transmittance'] < 1).all() and (o['cloud_impact'] > 0).mean() == 1
    if sky in ('thick', 'broken', 'mixed'): assert o['cloud_impact'].mean() > .8


@quick
@given(sky=skies, seed=seeds, origin=st.tuples(*[st.integers(-10**6, 10**6)] * 2), cut=st.tuples(*[st.integers(0, 20)] * 2), cover=st.floats(.05, .95))
def test_two_windows_of_one_scene_get_the_same_cloud(sky, seed, origin, cut, cover):
    x = np.full((4, 48, 48), .2, np.float32)
    whole = simulate_clouds(x, seed, cover, sky, origin=origin, noise=.01)
    part = simulate_clouds(x[:, :25, :28], seed, cover, sky, origin=(origin[0] + cut[0], origin[1] + cut[1]), noise=.01)
    for k in ('image', 'cloud_impact', 'transmittance', 'shadow', 'end_member'):
        np.testing.assert_allclose(part[k], whole[k][..., cut[0]:cut[0] + 25, cut[1]:cut[1] + 28], atol=2e-5)


@pytest.mark.parametrize('sky', ['thin', 'thick', 'broken', 'haze', 'mixed'])
@pytest.mark.parametrize('cover', [.1, .5, .9])
def test_a_large_scene_has_the_asked_cover(sky, cover):
    x = np.zeros((1, 1024, 1024), np.float32)
    got = np.mean([(simulate_clouds(x, s, cover, sky, shadow=0)['transmittance'] < 1).mean() for s in range(4)])
    assert abs(got - cover) < .08


def test_the_level_does_not_come_from_the_tile():
    x = np.zeros((1, 96, 96), np.float32)
    tiles = [(simulate_clouds(x, 5, .5, 'thick', origin=(300 * i, 0))['transmittance'] < 1).mean() for i in range(30)]
    assert np.std(tiles) > .1, 'every tile has the same share of cloud: its own quantile was used'


@pytest.mark.parametrize('azimuth,down,right', [(0, 1, 0), (90, 0, -1), (180, -1, 0), (270, 0, 1), (225, -1, 1), (135, -1, -1)])
@pytest.mark.parametrize('elevation', [30, 60])
def test_the_shadow_is_the_same_cloud_moved_away_from_the_sun(azimuth, down, right, elevation):
    layer = (Layer(scale=200, octaves=3, gamma=1., height=400),)
    x = np.full((3, 160, 160), .2, np.float32)
    far = 400 / math.tan(math.radians(elevation)) / 10
    o = simulate_clouds(x, 2, .4, layer, sun=(azimuth, elevation), origin=(500, 500))
    length = math.hypot(down, right)
    # the cloud, read where the shadow of each pixel would have come from
    at = (500 - down * far / length, 500 - right * far / length)
    cloud = simulate_clouds(x, 2, .4, layer, sun=(azimuth, elevation), origin=at)['transmittance']
    expected = 1 - .8 * (1 - .25 * (np.array([.665, .56, .49]) / .49)**-1.5)[:, None, None] * (1 - cloud)
    np.testing.assert_allclose(o['light'], expected, atol=1e-5)
    assert .1 < (o['shadow'] < .9).mean() < .9


def test_shadows_do_not_wrap_around_the_tile():
    # a cloud that leaves the tile on one side must not throw its shadow in from the other
    layer = (Layer(scale=200, octaves=3, gamma=1., height=400),)
    x = np.full((3, 64, 64), .2, np.float32)
    small = simulate_clouds(x, 2, .4, layer, sun=(180, 45))
    large = simulate_clouds(np.full((3, 256, 64), .2, np.float32), 2, .4, layer, sun=(180, 45), origin=(-96, 0))
    np.testing.assert_allclose(small['shadow'], large['shadow'][:, 96:160], atol=1e-5)
    shift = -round(towards_sun((180, 45), 400)[0])
    assert not np.allclose(small['light'][0], np.roll(1 - .8 * (1 - small['transmittance'][0]), shift, 0), atol=.05)


def test_haze_takes_blue_most_and_shadow_takes_blue_least():
    x = np.full((4, 300, 300), .2, np.float32)
    haze = simulate_clouds(x, 1, 1., 'haze')
    assert (np.diff(haze['transmittance'], axis=0) > 0).all() and (haze['shadow'] == 1).all()
    dark = simulate_clouds(x, 1, .8, 'shadow_only')
    assert (dark['transmittance'] == 1).all() and (dark['image'] <= x).all()
    assert (np.diff(dark['light'].mean((1, 2))) < 0).all() and (dark['shadow'] < .6).any()


def test_broken_clouds_add_detail_and_smooth_ones_remove_it():
    x = np.kron(ground(1, (64, 64), 1), np.ones((1, 4, 4), np.float32)).repeat(4, 0) * .3
    def detail(im): return float(np.mean(np.diff(im[3], axis=0)**2))
    broken = np.mean([detail(simulate_clouds(x, s, .4, 'broken')['image']) for s in range(6)])
    thin = np.mean([detail(simulate_clouds(x, s, 1., 'thin')['image']) for s in range(6)])
    assert thin < .8 * detail(x) < detail(x) < .8 * broken


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_arrays_and_tensors_agree_and_keep_their_kind(dtype):
    x = ground().astype(dtype)
    a, t = simulate_clouds(x, 4), simulate_clouds(torch.from_numpy(x), 4)
    for k in a:
        assert isinstance(a[k], np.ndarray) and isinstance(t[k], torch.Tensor) and a[k].dtype == dtype and str(t[k].dtype) == f'torch.{dtype}'
        np.testing.assert_allclose(t[k].numpy(), a[k], atol=1e-6)


def test_gradients_flow_through_the_clear_image():
    x = torch.from_numpy(ground()).requires_grad_()
    o = simulate_clouds(x, 1)
    o['image'].sum().backward()
    torch.testing.assert_close(x.grad, o['transmittance'] * o['light'])


def test_each_element_of_a_batch_has_its_own_sky():
    x = torch.from_numpy(np.stack([ground()] * 3))
    o = simulate_clouds(x, 7, .5, 'broken')
    for i in range(3): torch.testing.assert_close(o['image'][i], simulate_clouds(x[i], 7 + i, .5, 'broken')['image'])
    assert not torch.allclose(o['cloud_impact'][0], o['cloud_impact'][1])
    assert o['cloud_impact'].shape == (3, 1, 40, 56)
    own = simulate_clouds(x, [9, 7, 9], [.3, .5, .3], 'broken')
    torch.testing.assert_close(own['image'][1], o['image'][0])
    torch.testing.assert_close(own['image'][0], own['image'][2])


def test_the_input_is_not_changed_and_the_same_seed_gives_the_same_sky():
    x = ground(); before = x.copy()
    a, b, c = (simulate_clouds(x, s)['image'] for s in (1, 1, 2))
    np.testing.assert_array_equal(x, before); np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > .05


def test_a_sensor_of_your_own_needs_end_members_and_wavelengths():
    x = ground(5)
    with pytest.raises(BandError, match='no usual sensor has 5 bands'): simulate_clouds(x)
    o = simulate_clouds(x, 1, 1., 'thick', end_member=[.3, .4, .5, .6, .7], wavelengths=[.4, .5, .6, .8, 1.6])
    assert (np.diff(o['end_member'].mean((1, 2))) > 0).all()
    named = simulate_clouds(ground(2), 1, bands=('red', 'nir'))
    assert named['image'].shape == (2, 40, 56)
    for n in SENSORS: assert len(band_optics(n)[0]) == n


@pytest.mark.parametrize('wrong,message', [
    (dict(image=np.full((4, 8, 8), np.nan, np.float32)), 'NaN'), (dict(image=np.full((4, 8, 8), np.inf, np.float32)), 'infinite'),
    (dict(image=np.zeros((8, 8), np.float32)), 'shape'), (dict(image=np.zeros((4, 0, 8), np.float32)), 'at least one pixel'),
    (dict(image=np.zeros((4, 8, 8), np.uint8)), 'uint8'), (dict(image=np.full((4, 8, 8), 3000., np.float32)), 'reflectance'),
    (dict(image=np.full((4, 8, 8), -12., np.float32)), 'reflectance'), (dict(image=[[1.]]), 'list')])
def test_images_that_are_none_are_refused(wrong, message):
    with pytest.raises(DataError, match=message): simulate_clouds(**wrong)


@pytest.mark.parametrize('wrong,message', [
    (dict(cover=-.1), 'cover'), (dict(cover=1.1), 'cover'), (dict(cover=math.nan), 'cover'), (dict(sky='rain'), 'no sky'), (dict(sun=(90, 0)), 'elevation'),
    (dict(gsd=0), 'gsd'), (dict(shadow=2), 'shadow'), (dict(noise=-1), 'noise'), (dict(seed=[1, 2]), '2 values of seed'), (dict(gsd=2000.), 'a pixel at least')])
def test_impossible_skies_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message): simulate_clouds(ground(), **wrong)


def test_global_random_state_is_left_alone():
    torch.manual_seed(0); np.random.seed(0)
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    simulate_clouds(ground(), 1, noise=.01)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
