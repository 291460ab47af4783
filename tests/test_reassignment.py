"Pseudo-labels: what must not matter does not, what must be kept is kept, and no class is lost."
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_mtl.core import IGNORE, ConfigError, DataError, LabelError
from rs_mtl.labels.assigners import ASSIGNERS, create_assigner
from rs_mtl.labels.reassignment import SLACK, Memory, Reassigner, regions, spread, tile_prior, vetoed

C = 4


def scene(b=3, size=40, seed=0, noise=1., c=C):
    "Patches of classes, and logits that mostly know them."
    g = torch.Generator().manual_seed(seed)
    truth = F.interpolate(torch.randint(0, c, (b, 1, 5, 5), generator=g).float(), (size, size)).long()[:, 0]
    return truth, 2.5*F.one_hot(truth, c).permute(0, 3, 1, 2) + noise*torch.randn(b, c, size, size, generator=g)


def taught(name='reassign', **options):
    a = create_assigner(name, C, **options)
    a.observe(*scene(seed=9))
    return a


def same(a, b):
    return torch.equal(a.labels, b.labels) and torch.equal(a.confidence, b.confidence) and torch.equal(a.plan, b.plan) and a.kept == b.kept


@pytest.mark.parametrize('name', ASSIGNERS)
def test_the_same_comes_out_twice_and_no_global_randomness_is_used(name):
    z, state = scene()[1], torch.get_rng_state()
    assert same(taught(name)(z), taught(name)(z))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('name', ASSIGNERS)
def test_what_comes_out_has_its_form(name):
    truth, z = scene()
    valid = torch.ones(3, 1, 40, 40, dtype=torch.bool); valid[1, :, :, 20:] = False
    out = taught(name)(z, valid)
    assert out.labels.shape == truth.shape and out.labels.dtype == torch.int64
    assert (out.labels[~valid[:, 0]] == IGNORE).all() and (out.confidence[~valid[:, 0]] == 0).all()
    assert torch.allclose(out.plan.sum(1), valid[:, 0].float(), atol=1e-5)
    assert out.histogram.sum() == pytest.approx(1) and 0 < out.kept <= 1
    told = out.labels != IGNORE
    assert torch.equal(out.plan.argmax(1)[told], out.labels[told])
    assert out.kept == pytest.approx(float(told.sum()/valid.sum()))


@pytest.mark.parametrize('name', ASSIGNERS)
@pytest.mark.parametrize('rubbish', [float('nan'), float('inf'), 1e30])
def test_pixels_that_are_not_valid_have_no_influence(name, rubbish):
    _, z = scene()
    valid = torch.ones(3, 1, 40, 40, dtype=torch.bool); valid[0, :, 10:30] = False; valid[2] = False
    a, b = taught(name), taught(name)
    spoilt = torch.where(valid, z, rubbish)
    for _ in range(2): clean, bad = a(z, valid), b(spoilt, valid)
    assert same(clean, bad)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_ignored_labels_have_no_influence_on_what_is_observed():
    truth, z = scene(seed=9)
    hole = torch.zeros_like(truth, dtype=torch.bool); hole[:, 5:20] = True
    labels = torch.where(hole, IGNORE, truth)
    a, b = Reassigner(C), Reassigner(C)
    a.observe(labels, z); b.observe(labels, torch.where(hole[:, None], float('nan'), z))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_a_number_that_is_none_is_named_where_it_counts():
    _, z = scene(); z[1, 2, 7, 3] = float('nan')
    with pytest.raises(DataError, match='image 1.*row 7, column 3'): Reassigner(C)(z)


def test_classes_have_no_order():
    order = torch.tensor([2, 0, 3, 1])
    truth, z = scene(seed=9)
    a, b = Reassigner(C), Reassigner(C)
    a.observe(truth, z); b.observe(torch.argsort(order)[truth], z[:, order])
    x = scene(seed=1, noise=1.5)[1]
    one, two = a(x), b(x[:, order])
    assert (one.labels == order[two.labels]).float().mean() > .9995      # a tie may go either way
    assert torch.allclose(one.plan[:, order], two.plan, atol=2e-2)
    assert torch.allclose(a.prior[order], b.prior, atol=1e-9) and torch.equal(a.excess[order], b.excess)


@pytest.mark.parametrize('name', ASSIGNERS)
def test_a_state_dict_goes_on_bit_by_bit(name, tmp_path):
    a = taught(name)
    a(scene(seed=1)[1])
    torch.save(a.state_dict(), tmp_path/'a.pt')
    b = create_assigner(name, C)
    b.load_state_dict(torch.load(tmp_path/'a.pt', weights_only=True))
    for seed in (2, 3):
        truth, z = scene(seed=seed)
        a.observe(truth, z); b.observe(truth, z)
        assert same(a(z), b(z))


