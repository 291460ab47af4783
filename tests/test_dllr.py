"""Masking, complementary learning and the net of DLLR: what must hold for any ratio, size, class count and content."""
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import rs_mtl
from rs_mtl.core import ConfigError, DataError
from rs_mtl.layers.complementary import FUSIONS, DifferenceFusion, complementary_loss, divergence, feature_difference, make_fusion, surer
from rs_mtl.layers.masking import Masking, mask_blocks

quick = settings(max_examples=60, deadline=None)
shares, sizes, seeds = st.floats(0, 1), st.tuples(st.integers(1, 70), st.integers(1, 70)), st.integers(0, 2**31)


def cells_of(mask, block):
    """One value per square, and whether every square is of one value."""
    pad = F.pad(mask.float(), (0, -mask.shape[-1] % block, 0, -mask.shape[-2] % block), value=.5)
    high, low = F.max_pool2d(torch.where(pad == .5, 0, pad), block), -F.max_pool2d(-torch.where(pad == .5, 1, pad), block)
    return high.bool(), bool((high == low).all())


@quick
@given(shares, sizes, st.integers(1, 40), seeds)
def test_masks_are_whole_squares_in_the_right_number(ratio, size, block, seed):
    before = torch.get_rng_state()
    mask = mask_blocks((3, *size), ratio, block, seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert mask.shape == (3, 1, *size) and mask.dtype == torch.bool and mask.is_contiguous()
    squares, whole = cells_of(mask, block)
    assert whole
    n = squares[0].numel()
    for k in squares.flatten(1).sum(1).tolist(): assert math.floor(ratio*n) <= k <= math.ceil(ratio*n + 1e-9)
    assert torch.equal(mask, mask_blocks((3, *size), ratio, block, seed))


@quick
@given(shares, shares, sizes, st.integers(1, 40), seeds)
def test_disjoint_masks_meet_nowhere_and_keep_their_ratios(a, b, size, block, seed):
    if a + b > 1: a, b = a/2, b/2
    out = Masking(a, b, block).draw((4, *size), seed)
    assert not (out['hide_image'] & out['hide_sar']).any()
    for ratio, mask in ((a, out['hide_image']), (b, out['hide_sar'])):
        squares, whole = cells_of(mask, block)
        n = squares[0].numel()
        assert whole and all(math.floor(ratio*n - 1e-9) <= k <= math.ceil(ratio*n + 1e-9) for k in squares.flatten(1).sum(1).tolist())


@pytest.mark.parametrize('disjoint', [True, False])
def test_every_pixel_is_hidden_as_often_as_the_ratio_says(disjoint):
    out = Masking(.37, .21, 8, disjoint).draw((6000, 20, 13), seed=3)  # 3x2 squares: most are cut off, and no count is whole
    for ratio, name in ((.37, 'hide_image'), (.21, 'hide_sar')):
        often = out[name].float().mean(0)
        assert (often - ratio).abs().max() < 5*math.sqrt(ratio*(1 - ratio)/6000)
    assert (mask_blocks((6000, 20, 13), .37, 8, 4).float().mean(0) - .37).abs().max() < 5*math.sqrt(.37*.63/6000)
    both = (out['hide_image'] & out['hide_sar']).float().mean()
    assert both == 0 if disjoint else abs(both - .37*.21) < .02


def test_a_generator_goes_on_and_items_differ():
    source = torch.Generator().manual_seed(5)
    first, second = (Masking().draw((2, 128, 128), source) for _ in range(2))
    assert not torch.equal(first['hide_image'], second['hide_image']) and not torch.equal(first['hide_image'][0], first['hide_image'][1])
    assert torch.equal(first['hide_image'], Masking().draw((2, 128, 128), 5)['hide_image'])


@pytest.mark.parametrize('wrong', [dict(image=.7, sar=.4), dict(image=-.1), dict(sar=1.1), dict(block=0), dict(image=float('nan'))])
def test_impossible_masking_is_refused(wrong):
    with pytest.raises(ConfigError): Masking(**wrong)


def test_full_shares_do_not_overflow():
    for a in (.1, .3, .35, .7): assert (sum(Masking(a, 1 - a, 16).draw((50, 47, 33), 1).values()) == 1).all()
    Masking(.7, .4, disjoint=False)


# ---- difference and loss

def logits(seed, shape=(2, 5, 6, 7), scale=4.):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))*scale


