"Seeing through clouds: scores against torchmetrics, scikit-learn and scipy; losses, simulated clouds and runs against what must hold for any content."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import layouts
import rs_mtl  # before torchmetrics and scikit-learn
from rs_mtl.core import IGNORE, ConfigError
from rs_mtl.data.clouded import Clouded
from rs_mtl.data.datasets import layers_of, open_data, open_dataset, run_options
from rs_mtl.training.losses import ssim, ssim_loss
from rs_mtl.training.metrics import Scores, plain
from rs_mtl.training.restoration import RestorationScores, spectral_angle
from rs_mtl.training.segcr import SegCR, cloud_target, follow_loss, impact_loss, restoration_loss, weak_impact
from rs_mtl.training.under_cloud import COVERS, ImpactScores, sky_of

pytestmark = pytest.mark.filterwarnings('ignore:The ``compute`` method')
FEW = settings(max_examples=15, deadline=None)


def noise(seed, *shape): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))

def pictures(seed, n=2, bands=4, h=24, w=31):
    "Smooth pictures and a spoilt version of each."
    a = torch.nn.functional.avg_pool2d(noise(seed, n, bands, h + 4, w + 4), 5, 1)
    return (a + .1*noise(seed + 1, n, bands, h, w) - .05).clamp(0, 1), a

def whole(x): return torch.ones_like(x[:, :1], dtype=torch.bool)

def restored(p, t, valid=None, batch=None, cut=9):
    s = RestorationScores()
    for i in range(0, len(p), cut):
        s.update(p[i:i + cut], t[i:i + cut], (whole(p) if valid is None else valid)[i:i + cut], None if batch is None else sky_of({k: v[i:i + cut] for k, v in batch.items()}))
    return s.compute()


# scores of a restored image

@FEW
@given(seed=st.integers(0, 9999), bands=st.integers(1, 6), h=st.integers(6, 40), w=st.integers(6, 40))
def test_restoration_scores_are_those_of_torchmetrics_where_everything_is_valid(seed, bands, h, w):
    from torchmetrics.functional.image import peak_signal_noise_ratio, spectral_angle_mapper, structural_similarity_index_measure
    p, t = pictures(seed, 3, bands, h, w)
    found = restored(p, t)
    assert found['psnr'].item() == pytest.approx(peak_signal_noise_ratio(p, t, data_range=1., dim=(1, 2, 3)).item(), abs=1e-5)
    assert found['ssim'].item() == pytest.approx(structural_similarity_index_measure(p.double(), t.double(), data_range=1., sigma=1.5, kernel_size=11).item(), abs=1e-5)
    assert found['mae'].item() == pytest.approx((p - t).abs().mean().item(), abs=1e-5)
    if bands > 1: assert found['sam'].item() == pytest.approx(math.degrees(spectral_angle_mapper(p.double(), t.double())), abs=1e-5)

@FEW
@given(seed=st.integers(0, 9999), share=st.floats(0, .6), garbage=st.sampled_from([torch.nan, torch.inf, -1e30]))
def test_scores_under_cloud_agree_with_a_loop_over_images_and_see_nothing_invalid(seed, share, garbage):
    p, t = pictures(seed, 5)
    valid, impact, known = noise(seed + 2, 5, 1, 24, 31) >= share, noise(seed + 3, 5, 1, 24, 31)*.25, noise(seed + 4, 5, 1, 24, 31) < .9
    impact[0], valid[1] = 0, False
    batch = {'cloud_impact': torch.where(known, impact, torch.nan), 'valid_cloud_impact': known}
    found = restored(torch.where(valid, p, garbage), torch.where(valid, t, garbage), valid, batch, cut=2)
    similar, counts = ssim(p, t, valid)
    maps = {'mae': ((p - t).abs().mean(1, keepdim=True), valid), 'sam': (spectral_angle(p, t), valid), 'ssim': (similar, valid & counts), 'psnr': ((p - t).square().mean(1, keepdim=True), valid)}
    for place, where in {'': valid, '_cloudy': known & (impact > .1), '_cloudfree': known & (impact <= .1)}.items():
        for k, (m, ok) in maps.items():
            each = [m[i][(ok & where)[i]].double().mean().item() for i in range(5) if (ok & where)[i].any()]
            if k == 'psnr': each = [-10*math.log10(v) for v in each]
            expected = sum(each)/len(each) if each else math.nan
            assert found[k + place].item() == pytest.approx(expected, abs=1e-5, nan_ok=True), k + place

def test_every_image_counts_once_in_the_class_of_its_cover():
    p, t = pictures(0, 6)
    covers = [0., .1, .3, .55, .85, 1.]
    impact = torch.stack([torch.arange(744).view(1, 24, 31) < c*744 for c in covers]).float()
    scores = restored(p, t, batch={'cloud_impact': impact})
    found = scores['by_cover']
    assert [found[c]['images'] for c in COVERS] == [2, 1, 1, 0, 2]
    each = [-10*math.log10((p - t)[i].square().mean()) for i, c in enumerate(covers) if c >= .4]   # overcast: from two fifths on
    assert scores['psnr_overcast'].item() == pytest.approx(sum(each)/len(each), abs=1e-5)
    alone = restored(p[3:4], t[3:4])
    assert found['40-60%']['psnr'] == pytest.approx(alone['psnr'].item()) and math.isnan(found['60-80%']['ssim'])