def test_the_state_is_needed_to_go_on():
    a = taught(memory=4); a(scene(seed=1, noise=2)[1] + torch.tensor([3., 0, 0, 0])[:, None, None])
    z = scene(seed=2, noise=2)[1]
    assert not same(a(z), taught()(z))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_only_rounded(dtype):
    _, z = scene()
    low, exact, full = taught()(z.to(dtype)), taught()(z.to(dtype).float()), taught()(z)
    assert same(low, exact) and low.plan.dtype == torch.float32
    assert (low.labels == full.labels).float().mean() > .99


@pytest.mark.parametrize('name', ASSIGNERS)
def test_autocast_changes_nothing(name):
    z = scene()[1]
    plain = taught(name)(z)
    with torch.autocast('cpu', dtype=torch.bfloat16): cast = taught(name)(z)
    assert same(plain, cast)


def test_no_gradient_leaks_and_the_input_stays():
    z = scene()[1].requires_grad_(); before = z.detach().clone()
    out = taught()(z)
    assert not out.plan.requires_grad and not out.confidence.requires_grad and torch.equal(z.detach(), before)


@pytest.mark.parametrize('name', ASSIGNERS)
def test_extreme_logits_stay_finite(name):
    z = scene()[1]*3000
    out = taught(name)(z)
    assert out.plan.isfinite().all() and out.confidence.isfinite().all()


@pytest.mark.parametrize('levels', ['multi', 'pixel'])
def test_a_class_that_is_absent_is_not_invented(levels):
    truth, z = scene(noise=.5)
    z[:, 3] = -12.; truth = truth.clamp(max=2)
    a = Reassigner(C, levels); a.observe(*scene(seed=9))       # there it does occur
    for _ in range(5): out = a(z)
    assert out.histogram[3] < .001


def test_one_class():
    a = Reassigner(1); a.observe(torch.zeros(2, 8, 8, dtype=torch.long), torch.randn(2, 1, 8, 8))
    out = a(torch.randn(2, 1, 8, 8))
    assert (out.labels == 0).all() and torch.allclose(out.plan, torch.ones(()))


@pytest.mark.parametrize('name', ASSIGNERS)
def test_nothing_valid_changes_no_state(name):
    a = taught(name)
    before = copy.deepcopy(a.state_dict())
    out = a(scene()[1], torch.zeros(3, 1, 40, 40, dtype=torch.bool))
    assert (out.labels == IGNORE).all() and not out.plan.any() and out.kept == 0 and not out.histogram.any()
    for k, v in a.state_dict().items(): assert torch.equal(v, before[k]), k


def test_an_empty_start_is_no_error_and_close_to_argmax():
    truth, z = scene()
    out = Reassigner(C, region=0.)(z)
    assert (out.labels == z.argmax(1)).float().mean() > .97
    assert Reassigner(C)(z[:0]).labels.shape == (0, 40, 40)


@pytest.mark.parametrize('size', [(1, 1), (3, 50), (17, 9), (64, 64)])
def test_any_size(size):
    z = torch.randn(2, C, *size, generator=torch.Generator().manual_seed(0))
    assert taught()(z).labels.shape == (2, *size)


