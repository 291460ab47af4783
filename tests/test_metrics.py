"Scores against what a person would compute by hand, loop by loop, and against scikit-learn."
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rs_mtl  # noqa: F401  before torchmetrics and scikit-learn
from rs_mtl.core import IGNORE, ConfigError, LabelError
from rs_mtl.training.metrics import HeightErrors, Scores, plain

pytestmark = pytest.mark.filterwarnings('ignore:The ``compute`` method')
FAST = settings(max_examples=30, deadline=None)
NAMES = ('road', 'roof', 'grass', 'tree', 'clutter')


def one_hot(pred, classes=len(NAMES)): return torch.nn.functional.one_hot(pred, classes).movedim(-1, 1).float()

def labels(seed, n=2, present=5):
    g = torch.Generator().manual_seed(seed)
    truth, pred = (torch.randint(0, present, (n, 9, 7), generator=g) for _ in range(2))
    return torch.where(torch.rand(n, 9, 7, generator=g) < .2, IGNORE, truth), pred


@FAST
@given(seed=st.integers(0, 10_000), present=st.integers(1, 5))
def test_class_scores_agree_with_scikit_learn_on_the_pixels_that_count(seed, present):
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score
    truth, pred = labels(seed, present=present)
    scores = Scores(['mask'], NAMES)
    for i in range(len(truth)): scores.update({'mask': one_hot(pred[i:i+1])}, {'mask': truth[i:i+1]})
    v = scores.compute()['values']
    t, p = truth[truth != IGNORE].numpy(), pred[truth != IGNORE].numpy()
    seen = sorted({*t.tolist(), *p.tolist()})
    assert v['confusion'] == confusion_matrix(t, p, labels=range(5)).tolist()
    assert v['oa'] == pytest.approx(accuracy_score(t, p))
    assert v['miou'] == pytest.approx(jaccard_score(t, p, labels=seen, average='macro', zero_division=0))
    assert v['mf1'] == pytest.approx(f1_score(t, p, labels=seen, average='macro', zero_division=0))
    kept = [c for c in seen if c != 4]
    assert v['miou_no_clutter'] == pytest.approx(jaccard_score(t, p, labels=kept, average='macro', zero_division=0))
    assert v['mf1_no_clutter'] == pytest.approx(f1_score(t, p, labels=kept, average='macro', zero_division=0))
    for c, name in enumerate(NAMES): assert math.isnan(v['iou'][name]) == (c not in seen)

@FAST
@given(seed=st.integers(0, 10_000))
def test_height_scores_agree_with_a_loop_over_pixels(seed):
    g = torch.Generator().manual_seed(seed)
    truth, pred = torch.rand(2, 1, 6, 5, generator=g)*4 - .5, torch.rand(2, 1, 6, 5, generator=g)*4
    pred[0, 0, 0, 0] = 0.
    valid, (mask, _) = torch.rand(2, 1, 6, 5, generator=g) < .7, labels(seed)
    mask = mask[:, :6, :5]
    scores = Scores(['height'], NAMES)
    for i in range(2): scores.update({'height': pred[i:i+1]}, {'height': torch.where(valid, truth, torch.nan)[i:i+1], 'valid_height': valid[i:i+1], 'mask': mask[i:i+1]})
    v = scores.compute()['values']
    pairs = [(float(p), float(t), int(m)) for p, t, ok, m in zip(pred.flatten(), truth.flatten(), valid.flatten(), mask.flatten(), strict=True) if ok]
    def mean(xs): xs = list(xs); return sum(xs)/len(xs) if xs else math.nan
    tall = [(max(p, .1), p, t) for p, t, _ in pairs if t > 1]
    expected = {'mae': mean(abs(p-t) for p, t, _ in pairs), 'rmse': mean((p-t)**2 for p, t, _ in pairs)**.5, 'bias': mean(p-t for p, t, _ in pairs),
        'rmse_tall': mean((p-t)**2 for _, p, t in tall)**.5, 'abs_rel': mean(abs(q-t)/t for q, _, t in tall), 'log10': mean(abs(math.log10(q/t)) for q, _, t in tall),
        **{f'delta{k}': mean(max(q/t, t/q) < 1.25**k for q, _, t in tall) for k in (1, 2, 3)}, 'pixels': len(pairs), 'pixels_tall': len(tall)}
    for name, value in expected.items(): assert v[f'height_{name}'] == pytest.approx(value, rel=1e-4, nan_ok=True), name
    for c, name in enumerate(NAMES):
        assert v['height_rmse_by_class'][name] == pytest.approx(mean((p-t)**2 for p, t, m in pairs if m == c)**.5, rel=1e-4, nan_ok=True)