@quick
@given(seeds, st.integers(2, 19), st.sampled_from([.1, 3., 40., 1e4]))
def test_divergence_is_that_of_jensen_and_shannon(seed, classes, scale):
    a, b = logits(seed, (1, classes, 4, 4), scale), logits(seed + 1, (1, classes, 4, 4), scale)
    d = divergence(a, b)
    p, q = (x.double().softmax(1) for x in (a, b))
    m = (p + q)/2
    truth = (torch.xlogy(p, p/m) + torch.xlogy(q, q/m)).nan_to_num(0).sum(1, keepdim=True)/(2*math.log(2))
    torch.testing.assert_close(d.double(), truth, rtol=1e-4, atol=1e-5)
    assert ((d >= 0) & (d <= 1)).all()
    torch.testing.assert_close(d, divergence(b, a))
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(d, divergence(a[:, order], b[:, order]), rtol=1e-4, atol=1e-5)
    assert (divergence(a, a) == 0).all()


def test_divergence_agrees_with_scipy():
    distance = pytest.importorskip('scipy.spatial.distance')
    a, b = logits(1, (1, 7, 1, 30)), logits(2, (1, 7, 1, 30))
    p, q = (x.double().softmax(1)[0, :, 0].T.numpy() for x in (a, b))
    np.testing.assert_allclose(divergence(a, b)[0, 0, 0].numpy(), [distance.jensenshannon(u, v, base=2)**2 for u, v in zip(p, q)], rtol=1e-4)


def by_hand(a, b, where, valid):
    """The loss, pixel by pixel, in double precision."""
    p, q, d = a.double().softmax(1), b.double().softmax(1), divergence(a.double(), b.double())
    total, n = 0., 0
    for i, _, y, x in torch.nonzero(where & valid).tolist():
        u, v = p[i, :, y, x], q[i, :, y, x]
        if u.max() <= v.max(): u, v = v, u
        total, n = total + float(d[i, 0, y, x]*(u*(u/v).log()).sum()), n + 1
    return total/max(n, 1)


@settings(max_examples=25, deadline=None)
@given(seeds, shares, shares)
def test_the_lesson_is_the_weighted_divergence_of_the_surer_to_the_other(seed, hidden, seen):
    a, b = logits(seed), logits(seed + 1)
    g = torch.Generator().manual_seed(seed)
    where, valid = (torch.rand(2, 1, 6, 7, generator=g) < r for r in (hidden, seen))
    loss = complementary_loss(a, b, where, valid)
    assert float(loss) == pytest.approx(by_hand(a, b, where, valid), rel=1e-3, abs=1e-6)
    assert float(loss) == pytest.approx(float(complementary_loss(b, a, where, valid)), rel=1e-5, abs=1e-8)


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([float('nan'), float('inf'), -float('inf'), 1e30]))
def test_what_does_not_count_has_no_part_in_loss_and_gradient(seed, bad):
    g = torch.Generator().manual_seed(seed)
    where, valid = (torch.rand(2, 1, 6, 7, generator=g) < .6 for _ in range(2))
    clean = [logits(seed), logits(seed + 1)]
    spoilt = [torch.where(where & valid, x, bad).requires_grad_() for x in clean]
    loss = complementary_loss(*spoilt, where, valid, torch.where(valid, divergence(*clean), torch.nan))
    loss.backward()
    torch.testing.assert_close(loss.detach(), complementary_loss(*clean, where, valid))
    taught = surer(*clean)
    for x, learns in zip(spoilt, (~taught, taught)):
        assert x.grad.isfinite().all()
        assert not x.grad.abs().sum(1, keepdim=True)[~(where & valid & learns)].any()       # a teacher does not move, nor does what is not asked
    assert any(x.grad.any() for x in spoilt) or not (where & valid).any()


def test_a_step_along_the_gradient_brings_the_pupil_to_the_teacher():
    a, b = logits(3), logits(4).requires_grad_()
    everywhere = torch.ones(2, 1, 6, 7, dtype=torch.bool)
    before = complementary_loss(a, b, everywhere)
    before.backward()
    pupil = surer(a, b.detach())
    with torch.no_grad(): moved = b - 20*b.grad
    near = lambda x: ((a.softmax(1)*(a.log_softmax(1) - x.log_softmax(1))).sum(1, keepdim=True))
    assert (near(moved) <= near(b.detach()) + 1e-6)[pupil].all() and torch.equal(moved[(~pupil).expand_as(b)], b.detach()[(~pupil).expand_as(b)])