def test_a_collapse_cannot_carry_the_prior_away_and_is_forgotten_within_the_memory():
    a = taught(floor=.1)
    anchor = a.anchor.clone()
    all_zero = torch.zeros(4, C, 16, 16); all_zero[:, 0] = 30.
    for _ in range(60): a(all_zero)
    assert a.moving[1:].max() < 1e-3                                     # it did follow
    assert (a.prior >= .1*anchor - 1e-12).all() and a.prior.sum() == pytest.approx(1)
    for i in range(a.horizon//2):                                       # three tiles each
        truth, z = scene(seed=i)
        again = a(z).labels
        assert len(again.unique()) == C                                 # no class is lost meanwhile
    assert (again == truth).float().mean() > (z.argmax(1) == truth).float().mean() - .01


def test_the_anchor_is_laplace():
    a = Reassigner(3, laplace=.3)
    assert torch.allclose(a.anchor, torch.full((3,), 1/3, dtype=torch.float64))
    a.observe(torch.tensor([[[0, 0], [1, IGNORE]]]))
    assert torch.allclose(a.anchor, torch.tensor([.6, .35, .1], dtype=torch.float64)/1.05)


@pytest.mark.parametrize('share', [0., .1])
def test_a_tile_of_one_class_is_left_alone(share):
    "Where a prior that must be met ruins."
    known, z = scene(8, seed=5, noise=1.2)
    truth = torch.zeros(2, 40, 40, dtype=torch.long); truth[:, :int(40*share)] = 1
    x = 2.5*F.one_hot(truth, C).permute(0, 3, 1, 2) + 1.2*torch.randn(2, C, 40, 40, generator=torch.Generator().manual_seed(3))
    right = {}
    for name in ('argmax', 'hard', 'reassign'):
        a = create_assigner(name, C); a.observe(known, z)
        right[name] = float((a(x).labels == truth).float().mean())
    assert right['reassign'] > right['argmax'] - .005 and right['hard'] < .5


def test_confidence_thresholds():
    truth, z = scene(noise=1.5)
    loose, strict = taught()(z), taught(threshold=.8)(z)
    kept = strict.labels != IGNORE
    assert torch.equal(kept, loose.confidence >= .8) and .05 < strict.kept < .95
    assert (strict.labels == truth)[kept].float().mean() > (loose.labels == truth).float().mean() + .02


def test_reassigned_before_mixing_is_not_reassigned_after():
    "Labels of a mixture come from the places it was made of."
    (_, z), (_, y) = scene(2, seed=1, noise=1.5), scene(2, seed=2, noise=1.5)
    box = torch.zeros(1, 1, 40, 40, dtype=torch.bool); box[..., 7:23, 11:30] = True
    a, b = taught(), taught()
    both = a(torch.cat([z, y]))
    before = torch.where(box[:, 0], both.labels[2:], both.labels[:2])
    after = b(torch.where(box, y, z)).labels
    inside = torch.zeros(40, 40, dtype=torch.bool); inside[16:24, 16:24] = True
    assert torch.equal(before[:, ~box[0, 0]], both.labels[:2][:, ~box[0, 0]])
    assert not torch.equal(before, after)


def test_regions_respect_holes_and_boundaries():
    s = torch.full((1, 2, 16, 16), .5).log(); s[:, 0, :, 4:] = 0.; s[:, 1, :, 4:] = -20.
    s[:, 0, :, :4], s[:, 1, :, :4] = -20., 0.
    seen = torch.ones(1, 16, 16, dtype=torch.bool); seen[:, 5:, :] = False
    mean, some, uniform = regions(s, seen, 8)
    assert some.tolist() == [[[True, True], [False, False]]]
    assert uniform[0, 0, 0].tolist() == [0., 1.] and mean.isfinite().all()
    assert mean[0, :, 0, 1].tolist() == pytest.approx([0., -20.]) and mean[0, :, 0, 0].tolist() == pytest.approx([-10., -10.])      # of the five rows that count


def test_samples_are_valid_and_all_over():
    g = torch.Generator().manual_seed(0)
    seen = torch.rand(3, 256, 256, generator=g) < .3; seen[2] = False
    at, weight = spread(seen, 256)
    assert seen[:2].flatten(1).gather(1, at[:2]).all() and not weight[2].any()
    assert weight[0, 0] == pytest.approx(.3, abs=.01)
    for tile in at[:2]:
        assert len(tile.unique()) == 256
        assert len((tile % 256//16).unique()) == 16 and len((tile//256//16).unique()) == 16     # all columns and rows of blocks


def test_the_memory_forgets_the_oldest():
    m = Memory(3, 2, 1)
    for k in range(5): m.push(torch.full((1, 2, 1), float(k)), torch.ones(1, 2))
    assert sorted(m.rows[:, 0, 0].tolist()) == [2, 3, 4]
    m.push(torch.arange(7.).view(7, 1, 1).expand(7, 2, 1), torch.ones(7, 2))
    assert sorted(m.rows[:, 0, 0].tolist()) == [4, 5, 6]


def test_the_mix_of_a_tile_is_found():
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(1, 4000, generator=g) < .9).long()
    x = (2*y - 1.) + 1.2*torch.randn(1, 4000, generator=g)
    s = torch.stack([-2*x/1.44/2, 2*x/1.44/2], -1).log_softmax(-1)          # calibrated for a half each
    w = tile_prior(s, torch.ones(1, 4000), torch.tensor([.5, .5]), hold=1e-3, rounds=200)
    assert float(w[0, 1]) == pytest.approx(.9, abs=.03) and s.exp().mean(1)[0, 1] < .82


@pytest.mark.parametrize('bad', [dict(levels='all'), dict(eps=0), dict(strength=0), dict(memory=0), dict(cell=1), dict(region=2), dict(floor=0), dict(tile=2), dict(threshold=2), dict(laplace=0)])
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))): Reassigner(C, **bad)


