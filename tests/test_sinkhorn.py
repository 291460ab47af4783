"The plan against POT, linear and convex programmes, and what must hold whatever the numbers are."
import os
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from rs_mtl.core import IGNORE, ConfigError, DataError
from rs_mtl.labels import sinkhorn as module
from rs_mtl.labels.sinkhorn import Equal, NotConverged, Pixels, Relaxed, Upper, planar, sinkhorn, solve_flow, strided, visit

FAST = settings(max_examples=25, deadline=None)
SEEDS, EPS = st.integers(0, 10_000), st.sampled_from([.02, .05, .3, 1., 5.])


def problem(seed: int, n: int = 0, classes: int = 0, scale: float = 1., dtype: torch.dtype = torch.float64):
    "Scores (N,C) and a prior, of random size unless it is given."
    g = torch.Generator().manual_seed(seed)
    n = n or int(torch.randint(1, 300, (), generator=g))
    classes = classes or int(torch.randint(1, 9, (), generator=g))
    scores = scale*(torch.randn(n, classes, generator=g, dtype=torch.float64) + torch.randn(classes, generator=g, dtype=torch.float64))
    prior = torch.rand(classes, generator=g, dtype=torch.float64) + .02
    return scores.to(dtype), prior/prior.sum()

def score(plan, scores, weight=None):
    w = torch.full((len(scores),), 1/len(scores), dtype=torch.float64) if weight is None else weight/weight.sum()
    return float((w[:, None]*plan.assignment*scores).sum())


# ---- oracles ----

def pot():
    return pytest.importorskip('ot')

@pytest.mark.parametrize('eps', [.05, .3, 2.])
@pytest.mark.parametrize('seed', range(4))
def test_equal_shares_give_the_plan_of_pot(seed, eps):
    scores, prior = problem(seed, n=60, classes=4)
    n = len(scores)
    want = pot().bregman.sinkhorn_log(np.full(n, 1/n), prior.numpy(), -scores.numpy(), eps, numItermax=200_000, stopThr=1e-11)
    np.testing.assert_allclose(sinkhorn(scores, prior, eps, 1e-10).assignment, n*want, atol=1e-6)

@pytest.mark.parametrize('seed', range(3))
def test_weights_of_pixels_are_the_first_marginal_of_pot(seed):
    scores, prior = problem(seed, n=50, classes=5)
    weight = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + .1
    want = pot().bregman.sinkhorn_log((weight/weight.sum()).numpy(), prior.numpy(), -scores.numpy(), .2, numItermax=100_000, stopThr=1e-11)
    np.testing.assert_allclose((weight/weight.sum())[:, None]*sinkhorn(scores, prior, .2, 1e-10, weight=weight).assignment, want, atol=1e-8)

@pytest.mark.parametrize('strength', [.02, .3, 5.])
@pytest.mark.parametrize('eps', [.1, 1.])
def test_relaxed_shares_give_the_plan_of_pot(eps, strength):
    scores, prior = problem(1, n=50, classes=5)
    want = pot().unbalanced.sinkhorn_unbalanced(np.full(50, 1/50), prior.numpy(), -scores.numpy(), eps, (np.inf, strength), method='sinkhorn_stabilized', reg_type='entropy', numItermax=100_000, stopThr=1e-13)
    np.testing.assert_allclose(sinkhorn(scores, prior, eps, 1e-10, marginal='kl', strength=strength).assignment, 50*want, atol=2e-6)

def programme(scores, prior, upper=None):
    "The best score of a plan with these shares, or with at most `upper` times these, by a linear programme."
    n, c = scores.shape
    rows, cols = np.kron(np.eye(n), np.ones(c)), np.kron(np.ones(n), np.eye(c))/n
    kind = dict(A_eq=np.vstack([rows, cols]), b_eq=np.r_[np.ones(n), prior]) if upper is None else dict(A_eq=rows, b_eq=np.ones(n), A_ub=cols, b_ub=upper*prior.numpy())
    found = linprog(-scores.numpy().ravel()/n, bounds=(0, None), **kind)
    assert found.status == 0
    return -found.fun, found.x.reshape(n, c)

@pytest.mark.parametrize('upper', [None, 1.3])
@pytest.mark.parametrize('seed', range(4))
def test_a_small_eps_gives_the_linear_programme(seed, upper):
    scores, prior = problem(seed, n=25, classes=4)
    best, vertex = programme(scores, prior, upper)
    kind = {} if upper is None else dict(marginal='upper', strength=upper)
    plan = sinkhorn(scores, prior, 1e-4, 1e-8, **kind)
    assert best - 1e-4*np.log(4) - 1e-6 <= score(plan, scores) <= best + 1e-6      # entropy buys at most eps*log C
    np.testing.assert_allclose(plan.assignment, vertex, atol=.02)
    assert score(sinkhorn(scores, prior, .5, 1e-8, **kind), scores) < best - 1e-3   # and a large one does not