@FAST
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 3))
def test_scores_are_pooled_so_the_batch_size_does_not_matter(seed, cut):
    truth, pred = labels(seed, n=4)
    height = torch.rand(4, 1, 9, 7, generator=torch.Generator().manual_seed(seed))*9
    whole, parts = (Scores(['mask', 'height'], NAMES) for _ in range(2))
    def feed(s, i, j): s.update({'mask': one_hot(pred[i:j]), 'height': height[i:j]}, {'mask': truth[i:j], 'height': height[i:j].flip(-1)})
    feed(whole, 0, 4); feed(parts, 0, cut); feed(parts, cut, 4)
    a, b = whole.compute()['values'], parts.compute()['values']
    for k in a:
        if isinstance(a[k], float): assert a[k] == pytest.approx(b[k], nan_ok=True), k
    assert a['confusion'] == b['confusion']

def test_a_score_over_zero_pixels_is_nan_and_none_in_json():
    scores = Scores(['mask', 'height', 'clear'], NAMES)
    x = torch.zeros(1, 1, 4, 4)
    scores.update({'mask': torch.zeros(1, 5, 4, 4), 'height': x, 'clear': x}, {'mask': torch.full((1, 4, 4), IGNORE), 'height': x, 'valid_height': x.bool(), 'clear': x, 'valid_clear': x.bool()})
    v = scores.compute()['values']
    for k in ('miou', 'mf1', 'oa', 'miou_no_clutter', 'height_mae', 'height_rmse', 'height_rmse_tall', 'height_abs_rel', 'height_delta1', 'clear_mae', 'clear_psnr'):
        assert math.isnan(v[k]), k
    assert v['pixels'] == v['height_pixels'] == 0
    assert json.loads(json.dumps(plain(v), allow_nan=False))['miou'] is None

def test_a_label_without_a_class_is_an_error_and_never_the_last_class():
    truth, pred = labels(0)
    truth[0, 0, 0] = 5
    with pytest.raises(LabelError, match=r'5 \(1 pixels\)'): Scores(['mask'], NAMES).update({'mask': one_hot(pred)}, {'mask': truth})

def test_a_net_with_other_classes_than_the_data_is_refused():
    truth, pred = labels(0, present=3)
    with pytest.raises(ConfigError, match='gives 3 classes'): Scores(['mask'], NAMES).update({'mask': one_hot(pred, 3)}, {'mask': truth})

def test_ignore_cannot_be_one_of_the_classes():
    with pytest.raises(ConfigError, match='256 class names'): Scores(['mask'], [str(i) for i in range(256)])

def test_a_net_that_answers_nan_scores_nan():
    h = HeightErrors()
    h.update(torch.full((1, 1, 2, 2), torch.nan), torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2).bool())
    assert h.compute()['mae'].isnan() and h.compute()['rmse'].isnan()

def test_the_protocol_stands_beside_the_values_and_names_only_what_was_scored():
    protocol = Scores(['height']).compute()['protocol']
    assert 'above 1 m' in protocol['height'] and 'mask' not in protocol and 'no_clutter' not in protocol and 'pooled' in protocol['pooling']
    assert 'no_clutter' in Scores(['mask'], NAMES).compute()['protocol']