def test_bad_input_is_refused():
    a = Reassigner(C); z = scene()[1]
    with pytest.raises(LabelError, match='7'): a.observe(torch.full((1, 4, 4), 7))
    with pytest.raises(ConfigError, match='labels of shape'): a.observe(torch.zeros(4, 4, dtype=torch.long))
    with pytest.raises(ConfigError, match='logits of shape'): a(z[:, :2])
    with pytest.raises(ConfigError, match='logits of shape'): a(z.long())
    with pytest.raises(ConfigError, match='valid of shape'): a(z, torch.ones(3, 1, 40, 39, dtype=torch.bool))
    with pytest.raises(ConfigError, match='valid of shape'): a(z, torch.ones(3, 1, 40, 40))
    with pytest.raises(ConfigError, match='logits'): a.observe(scene()[0], z[..., :20])


# ---- the guard ----

@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(1, 9))
def test_no_class_rises_that_is_given_too_often_and_all_others_do_as_they_would(seed, classes):
    g = torch.Generator().manual_seed(seed)
    offset, excess, given = 3*torch.randn(4, classes, generator=g, dtype=torch.float64), .2*torch.randn(classes, generator=g, dtype=torch.float64), torch.rand(classes, generator=g, dtype=torch.float64)
    given /= given.sum()
    found, wished = vetoed(offset, excess, given), offset - (offset*given).sum(1, keepdim=True)
    assert (found[:, excess >= 2*SLACK] <= 0).all()
    free = (excess <= SLACK) | (wished <= 0)
    torch.testing.assert_close(found[free], wished[free])
    assert ((found >= 0) == (wished >= 0))[wished > 0].all() and (found <= wished + 1e-12).all()
    order = torch.randperm(classes, generator=g)
    torch.testing.assert_close(vetoed(offset[:, order], excess[order], given[order]), found[:, order])

def over_eager(n: int, seed: int):
    "A scene, and logits of a net that likes class 2 too much."
    truth, z = scene(n, seed=seed)
    return truth, z + 1.5*F.one_hot(torch.tensor(2), C)[:, None, None]

def listening(**options):
    "One that has seen this net's answers on labelled tiles, of an unusual mix."
    a = Reassigner(C, **options)
    truth, z = over_eager(4, 20)
    mostly_one = torch.where((truth == 1) | (torch.arange(truth.shape[-1]) < 10), truth, IGNORE)
    a.observe(mostly_one, z)
    return a

def test_a_class_that_is_given_too_often_is_not_given_more():
    a, free = listening(), listening(guard=False)
    truth, z = (torch.stack(x) for x in zip(*(over_eager(8, i) for i in range(8))))
    got, without = (torch.stack([way(x).labels for x in z]) for way in (a, free))
    assert a.excess.argmax() == 2 and a.excess[2] > 2*SLACK
    assert (got == 2).sum() < min((without == 2).sum(), (z.argmax(2) == 2).sum())
    right = lambda x: float((x == truth).float().mean())
    assert right(got) > max(right(z.argmax(2)), right(without)) + .003

def test_the_guard_compares_the_same_pixels_and_needs_the_answers():
    truth, z = scene(seed=5)
    labels_only, free = Reassigner(C), Reassigner(C, guard=False)
    for a in (labels_only, free): a.observe(truth)
    assert same(labels_only(z), free(z)) and not labels_only.excess.any()
    a = Reassigner(C, laplace=1e-6)
    known = truth.clone(); known[:, 20:] = IGNORE
    a.observe(known, z)
    want = [((z.argmax(1) == k) & (known != IGNORE)).sum()/(known == k).sum() for k in range(C)]
    torch.testing.assert_close(a.excess.exp(), torch.stack(want).double(), atol=1e-4, rtol=0)
    a.observe(torch.full_like(truth, IGNORE), z)                            # nothing to compare changes nothing
    torch.testing.assert_close(a.excess.exp(), torch.stack(want).double(), atol=1e-4, rtol=0)

def test_what_labelled_tiles_said_fades_with_new_ones():
    a, eager = Reassigner(C, memory=8), over_eager(4, 20)
    a.observe(*eager)
    early = a.excess[2]
    for i in range(20): a.observe(*scene(4, seed=i, noise=.1))
    assert early > 2*SLACK and a.excess.abs().max() < .01