@pytest.mark.parametrize('cloudy, expected', [(0, 0), (1, 0), (19, 0), (20, 1), (39, 1), (40, 2), (60, 3), (79, 3), (80, 4), (100, 4)])
def test_the_border_of_two_covers_belongs_to_the_cloudier_one(cloudy, expected):
    assert sky_of({'cloud_impact': (torch.arange(100) < cloudy).float().view(1, 1, 10, 10)}).cover.tolist() == [expected]

def test_a_spectral_angle_has_a_value_everywhere_and_keeps_its_digits():
    x = torch.tensor([.3, .2, .1, .4]).view(1, 4, 1, 1)
    assert spectral_angle(x, x*3).item() == pytest.approx(0, abs=1e-5) and spectral_angle(x, -x).item() == pytest.approx(180)
    tiny = x.double().clone(); tiny[0, 0] += 1e-9
    assert 1e-8 < spectral_angle(tiny, x.double()).item() < 1e-6  # an arc cosine would say 0

def test_a_restored_image_that_is_no_number_scores_no_number():
    p, t = pictures(1)
    p[0, 0, 3, 3] = torch.nan
    assert all(restored(p, t)[k].isnan() for k in ('psnr', 'ssim', 'sam', 'mae'))


# structure

@FEW
@given(seed=st.integers(0, 9999), share=st.floats(0, .05), garbage=st.sampled_from([torch.nan, torch.inf, 1e30]))
def test_an_invalid_pixel_changes_neither_ssim_nor_its_gradient(seed, share, garbage):
    p, t = pictures(seed)
    valid, out = noise(seed + 2, 2, 1, 24, 31) >= share, []
    for fill in (0., garbage):
        x = torch.where(valid, p, fill).requires_grad_()
        loss = ssim_loss(x, torch.where(valid, t, fill), valid)
        loss.backward()
        out.append((loss.item(), x.grad))
        assert loss.isfinite() and x.grad.isfinite().all() and not x.grad[~valid.expand_as(p)].any()
    assert out[0][0] == out[1][0] and torch.equal(out[0][1], out[1][1])

def test_windows_that_hold_an_invalid_pixel_do_not_count_and_the_others_are_those_of_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure
    (p, t), valid = pictures(6), torch.ones(2, 1, 24, 31, dtype=torch.bool)
    valid[0, 0, 3, 8] = valid[1, 0, 20, 30] = False
    full = structural_similarity_index_measure(p.double(), t.double(), data_range=1., sigma=1.5, kernel_size=11, return_full_image=True)[1].mean(1, keepdim=True)
    similar, counts = ssim(p, t, valid)
    for i, (r, c) in enumerate(((3, 8), (20, 30))):
        near = ((torch.arange(24)[:, None] - r).abs() <= 5) & ((torch.arange(31) - c).abs() <= 5)
        assert torch.equal(counts[i, 0], ~near)
    assert (similar - full)[counts].abs().max() < 1e-4 and (similar - full)[counts].mean().abs() < 1e-5

def test_the_gradient_of_ssim_agrees_with_finite_differences():
    p, t = (x.double() for x in pictures(3, 1, 2, 8, 9))
    assert ssim(p, t)[0].dtype == torch.float32
    x = p.float().requires_grad_()
    loss = ssim_loss(x, t.float())
    loss.backward()
    v = noise(5, *p.shape) - .5
    ahead, behind = (ssim_loss((p + s*1e-2*v).float(), t.float()).item() for s in (1, -1))
    assert (x.grad*v).sum().item() == pytest.approx((ahead - behind)/2e-2, rel=.02)

def test_ssim_is_computed_in_full_precision_under_autocast():
    p, t = pictures(4)
    with torch.autocast('cpu', torch.bfloat16): low = ssim(p, t)[0]
    assert torch.equal(low, ssim(p, t)[0])


# cloud impact maps

def impacts(seed, n=4, ties=True):
    "A share with a mass of zeros, and a map that has to do with it."
    t = (noise(seed, n, 1, 20, 30)*1.6 - .6).clamp(0, 1)
    p = (.7*t + .5*noise(seed + 1, n, 1, 20, 30) - .1).clamp(0, 1)
    return (p*20).round()/20 if ties else p, t

