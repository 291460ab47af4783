"Losses over random shapes, masks and values: what is hidden counts for nothing, and gradients are what finite differences say."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_mtl.core import IGNORE, ConfigError, LabelError
from rs_mtl.training.losses import HEIGHT_KINDS, Objective, charbonnier, check_labels, cross_entropy, dice, height_loss, l1, mask_loss, masked_mean

FAST = settings(max_examples=40, deadline=None)
GARBAGE = st.sampled_from([float('nan'), float('inf'), -float('inf'), -9999., 3.4e38])


def gen(seed: int) -> torch.Generator: return torch.Generator().manual_seed(seed)

def case(seed: int, share: float, channels: int = 1):
    "A prediction, a target and a random validity of that share, of a random size."
    g = gen(seed)
    b, h, w = (int(torch.randint(1, hi, (), generator=g)) for hi in (4, 20, 20))
    pred, truth = (torch.rand(b, channels, h, w, generator=g, dtype=torch.float64)*20 for _ in range(2))
    return pred, truth, torch.rand(b, 1, h, w, generator=g) < share

def gradient(loss, pred, *args, **kwargs):
    pred = pred.clone().requires_grad_()
    value = loss(pred, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value, pred)[0]


@FAST
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), garbage=GARBAGE)
def test_a_mean_over_valid_pixels_does_not_see_the_others(seed, share, garbage):
    x, _, valid = case(seed, share)
    assert float(masked_mean(torch.where(valid, x, garbage), valid)) == pytest.approx(float(x[valid].mean()) if valid.any() else 0.)

REGRESSIONS = {**{f'height {k}': (lambda p, t, v, k=k: height_loss(p, t, v, kind=k)) for k in HEIGHT_KINDS}, 'charbonnier': charbonnier, 'l1': l1}

@pytest.mark.parametrize('name', REGRESSIONS)
@FAST
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), garbage=GARBAGE)
def test_what_lies_under_an_invalid_pixel_changes_neither_loss_nor_gradient(name, seed, share, garbage):
    loss = REGRESSIONS[name]
    pred, truth, valid = case(seed, share)
    value, grad = gradient(loss, pred, truth, valid)
    spoilt_value, spoilt_grad = gradient(loss, torch.where(valid, pred, garbage), torch.where(valid, truth, garbage), valid)
    assert torch.isfinite(spoilt_value) and torch.isfinite(spoilt_grad).all()
    assert torch.equal(value, spoilt_value) and torch.equal(grad, spoilt_grad)
    assert (spoilt_grad[~valid.expand_as(pred)] == 0).all()
    assert value > 0 or not valid.any()

@pytest.mark.parametrize('name', REGRESSIONS)
def test_a_height_model_without_one_valid_pixel_gives_exactly_zero_loss_and_gradient(name):
    pred, truth, valid = case(1, 0.)
    value, grad = gradient(REGRESSIONS[name], pred, torch.full_like(truth, torch.nan), valid)
    assert value == 0 and (grad == 0).all()

@pytest.mark.parametrize('loss', [cross_entropy, dice, mask_loss])
def test_labels_that_are_all_ignore_give_exactly_zero_loss_and_gradient(loss):
    value, grad = gradient(loss, torch.randn(2, 5, 7, 9, generator=gen(0)), torch.full((2, 7, 9), IGNORE))
    assert value == 0 and (grad == 0).all()

@pytest.mark.parametrize('loss', [cross_entropy, dice, mask_loss])
@FAST
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 9), share=st.floats(0, 1))
def test_ignored_labels_and_invalid_pixels_mean_the_same(loss, seed, classes, share):
    g = gen(seed)
    logits, mask = torch.randn(2, classes, 6, 5, generator=g), torch.randint(0, classes, (2, 6, 5), generator=g)
    valid = torch.rand(2, 1, 6, 5, generator=g) < share
    by_label, grad = gradient(loss, logits, torch.where(valid[:, 0], mask, IGNORE))
    by_mask, grad2 = gradient(loss, logits, mask, valid)
    assert torch.equal(by_label, by_mask) and torch.equal(grad, grad2) and torch.isfinite(by_label)
    assert (grad[~valid.expand_as(grad)] == 0).all()

