"Seeing through clouds: scores against torchmetrics, scikit-learn and scipy; losses, simulated clouds and runs against what must hold for any content."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rs_mtl  # noqa: F401  before torchmetrics and scikit-learn
from rs_mtl.core import IGNORE, ConfigError
from rs_mtl.training.losses import ssim, ssim_loss
from rs_mtl.training.metrics import Scores, plain
from rs_mtl.training.restoration import RestorationScores, spectral_angle
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
    found = restored(p, t, batch={'cloud_impact': impact})['by_cover']
    assert [found[c]['images'] for c in COVERS] == [2, 1, 1, 0, 2]
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
    assert found['spearman'].item() == pytest.approx(spearmanr(a, b).statistic, abs=1e-3)
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
    assert {f'{k}_{p}' for k in ('miou', 'oa', 'clear_psnr', 'clear_ssim', 'clear_sam', 'clear_mae') for p in ('cloudy', 'cloudfree')} | {'mask_by_cover', 'clear_by_cover'} == every['values'].keys() - few['values'].keys()
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
    assert v['oa_cloudy'] == pytest.approx(sum(hits[True])/len(hits[True])) and v['oa_cloudfree'] == pytest.approx(sum(hits[False])/len(hits[False]))

def test_a_task_that_the_batch_does_not_hold_is_named():
    out, batch = batch_of(2)
    with pytest.raises(ConfigError, match="without 'cloud_impact'"): Scores(['cloud_impact']).update(out, {'clear': batch['clear']})