@pytest.mark.parametrize('seed', range(3))
def test_upper_limits_give_the_plan_of_a_convex_programme(seed):
    "The primal problem, by a general solver that knows nothing of duals."
    scores, prior = problem(seed, n=6, classes=3)
    eps, cap, s = .4, 1.25*prior.numpy(), scores.numpy()
    cost = lambda p: -(p*s.ravel()).sum()/6 + eps*(p*np.log(p)).sum()/6
    slope = lambda p: (-s.ravel() + eps*(np.log(p) + 1))/6
    rows, cols = np.kron(np.eye(6), np.ones(3)), np.kron(np.ones(6), np.eye(3))/6
    found = minimize(cost, np.tile(prior, 6), jac=slope, bounds=[(1e-12, 1)]*18, method='SLSQP', options=dict(ftol=1e-14, maxiter=500),
                     constraints=[dict(type='eq', fun=lambda p: rows @ p - 1, jac=lambda p: rows), dict(type='ineq', fun=lambda p: cap - cols @ p, jac=lambda p: -cols)])
    plan = sinkhorn(scores, prior, eps, 1e-10, marginal='upper', strength=1.25)
    np.testing.assert_allclose(plan.assignment, found.x.reshape(6, 3), atol=2e-4)
    assert (plan.col_mass.numpy() <= cap + 1e-9).all() and (plan.dual <= 0).all()
    assert (plan.col_mass.numpy() >= cap - 1e-4).any()      # a limit is felt

def test_upper_limits_that_nobody_reaches_change_nothing():
    scores, prior = problem(5, n=200, classes=4)
    free = torch.softmax(scores/.3, 1)
    plan = sinkhorn(scores, free.mean(0), .3, 1e-9, marginal='upper', strength=1.5)
    assert torch.equal(plan.dual, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(plan.assignment, free)

@FAST
@given(seed=SEEDS, eps=EPS, factor=st.floats(1.05, 4.))
def test_upper_limits_hold_and_are_paid_for_only_where_they_bind(seed, eps, factor):
    scores, prior = problem(seed, scale=3.)
    plan = sinkhorn(scores, prior, eps, 1e-8, marginal='upper', strength=factor)
    room = factor*prior - plan.col_mass
    assert (room > -1e-7).all() and (plan.dual <= 0).all()
    assert (torch.minimum(room, -plan.dual/eps) < 1e-7).all()

@FAST
@given(seed=SEEDS, eps=EPS, strength=st.floats(.01, 10.))
def test_relaxed_shares_lie_where_their_prices_say(seed, eps, strength):
    scores, prior = problem(seed, scale=3.)
    plan = sinkhorn(scores, prior, eps, 1e-8, marginal='kl', strength=strength)
    want = torch.softmax(prior.log() - plan.dual/strength, 0)
    assert float((plan.col_mass - want).norm()) <= 1.01e-8
    torch.testing.assert_close(plan.assignment, torch.softmax((scores + plan.dual)/eps, 1), atol=1e-9, rtol=1e-6)

def test_strength_leads_from_the_softmax_to_equal_shares():
    scores, prior = problem(3, n=300, classes=5)
    plans = [sinkhorn(scores, prior, .2, 1e-9, marginal='kl', strength=s) for s in (1e-5, .05, .5, 1e5)]
    torch.testing.assert_close(plans[0].assignment, torch.softmax(scores/.2, 1), atol=1e-3, rtol=0)
    torch.testing.assert_close(plans[-1].assignment, sinkhorn(scores, prior, .2, 1e-9).assignment, atol=1e-4, rtol=0)
    missed = [float((p.col_mass - prior).norm()) for p in plans]
    assert missed == sorted(missed, reverse=True) and missed[0] > .05


# ---- the steps ----

@FAST
@given(seed=SEEDS)
def test_elimination_without_subtraction_solves_the_laplacian(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 12))
    ties = np.exp(rng.uniform(-6, 0, (n, n)))
    ties = (ties + ties.T)*(1 - np.eye(n))
    fixed = rng.random(n) < .3
    fixed[rng.integers(n)] = True
    push = rng.standard_normal(n)
    d = solve_flow(ties, push, fixed)
    assert (d[fixed] == 0).all()
    np.testing.assert_allclose((ties.sum(1)*d - ties @ d)[~fixed], push[~fixed], atol=1e-9*(1 + abs(push).max()))

@pytest.mark.parametrize('kind,strength', [(Equal, 0.), (Relaxed, .3), (Relaxed, .01)])
def test_the_step_is_newtons(kind, strength):
    "Against finite differences of the residual."
    scores, prior = problem(2, n=400, classes=4)
    pixels, aim, eps = Pixels(planar(scores)), kind(prior.numpy(), strength), .3
    h = aim.placed(np.array([.3, -.2, .5, .1]))
    mass, ties = visit(pixels, h, eps, True)
    d, _ = aim.step(h, mass, ties, eps)
    small = 1e-5
    change = (aim.residual(h + small*d, visit(pixels, h + small*d, eps)[0], eps) - aim.residual(h, mass, eps))/small
    np.testing.assert_allclose(change, -aim.residual(h, mass, eps), rtol=1e-3, atol=1e-6)

@pytest.mark.parametrize('far', [.5, 19., 300.])
def test_a_plan_that_is_moved_is_the_plan_that_is_computed(far):
    scores, _ = problem(0, n=5000, classes=4, scale=30., dtype=torch.float32)
    pixels = Pixels(planar(scores), out=planar(out := torch.empty_like(scores)))
    for h in (np.zeros(4), np.array([0., far, 0, 0]), np.array([0., 0, far, -far])): mass, _ = visit(pixels, h, .5)
    want = torch.softmax(scores.double()/.5 + torch.tensor([0., 0, far, -far]), 1)
    torch.testing.assert_close(out.double(), want, atol=1e-4, rtol=0)
    np.testing.assert_allclose(mass, want.mean(0), atol=1e-5)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize('weighted', [False, True])