@FEW
@given(seed=st.integers(0, 9999), ties=st.booleans(), share=st.floats(0, .5), binary=st.booleans())
def test_auroc_and_rank_correlation_are_those_of_scikit_learn_and_scipy(seed, ties, share, binary):
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score
    p, t = impacts(seed, ties=ties)
    if binary: t = (t > .3).float()
    valid, s = noise(seed + 2, *p.shape) >= share, ImpactScores()
    for i in range(4): s.update(torch.where(valid, p, torch.nan)[i:i+1], torch.where(valid, t, torch.nan)[i:i+1], valid[i:i+1])
    found, (a, b) = s.compute(), (p[valid].numpy(), t[valid].numpy())
    assert found['auroc'].item() == pytest.approx(roc_auc_score(b > .1, a), abs=1e-3)
    assert found['spearman'].item() == pytest.approx(spearmanr(a, b).statistic, abs=2e-3)  # of a thousand pixels
    assert found['mae'].item() == pytest.approx(abs(a.astype(float) - b).mean(), abs=1e-6)

def test_scores_on_the_bins_themselves_are_exact():
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score
    p, t = (torch.randint(0, n, (1, 1, 40, 40), generator=torch.Generator().manual_seed(n))/512 for n in (300, 512))
    s = ImpactScores(); s.update(p, t, whole(p)); found = s.compute()
    assert found['auroc'].item() == pytest.approx(roc_auc_score((t > .1).flatten(), p.flatten()), abs=1e-12)
    assert found['spearman'].item() == pytest.approx(spearmanr(p.flatten(), t.flatten()).statistic, abs=1e-12)

def test_clear_scenes_are_those_without_any_cloud_and_only_valid_pixels_of_them_count():
    truth, p = torch.zeros(4, 1, 4, 4), torch.full((4, 1, 4, 4), .2)
    truth[0, 0, 0, 0], truth[1, 0, 0, 0], valid = .02, .9, whole(p)
    p[0] = .6                                                         # of a scene that is nearly clear
    valid[1, 0, 0, 0] = False; p[1, 0, 0, 0] = .9; valid[3] = False; p[3] = .7
    s = ImpactScores(); s.update(p, truth, valid)
    assert s.compute()['on_clear'].item() == pytest.approx(.2)
    s.update(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), valid[:1])
    assert s.compute()['on_clear'].item() == pytest.approx(.2)


# all of them at once

def batch_of(seed, n=6):
    p, t = pictures(seed, n)
    q, impact = (x[:, :, :, :1].expand(-1, -1, -1, 31)[:, :, torch.arange(24) % 20] for x in impacts(seed, n))
    mask = torch.randint(0, 3, (n, 24, 31), generator=torch.Generator().manual_seed(seed))
    logits = torch.nn.functional.one_hot(torch.randint(0, 3, mask.shape, generator=torch.Generator().manual_seed(seed + 1)), 3).movedim(-1, 1).float()
    return {'mask': logits, 'clear': p, 'cloud_impact': q.contiguous()}, {'mask': mask, 'clear': t, 'cloud_impact': impact.contiguous()}

def flat(values): return {f'{k} {k2}': v2 for k, v in values.items() for k2, v2 in (flat(v) if isinstance(v, dict) else {'': v}).items()}

@FEW
@given(seed=st.integers(0, 999), cut=st.integers(1, 5))
def test_neither_the_batch_size_nor_the_number_of_processes_matters(seed, cut):
    out, batch = batch_of(seed)
    def feed(*parts):
        s = Scores(out, ('a', 'b', 'c'))
        for i, j in parts: s.update({k: v[i:j] for k, v in out.items()}, {k: v[i:j] for k, v in batch.items()})
        return s
    one, two, first, second = feed((0, 6)), feed((0, cut), (cut, 6)), feed((0, cut)), feed((cut, 6))
    for a, b in zip(first.metrics.values(), second.metrics.values(), strict=True):
        for name, how in a._reductions.items():  # what torchmetrics does with the states of several processes
            assert how.__name__ == 'dim_zero_sum'
            setattr(a, name, getattr(a, name) + getattr(b, name))
    a, b, c = (flat(s.compute()['values']) for s in (one, two, first))
    assert a.keys() == b.keys() == c.keys()
    for k, v in a.items():
        assert v == b[k] == c[k] if isinstance(v, list) else v == pytest.approx(b[k], nan_ok=True) and v == pytest.approx(c[k], nan_ok=True), k

def test_states_stay_small_however_many_images_are_scored():
    out, batch = batch_of(0)
    s = Scores(out, ('a', 'b', 'c'))
    def size(): return sum(getattr(m, k).numel() for m in s.metrics.values() for k in m._defaults)
    before = size()
    for _ in range(3): s.update(out, batch)
    assert size() == before < 300_000

def test_without_a_cloud_layer_only_whole_numbers_come_out_and_with_one_all_of_them():
    out, batch = batch_of(1)
    few, every = Scores(['mask', 'clear'], ('a', 'b', 'c')), Scores(['mask', 'clear'], ('a', 'b', 'c'))
    few.update(out, {k: v for k, v in batch.items() if k != 'cloud_impact'}); every.update(out, batch)
    few, every = few.compute(), every.compute()
    assert not [k for k in few['values'] if 'cloud' in k or 'cover' in k] and 'cloudy' not in few['protocol']
    assert {f'{k}_{p}' for k in ('miou', 'oa', 'clear_psnr', 'clear_ssim', 'clear_sam', 'clear_mae') for p in ('cloudy', 'cloudfree', 'overcast')} | {'mask_by_cover', 'clear_by_cover'} == every['values'].keys() - few['values'].keys()
    assert {k: v for k, v in every['values'].items() if k in few['values']} == few['values']
    assert 'cloudy' in every['protocol'] and 'mean over images' in every['protocol']['clear']
    plain(every)