@FAST
@given(seed=st.integers(0, 10_000), share=st.floats(.2, 1))
def test_cross_entropy_and_dice_agree_with_loops_over_pixels(seed, share):
    g = gen(seed)
    logits, mask = torch.randn(1, 3, 4, 4, generator=g), torch.randint(0, 3, (1, 4, 4), generator=g)
    mask = torch.where(torch.rand(1, 4, 4, generator=g) < share, mask, IGNORE)
    p, seen = logits.softmax(1)[0], [(i, j) for i in range(4) for j in range(4) if mask[0, i, j] != IGNORE]
    if not seen: return
    ce = -sum(float(p[mask[0, i, j], i, j].log()) for i, j in seen)/len(seen)
    terms = []
    for c in {int(mask[0, i, j]) for i, j in seen}:
        inter = sum(float(p[c, i, j]) for i, j in seen if mask[0, i, j] == c)
        size = sum(float(p[c, i, j]) for i, j in seen) + sum(int(mask[0, i, j] == c) for i, j in seen)
        terms.append(1 - 2*inter/size)
    assert float(cross_entropy(logits, mask)) == pytest.approx(ce, rel=1e-4)
    assert float(dice(logits, mask)) == pytest.approx(sum(terms)/len(terms), rel=1e-4, abs=1e-6)

def test_class_weights_are_a_weighted_mean():
    logits, mask = torch.randn(1, 3, 5, 5, generator=gen(0)), torch.randint(0, 3, (1, 5, 5), generator=gen(1))
    weight = torch.tensor([1., 2., 5.])
    expected = torch.nn.functional.cross_entropy(logits, mask, weight)
    assert torch.allclose(cross_entropy(logits, mask, weight=weight), expected)
    assert cross_entropy(logits, torch.full_like(mask, IGNORE), weight=weight) == 0


def differences(loss, x, eps=1e-3):
    "Central finite differences of a loss that computes in float32."
    g = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x).view(-1); step[i] = eps
        g.view(-1)[i] = (loss(x + step.view_as(x)) - loss(x - step.view_as(x)))/(2*eps)
    return g

@pytest.mark.parametrize('name', ['height smooth_l1', 'charbonnier'])
def test_regression_gradients_agree_with_finite_differences(name):
    g = gen(3)
    pred, truth = torch.rand(1, 1, 4, 4, generator=g)*3, torch.rand(1, 1, 4, 4, generator=g)*3
    valid = torch.rand(1, 1, 4, 4, generator=g) < .7
    def loss(p): return REGRESSIONS[name](p, truth, valid)
    assert torch.allclose(gradient(loss, pred)[1], differences(loss, pred), atol=2e-3)

@pytest.mark.parametrize('loss', [cross_entropy, dice, mask_loss])
def test_class_gradients_agree_with_finite_differences(loss):
    logits, mask = torch.randn(1, 3, 3, 3, generator=gen(4)), torch.randint(0, 3, (1, 3, 3), generator=gen(5))
    mask[0, 0, 0] = IGNORE
    assert torch.allclose(gradient(loss, logits, mask)[1], differences(lambda x: loss(x, mask), logits), atol=2e-3)


@FAST
@given(classes=st.integers(1, 255), value=st.integers(-300, 1000))
def test_a_class_index_that_does_not_exist_is_named_with_its_count_before_the_gpu_sees_it(classes, value):
    mask = torch.zeros(2, 3, 3, dtype=torch.int64)
    mask[1, 1, :2] = value
    if 0 <= value < classes or value == IGNORE:
        assert torch.equal(check_labels(mask, classes), mask)
    else:
        with pytest.raises(LabelError, match=rf'tile_3.* {value} \(2 pixels\)'): check_labels(mask, classes, "'tile_3'")
        with pytest.raises(LabelError): cross_entropy(torch.zeros(2, classes, 3, 3), mask)

def test_ignore_inside_the_classes_is_refused():
    with pytest.raises(ConfigError, match='256 classes'): cross_entropy(torch.zeros(1, 256, 2, 2), torch.zeros(1, 2, 2).long())