def test_the_shift_of_rows_changes_nothing_but_the_range(dtype, weighted):
    scores, _ = problem(0, n=5000, classes=6, dtype=dtype)
    h = np.linspace(-3, 3, 6)
    weight = (torch.rand(1, 5000, 1, generator=torch.Generator().manual_seed(0)) - .3).clamp(min=0) if weighted else None
    for ties in (False, True):
        free, shifted = (visit(p := Pixels(planar(scores), weight, largest=m), h, .2, ties) for m in (float(scores.abs().max()), float('inf')))
        assert p.largest == float('inf')
        for a, b in zip(free, shifted): np.testing.assert_allclose(a, b, atol=1e-6)

@pytest.mark.parametrize('row,again', [([400., 399.9, 300.], True), ([-400., -399.9, -500.], True), ([90., -90., 0.], True), ([15., -15., 0.], False)])
def test_a_row_that_leaves_the_range_of_its_sample_is_computed_again(row, again):
    scores, _ = problem(0, n=4000, classes=3, dtype=torch.float32)
    scores[1234] = torch.tensor(row)
    pixels = Pixels(planar(scores), out=planar(out := torch.empty_like(scores)), largest=6.)
    mass, _ = visit(pixels, np.array([.5, 0, -.5]), .25)
    want = torch.softmax(scores.double()/.25 + torch.tensor([.5, 0, -.5]), 1)
    torch.testing.assert_close(out.double(), want, atol=1e-4, rtol=0)
    np.testing.assert_allclose(mass, want.mean(0), atol=1e-6)
    assert pixels.visits == 1 and (pixels.largest == float('inf')) == again

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_fault_33_scores_that_are_not_finite_are_found_without_a_shift_too(bad):
    scores = torch.rand(30_000, 4, generator=torch.Generator().manual_seed(0))
    scores[29_998, 1] = bad
    with pytest.raises(DataError, match='class 1, pixel 29998'): sinkhorn(scores, [.1, .2, .3, .4])

@FAST
@given(seed=SEEDS, scale=st.sampled_from([.1, 1., 100.]), weighted=st.booleans())
def test_a_sample_of_all_pixels_tells_what_they_tell(seed, scale, weighted):
    scores, prior = problem(seed, scale=scale)
    weight = torch.rand(1, len(scores), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + .1 if weighted else None
    all_of_them = Pixels(planar(scores), weight)
    sample = module.Sample(*strided(planar(scores), weight, None))
    for h in (np.zeros(len(prior)), prior.numpy(), 60*prior.numpy(), -prior.numpy()):
        for a, b in zip(sample.visit(h, .3), visit(all_of_them, h, .3, True)): np.testing.assert_allclose(a, b, atol=1e-9)

@pytest.mark.parametrize('name', ['image', 'images', 'rows', 'planar rows', 'every other row', 'one row', 'crop', 'channels_last'])
def test_a_sample_is_every_so_manieth_pixel_in_any_layout(name):
    x = torch.randn(3 if name == 'images' else 1, 5, 130, 301, generator=torch.Generator().manual_seed(0))
    weight = (torch.arange(x[:, 0].numel()) % 3).view(x[:, 0].shape)
    flat = x.transpose(0, 1).reshape(5, -1)
    x = {'rows': lambda: planar(flat.t().contiguous()), 'planar rows': lambda: planar(flat.t()), 'every other row': lambda: planar(flat.t().repeat_interleave(2, 0)[::2]), 'one row': lambda: flat[None, :, None], 'crop': lambda: torch.nn.functional.pad(x, (1, 2, 3, 0))[..., 3:, 1:-2],
         'channels_last': lambda: x.to(memory_format=torch.channels_last)}.get(name, lambda: x)()
    step = flat.shape[1]//module.SAMPLE | 1
    got, none = strided(x, None, None)
    assert none is None and np.array_equal(got, flat[:, ::step])
    got, w = strided(x, weight.reshape(x[:, 0].shape), [0, 3])
    alive = weight.flatten()[::step] > 0
    assert np.array_equal(got, flat[[0, 3], ::step][:, alive]) and np.array_equal(w, weight.flatten()[::step][alive])

@pytest.mark.parametrize('seed', range(4))
def test_millimetre_work_is_done_on_the_sample(seed):
    "Two passes over all pixels reach 1e-3, three or four 1e-6."
    g = torch.Generator().manual_seed(seed)
    scores, prior = 2*torch.rand(1, 7, 400, 500, generator=g) - 1, torch.rand(7, generator=g, dtype=torch.float64) + .1
    assert sinkhorn(scores, prior/prior.sum(), .05, 1e-3).passes <= 3 and sinkhorn(scores, prior/prior.sum(), .05, 1e-6).passes <= 4

def test_ties_of_all_pixels_are_counted_only_for_a_fine_tolerance(monkeypatch):
    "They cost more than the passes that they save, unless the sample would have to help three times."
    counted, whole = [], module.sweep
    monkeypatch.setattr(module, 'sweep', lambda p, h, eps, ties, *a: (counted.append(ties), whole(p, h, eps, ties, *a))[1])
    g = torch.Generator().manual_seed(0)
    scores = 2*torch.rand(1, 7, 400, 500, generator=g) - 1
    for tol in (1e-3, 3e-4): sinkhorn(scores, torch.arange(1, 8)/28, .05, tol)
    assert counted and not any(counted)
    sinkhorn(scores, torch.arange(1, 8)/28, .05, 1e-7)
    assert sum(counted) == 1

@pytest.mark.parametrize('n', [200, 300_000])
@pytest.mark.parametrize('none_of', [None, 2])
def test_the_plan_of_rows_lies_class_by_class(n, none_of):
    scores, prior = problem(0, n=n, classes=5, dtype=torch.float32)
    if none_of is not None: prior = torch.where(torch.arange(5) == none_of, 0, prior)/(1 - prior[none_of])
    plan = sinkhorn(scores, prior, .2, 1e-5)
    assert plan.assignment.shape == (n, 5) and plan.assignment.t().is_contiguous() and plan.apply(scores).t().is_contiguous()
    torch.testing.assert_close(plan.assignment, torch.softmax((scores.double() + plan.dual)/.2, 1).float(), atol=1e-5, rtol=0)

def test_a_large_plan_lies_as_torch_would_lay_it(tmp_path):
    scores = torch.rand(1, 4, 600, 500)
    plan = sinkhorn(scores, [.25]*4, .1, 1e-4).assignment
    assert plan.data_ptr() % 64 == 0 and plan.is_contiguous() and plan.untyped_storage().nbytes() == 4*plan.numel()
    torch.save(plan, tmp_path/'plan.pt')
    assert torch.equal(torch.load(tmp_path/'plan.pt', weights_only=True), plan)
    assert sinkhorn(scores.double(), [.25]*4, .1, 1e-4).assignment.dtype == torch.float64

@FAST
@given(seed=SEEDS)
def test_the_step_under_upper_limits_meets_its_conditions(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 9))
    prior, mass = rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(n))
    ties = rng.random((n, n))*.1; ties = ties + ties.T
    h, aim = -rng.random(n)*(rng.random(n) < .5), Upper(prior, 1 + rng.random())
    d, _ = aim.step(h, mass, ties, .1)
    room = aim.strength*prior - (mass + ties.sum(1)*d - ties @ d)
    assert (h + d <= 1e-9).all() and (room >= -1e-9).all() and (abs((h + d)*room) < 1e-7).all()