def test_the_weight_carries_no_gradient_and_low_precision_stays_close():
    a, b, where = logits(5).requires_grad_(), logits(6), torch.ones(2, 1, 6, 7, dtype=torch.bool)
    weight = divergence(a, b)
    complementary_loss(a, b, where, weight=weight).backward()
    given_grad = a.grad.clone(); a.grad = None
    complementary_loss(a, b, where).backward()
    torch.testing.assert_close(given_grad, a.grad)
    half = complementary_loss(a.detach().bfloat16(), b.bfloat16(), where)
    assert half.dtype == torch.float32 and float(half) == pytest.approx(float(complementary_loss(a.detach(), b, where)), rel=.05)


def test_wrong_places_are_refused():
    a, b, where = logits(1), logits(2), torch.ones(2, 1, 6, 7, dtype=torch.bool)
    for bad in (where.float(), where[:, 0], where[:1], where[..., :3]):
        with pytest.raises(DataError, match='torch.bool'): complementary_loss(a, b, bad)
        with pytest.raises(DataError, match='torch.bool'): complementary_loss(a, b, where, bad)
    with pytest.raises(DataError, match='same shape'): complementary_loss(a, b[:, :4], where)


@quick
@given(seeds, st.integers(1, 16))
def test_feature_difference_is_half_of_one_minus_the_cosine(seed, width):
    a, b = logits(seed, (2, width, 3, 3)), logits(seed + 1, (2, width, 3, 3))
    torch.testing.assert_close(feature_difference(a, b), (1 - F.cosine_similarity(a, b)[:, None])/2, rtol=1e-4, atol=1e-5)
    assert (feature_difference(a, a) == 0).all()


# ---- fusion

@pytest.mark.parametrize('kind', FUSIONS)
def test_every_fusion_starts_as_the_mean_and_learns(kind):
    fuse, a, b = make_fusion(kind, 8), logits(1, (2, 8, 5, 9)), logits(2, (2, 8, 5, 9))
    torch.testing.assert_close(fuse(a, b), (a + b)/2)
    a.requires_grad_(); b.requires_grad_()
    fuse(a, b).square().sum().backward()
    assert all(p.grad.any() for n, p in fuse.named_parameters()) and a.grad.any() and b.grad.any()


def test_the_gate_learns_whom_to_believe():
    """One sensor is blind at random places, its feature a constant there; the mean is wrong, the gate finds out."""
    g, fuse = torch.Generator().manual_seed(0), DifferenceFusion(4)
    optimiser = torch.optim.Adam(fuse.parameters(), .05)
    for _ in range(150):
        truth, blind = torch.randn(1, 4, 16, 16, generator=g), torch.rand(2, 1, 1, 16, 16, generator=g) < .3
        blind[1] &= ~blind[0]
        a, b = torch.where(blind[0], 5., truth), torch.where(blind[1], -5., truth)
        loss = (fuse(a, b) - truth).square().mean()
        optimiser.zero_grad(); loss.backward(); optimiser.step()
    gate = fuse.gate(a, b).mean(1, keepdim=True)
    assert loss < .1*((a + b)/2 - truth).square().mean()
    assert gate[blind[0]].mean() < .15 and gate[blind[1]].mean() > .85


# ---- the net

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return rs_mtl.create_model('dllr', encoder='resnet10t', width=16, full=8, detail=8).eval()


