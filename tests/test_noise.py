"""Noise belongs to places: windows agree, nothing repeats, and the distribution is known."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_mtl.core import ConfigError
from rs_mtl.worlds.noise import cells, fractal, fractal_at, level, points, ridged, share, sites, uniform, white

quick = settings(max_examples=25, deadline=None)
place = st.tuples(st.integers(-10**7, 10**7), st.integers(-10**7, 10**7))
seeds = st.integers(0, 2**40)
FIELDS = {
    'white': lambda size, origin, seed: white(size, origin, seed),
    'fractal': lambda size, origin, seed: fractal(size, origin, 37.5, 5, .6, seed),
    'stretched': lambda size, origin, seed: fractal(size, origin, (12, 50), 3, .5, seed),
    'turned': lambda size, origin, seed: fractal(size, origin, 20, 2, .5, seed, angle=30),
    'ridged': lambda size, origin, seed: ridged(size, origin, 40, 4, .5, seed),
    'cells': lambda size, origin, seed: cells(*points(size, origin), 9, .9, seed)['id'],
    'edge': lambda size, origin, seed: cells(*points(size, origin), 9, .9, seed)['edge'],
}


@pytest.mark.parametrize('name', FIELDS)
@quick
@given(origin=place, seed=seeds, cut=st.tuples(*[st.integers(0, 30)] * 2), size=st.tuples(*[st.integers(1, 30)] * 2))
def test_a_window_is_bit_for_bit_part_of_a_larger_one(name, origin, seed, cut, size):
    whole = FIELDS[name]((60, 60), origin, seed)
    part = FIELDS[name](size, (origin[0] + cut[0], origin[1] + cut[1]), seed)
    np.testing.assert_array_equal(part, whole[cut[0]:cut[0] + size[0], cut[1]:cut[1] + size[1]])


@pytest.mark.parametrize('name', ['white', 'fractal', 'cells'])
@pytest.mark.parametrize('step', [64, 256, 1000, 4096, 65536, 2**24, 2**30])
def test_nothing_comes_back_after_a_round_distance(name, step):
    for origin in ((0, 0), (-77, 31)):
        here = FIELDS[name]((64, 64), origin, 1)
        for far in ((step, 0), (0, step), (step, step), (-step, step)):
            there = FIELDS[name]((64, 64), (origin[0] + far[0], origin[1] + far[1]), 1)
            assert (here == there).mean() < .05, 'the world repeats itself'


def test_far_places_are_not_correlated():
    # 2 000 pairs of places one period apart, for any period that a wrapping lattice might have
    origins = [(997 * i, 1009 * j) for i in range(45) for j in range(45)]
    here = np.array([fractal(1, o, 32, 4, .5, 5)[0, 0] for o in origins])
    for step in (256, 1024, 8192, 65536):
        there = np.array([fractal(1, (r + step, c), 32, 4, .5, 5)[0, 0] for r, c in origins])
        assert abs(np.corrcoef(here, there)[0, 1]) < .08


@quick
@given(seed=seeds, phase=st.floats(0, 1), scale=st.floats(2, 90), octaves=st.integers(1, 2), persistence=st.floats(.1, 1))
def test_every_place_is_standard_normal_over_seeds(seed, phase, scale, octaves, persistence):
    values = np.array([fractal(1, (phase * scale, 3.7), scale, octaves, persistence, seed + i)[0, 0] for i in range(600)])
    assert abs(values.mean()) < .25 and .8 < values.std() < 1.2
    assert abs((values > 1).mean() - .1587) < .09


@pytest.mark.parametrize('part', [.02, .1, .5, .9])
def test_the_level_leaves_the_asked_share_above(part):
    got = np.mean([(fractal(1024, (0, 10**5 * s), 24, 4, .5, s) > level(part)).mean() for s in range(3)])
    assert abs(got - part) < .02


def test_share_and_level_are_inverse():
    p = np.linspace(.001, .999, 400)
    values = np.array([level(1 - q) for q in p], np.float32)
    np.testing.assert_allclose(share(values), p, atol=2e-6)
    assert level(0) == np.inf and level(1) == -np.inf
    assert (np.diff(share(np.linspace(-8, 8, 5000, dtype=np.float32))) >= 0).all()
    np.testing.assert_allclose(share(np.array([np.inf, -np.inf], np.float32)), [1, 0], atol=1e-8)


@quick
@given(origin=place, seed=seeds)
def test_the_field_at_scattered_points_is_the_field_of_the_window(origin, seed):
    window = fractal(30, origin, 16, 3, .5, seed)
    np.testing.assert_allclose(fractal_at(*points(30, origin), 16, 3, .5, seed), window, atol=2e-4)
    few = fractal_at(np.array([origin[0], origin[0] + 29.]), np.array([origin[1] + 29., origin[1]]), 16, 3, .5, seed)
    np.testing.assert_allclose(few, [window[0, 29], window[29, 0]], atol=2e-4)
    far = fractal_at(np.array([origin[0], 10.**8]), np.array([origin[1], 0.]), 16, 3, .5, seed)  # two places, a world apart
    np.testing.assert_allclose(far[0], window[0, 0], atol=2e-4)


def test_neighbours_are_alike_and_strangers_are_not():
    f = fractal(512, scale=64, octaves=1, seed=9)
    assert np.corrcoef(f[1:].ravel(), f[:-1].ravel())[0, 1] > .99
    assert np.abs(np.diff(f, axis=0)).max() < .1                    # no seams between lattice squares
    assert np.abs(np.diff(f, n=2, axis=1)).max() < .01              # nor creases
    assert abs(np.corrcoef(f.ravel(), fractal(512, scale=64, octaves=1, seed=10).ravel())[0, 1]) < .4


def test_stretched_noise_is_longer_in_one_direction_and_turns_with_the_angle():
    along = fractal(256, scale=(8, 64), octaves=1, seed=1)
    assert np.abs(np.diff(along, axis=0)).mean() > 4 * np.abs(np.diff(along, axis=1)).mean()
    turned = fractal(256, scale=(8, 64), octaves=1, seed=1, angle=90)
    assert np.abs(np.diff(turned, axis=1)).mean() > 4 * np.abs(np.diff(turned, axis=0)).mean()


@quick
@given(origin=place, seed=seeds, jitter=st.floats(0, 1))
def test_each_place_belongs_to_its_nearest_site(origin, seed, jitter):
    rows, cols = points(12, origin)
    cell = cells(rows, cols, 7, jitter, seed)
    R, C = np.arange(origin[0] // 7 - 4, origin[0] // 7 + 7)[:, None], np.arange(origin[1] // 7 - 4, origin[1] // 7 + 7)[None]
    dr, dc = sites(R, C, jitter, seed)
    sr, sc = ((R + dr.astype(float)) * 7).ravel(), ((C + dc.astype(float)) * 7).ravel()
    near = np.sort(np.hypot(rows[..., None] - sr, cols[..., None] - sc), -1)
    np.testing.assert_allclose(np.hypot(rows - cell['row'], cols - cell['col']), near[..., 0], atol=1e-4)
    np.testing.assert_allclose(cell['edge'], (near[..., 1] - near[..., 0]) / 7, atol=1e-4)


def test_uniform_numbers_are_uniform():
    u = uniform(np.arange(500)[:, None], np.arange(-250, 250)[None], 3)
    assert 0 <= u.min() and u.max() < 1
    assert np.abs(np.histogram(u, 20, (0, 1))[0] / u.size - .05).max() < .003
    for lag in (u[1:] - .5) * (u[:-1] - .5), (u[:, 1:] - .5) * (u[:, :-1] - .5): assert abs(lag.mean()) < .001


@pytest.mark.parametrize('wrong', [dict(size=0), dict(size=(4, -1)), dict(size=8, octaves=0), dict(size=8, scale=4, octaves=4), dict(size=8, scale=(64, 2), octaves=3)])
def test_impossible_noise_is_refused(wrong):
    with pytest.raises(ConfigError): fractal(**wrong)


def test_global_random_state_is_left_alone():
    np.random.seed(0); before = np.random.get_state()[1].copy()
    fractal(16), white(16), cells(*points(16))
    assert (np.random.get_state()[1] == before).all()