def test_classes_under_cloud_agree_with_a_loop_on_labels_of_a_coarser_grid():
    mask = torch.randint(0, 3, (2, 6, 9), generator=torch.Generator().manual_seed(0)); mask[0, 0] = IGNORE
    pred = torch.randint(0, 3, (2, 6, 9), generator=torch.Generator().manual_seed(1))
    impact = noise(2, 2, 1, 20, 30)*.3
    s = Scores(['mask'], ('a', 'b', 'c'))
    s.update({'mask': torch.nn.functional.one_hot(pred, 3).movedim(-1, 1).float()}, {'mask': mask, 'cloud_impact': impact})
    hits = {True: [], False: []}
    for b in range(2):
        for r in range(6):
            for c in range(9):
                if mask[b, r, c] != IGNORE: hits[bool(impact[b, 0, int((r + .5)*20/6), int((c + .5)*30/9)] > .1)].append(bool(pred[b, r, c] == mask[b, r, c]))
    v = s.compute()['values']
    overcast = [b for b in range(2) if (impact[b] > .1).float().mean() >= .4]
    assert v['oa_overcast'] == pytest.approx((pred[overcast] == mask[overcast]).sum().item()/(mask[overcast] != IGNORE).sum().item())
    assert v['oa_cloudy'] == pytest.approx(sum(hits[True])/len(hits[True])) and v['oa_cloudfree'] == pytest.approx(sum(hits[False])/len(hits[False]))

def test_a_task_that_the_batch_does_not_hold_is_named():
    out, batch = batch_of(2)
    with pytest.raises(ConfigError, match="without 'cloud_impact'"): Scores(['cloud_impact']).update(out, {'clear': batch['clear']})


# the objective


class Eyes(torch.nn.Module):
    "The contract of the segcr net, in a few convolutions."
    inputs = ('image', 'sar')
    def __init__(self, tasks=('mask', 'clear', 'cloud_impact'), bands=4, classes=3):
        super().__init__()
        self.tasks, self.config, self.meta = tuple(tasks), {'model': 'eyes', 'classes': classes}, {}
        self.image, self.sar = torch.nn.Conv2d(bands, 6, 3, 4, 1), torch.nn.Conv2d(2, 6, 3, 4, 1)
        self.heads = torch.nn.ModuleDict({f'to_{t}': torch.nn.Conv2d(12, n, 1) for t, n in (('mask', classes), ('clear', bands), ('cloud_impact', 1))})
        self.paint = torch.nn.Conv2d(6, bands, 1)
    def forward(self, batch):
        a, s = self.image(batch['image']), self.sar(batch['sar'])
        up = lambda x: torch.nn.functional.interpolate(x, batch['image'].shape[-2:])
        out = {t: up(self.heads[f'to_{t}'](torch.cat([a, s], 1))) for t in ('mask', 'clear', 'cloud_impact')}
        out['cloud_impact'] = out['cloud_impact'].sigmoid(); out['clear'] = out['clear'] + batch['image']
        known = {k: v for k, v in out.items() if k in self.tasks}
        if not self.training: return known
        return known | {'aux_simulated_4': s, 'aux_clear_sar': up(self.paint(s))} | ({} if 'cloud_impact' in known else {'aux_cloud_impact': out['cloud_impact']})
    @torch.no_grad()
    def features(self, clear, valid=None): return {'aux_simulated_4': self.image(clear if valid is None else torch.where(valid, clear, 0))}

