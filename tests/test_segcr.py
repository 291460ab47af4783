"""The frequency split, the impact map, translation, fusion and the net of SegCR: what must hold for any size, content and switch."""
import contextlib
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import rs_mtl
from rs_mtl.core import BandError, ConfigError, DataError
from rs_mtl.layers.cloud_impact import CloudImpact, pool_to, split
from rs_mtl.layers.fusion import ConcatFusion, TargetedFusion, targeted_fusion
from rs_mtl.layers.translation import Translator
from rs_mtl.models.segcr import Restore

quick = settings(max_examples=50, deadline=None)
seeds, sizes = st.integers(0, 2**31), st.tuples(st.integers(1, 40), st.integers(1, 40))


def noise(seed, *shape, scale=1.):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))*scale


# ---- frequency split

@quick
@given(seeds, sizes, st.integers(2, 9), st.sampled_from([1e-3, 1., 1e4]), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_low_and_high_make_the_whole(seed, size, scale, range_, dtype):
    x = noise(seed, 2, 3, *size, scale=range_).to(dtype)
    low, high = split(x, scale)
    assert low.shape == high.shape == x.shape and low.dtype == high.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (low + high - x).abs().max() <= 3e-7*x.float().abs().max()  # half precision has no such small bound
    if dtype in (torch.bfloat16, torch.float16): assert ((low + high).to(dtype).float() - x.float()).abs().le(3e-7*x.float().abs().max() + torch.finfo(dtype).eps*x.float().abs()).all()  # but for the last digit of what is far smaller than its neighbours
    assert low.min() >= x.min() - 1e-5*range_ and low.max() <= x.max() + 1e-5*range_            # means stay within


@quick
@given(seeds, sizes, st.integers(2, 6))
def test_split_is_linear_and_treats_channels_alike(seed, size, scale):
    a, b, mix = noise(seed, 1, 3, *size), noise(seed + 1, 1, 3, *size), noise(seed + 2, 5, 3)
    torch.testing.assert_close(split(2*a - 3*b, scale)[0], 2*split(a, scale)[0] - 3*split(b, scale)[0], rtol=1e-4, atol=1e-4)
    project = lambda x: torch.einsum('oc,bchw->bohw', mix, x)
    torch.testing.assert_close(split(project(a), scale)[1], project(split(a, scale)[1]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(split(a.flip(1), scale)[0], split(a, scale)[0].flip(1))
    torch.testing.assert_close(split(torch.full((1, 2, *size), 7.), scale)[0], torch.full((1, 2, *size), 7.))


def test_slow_waves_are_low_and_fast_ones_high():
    wave = lambda period: torch.sin(torch.arange(128)*2*torch.pi/period).expand(1, 1, 128, 128)
    share = [float(split(wave(p))[1].square().mean()/wave(p).square().mean()) for p in (64, 32, 16, 8, 4)]
    assert share == sorted(share) and share[0] < .02 and share[-1] > .95


def test_split_under_autocast_stays_in_full_precision():
    x = noise(0, 2, 8, 33, 20)*.01 + 5.
    with torch.autocast('cpu', torch.bfloat16): low, high = split(x)
    torch.testing.assert_close(high, split(x)[1], rtol=0, atol=0)
    with pytest.raises(ConfigError, match='scale=1'): split(x, 1)


# ---- map

@quick
@given(seeds, st.integers(1, 6), st.integers(1, 6), st.integers(1, 7), st.integers(1, 7))
def test_pooling_keeps_the_mean_share(seed, h, w, a, b):
    x = noise(seed, 2, 1, h*a, w*b).sigmoid()
    small = pool_to(x, torch.zeros(1, 3, h, w))
    assert small.shape == (2, 1, h, w)
    torch.testing.assert_close(small.mean(), x.mean())
    assert torch.equal(pool_to(x, x), x)
    torch.testing.assert_close(small, F.adaptive_avg_pool2d(x, (h, w)))


def test_pooling_odd_sizes_and_refusing_to_enlarge():
    x = noise(0, 1, 1, 7, 11)
    torch.testing.assert_close(pool_to(x, torch.zeros(1, 1, 3, 4)), F.adaptive_avg_pool2d(x, (3, 4)))
    with pytest.raises(DataError, match='7x11 pixels for features of 8x11'): pool_to(x, torch.zeros(1, 1, 8, 11))


def pyramid(seed, width=8, sizes=((24, 20), (12, 10), (6, 5), (1, 1))): return [noise(seed + i, 2, width, *s) for i, s in enumerate(sizes)]


def stirred(module, seed=0):
    """The module with nothing left at its start, so that no zero hides what it multiplies."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()): p.copy_(p + .2*noise(seed + i, *p.shape) if p.ndim < 2 else noise(seed + i, *p.shape)*(2/p[0].numel())**.5)
    return module


@pytest.mark.parametrize('norm', ['batch', 'group'])
def test_the_map_looks_at_both_sensors_at_every_stage(norm):
    net, full, detail = stirred(CloudImpact(8, 4, detail=5, norm=norm)).eval(), torch.zeros(2, 3, 48, 40), noise(9, 2, 5, 48, 40)
    image, sar = pyramid(1), pyramid(2)
    base = net(image, sar, full, detail)
    assert base.shape == (2, 1, 48, 40) and base.dtype == torch.float32 and bool(((base > 0) & (base < 1)).all())
    for side, stage in itertools.product((0, 1), range(4)):
        other = [list(image), list(sar)]
        other[side][stage] = other[side][stage] + noise(5, *other[side][stage].shape)
        assert (net(*other, full, detail) - base).abs().max() > 1e-4, (side, stage)
    assert (net(image, sar, full, detail*2) - base).abs().max() > 1e-4
    torch.testing.assert_close(net([f.flip(0) for f in image], [f.flip(0) for f in sar], full, detail.flip(0)), base.flip(0))


def test_the_map_starts_nearly_clear_and_learns_from_its_first_step_on():
    torch.manual_seed(0)
    net, detail = CloudImpact(8, 4, detail=5), noise(9, 2, 5, 48, 40)
    out = net(pyramid(1), pyramid(2), detail, detail)
    assert out.mean() < .25
    F.binary_cross_entropy(out, (noise(3, *out.shape) > 0).float()).backward()
    assert not [n for n, p in net.named_parameters() if not p.grad.any() and not n.endswith('0.weight')] and all(p.grad.isfinite().all() for p in net.parameters())


def test_a_wholly_overcast_window_is_told_from_a_clear_one():
    """Instance norm would make the two alike: only the level differs."""
    net = stirred(CloudImpact(8, 4)).eval()
    image, sar, full = pyramid(1), pyramid(2), torch.zeros(2, 1, 48, 40)
    assert (net([f + 3 for f in image], sar, full) - net(image, sar, full)).abs().mean() > .01


# ---- translation

def test_translation_starts_as_nothing_and_stages_do_not_mix():
    torch.manual_seed(0)
    net, levels = Translator(8, 4).eval(), pyramid(1)
    assert all(torch.equal(a, b) for a, b in zip(net(levels), levels, strict=True))
    stirred(net)
    base, other = net(levels), net([levels[0] + 1, *levels[1:]])
    assert not torch.equal(base[0], other[0]) and all(torch.equal(a, b) for a, b in zip(base[1:], other[1:], strict=True))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(base, levels, strict=True))
    with pytest.raises(ConfigError, match='translation=False'): Translator(8, 4, blocks=0)


# ---- fusion

@quick
@given(seeds, sizes, st.floats(-8, 8))
def test_the_weight_is_exact_at_both_ends_and_rises_between(seed, size, log_odds):
    o, s, k = noise(seed, 2, 4, *size, scale=1e3), noise(seed + 1, 2, 4, *size, scale=1e-3), torch.tensor(log_odds).exp()
    none, every = torch.zeros(2, 1, *size), torch.ones(2, 1, *size)
    assert torch.equal(targeted_fusion(o, s, none, k), o) and torch.equal(targeted_fusion(o, s, every, k), s)
    weights = [float(targeted_fusion(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), m), k)) for m in (0, .1, .3, .5, .9, 1)]
    assert weights == sorted(weights) and weights[0] == 0 and weights[-1] == 1
    assert abs(weights[3] - float(torch.sigmoid(torch.tensor(log_odds)))) < 1e-4
    m = noise(seed + 2, 2, 1, *size).sigmoid()
    torch.testing.assert_close(targeted_fusion(o, s, m), (1 - m)*o + m*s)


def test_fusion_properties_hold_for_any_weights():
    targeted, control = stirred(TargetedFusion(8)), ConcatFusion(8)
    control.load_state_dict(targeted.state_dict(), strict=False)
    o, s, t, u = (noise(i, 2, 8, 9, 13) for i in range(4))
    none, every, some = torch.zeros(2, 1, 36, 52), torch.ones(2, 1, 36, 52), noise(7, 2, 1, 36, 52).sigmoid()
    assert torch.equal(targeted(o, s, t, none), control(o, s)) and torch.equal(targeted(o, s, t, none), targeted(o, s, u, none))
    assert torch.equal(targeted(o, s, t, every), targeted(u, s, t, every)) and not torch.equal(targeted(o, s, t, every), targeted(o, s, u, every))
    assert torch.equal(targeted(o, s, None, some), targeted(o, s, s, some))
    assert not torch.equal(targeted(o, s, t, some), targeted(o, s, t, some*.5))
    order = torch.randperm(2*9*13, generator=torch.Generator().manual_seed(0))              # nothing looks at its neighbours
    shuffle = lambda x: x.movedim(1, -1).flatten(0, 2)[order].unflatten(0, (2, 9, 13)).movedim(-1, 1).contiguous()
    m = pool_to(some, o)
    torch.testing.assert_close(targeted(shuffle(o), shuffle(s), shuffle(t), shuffle(m)), shuffle(targeted(o, s, t, m)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('translated', [False, True])
def test_every_fusion_starts_as_the_mean(translated):
    o, s, t = (noise(i, 2, 8, 9, 13) for i in range(3))
    torch.testing.assert_close(ConcatFusion(8, translated)(o, s, *([t] if translated else [])), (o + s)/2)
    torch.testing.assert_close(TargetedFusion(8)(o, s, t, torch.full((2, 1, 9, 13), .12)), ((.88*o + .12*t) + s)/2)


def test_gradients_of_the_fusion_are_finite_at_both_ends():
    fuse = TargetedFusion(4)
    for value in (0., 1.):
        m = torch.full((1, 1, 6, 6), value, requires_grad=True)
        fuse(noise(0, 1, 4, 6, 6), noise(1, 1, 4, 6, 6), noise(2, 1, 4, 6, 6), m).square().sum().backward()
        assert m.grad.isfinite().all() and m.grad.any() and fuse.log_odds.grad.isfinite().all()


def test_shapes_that_do_not_fit_are_told():
    o = noise(0, 2, 4, 6, 6)
    for wrong in (dict(simulated=o[:, :3], impact=torch.zeros(2, 1, 6, 6)), dict(simulated=o, impact=torch.zeros(2, 4, 6, 6)), dict(simulated=o, impact=torch.zeros(1, 1, 6, 6))):
        with pytest.raises(DataError, match=r'\(2, 1, 6, 6\)'): targeted_fusion(o, **wrong)


# ---- restored image

@quick
@given(seeds, st.floats(-6, 6))
def test_the_restored_image_lies_between_the_cloudy_one_and_the_guess(seed, bias):
    net, x, image = stirred(Restore(8, 4), seed % 1000).eval(), noise(seed, 1, 8, 5, 6), noise(seed + 1, 1, 4, 5, 6)
    with torch.no_grad():
        net.head.out.bias[-1] = bias
        guess, out = net.head(x)[:, :-1], net(x, image)
    assert (out <= torch.maximum(guess, image) + 1e-5).all() and (out >= torch.minimum(guess, image) - 1e-5).all()


# ---- the net

TINY = dict(encoder='resnet10t', width=16, full=8, detail=8)
ROWS = {'optical only': dict(fusion='image'), 'SAR only': dict(fusion='sar'), 'concat': dict(fusion='concat', translation=False, cloud_impact=False), '+ translation': dict(fusion='concat', cloud_impact=False),
        '+ impact': dict(translation=False), 'full': {}, 'map that steers nothing': dict(fusion='concat'), 'segmentation only': dict(tasks=('mask',)), 'removal only': dict(tasks=('clear',)),
        'three tasks and height': dict(tasks=('mask', 'clear', 'cloud_impact', 'height')), 'no stem': dict(detail=0), 'label grid': dict(label_scale=.5)}
STATS = {'image': ([.1, .15, .2, .4], [.1, .1, .15, .2]), 'sar': ([-12., -18.], [4., 5.])}


def build(**kw):
    torch.manual_seed(0)
    net = rs_mtl.create_model('segcr', **TINY | kw)
    net.set_stats(STATS)
    return net


def batch_for(net, n=2, h=64, w=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda c, a, b: torch.rand(n, c, h, w, generator=g)*(b - a) + a
    batch = {'image': draw(4, 0, .8), 'sar': draw(2, -25, 0), 'clear': draw(4, 0, .5), 'cloud_impact': draw(1, 0, 1), 'height': draw(1, 0, 20)}
    grid = [int(s*net.label_grid) for s in (h, w)]
    return batch | {'mask': torch.randint(0, 7, (n, *grid), generator=g)}


def loss_of(net, batch):
    """The losses of all tasks and both terms of the translation."""
    out = net(batch)
    total = rs_mtl.Objective(net.tasks)(out, batch)['total']
    if 'aux_cloud_impact' in out: total = total + (out['aux_cloud_impact'] - batch['cloud_impact']).abs().mean()
    if 'aux_clear_sar' in out:
        total = total + (out['aux_clear_sar'] - batch['clear']).abs().mean()
        total = total + sum((out[k] - f).abs().mean() for k, f in net.features(batch['clear']).items())
    return total


@pytest.mark.parametrize('row', ROWS)
def test_every_row_of_the_ablation_trains(row):
    net = build(**ROWS[row]).train()
    batch, optimiser = batch_for(net), torch.optim.SGD(net.parameters(), .02)
    seen, losses = set(), []
    for _ in range(4):
        optimiser.zero_grad()
        loss = loss_of(net, batch)
        loss.backward()
        seen |= {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        assert all(p.grad.isfinite().all() for p in net.parameters())
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert seen == {n for n, _ in net.named_parameters()}          # what starts at zero has moved, and lets through what lies behind it
    assert losses[-1] < losses[0]


@functools.cache
def full_net(): return build().eval()


def test_outputs_by_mode_and_task():
    batch = batch_for(full_net())
    net = build()
    names = {f'aux_simulated_{s}' for s in (2, 4, 8, 16, 32)}
    assert set(net.train()(batch)) == {'mask', 'clear', 'cloud_impact', 'aux_clear_sar'} | names
    with torch.no_grad(): out = net.eval()(batch)
    assert {k: tuple(v.shape) for k, v in out.items()} == {'mask': (2, 7, 64, 64), 'clear': (2, 4, 64, 64), 'cloud_impact': (2, 1, 64, 64)}
    assert out['cloud_impact'].min() >= 0 and out['cloud_impact'].max() <= 1
    only = build(tasks=('mask',))
    assert set(only.train()(batch)) == {'mask', 'aux_cloud_impact', 'aux_clear_sar'} | names and set(only.eval()(batch)) == {'mask'}
    assert set(build(fusion='image').train()(batch)) == {'mask', 'clear', 'cloud_impact'}


def test_classes_and_image_have_a_decoder_each_and_one_map_alone_needs_no_second():
    both, batch = build().train(), batch_for(full_net())
    assert sorted(both.own) == ['to_clear'] and not build(tasks=('clear', 'cloud_impact')).own and not build(tasks=('mask', 'cloud_impact')).own
    both(batch)['clear'].sum().backward()
    assert all(p.grad is None for p in both.decoder.parameters()) and all(p.grad is not None for p in both.own.parameters())
    start = build(tasks=('mask',)).state_dict()   # a net of classes alone is the start of one with both: its decoder stays that of the classes
    assert {k for k in both.state_dict() if k.startswith('decoder.')} == {k for k in start if k.startswith('decoder.')}


class Fixed(nn.Module):
    "A map that somebody else drew."
    def __init__(self, value):
        super().__init__()
        self.value = value
    def forward(self, image, sar, full, detail=None): return torch.full_like(full[:, :1], self.value)


@contextlib.contextmanager
def forced(net, value):
    kept, net.impact = net.impact, Fixed(value)
    try: yield net
    finally: net.impact = kept


def test_without_clouds_the_net_is_the_plain_fusion_and_under_them_translation_takes_over():
    net, control = stirred(build(tasks=('mask', 'clear'))).eval(), build(tasks=('mask', 'clear'), **ROWS['concat']).eval()
    with torch.no_grad():   # a gate that reads the map alone, as it begins; the stirred one may say anything
        gate = net.head['to_clear'].head.out
        gate.weight[-1], gate.bias[-1] = 0, 3
    missing = control.load_state_dict(net.state_dict(), strict=False)
    assert not missing.missing_keys
    batch = batch_for(net)
    with torch.no_grad():
        with forced(net, 0.): clear = net(batch)
        torch.testing.assert_close(clear['mask'], control(batch)['mask'])
        with forced(net, 1.): under = net(batch)
        changed = lambda out: (out['clear'] - batch['image']).abs().mean()
        assert changed(clear) < .05*changed(under) and changed(control(batch)) > changed(clear)  # what is free stays
        for p in net.translate.parameters(): p.mul_(1.5)
        with forced(net, 0.): again = net(batch)
        with forced(net, 1.): moved = net(batch)
    for k in clear:
        assert torch.equal(clear[k], again[k]) and (under[k] - moved[k]).abs().max() > 1e-4 and (under[k] - clear[k]).abs().max() > 1e-4


def test_nothing_optical_is_left_in_the_fused_features_under_full_cloud():
    net, batch = stirred(build(detail=0)).eval(), batch_for(full_net())
    other = batch | {'image': batch['image'].flip(-1)}
    def fused(b):
        streams = {k: net.normalise[k](b[k]) for k in net.inputs}
        return net.mix({k: net.view[k](x) for k, x in streams.items()}, torch.cat(list(streams.values()), 1), None)[0]
    with torch.no_grad(), forced(net, 1.): assert all(torch.equal(a, b) for a, b in zip(fused(batch), fused(other), strict=True))
    with torch.no_grad(), forced(net, .5): assert not any(torch.equal(a, b) for a, b in zip(fused(batch), fused(other), strict=True))


def test_all_rows_start_as_the_plain_net():
    control = build(tasks=('mask', 'clear'), **ROWS['concat']).eval()
    common, batch = {k: v for k, v in control.state_dict().items() if not k.startswith('fuse')}, batch_for(control)
    with torch.no_grad(): base = control(batch)
    for row, limit in (('+ translation', 1e-6), ('map that steers nothing', 1e-6), ('+ impact', .2), ('full', .2)):
        net = build(tasks=('mask', 'clear'), **ROWS[row]).eval()
        net.load_state_dict(common, strict=False)
        with torch.no_grad(): out = net(batch)
        for k, m in base.items():
            if k != 'clear' or limit < .1: assert (out[k] - m).abs().mean() <= limit*m.std(), (row, k)  # a steered restoration begins with the map's word


def calls(net, batch):
    seen, hooks = [], []
    for name, m in net.named_modules():
        if name: hooks.append(m.register_forward_hook(lambda *_, name=name: seen.append(name)))
    with torch.no_grad(): net(batch)
    for h in hooks: h.remove()
    return set(seen)


def test_the_subtask_is_not_run_at_prediction_and_nothing_else_lies_idle():
    net = build()
    batch = batch_for(net)
    every = {n for n, m in net.named_modules() if n and not isinstance(m, nn.ModuleList | nn.ModuleDict) and list(m.parameters()) and not list(m.children())}
    assert every <= calls(net.train(), batch)
    assert every - calls(net.eval(), batch) == {n for n in every if n.startswith('simulated.')}


def test_features_of_the_clear_image_are_those_of_the_encoder_and_leave_no_trace():
    net = build().train()
    batch = batch_for(net, h=50, w=70)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    told, out = net.features(batch['clear']), net(batch)
    assert all(out[k].shape == f.shape and not f.requires_grad for k, f in told.items()) and len(told) == 5
    again = build().train()
    again.load_state_dict(before)
    again.features(batch['clear'])
    assert all(torch.equal(v, before[k]) for k, v in again.state_dict().items())
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    net.eval()
    with torch.no_grad(): seen = net.view['image'](net.normalise['image'](batch['clear'][..., :32, :64]))
    assert all(torch.equal(a, b) for a, b in zip(net.features(batch['clear'][..., :32, :64]).values(), seen, strict=True))
    holes = torch.ones(2, 1, 50, 70, dtype=torch.bool)
    holes[..., :9] = False
    spoilt = torch.where(holes, batch['clear'], torch.nan)
    assert all(f.isfinite().all() for f in net.features(spoilt, holes).values())
    with pytest.raises(ConfigError, match='without an optical encoder'): build(fusion='sar').features(batch['clear'])


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('missing', ['image', 'sar'])
def test_a_missing_sensor_is_told(training, missing):
    batch = batch_for(full_net())
    with pytest.raises(DataError, match=f"the batch has no '{missing}'"):
        (build() if training else full_net()).train(training)({k: v for k, v in batch.items() if k != missing})
    full_net().eval()


def test_one_sensor_alone_asks_for_no_other_and_gives_every_map():
    batch = batch_for(full_net(), h=40, w=56)
    for fusion, key, other in (('image', 'image', 'sar'), ('sar', 'sar', 'image')):
        net = build(fusion=fusion).eval()
        with torch.no_grad(): a, b = net({key: batch[key]}), net({**batch, other: batch[other]*0})
        assert net.inputs == (key,) and {k: tuple(v.shape) for k, v in a.items()} == {'mask': (2, 7, 40, 56), 'clear': (2, 4, 40, 56), 'cloud_impact': (2, 1, 40, 56)}
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert build(fusion='sar').has_stats
    with pytest.raises(ConfigError, match='for image, too'): build(fusion='sar').set_stats({'sar': STATS['sar']})
    with pytest.raises(BandError): build(fusion='sar')({'sar': batch['sar'].repeat(1, 2, 1, 1)})
    radar = rs_mtl.create_model('segcr', **TINY, bands=0, sar_bands=1, fusion='sar', tasks=('mask',))
    assert list(radar.normalise) == ['sar']


@pytest.mark.parametrize('wrong', [dict(fusion='sum'), dict(sar_bands=0), dict(bands=0), dict(label_scale=0.), dict(label_scale=1.2), dict(label_scale=.123456), dict(tasks=('colour',)), dict(bands=0, fusion='sar', tasks=('clear',))])
def test_what_cannot_be_built_is_refused(wrong):
    with pytest.raises(ConfigError): build(**wrong)


def test_the_clear_image_comes_in_the_units_of_the_input():
    """The same ground in reflectance and in tens of thousands gives the same image, in its own units."""
    net, batch = full_net(), batch_for(full_net())
    raw = build().eval()
    raw.load_state_dict(net.state_dict())
    raw.set_stats({'image': tuple([v*1e4 for v in part] for part in STATS['image']), 'sar': STATS['sar']})
    with torch.no_grad(): a, b = net(batch), raw(batch | {'image': batch['image']*1e4})
    torch.testing.assert_close(b['clear'], a['clear']*1e4, rtol=1e-3, atol=1.)
    torch.testing.assert_close(b['mask'], a['mask'], rtol=1e-3, atol=1e-3)


def test_holes_in_a_sensor_do_not_spread():
    net, batch = full_net(), batch_for(full_net())
    holes = {f'valid_{k}': torch.ones(2, 1, 64, 64, dtype=torch.bool) for k in ('image', 'sar')}
    holes['valid_image'][..., :20, :], holes['valid_sar'][..., 40:] = False, False
    spoilt = {k: torch.where(holes[f'valid_{k}'], batch[k], torch.nan) for k in ('image', 'sar')}
    with torch.no_grad(): a, b = net(spoilt | holes), net({k: torch.where(v.isnan(), 1e6, v) for k, v in spoilt.items()} | holes)
    assert all(a[k].isfinite().all() and torch.equal(a[k], b[k]) for k in a)


# ---- the label grid

@pytest.mark.parametrize('size', [(160, 160), (10, 300), (170, 90)])
def test_labels_of_a_third_grid(size):
    net = build(label_scale=.3).eval()
    batch = {'image': torch.rand(1, 4, *size), 'sar': torch.rand(1, 2, *size)}
    with torch.no_grad():
        out = net(batch)
        net.on_labels = False
        whole = net(batch)
    assert tuple(out['mask'].shape[-2:]) == tuple(s*3//10 for s in size) and {tuple(out[k].shape[-2:]) for k in ('clear', 'cloud_impact')} == {size}
    assert tuple(whole['mask'].shape[-2:]) == size and torch.equal(out['clear'], whole['clear'])
    torch.testing.assert_close(whole['mask'], F.interpolate(out['mask'], size, mode='bilinear'))


def test_a_window_through_a_label_is_refused_and_a_label_lies_where_its_pixels_lie():
    net = build(label_scale=.5, tasks=('mask',)).eval()
    with pytest.raises(DataError, match=r'65x64 pixels has 32.5x32 label pixels'): net({'image': torch.rand(1, 4, 65, 64), 'sar': torch.rand(1, 2, 65, 64)})
    image, sar = torch.zeros(1, 4, 128, 128), torch.zeros(1, 2, 128, 128)
    there = image.clone()
    there[..., 64:80, 96:112] = 5.
    stirred(net)
    net.set_stats(STATS)
    with torch.no_grad(): d = (net({'image': there, 'sar': sar})['mask'] - net({'image': image, 'sar': sar})['mask']).square().sum(1)[0]
    rows, cols = (d.sum(i)/d.sum() for i in (1, 0))
    centre = [float((x*torch.arange(64)).sum()) for x in (rows, cols)]
    assert abs(centre[0] - 35.5) < 4 and abs(centre[1] - 51.5) < 4


def test_the_label_grid_exports_and_comes_back_from_json(tmp_path):
    net = build(label_scale=.3).eval()
    batch = {'image': torch.rand(1, 4, 160, 160), 'sar': torch.rand(1, 2, 160, 160)}
    program = torch.export.export(net, (batch,))
    with torch.no_grad(): a, b = net(batch), program.module()(batch)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-4)
    rs_mtl.save(net, tmp_path/'net')
    again = rs_mtl.load(tmp_path/'net').eval()
    with torch.no_grad(): assert torch.equal(again(batch)['mask'], a['mask']) and again.label_grid == net.label_grid


# ---- precision

def test_under_bfloat16_map_and_image_stay_in_full_precision():
    net, batch = full_net(), batch_for(full_net())
    with torch.no_grad():
        a = net(batch)
        with torch.autocast('cpu', torch.bfloat16): b = net(batch)
    assert b['cloud_impact'].dtype == b['clear'].dtype == torch.float32
    assert (a['clear'] - b['clear']).abs().mean() < .01 and (a['cloud_impact'] - b['cloud_impact']).abs().mean() < .01
    shut = build().eval()
    with torch.no_grad(): shut.head['to_clear'].head.out.bias[-1] = -200.       # an image that is not touched keeps its digits
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): torch.testing.assert_close(shut(batch)['clear'], batch['image'], rtol=1e-5, atol=1e-6)