def pair(h=48, w=40, n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {'image': torch.rand(n, 4, h, w, generator=g), 'sar': torch.randn(n, 2, h, w, generator=g)}


@pytest.fixture
def all_heads(net):
    net.all_heads = True
    yield net
    net.all_heads = False


@functools.cache
def _shared():  # hypothesis does not like fixtures
    torch.manual_seed(0)
    net = rs_mtl.create_model('dllr', encoder='resnet10t', width=16, full=8, detail=8).eval()
    net.all_heads = True
    return net


@settings(max_examples=12, deadline=None)
@given(st.tuples(st.integers(1, 50), st.integers(1, 50)), st.floats(0, .6), st.sampled_from([float('nan'), 1e20, -7.]), seeds)
def test_hidden_pixels_have_no_influence(size, ratio, bad, seed):
    net = _shared()
    batch = Masking(ratio, (1 - ratio)/2, 8)(pair(*size), seed)
    spoilt = batch | {k: torch.where(batch[f'hide_{k}'], bad, batch[k]) for k in ('image', 'sar')}
    with torch.no_grad(): a, b = net(batch), net(spoilt)
    assert all(torch.equal(a[k], b[k]) for k in a) and all(v.isfinite().all() for v in b.values())


def test_nothing_hidden_is_bit_for_bit_the_same(all_heads):
    batch = pair()
    with torch.no_grad(): a, b = all_heads(batch), all_heads(Masking(0, 0)(batch))
    assert set(a) == {'mask', 'mask_image', 'mask_sar'} and all(torch.equal(a[k], b[k]) for k in a)


def test_an_own_answer_reads_its_own_sensor_alone(net):
    batch = {k: v.requires_grad_() for k, v in pair().items()}
    out = net.train()(batch)
    for own, other in (('image', 'sar'), ('sar', 'image')):
        mine, theirs = torch.autograd.grad(out[f'mask_{own}'].square().sum(), [batch[own], batch[other]], retain_graph=True, allow_unused=True)
        assert mine.any() and theirs is None
    both = torch.autograd.grad(out['mask'].square().sum(), list(batch.values()))
    net.eval()
    assert all(g.any() for g in both)


@pytest.mark.parametrize('there', ['image', 'sar'])
@pytest.mark.parametrize('size', [(48, 40), (1, 1), (33, 70)])
def test_a_missing_sensor_leaves_the_others_own_answer(all_heads, there, size):
    batch = pair(*size)
    with torch.no_grad(): every, one = all_heads(batch), all_heads({there: batch[there]})
    assert set(one) == {'mask', f'mask_{there}'} and torch.equal(one['mask'], every[f'mask_{there}'])


@pytest.mark.parametrize('there', ['image', 'sar'])
def test_export_with_one_sensor(net, there):
    batch = {there: pair(72, 56)[there]}
    program = torch.export.export(net, (batch,))
    with torch.no_grad(): torch.testing.assert_close(program.module()(batch)['mask'], net(batch)['mask'], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('there', ['image', 'sar'])
def test_a_scene_of_one_sensor_is_mapped_by_that_sensor(there, tmp_path):
    import rasterio
    from rs_mtl.data.samples import write_sample
    torch.manual_seed(1)
    net = rs_mtl.create_model('dllr', encoder='resnet10t', width=16, full=8, detail=8).eval()
    net.set_stats({'image': ([.1] * 4, [.1] * 4), 'sar': ([-12., -18.], [5., 5.])})
    sample = {k: v for k, v in rs_mtl.Land(1, 64)[0].items() if k.endswith(there)}
    place = {'crs': 'EPSG:32650', 'transform': rasterio.transform.from_origin(500_000, 3_400_000, 10, 10)}
    files = write_sample(tmp_path / 'in', sample, place, bands=rs_mtl.Land.bands, sar_bands=rs_mtl.Land.sar_bands)
    maps = rs_mtl.predict_scene(net, files, tmp_path / 'out', tile=64)
    with rasterio.open(maps['mask']) as src: found = torch.from_numpy(src.read(1))
    read = rs_mtl.Scene(files).read(0, 0, 64, 64)
    with torch.no_grad(): expected = net({there: read[there][None]})['mask'].argmax(1)[0]
    assert (found == expected).float().mean() > .999
    with pytest.raises(ConfigError, match='the scene has no'): rs_mtl.predict_scene(net, {'clear': files[there]}, tmp_path / 'none')


def test_onnx_with_one_sensor(net, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    batch = {'image': pair(64, 64, 1)['image']}
    session = ort.InferenceSession(str(rs_mtl.save_onnx(net, tmp_path / 'image.onnx', batch)), providers=['CPUExecutionProvider'])
    assert [i.name for i in session.get_inputs()] == ['image']
    with torch.no_grad(): torch.testing.assert_close(torch.from_numpy(session.run(['mask'], {'image': batch['image'].numpy()})[0]), net(batch)['mask'], rtol=1e-3, atol=1e-3)


def test_training_on_one_sensor_is_refused(net):
    with pytest.raises(DataError, match=r'net.eval\(\) answers without it'): net.train()({'image': pair()['image']})
    net.eval()
    with pytest.raises(DataError, match='the batch has no'): net({'clear': pair()['image']})
    with pytest.raises(DataError, match='sar with 2 items of 40x40'): net(pair() | {'sar': torch.zeros(2, 2, 40, 40)})


@pytest.mark.parametrize('wrong', [torch.ones(2, 48, 40, dtype=torch.bool), torch.ones(2, 1, 48, 40), torch.ones(2, 4, 48, 40, dtype=torch.bool), torch.ones(1, 1, 48, 40, dtype=torch.bool)])
def test_a_wrong_hide_is_refused(net, wrong):
    with pytest.raises(DataError, match='hide_image'): net(pair() | {'hide_image': wrong})


def test_the_usual_objective_trains_every_parameter(net):
    batch = pair() | {'mask': torch.randint(0, 7, (2, 48, 40), generator=torch.Generator().manual_seed(0))}
    out = net.train()(batch)
    assert torch.equal(out['aux_mask_sar'], out['mask_sar'])
    rs_mtl.Objective(('mask',))(out, batch)['total'].backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None]
    learns = {k: bool(net.sensor[k].head['to_mask'].out.weight.grad.any()) for k in ('image', 'sar')}
    net.zero_grad(); net.eval()
    assert not idle and learns == {'image': True, 'sar': True}


def test_a_learned_token_fills_what_is_hidden():
    torch.manual_seed(0)
    net = rs_mtl.create_model('dllr', encoder='resnet10t', width=16, full=8, token=True)
    batch = Masking(.5, .5, 8)(pair(), 1)
    net.train()(batch)['mask'].square().mean().backward()
    assert all(p.grad.any() for p in net.token.values())
    with torch.no_grad():
        for p in net.token.values(): p.fill_(2.)
        changed, same = net.eval()(batch)['mask'], net(batch | {k: torch.where(batch[f'hide_{k}'], 2., batch[k]) for k in ('image', 'sar')} | {'hide_image': torch.zeros_like(batch['hide_image']), 'hide_sar': torch.zeros_like(batch['hide_sar'])})['mask']
    assert torch.equal(changed, same)


def test_switches_travel_in_the_checkpoint(tmp_path):
    net = rs_mtl.create_model('dllr', encoder='resnet10t', width=16, masking={'image': .3, 'sar': .6, 'block': 8}, complementary='mean', token=True)
    rs_mtl.save(net, tmp_path/'net')
    again = rs_mtl.load(tmp_path/'net')
    assert again.masking == Masking(.3, .6, 8) and again.token is not None and not list(again.fuse.parameters())
    assert rs_mtl.create_model('dllr', encoder='resnet10t', width=16, masking=False).masking is None


@pytest.mark.parametrize('wrong', [dict(bands=0), dict(sar_bands=0), dict(complementary='sum'), dict(alone=0), dict(masking={'image': .9, 'sar': .2}), dict(masking={'share': 1})])
def test_a_net_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError): rs_mtl.create_model('dllr', encoder='resnet10t', **wrong)

def test_a_row_of_the_ablation_knows_the_defaults_that_nobody_passed(monkeypatch):
    from rs_mtl.apply.ablation import _digest, _meant, variants
    from rs_mtl.training import dllr
    config = lambda variant: dict(bands=4, sar_bands=2, classes=7, encoder='test_resnet', width=16, full=8, **variants('dllr')[variant][0])
    told = lambda variant='dllr': _digest(_meant(config(variant)))
    first = told()
    assert told() == first
    for holder, name, value in ((dllr.TRANSPORT, 'floor', .5), (dllr.Switches.__init__.__kwdefaults__, 'weight', 3.)):
        with monkeypatch.context() as m:
            m.setitem(holder, name, value)
            assert told() != first
    squares = told('dllr, squares hidden')
    with monkeypatch.context() as m:
        m.setattr('rs_mtl.models.dllr.Masking', lambda: dllr.Masking(image=.3))
        assert told() == first and told('dllr, squares hidden') != squares
    with monkeypatch.context() as m:
        *others, norm = rs_mtl.models.dllr.DLLR.__init__.__defaults__
        m.setattr(rs_mtl.models.dllr.DLLR.__init__, '__defaults__', (*others, 'group'))
        assert norm == 'batch' and told() != first
    assert told() == first