def eyes(**kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Eyes(**kwargs)

def seen(seed=0, n=2, h=24, w=28, holes=0., garbage=0.):
    "A batch of pairs with gaps in every layer."
    cloudy, clear = pictures(seed, n, 4, h, w)
    layers = {'image': cloudy, 'clear': clear, 'sar': noise(seed + 1, n, 2, h, w), 'cloud_impact': impacts(seed, n)[1][..., :1].expand(-1, -1, -1, w)[:, :, torch.arange(h) % 20]}
    batch = {'mask': torch.randint(0, 3, (n, h, w), generator=torch.Generator().manual_seed(seed)), 'valid_mask': noise(seed + 9, n, 1, h, w) >= holes}
    for i, (k, x) in enumerate(layers.items()):
        valid = noise(seed + 10 + i, n, 1, h, w) >= holes
        batch |= {k: torch.where(valid, x, garbage if k in ('clear', 'cloud_impact') else 0.), f'valid_{k}': valid}
    return batch

def without(batch, *layers): return {k: v for k, v in batch.items() if k.removeprefix('valid_') not in layers}

def learned(objective, net, batch):
    net.zero_grad()
    losses = objective.learn(net.train(), batch)
    losses['total'].backward()
    return {k: v.item() for k, v in losses.items()}, {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}

@FEW
@given(seed=st.integers(0, 999), holes=st.floats(0, .3), garbage=st.sampled_from([torch.nan, torch.inf, -1e30]), tasks=st.sampled_from([('mask',), ('clear',), ('mask', 'clear'), ('mask', 'clear', 'cloud_impact')]), told=st.booleans())
def test_what_lies_under_an_invalid_pixel_reaches_neither_losses_nor_gradients(seed, holes, garbage, tasks, told):
    net, objective = eyes(tasks=tasks), SegCR(tasks)
    told = told or 'cloud_impact' in tasks
    (a, ga), (b, gb) = (learned(objective, net, seen(seed, holes=holes, garbage=g) if told else without(seen(seed, holes=holes, garbage=g), 'cloud_impact')) for g in (0., garbage))
    assert all(math.isfinite(v) for v in b.values()) and all(g.isfinite().all() for g in gb.values())
    assert a == b and all(torch.equal(ga[n], gb[n]) for n in ga)

def test_a_batch_without_one_valid_pixel_has_no_loss_and_no_gradient():
    batch = seen()
    batch |= {k: torch.zeros_like(v) for k, v in batch.items() if k in ('valid_mask', 'valid_clear', 'valid_cloud_impact')}
    losses, grads = learned(SegCR(), eyes(), batch)
    assert set(losses.values()) == {0.} and not any(g.any() for g in grads.values())

@pytest.mark.parametrize('tasks, missing, terms', [
    (('mask',), ('clear', 'cloud_impact'), ()), (('mask',), ('clear',), ('map',)), (('mask',), (), ('map', 'translation', 'simulated')), (('clear',), ('mask', 'cloud_impact'), ('map', 'translation', 'simulated')),
    (('mask', 'clear', 'cloud_impact'), (), ('translation', 'simulated'))])
def test_terms_are_those_that_the_batch_can_teach(tasks, missing, terms):
    losses, grads = learned(SegCR(tasks), eyes(tasks=tasks), without(seen(), *missing))
    assert tuple(losses) == (*tasks, 'total', *terms)
    w = {'mask': 1, 'clear': 2, 'cloud_impact': .5, 'translation': 1, 'simulated': .5, 'map': .5}
    assert losses['total'] == pytest.approx(sum(w[k]*v for k, v in losses.items() if k != 'total'), rel=1e-5)

def test_a_weight_of_zero_takes_a_term_away_and_changes_nothing_else():
    net, batch = eyes(), seen()
    full, _ = learned(SegCR(), net, batch)
    less, grads = learned(SegCR(translation=0, simulated=0), net, batch)
    assert less.keys() == full.keys() - {'translation', 'simulated'} and all(less[k] == full[k] for k in less if k != 'total')
    assert not any(n.startswith('paint') for n in grads)

def test_simulated_features_follow_the_camera_and_the_camera_does_not_follow_them():
    net, batch = eyes(tasks=('mask',)), seen()
    out = net.train()(batch)
    follow_loss({'aux_simulated_4': out['aux_simulated_4']}, {'aux_simulated_4': net.image(batch['clear'])}).backward()  # even if a net forgets to stop the gradient
    assert net.sar.weight.grad.any() and net.image.weight.grad is None

@FEW
@given(seed=st.integers(0, 999), cloud=st.floats(0, 9))
def test_the_restoration_loss_is_a_weighted_mean(seed, cloud):
    b = seen(seed, holes=.2)
    d = (((b['image'] - b['clear'])**2 + 1e-6).sqrt() - 1e-3).mean(1, keepdim=True)
    w = torch.where(b['valid_clear'], 1 + cloud*b['cloud_impact'], 0)
    assert restoration_loss(b['image'], b['clear'], b['valid_clear'], b['cloud_impact'], cloud, 0).item() == pytest.approx(((w*d).sum()/w.sum()).item(), rel=1e-4)

def test_a_cloud_weight_that_is_no_number_where_the_image_is_invalid_changes_nothing():
    b = seen(4, holes=.2)
    bad = torch.where(b['valid_clear'], b['cloud_impact'], torch.nan)
    a, c = (restoration_loss(b['image'], b['clear'], b['valid_clear'], w).item() for w in (b['cloud_impact'], bad))
    assert a == c and math.isfinite(a)

def test_a_pixel_whose_cloud_is_unknown_counts_as_a_clear_one():
    b = seen(3)
    b['valid_cloud_impact'] = torch.zeros_like(b['valid_cloud_impact'])
    known, plain_mean = SegCR(('clear',)), SegCR(('clear',), cloud=0)
    out = {'clear': b['image']}
    assert known(out, b)['clear'].item() == pytest.approx(plain_mean(out, b)['clear'].item(), rel=1e-5)

@FEW
@given(t=st.floats(0, 1), p=st.floats(0, 1))
def test_the_impact_loss_is_least_at_the_truth_for_shares_and_for_masks(t, p):
    one = lambda v: torch.full((1, 1, 1, 1), v)
    x = one(p).requires_grad_()
    impact_loss(x, one(t)).backward()
    assert x.grad.isfinite().all() and abs(impact_loss(one(t), one(t)).item()) < 1e-5 and impact_loss(one(p), one(t)) >= -1e-5
    if abs(p - t) > .01: assert x.grad.item()*(p - t) > 0

@pytest.mark.parametrize('sky, least', [('thick', .97), ('broken', .97), ('haze', .9), ('shadow_only', .95), ('thin', .95)])
def test_two_images_tell_where_the_clouds_are_under_any_sky(sky, least):
    from rs_mtl.worlds.land import Land
    places = Land(6, 64, seed=3, cover=(.1, .7), sky=sky)
    b = {k: torch.stack([places[i][k] for i in range(6)]) for k in ('image', 'clear', 'cloud_impact')}
    s = ImpactScores(); s.update(weak_impact(b['image'], b['clear']), b['cloud_impact'], whole(b['image']))
    assert s.compute()['auroc'] >= least and s.compute()['mae'] < .12

def test_without_a_cloud_layer_the_two_images_are_asked_and_where_they_cannot_tell_nobody_is():
    b = without(seen(), 'cloud_impact')
    target, valid = cloud_target(b)
    assert torch.equal(valid, b['valid_image'] & b['valid_clear']) and torch.equal(target, weak_impact(b['image'], b['clear'], valid))
    assert cloud_target(without(b, 'clear')) == (None, None) and cloud_target(b | {'clear': b['clear'][:, :3]}) == (None, None)

def test_the_settings_of_an_objective_are_remembered_by_a_run(tmp_path):
    from rs_mtl.training.fit import fit
    class Some(torch.utils.data.Dataset):
        classes, name = ('a', 'b', 'c'), 'some'
        def __len__(self): return 4
        def __getitem__(self, i): return {k: v[0] for k, v in seen(i, 1).items()}
    def once(**kwargs): return fit(eyes(), Some(), Some(), objective=SegCR(**kwargs), epochs=1, batch_size=2, out=tmp_path, resume=True)
    run = once()
    assert {'loss_translation', 'loss_simulated', 'val_loss', 'val_clear_ssim', 'val_cloud_impact_auroc', 'val_miou_cloudy'} <= run.history[0].keys()
    with pytest.raises(ConfigError, match="'structure': 0.2"): once(structure=.3)
    with pytest.raises(ConfigError, match='drop_task'): fit(eyes(), Some(), objective=SegCR(), epochs=1, batch_size=2, on_nan='drop_task')

def test_labels_and_answers_on_other_grids_are_refused_in_words():
    out = {'mask': torch.zeros(1, 3, 20, 20)}
    with pytest.raises(ConfigError, match='label_scale'): SegCR(('mask',))(out, {'mask': torch.zeros(1, 6, 6, dtype=torch.long)})


# clouds over any data set


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sets')
    layouts.m3mcr(folder/'m3mcr')
    layouts.whu_opt_sar(folder/'whu', shape=(96, 96), places=['NH49E004021', 'NH49E005014', 'NH49E001013', 'NH49E001014'])
    return folder

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@FEW
@given(seed=st.integers(0, 99), epoch=st.integers(0, 3), i=st.integers(0, 2), fixed=st.booleans())
def test_a_cloud_is_decided_by_seed_epoch_and_place(seed, epoch, i, fixed):
    from rs_mtl.worlds.land import Land
    def one(seed, epoch, i):
        data = Clouded(Land(3, 24), cover=(.5, 1.), sky='thick', seed=seed, fixed=fixed)
        data.set_epoch(epoch)
        return data[i]
    here = one(seed, epoch, i)
    assert same(here, one(seed, epoch, i))
    other = one(seed, epoch + 1, i)
    assert torch.equal(here['cloud_impact'], other['cloud_impact']) == (fixed or bool((here['cloud_impact'] == 0).all() and (other['cloud_impact'] == 0).all()))

def test_workers_that_run_already_hear_of_the_next_epoch_and_draw_the_same_clouds():
    from torch.utils.data import DataLoader

    from rs_mtl.worlds.land import Land
    data = Clouded(Land(4, 24), cover=.7)
    loader = DataLoader(data, batch_size=2, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        apart = torch.cat([b['image'] for b in loader])
        assert torch.equal(apart, torch.stack([data[i]['image'] for i in range(4)]))

def test_clouds_over_a_public_set_without_any_and_its_gaps_stay_gaps(root):
    # labels are scored under the same clouds in every epoch, learned from under others
    how = dict(root=root/'whu', cover=(.6, .9), sky='broken', end_member=(.95,)*4, layers=['image', 'sar', 'mask', 'clear', 'cloud_impact'], size=64, splits={'train': ['NH49E004021', 'NH49E005014'], 'test': ['NH49E001014']}, val=0)
    train, test = (open_data('whu_opt_sar', s, **how) for s in ('train', 'test'))
    s = test[0]
    assert {'image', 'sar', 'mask', 'clear', 'cloud_impact'} <= s.keys() and s['cloud_impact'].max() > .5
    assert torch.equal(s['valid_image'], s['valid_clear']) and torch.equal((s['image'] != s['clear']).any(0) & (s['cloud_impact'][0] == 0), torch.zeros(64, 64, dtype=torch.bool))
    assert s['image'].max() > .85 > s['clear'].max()
    test.set_epoch(3); assert same(s, test[0])
    first = train[0]; train.set_epoch(1); assert not torch.equal(first['cloud_impact'], train[0]['cloud_impact'])
    assert train.classes == test.classes and 'clouds of broken' in train.treatment

def test_where_the_clear_image_has_no_data_nothing_is_drawn():
    from rs_mtl.worlds.land import Land
    class Torn(Land):
        def __getitem__(self, i):
            s = super().__getitem__(i)
            s['valid_clear'][:, :9] = False; s['clear'] = torch.where(s['valid_clear'], s['clear'], -7.)
            return s
    s = Clouded(Torn(1, 32), cover=1., sky='thick')[0]
    assert (s['image'][:, :9] == -7).all() and not s['cloud_impact'][:, :9].any() and not s['valid_image'][:, :9].any() and (s['image'][:, 9:] > 0).all()

def test_an_image_that_is_no_reflectance_and_a_data_set_without_image_are_refused(root):
    from rs_mtl.core import DataError
    class Bytes(torch.utils.data.Dataset):
        def __init__(self, layer): self.layer = layer
        def __len__(self): return 1
        def __getitem__(self, i): return {self.layer: torch.full((4, 16, 16), 120.)}
    with pytest.raises(DataError, match='reflectance'): Clouded(Bytes('image'))[0]
    with pytest.raises(DataError, match="an 'image' without clouds"): Clouded(Bytes('sar'))[0]

@pytest.mark.parametrize('world', ['land', 'city'])
def test_both_worlds_give_clear_images_and_the_truth_under_a_range_of_covers(world):
    data = open_data(world, 'train', n=6, size=64, cover=(0, .9), sky='broken')
    shares = [data[i]['cloud_impact'].gt(.1).float().mean().item() for i in range(6)]
    assert min(shares) < .35 and max(shares) > .5
    s = data[shares.index(max(shares))]
    assert s['image'].shape == s['clear'].shape and not torch.equal(s['image'], s['clear'])


# M3M-CR: 160 pixels of the image, 48 of the labels

def test_m3mcr_opens_with_radar_on_the_image_and_labels_on_their_own_pixels(root):
    how = run_options('m3mcr', root/'m3mcr', ['image', 'sar'], ['mask', 'clear', 'cloud_impact'], own_labels=True)
    native, data = open_dataset('m3mcr', root/'m3mcr', crop=160, n=4, seed=1), open_data('m3mcr', 'train', n=4, size=160, seed=1, **how)
    a, s = native[0], data[0]
    assert s['mask'].shape == (48, 48) and s['valid_mask'].shape == (1, 48, 48) and s['sar'].shape == (2, 160, 160) and s['cloud_impact'].shape == (1, 160, 160)
    assert torch.equal(a['mask'], s['mask']) and torch.equal(a['image'], s['image'])
    at = ((torch.arange(160) + .5)*.3).long()  # the radar pixel under each centre
    assert torch.equal(s['sar'], a['sar'][:, at][:, :, at]) and torch.equal(s['valid_sar'], a['valid_sar'][:, at][:, :, at])
    assert layers_of('m3mcr') == ('image', 'sar', 'mask', 'clear', 'cloud_impact')
    with pytest.raises(ConfigError, match="no layer 'radar'"): open_dataset('m3mcr', root/'m3mcr', one_grid=['radar'])

def test_segcr_learns_and_is_scored_on_the_label_grid(root):
    from rs_mtl.training.fit import evaluate, fit
    how = run_options('m3mcr', root/'m3mcr', ['image', 'sar'], ['mask', 'clear', 'cloud_impact'], own_labels=True)
    train, test = (open_data('m3mcr', s, n=2, size=160, **how) for s in ('train', 'test'))
    net = rs_mtl.create_model('segcr', bands=4, sar_bands=2, classes=6, encoder='resnet10t', width=8, full=8, detail=0, label_scale=.3)
    run = fit(net, train, objective=SegCR(net.tasks), epochs=1, steps=1, batch_size=2)
    values = evaluate(net, test, objective=SegCR(net.tasks), batch_size=1)['values']
    assert run.step == 1 and values['pixels'] == sum(int((s['mask'] != IGNORE).sum()) for s in (test[0], test[1]))
    assert 0 <= values['miou_cloudy'] <= 1 and math.isfinite(values['clear_psnr_cloudy']) and 0 <= values['cloud_impact_auroc'] <= 1


# runs

def command(*argv):
    import subprocess
    import sys
    return subprocess.run([sys.executable, '-c', 'import sys; from rs_mtl.apply.cli import main; sys.exit(main())', *map(str, argv)], capture_output=True, text=True, timeout=300)

def test_the_command_line_trains_segcr_on_the_country_with_clouds_and_prints_the_floor(tmp_path):
    import json
    said = command('train', 'segcr', '--data', 'land', '--quick', '--out', tmp_path/'run', '--options', 'width=8,full=8,detail=0')
    assert said.returncode == 0 and 'PSNR' in said.stdout, said.stderr
    told = json.loads((tmp_path/'run'/'metrics.json').read_text())
    assert {'miou', 'miou_cloudy', 'clear_psnr', 'clear_ssim_cloudy', 'cloud_impact_auroc', 'cloud_impact_on_clear'} <= told['values'].keys()
    assert told['floors']['clear_psnr'] > 5 and told['parameters']['tasks'] == 'mask,clear,cloud_impact' and told['parameters']['inputs'] == 'image,sar'
    assert 0 < told['radar_alone']['clear_psnr'] != told['floors']['clear_psnr'] and all(k in (tmp_path/'run'/'train.ipynb').read_text() for k in ('doing nothing', 'radar alone'))
    said = command('evaluate', tmp_path/'run', '--quick')
    assert said.returncode == 0, said.stderr
    assert 'miou_cloudy' in json.loads((tmp_path/'run'/'evaluate.json').read_text())['values']  # under clouds, as it was trained

def test_the_command_line_trains_and_evaluates_segcr_on_m3mcr(root, tmp_path):
    import json
    said = command('train', 'segcr', '--data', 'm3mcr', '--root', root/'m3mcr', '--quick', '--epochs', 1, '--n', 2, '--batch-size', 2, '--out', tmp_path/'run', '--encoder', 'resnet10t', '--options', 'width=8,full=8,detail=0')
    assert said.returncode == 0, said.stderr
    assert json.loads((tmp_path/'run'/'model.json').read_text())['config']['label_scale'] == .3
    said = command('evaluate', tmp_path/'run', '--root', root/'m3mcr', '--size', 160, '--n', 2)
    assert said.returncode == 0 and 'evaluate: mIoU' in said.stdout, said.stderr

def settled(run='train', **parameters):
    "What the first two cells of a run make of its parameters."
    import json
    from pathlib import Path
    cells = json.loads((Path(__file__).parents[1]/'nbs'/'runs'/f'{run}.ipynb').read_text())['cells']
    first, second = [''.join(c['source']) for c in cells if c['cell_type'] == 'code'][:2]
    names = {}
    exec(first, names); names.update(parameters); exec(second, names)
    return names

@pytest.mark.parametrize('twice', ['encoder=resnet18', 'bands=3', 'width=16,tasks=mask'])
def test_an_argument_with_a_parameter_of_its_own_is_no_option(twice):
    with pytest.raises(ConfigError, match='no parameter of their own'): settled(model='dllr', data='land', labels='1/4', options=twice)
    assert settled(model='dllr', data='land', labels='1/4', options='width=16,masking=true')['method'] == 'dllr'
    with pytest.raises(ConfigError, match='no parameter of their own'): settled('ablate', model='ctme', options=twice)

def test_a_run_of_segcr_knows_what_it_needs(root):
    land = settled(model='segcr', data='land')
    assert land['settings']['data_options'] == 'cover=(0,.9)'  # written down, for whoever scores the net later
    assert (land['inputs'], land['tasks'], land['how']) == ('image,sar', 'mask,clear,cloud_impact', {'cover': (0, .9)})
    assert settled(model='segcr', data='land', data_options='cover=.3,sky=(thin,haze)')['how'] == {'cover': .3, 'sky': ('thin', 'haze')}
    assert settled(model='segcr', data='land', tasks='mask')['tasks'] == 'mask'
    m3 = settled(model='segcr', data='m3mcr', root=str(root/'m3mcr'))
    assert (m3['size'], m3['tasks'], m3['how']['one_grid']) == (160, 'mask,clear,cloud_impact', ['image', 'clear', 'sar', 'cloud_impact'])
    whu = settled(model='segcr', data='whu_opt_sar', root=str(root/'whu'))
    assert whu['tasks'] == 'mask' and whu['how']['layers'] == ('image', 'sar', 'mask')
    assert settled(model='segcr', data='whu_opt_sar', root=str(root/'whu'), data_options='cover=(.2,.8)')['tasks'] == 'mask,clear,cloud_impact'
    plain_run = settled(model='plain', data='land')
    assert (plain_run['inputs'], plain_run['tasks'], plain_run['how']) == ('image', '', {})
    with pytest.raises(ConfigError, match='few labels'): settled(model='segcr', data='land', labels='1/4')
    with pytest.raises(ConfigError, match='method_options'): settled(model='plain', data='land', method_options='cloud=0')