# ---- properties ----

@FAST
@given(seed=SEEDS, eps=EPS, scale=st.sampled_from([.1, 1., 10.]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_rows_sum_to_one_and_columns_to_the_prior(seed, eps, scale, dtype):
    scores, prior = problem(seed, scale=scale, dtype=dtype)
    plan = sinkhorn(scores, prior, eps, 1e-5)
    assert plan.converged and plan.marginal_error <= 1e-5 and plan.assignment.dtype == dtype and plan.assignment.shape == scores.shape
    assert (plan.assignment.sum(1) - 1).abs().max() < 1e-5 and (plan.assignment >= 0).all()
    assert (plan.assignment.double().mean(0) - prior).norm() < 1.2e-5
    torch.testing.assert_close(plan.col_mass, plan.assignment.double().mean(0), atol=1e-6, rtol=0)

@FAST
@given(seed=SEEDS, eps=EPS)
def test_a_constant_per_row_changes_nothing(seed, eps):
    scores, prior = problem(seed)
    shift = torch.randn(len(scores), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*50
    torch.testing.assert_close(sinkhorn(scores + shift, prior, eps, 1e-10).assignment, sinkhorn(scores, prior, eps, 1e-10).assignment, atol=1e-5, rtol=0)

@FAST
@given(seed=SEEDS, eps=EPS)
def test_the_order_of_pixels_and_of_classes_does_not_matter(seed, eps):
    scores, prior = problem(seed)
    g = torch.Generator().manual_seed(seed)
    i, k = torch.randperm(len(scores), generator=g), torch.randperm(len(prior), generator=g)
    want = sinkhorn(scores, prior, eps, 1e-10)
    got = sinkhorn(scores[i][:, k], prior[k], eps, 1e-10)
    torch.testing.assert_close(got.assignment, want.assignment[i][:, k], atol=1e-5, rtol=0)

@FAST
@given(seed=SEEDS)
def test_a_large_eps_gives_every_pixel_the_prior(seed):
    scores, prior = problem(seed)
    torch.testing.assert_close(sinkhorn(scores, prior, 1e6, 1e-8).assignment, prior.expand(len(scores), -1), atol=1e-4, rtol=0)

@FAST
@given(seed=SEEDS)
def test_probabilities_with_their_own_mean_come_back(seed):
    logits, _ = problem(seed)
    p = torch.softmax(logits, 1)
    torch.testing.assert_close(sinkhorn(p.log(), p.mean(0), 1., 1e-9).assignment, p, atol=1e-6, rtol=0)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('n', [500, 20_000])
def test_half_precision_is_widened_before_anything_is_computed(n, dtype):
    scores, prior = problem(0, n=n, classes=6, dtype=dtype)
    half, full = sinkhorn(scores, prior, tol=1e-6), sinkhorn(scores.float(), prior, tol=1e-6)
    assert torch.equal(half.assignment, full.assignment) and half.assignment.dtype == torch.float32 and half.marginal_error <= 1e-6

@pytest.mark.parametrize('marginal', ['equal', 'kl', 'upper'])
@pytest.mark.parametrize('eps', [.01, .05, 1.])
@pytest.mark.parametrize('n', [5, 3000, 20_000])
def test_scores_of_ten_thousand_are_fine(n, eps, marginal):
    scores, prior = problem(n, n=n, classes=5, scale=1e4, dtype=torch.float32)
    plan = sinkhorn(scores.clamp(-1e4, 1e4), prior, eps, 1e-5, marginal=marginal, strength={'equal': None, 'kl': 1., 'upper': 1.2}[marginal])
    assert plan.assignment.isfinite().all() and plan.marginal_error <= 1e-5
    assert (plan.assignment.sum(1) - 1).abs().max() < 1e-5

@pytest.mark.parametrize('eps', [1., .1, .01, 1e-3, 1e-4])
def test_log_probabilities_and_any_eps_take_few_passes(eps):
    scores, prior = problem(0, n=40_000, classes=7, scale=4., dtype=torch.float32)
    plan = sinkhorn(torch.log_softmax(scores, 1), prior, eps, 1e-5)
    assert plan.marginal_error <= 1e-5 and plan.passes <= 40
    assert abs(float((plan.assignment.double().mean(0) - prior).norm())) < 1.5e-5

@pytest.mark.parametrize('block', [7, 100, 5000])
def test_blocks_do_not_matter(block, monkeypatch):
    scores, prior = problem(0, n=20_000, classes=6, dtype=torch.float32)
    image = scores.t().reshape(6, 4, 50, 100).transpose(0, 1)
    weight = torch.rand(4, 50, 100, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    want = sinkhorn(image, prior, tol=1e-6, weight=weight)
    monkeypatch.setitem(module.BLOCK, 'cpu', (block*6,)*3)
    assert (sinkhorn(image, prior, tol=1e-6, weight=weight).assignment - want.assignment).abs().max() < 1e-4

LAYOUTS = {'channels_last': lambda x: x.to(memory_format=torch.channels_last), 'crop': lambda x: torch.nn.functional.pad(x, (3, 5, 2, 1), value=torch.nan)[..., 2:-1, 3:-5],
           'turned': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), 'every other': lambda x: x.repeat_interleave(2, 3)[..., ::2], 'with gradient': lambda x: x.clone().requires_grad_()}

@pytest.mark.parametrize('name', LAYOUTS)
def test_any_layout_in_memory_gives_the_same_plan(name):
    scores, prior = problem(0, n=2*60*90, classes=5, dtype=torch.float32)
    image = scores.t().reshape(5, 2, 60, 90).transpose(0, 1).contiguous()
    rows = sinkhorn(scores, prior, tol=1e-6)
    for x in (image, LAYOUTS[name](image)):
        plan = sinkhorn(x, prior, tol=1e-6)
        assert plan.assignment.shape == x.shape and not plan.assignment.requires_grad
        torch.testing.assert_close(plan.assignment.transpose(0, 1).reshape(5, -1).t(), rows.assignment, atol=1e-4, rtol=0)

def test_one_long_row_is_cut_too(monkeypatch):
    monkeypatch.setitem(module.BLOCK, 'cpu', (300, 300, 300))
    scores, prior = problem(0, n=1000, classes=3, dtype=torch.float32)
    plan = sinkhorn(scores.t().reshape(1, 3, 1, 1000), prior, .3, 1e-6)
    torch.testing.assert_close(plan.assignment[0, :, 0].t(), sinkhorn(scores, prior, .3, 1e-6).assignment, atol=1e-5, rtol=0)

@FAST
@given(seed=SEEDS, marginal=st.sampled_from([('equal', None), ('kl', .3), ('upper', 1.3)]))
def test_a_warm_start_reaches_the_same_plan(seed, marginal):
    scores, prior = problem(seed)
    kind = dict(marginal=marginal[0], strength=marginal[1])
    want = sinkhorn(scores, prior, .2, 1e-10, **kind)
    for init in (want.dual, 3*torch.randn(len(prior), generator=torch.Generator().manual_seed(seed)), -100*torch.arange(len(prior)).double()):
        torch.testing.assert_close(sinkhorn(scores, prior, .2, 1e-10, init=init, **kind).assignment, want.assignment, atol=1e-5, rtol=0)
    assert sinkhorn(scores, prior, .2, 2e-10, init=want.dual, **kind).passes == 1

def test_the_dual_alone_gives_the_plan_back_and_labels_further_pixels():
    scores, prior = problem(0, n=30_000, classes=5, dtype=torch.float32)
    plan = sinkhorn(scores[:20_000], prior, .2, 1e-6)
    torch.testing.assert_close(plan.apply(scores[:20_000]), plan.assignment, atol=1e-5, rtol=0)
    torch.testing.assert_close(plan.apply(scores[20_000:]), torch.softmax((scores[20_000:].double() + plan.dual)/.2, 1).float(), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match='4 classes'): plan.apply(scores[:, :4])

def test_the_same_call_gives_the_same_bits():
    scores, prior = problem(0, n=50_000, classes=5, dtype=torch.float32)
    a, b = (sinkhorn(scores, prior, .05, 1e-6) for _ in range(2))
    assert torch.equal(a.assignment, b.assignment) and torch.equal(a.dual, b.dual) and a.passes == b.passes

def test_scores_are_not_changed_and_autocast_and_global_randomness_are_left_alone():
    scores, prior = problem(0, n=20_000, classes=5, dtype=torch.float32)
    before, state, want = scores.clone(), torch.get_rng_state(), sinkhorn(scores, prior, tol=1e-6)
    with torch.autocast('cpu', dtype=torch.bfloat16): inside = sinkhorn(scores, prior, tol=1e-6)
    assert torch.equal(inside.assignment, want.assignment) and inside.assignment.dtype == torch.float32
    assert torch.equal(scores, before) and torch.equal(torch.get_rng_state(), state)


# ---- weights and edges ----

@FAST
@given(seed=SEEDS, garbage=st.sampled_from([float('nan'), float('inf'), -float('inf'), 3e38]))
def test_a_pixel_of_weight_0_takes_no_part_whatever_it_holds(seed, garbage):
    scores, prior = problem(seed, n=400, classes=4, dtype=torch.float32)
    alive = torch.rand(400, generator=torch.Generator().manual_seed(seed)) < .6
    spoilt = torch.where(alive[:, None], scores, garbage)
    plan, want = sinkhorn(spoilt, prior, .2, 1e-6, weight=alive), sinkhorn(scores[alive], prior, .2, 1e-6)
    torch.testing.assert_close(plan.assignment[alive], want.assignment, atol=1e-4, rtol=0)
    assert (plan.assignment[~alive] == 0).all() and (plan.labels[~alive] == IGNORE).all() and torch.equal(plan.labels[alive], plan.assignment[alive].argmax(1))
    assert (plan.apply(spoilt, alive)[~alive] == 0).all()

def test_a_weight_counts_as_so_many_pixels():
    scores, prior = problem(0, n=300, classes=4)
    times = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(0))
    plan, want = sinkhorn(scores, prior, .1, 1e-10, weight=times), sinkhorn(scores.repeat_interleave(times, 0), prior, .1, 1e-10)
    torch.testing.assert_close(plan.dual, want.dual, atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.assignment.repeat_interleave(times, 0), want.assignment, atol=1e-6, rtol=0)

@pytest.mark.parametrize('shape', [(2, 100, 120), (2, 1, 100, 120)])
def test_weights_of_images_come_with_or_without_a_channel(shape):
    scores, prior = problem(0, n=24_000, classes=4, dtype=torch.float32)
    image = scores.t().reshape(4, 2, 100, 120).transpose(0, 1)
    weight = torch.rand(24_000, generator=torch.Generator().manual_seed(0))
    plan = sinkhorn(image, prior, tol=1e-6, weight=weight.view(shape))
    torch.testing.assert_close(plan.col_mass, prior, atol=1.1e-6, rtol=0)
    torch.testing.assert_close(plan.dual, sinkhorn(scores, prior, tol=1e-6, weight=weight).dual, atol=1e-4, rtol=0)

@pytest.mark.parametrize('n', [40, 20_000])
def test_a_class_of_prior_0_is_left_out(n):
    scores, prior = problem(0, n=n, classes=5, dtype=torch.float32)
    prior[2] = 0
    scores[:, 2] = torch.nan         # nobody looks
    prior /= prior.sum()
    for marginal, strength in (('equal', None), ('kl', .5), ('upper', 1.5)):
        plan = sinkhorn(scores, prior, .1, 1e-5, marginal=marginal, strength=strength)
        assert (plan.assignment[:, 2] == 0).all() and plan.col_mass[2] == 0 and plan.dual[2] == -torch.inf
        keep = [0, 1, 3, 4]
        torch.testing.assert_close(plan.assignment[:, keep], sinkhorn(scores[:, keep], prior[keep], .1, 1e-5, marginal=marginal, strength=strength).assignment, atol=1e-3, rtol=0)
        torch.testing.assert_close(plan.apply(scores), plan.assignment, atol=1e-4, rtol=0)
        assert sinkhorn(scores, prior, .1, 1e-4, marginal=marginal, strength=strength, init=plan.dual).converged

def test_a_class_that_was_left_out_and_comes_back_starts_from_0():
    scores, prior = problem(0, n=300, classes=3)
    before = sinkhorn(scores, [0., .5, .5], .2)
    torch.testing.assert_close(sinkhorn(scores, prior, .2, 1e-9, init=before.dual).assignment, sinkhorn(scores, prior, .2, 1e-9).assignment, atol=1e-6, rtol=0)

def test_an_absent_class_gets_its_share_under_equal_and_less_under_kl_and_upper():
    scores, prior = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([.3, .3, .2, .2])
    scores[:, 3] -= 50
    mass = {k: float(sinkhorn(scores, prior, .1, 1e-5, marginal=k, strength=s).col_mass[3]) for k, s in (('equal', None), ('kl', 1.), ('upper', 2.))}
    assert mass['equal'] == pytest.approx(.2, abs=1e-5) and mass['kl'] < 1e-3 and mass['upper'] < 1e-3

@pytest.mark.parametrize('n,classes', [(1, 1), (1, 5), (3, 7), (100, 1), (2, 200)])
def test_few_pixels_and_one_class(n, classes):
    scores, prior = problem(1, n=n, classes=classes)
    plan = sinkhorn(scores, prior, .1, 1e-8)
    assert plan.marginal_error <= 1e-8
    torch.testing.assert_close(plan.assignment.sum(1), torch.ones(n, dtype=torch.float64))
    if n == 1: torch.testing.assert_close(plan.assignment[0], prior, atol=1e-7, rtol=0)

@pytest.mark.parametrize('scores', [torch.zeros(0, 3), torch.zeros(0, 3, 8, 8), torch.zeros(2, 3, 0, 8)])
def test_nothing_to_transport(scores):
    plan = sinkhorn(scores, [.2, .3, .5], init=[1., 0, 0])
    assert plan.assignment.shape == scores.shape and plan.converged and plan.passes == 0 and plan.labels.numel() == 0
    assert plan.dual.argmax() == 0 and plan.apply(torch.zeros(4, 3)).isfinite().all()

@pytest.mark.parametrize('n', [100, 20_000])
def test_all_weight_zero(n):
    plan = sinkhorn(torch.randn(n, 3), [.2, .3, .5], weight=torch.zeros(n))
    assert (plan.assignment == 0).all() and (plan.labels == IGNORE).all() and plan.converged and (plan.col_mass == 0).all()

def test_a_sample_that_sees_none_of_the_weight_is_not_asked():
    scores, prior = problem(0, n=60_000, classes=4, dtype=torch.float32)
    weight = torch.zeros(60_000)
    weight[1:5] = 1
    plan = sinkhorn(scores, prior, .3, 1e-6, weight=weight)
    torch.testing.assert_close(plan.assignment[1:5], sinkhorn(scores[1:5], prior, .3, 1e-6).assignment, atol=1e-4, rtol=0)

def test_a_sample_that_misses_the_point_does_no_harm():
    "All that class 3 may come from lies in one corner that the stride steps over."
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(200_000, 4, generator=g)
    scores[:, 3] -= 30
    scores[1:30, 3] += 60
    plan = sinkhorn(scores, torch.tensor([.4, .4, .2 - 1e-4, 1e-4]), .05, 1e-7)
    assert plan.marginal_error <= 1e-7 and plan.assignment[1:30, 3].mean() > .6


# ---- faults ----

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('n', [100, 30_000])
def test_fault_33_scores_that_are_not_finite_are_named_by_place(n, bad):
    scores, prior = problem(0, n=n, classes=4, dtype=torch.float32)
    scores[n - 3, 2] = bad
    with pytest.raises(DataError, match=f'class 2, pixel {n - 3}'): sinkhorn(scores, prior)
    image = problem(0, n=2*n, classes=4, dtype=torch.float32)[0].t().reshape(4, 2, n//10, 10).transpose(0, 1).clone()
    image[1, 3, n//10 - 1, 6] = bad
    with pytest.raises(DataError, match=f'class 3, image 1, row {n//10 - 1}, column 6'): sinkhorn(image, prior)
    with pytest.raises(DataError, match='class 2'): sinkhorn(problem(0, n=n, classes=4, dtype=torch.float32)[0], prior).apply(scores)

def test_fault_33_scores_that_eps_blows_up_are_named():
    with pytest.raises(DataError, match='eps'): sinkhorn(torch.tensor([[3e38, -3e38], [0., 1.]]), [.5, .5], .05)

WRONG = {'eps 0': (dict(eps=0.), 'eps=0'), 'eps negative': (dict(eps=-.1), 'eps=-0.1'), 'eps nan': (dict(eps=float('nan')), 'eps=nan'), 'eps inf': (dict(eps=float('inf')), 'eps=inf'), 'tol 0': (dict(tol=0.), 'tol=0'),
         'prior sum': (dict(prior=[.3, .3, .3]), 'sums to 0.9'), 'prior negative': (dict(prior=[.6, .6, -.2]), 'not negative'), 'prior nan': (dict(prior=[.5, .5, float('nan')]), 'finite'),
         'prior length': (dict(prior=[.5, .5]), '3 classes in scores'), 'prior shape': (dict(prior=[[.5, .5]]), 'one number per class'), 'marginal': (dict(marginal='soft'), 'marginal='),
         'strength missing': (dict(marginal='kl'), 'strength=None'), 'strength low': (dict(marginal='upper', strength=1.), 'above 1'), 'strength 0': (dict(marginal='kl', strength=0.), 'above 0'),
         'strength for equal': (dict(strength=1.), 'no strength'), 'on_fail': (dict(on_fail='shrug'), 'on_fail='), 'init length': (dict(init=[0., 0]), 'init of shape'), 'init nan': (dict(init=[0., 0, float('nan')]), 'init is'),
         'weight shape': (dict(weight=torch.ones(4)), 'weight of shape'), 'scores 3D': (dict(scores=torch.zeros(3, 4, 4)), r'scores\[None\]'), 'scores int': (dict(scores=torch.zeros(5, 3, dtype=torch.int64)), 'floating'),
         'group': (dict(group=True), 'process group')}

@pytest.mark.parametrize('name', WRONG)
def test_fault_33_wrong_arguments_are_named(name):
    kind, words = WRONG[name]
    with pytest.raises(ConfigError, match=words): sinkhorn(**(dict(scores=torch.zeros(5, 3), prior=[.2, .3, .5]) | kind))

@pytest.mark.parametrize('weight', [[1., -1, 1], [1., float('nan'), 1], [1., float('inf'), 1]])
def test_fault_33_weights_that_are_no_weights(weight):
    with pytest.raises(DataError, match='weights from'): sinkhorn(torch.zeros(3, 2), [.5, .5], weight=torch.tensor(weight))

def test_a_rounded_prior_is_normalised():
    scores, prior = problem(0, n=100, classes=4)
    assert (sinkhorn(scores, prior*(1 + 5e-5), .2, 1e-8).col_mass - prior).abs().max() < 1e-7

def test_fault_33_not_converged_is_said_as_loudly_as_asked():
    scores, prior = problem(0, n=500, classes=6, scale=5.)
    with pytest.raises(NotConverged, match='marginal error .* after 2 passes'): sinkhorn(scores, prior, .01, 1e-8, max_passes=2)
    with pytest.warns(RuntimeWarning, match='marginal error'): plan = sinkhorn(scores, prior, .01, 1e-8, max_passes=2, on_fail='warn')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        same = sinkhorn(scores, prior, .01, 1e-8, max_passes=2, on_fail='ignore')
    assert not plan.converged and plan.marginal_error > 1e-3 and same.marginal_error == plan.marginal_error
    assert float((plan.assignment.mean(0) - prior).norm()) == pytest.approx(plan.marginal_error, rel=1e-6)   # the error is that of this plan

def test_a_tolerance_below_the_precision_ends_and_says_so():
    scores, prior = problem(0, n=20_000, classes=5, dtype=torch.float32)
    with pytest.raises(NotConverged, match='float64'): sinkhorn(scores, prior, .05, 1e-14)
    assert sinkhorn(scores, prior, .05, 1e-14, on_fail='ignore', max_passes=1000).passes < 200
    assert sinkhorn(scores.double(), prior, .05, 1e-13).marginal_error <= 1e-13


# ---- several processes ----

SCRIPT = '''
    import sys, torch, torch.distributed as dist
    sys.path.insert(0, {tests!r})
    from test_sinkhorn import problem, sinkhorn
    rank, n = int(sys.argv[1]), {n}
    dist.init_process_group('gloo', init_method='file://{store}', rank=rank, world_size=2)
    scores, prior = problem(0, n=n, classes=5, dtype=torch.float32)
    weight = torch.rand(n, generator=torch.Generator().manual_seed(0))
    cut = {cut}
    mine = slice(0, cut) if rank == 0 else slice(cut, n)
    if {spoil} and rank == 1: scores[n - 1, 3] = torch.nan
    try: plan = sinkhorn(scores[mine], prior, .1, 1e-7, weight=weight[mine], marginal={marginal!r}, strength={strength}, group=True)
    except Exception as e: torch.save(str(e), '{out}' + str(rank))
    else: torch.save((plan.assignment, plan.dual, plan.col_mass, plan.passes), '{out}' + str(rank))
    dist.destroy_process_group()
'''

def two_processes(tmp_path, n, cut, marginal='equal', strength=None, spoil=False):
    code = textwrap.dedent(SCRIPT).format(tests=os.path.dirname(__file__), n=n, cut=cut, store=tmp_path/'store', out=tmp_path/'out', marginal=marginal, strength=strength, spoil=spoil)
    jobs = [subprocess.Popen([sys.executable, '-c', code, str(r)], env=os.environ | {'OMP_NUM_THREADS': '1'}) for r in range(2)]
    assert [j.wait(120) for j in jobs] == [0, 0]
    return [torch.load(tmp_path/f'out{r}', weights_only=True) for r in range(2)]

@pytest.mark.parametrize('n,cut,marginal,strength', [(30_000, 7_000, 'equal', None), (2_000, 2_000, 'upper', 1.2)])
def test_two_processes_find_the_plan_of_one(tmp_path, n, cut, marginal, strength):
    (a, da, ma, pa), (b, db, mb, pb) = two_processes(tmp_path, n, cut, marginal, strength)
    scores, prior = problem(0, n=n, classes=5, dtype=torch.float32)
    want = sinkhorn(scores, prior, .1, 1e-7, weight=torch.rand(n, generator=torch.Generator().manual_seed(0)), marginal=marginal, strength=strength)
    assert torch.equal(da, db) and torch.equal(ma, mb) and pa == pb and len(a) == cut
    torch.testing.assert_close(torch.cat([a, b]), want.assignment, atol=1e-5, rtol=0)
    torch.testing.assert_close(ma, want.col_mass, atol=2e-7, rtol=0)

def test_a_bad_score_in_one_process_stops_all(tmp_path):
    mine, other = two_processes(tmp_path, 30_000, 7_000, spoil=True)
    assert 'class 3, pixel 22999' in other and 'another process' in mine


@pytest.mark.parametrize('shape', [(7, 65_536), (3, 5), (1, 9), (19, 16_385)])
def test_the_softmax_in_place_that_a_block_relies_on_is_the_ordinary_one(shape):
    "torch does not promise that `out` may be the input; the day that it may not, this says so."
    z = 20*torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.softmax(z, 0)
    torch.softmax(z, 0, out=z)
    assert torch.equal(z, expected)