@pytest.mark.parametrize('weighting', ['fixed', 'uncertainty'])
def test_a_batch_without_heights_trains_the_other_task_and_leaves_the_height_weight_alone(weighting):
    out = {'mask': torch.randn(2, 3, 8, 8, requires_grad=True), 'height': torch.rand(2, 1, 8, 8, requires_grad=True)}
    batch = {'mask': torch.randint(0, 3, (2, 8, 8)), 'height': torch.full((2, 1, 8, 8), torch.nan), 'valid_height': torch.zeros(2, 1, 8, 8).bool()}
    objective = Objective(('mask', 'height'), weighting=weighting)
    losses = objective(out, batch)
    losses['total'].backward()
    assert losses['height'] == 0 and losses['total'].isfinite()
    assert (out['height'].grad == 0).all() and (out['mask'].grad != 0).any()
    if weighting == 'uncertainty':
        assert objective.log_variance.grad[1] == 0 and objective.log_variance.grad[0] != 0

@pytest.mark.parametrize('tasks', [('a',), ('a', 'b'), ('a', 'b', 'c')])
def test_a_task_whose_loss_stays_zero_gets_no_infinite_weight(tasks):
    objective = Objective(tasks, weighting='uncertainty', losses={t: (lambda p, t, v: (p*0).sum()) for t in 'abc'})
    out = {t: torch.zeros(1, requires_grad=True) for t in tasks}
    opt = torch.optim.SGD(objective.parameters(), 100.)
    for _ in range(200):
        opt.zero_grad()
        objective(out, out)['total'].backward()
        opt.step()
    for t in tasks:
        assert -5 <= float(objective.log_var(t).detach()) <= 5
    assert objective.log_variance.isfinite().all()
    assert objective(out, out)['total'].isfinite()

def test_the_same_gradient_from_two_tasks_keeps_their_weights_equal():
    objective = Objective(('a', 'b'), weighting='uncertainty', losses=dict.fromkeys('ab', lambda p, t, v: p.square().mean()))
    out = {t: torch.ones(3) for t in 'ab'}
    opt = torch.optim.Adam(objective.parameters(), .1)
    for _ in range(50):
        opt.zero_grad(); objective(out, out)['total'].backward(); opt.step()
    assert objective.log_variance[0] == objective.log_variance[1] and objective.log_variance.isfinite().all()

@pytest.mark.parametrize('weighting', ['fixed', 'uncertainty'])
def test_all_four_tasks_train_together(weighting):
    maps = {t: torch.rand(2, 1, 8, 8, requires_grad=True) for t in ('height', 'clear', 'cloud_impact')}
    out = maps | {'mask': torch.randn(2, 3, 8, 8, requires_grad=True)}
    batch = {t: torch.rand(2, 1, 8, 8) for t in maps} | {'mask': torch.randint(0, 3, (2, 8, 8))}
    losses = Objective(out, weighting=weighting)(out, batch)
    losses['total'].backward()
    assert set(losses) == {'mask', 'height', 'clear', 'cloud_impact', 'total'} and all(o.grad.abs().sum() > 0 for o in out.values())

def test_an_auxiliary_output_is_brought_to_full_size_and_counts_with_its_weight():
    g = gen(0)
    mask, aux = torch.randint(0, 3, (1, 8, 8), generator=g), torch.randn(1, 3, 2, 2, generator=g)
    out, batch = {'mask': torch.randn(1, 3, 8, 8, generator=g)}, {'mask': mask}
    objective = Objective(['mask'], aux=.25)
    full = torch.nn.functional.interpolate(aux, (8, 8), mode='bilinear', align_corners=False)
    both = objective(out | {'aux_mask': aux}, batch)['mask']
    assert torch.allclose(both, mask_loss(out['mask'], mask) + .25*mask_loss(full, mask))
    assert objective(out | {'aux_masks_of_others': aux}, batch)['mask'] < both

@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(tasks=()), 'no task'), (dict(tasks=['depth']), "'depth'"), (dict(tasks=['mask'], weights={'height': 1}), "'height'"),
    (dict(tasks=['mask'], weights={'mask': float('nan')}), 'nan'), (dict(tasks=['mask'], weights={'mask': -1}), '-1'), (dict(tasks=['mask'], weighting='gradnorm'), 'gradnorm')])
def test_an_objective_that_makes_no_sense_is_refused_at_construction(kwargs, message):
    with pytest.raises(ConfigError, match=message): Objective(**kwargs)
