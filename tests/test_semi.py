"Few labels: which places keep them, what an item holds, and what each method does in a step, when resumed, and when the data are bad."
import itertools
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ENV, torchrun
from torch.utils.data import default_collate
from two import Few, Two, pairs, two  # the tiny net and data, also imported by child processes

from rs_mtl.core import IGNORE, ConfigError, DataError, DatasetNotFoundError
from rs_mtl.data.datasets import Kept
from rs_mtl.data.label_splits import Part, class_counts, count_of, divide, label_split, parse_fraction, place_names, read_split, shuffled, write_split
from rs_mtl.data.pairs import Pairs
from rs_mtl.layers.encoder import statistics_kept, statistics_used
from rs_mtl.layers.masking import Masking
from rs_mtl.training.checkpoint import read_pair
from rs_mtl.training.fit import evaluate, fit
from rs_mtl.training.losses import Objective
from rs_mtl.training.semi import METHODS, SENSORS, Target, answering, channels_dropped, consensus, evened, judged, look, paste, pseudo_loss, ramped, semi_objective, share_loss
from rs_mtl.worlds.land import Land

ALL = METHODS.names()
SURE = {'fixmatch': {'threshold': 0.}, 'unimatch': {'threshold': 0.}}  # a net of three steps is sure of nothing


@pytest.fixture(autouse=True)
def quiet(monkeypatch): monkeypatch.setenv('RS_MTL_PROGRESS', '0')

@pytest.fixture(scope='module')
def data(): return pairs()

@pytest.fixture(scope='module')
def batch(data): return default_collate([data[i] for i in range(6)])

SQUARES = 'dllr with hidden squares'
TAUGHT = [*(n for n in ALL if n != 'supervised'), SQUARES]

def method(name, **options):
    if name == SQUARES: name, options = 'dllr', {'masking': Masking(), 'drop': 0.} | options
    return semi_objective(name, **SURE.get(name, {}), **options)

def train(name, data, net=None, out=None, **kwargs):
    options = kwargs.pop('options', {})
    net = net or two()
    kwargs = dict(steps=3, batch_size=4, lr=.01, device='cpu', val=None) | kwargs
    val = kwargs.pop('val')
    return net, fit(net, data, val, objective=method(name, **options), out=out, **kwargs)

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def weights(folder): return {k: v for k, v in read_pair(folder, 'state')[0].items() if not k.startswith('rng')}


# which places keep their labels

names = st.lists(st.text(st.characters(codec='utf-8', exclude_categories=('Cs',)), min_size=1, max_size=8), min_size=2, max_size=60, unique=True)

@settings(max_examples=60, deadline=None)
@given(names, st.integers(0, 99), st.data())
def test_draws_are_nested_complete_and_the_same_in_any_order(places, seed, draw):
    held = np.array(draw.draw(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=len(places), max_size=len(places))))
    before = None
    mixed = draw.draw(st.permutations(range(len(places))))
    for k in range(1, len(places) + 1):
        try: split = label_split(places, k, seed, held, absent='warn') if held.any(0).all() else label_split(places, k, seed)
        except ConfigError as e:
            assert 'leave out class' in str(e) and before is None
            continue
        assert len(split.labelled) == k and sorted(split.labelled + split.unlabelled) == sorted(places)
        if held.any(0).all(): assert held[[places.index(n) for n in split.labelled]].any(0).all()
        if before: assert split.labelled[:len(before)] == before
        before = split.labelled
        again = label_split([places[i] for i in mixed], k, seed, held[mixed], absent='warn') if held.any(0).all() else label_split([places[i] for i in mixed], k, seed)
        assert again == split and again.hash == split.hash
    assert before is not None, 'not even all places'

def test_a_draw_that_holds_every_class_is_left_as_it_was():
    places = [f'p{i}' for i in range(40)]
    held = np.random.default_rng(0).random((40, 3)) < (.9, .5, .15)
    for k in range(1, 41):
        drawn = shuffled(places)[:k]
        if held[[places.index(n) for n in drawn]].any(0).all():
            split = label_split(places, k, histograms=held)
            assert set(split.labelled) == set(drawn) and not split.swapped

def test_the_repair_swaps_in_the_next_place_of_the_order_that_holds_the_class():
    places = shuffled([f'p{i}' for i in range(30)])
    held = np.ones((30, 2), bool)
    held[:, 1] = False
    held[[17, 23], 1] = True
    split = label_split(places, 5, histograms=held)
    assert split.swapped == (places[17],) and set(split.labelled) == {*places[:4], places[17]}
    assert label_split(places, 18, histograms=held).swapped == ()

def test_two_processes_with_other_hash_seeds_draw_the_same():
    code = "from rs_mtl.data.label_splits import label_split; print(label_split([f'scene {i}' for i in range(99)], '1/16', 3).hash)"
    hashes = {subprocess.run([sys.executable, '-c', code], env=ENV | {'PYTHONHASHSEED': s}, capture_output=True, text=True, check=True).stdout for s in ('1', '2')}
    assert hashes == {label_split([f'scene {i}' for i in range(99)], .0625, 3).hash + '\n'}

def test_a_few_pixels_of_a_class_do_not_pass_for_it():
    places = shuffled(['a', 'b', 'c', 'd'])
    held = [[90, 2, 9], [90, 0, 8], [90, 40, 9], [90, 60, 1]]          # a corner of the second class in the first place; the third class is thin everywhere
    assert label_split(places, 1, histograms=held, least=1).labelled == (places[0],)
    assert label_split(places, 1, histograms=held).swapped == (places[2],)

def test_a_class_that_is_nowhere_is_named():
    with pytest.raises(DataError, match="no place of 2 holds 9 pixels of 'field', 'road'"): label_split(['a', 'b'], 1, histograms=[[5, 0], [5, 0]], classes=('field', 'road'), least=9)
    with pytest.raises(DataError, match="no place of 2 holds 1 pixels of 'road'"): label_split(['a', 'b'], 1, histograms=[[5, 0], [5, 0]], classes=('field', 'road'))
    with pytest.warns(UserWarning, match="'road'"): assert len(label_split(['a', 'b'], 1, histograms=[[5, 0], [5, 0]], classes=('field', 'road'), absent='warn').labelled) == 1

def test_a_class_that_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="labels for 1 of 2 places .* leave out '(field|road)'") as e: label_split(['a', 'b'], 1, histograms=[[5, 0], [0, 5]], classes=('field', 'road'))
    assert 'labels=2' in e.value.todo

@pytest.mark.parametrize('wrong', [0, -1, '0/4', '5/4', 1.5, 'few', '', True, float('nan'), '1/0', '-5%'])
def test_shares_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match='labels='): parse_fraction(wrong)

@given(st.integers(1, 500), st.fractions(min_value='1/500', max_value=1))
def test_a_larger_share_is_never_fewer_places(n, f):
    assert 1 <= count_of(f/2, n) <= count_of(f, n) <= n

def test_a_manifest_is_read_back_and_a_changed_one_refused(tmp_path):
    split = label_split([f'ort {i} ü' for i in range(20)], '1/4', 5)
    file = write_split(split, tmp_path/'deep'/'split.json')
    assert read_split(file, split.labelled + split.unlabelled) == split
    text = file.read_text()
    assert json.loads(text)['sha256'] == split.hash and [p.name for p in file.parent.iterdir()] == ['split.json']
    moved = json.loads(text)
    moved['labelled'].append(moved['unlabelled'].pop())
    for bad, message in ((json.dumps(moved), 'was changed'), (text.replace('"seed": 5', '"seed": 6'), 'was changed'), (text[:40], 'cannot be read'), ('[]', 'is no split'), ('{"labelled": []}', 'no unlabelled')):
        file.write_text(bad)
        with pytest.raises(DataError, match=message): read_split(file)
    file.write_text(text)
    with pytest.raises(DataError, match='other places: ort 99'): read_split(file, [*split.labelled, *split.unlabelled, 'ort 99'])
    with pytest.raises(DatasetNotFoundError): read_split(tmp_path/'none.json')

def test_a_part_keeps_what_the_data_set_knows_and_its_epochs():
    land = Kept(Land(6, 32))
    part = Part(land, [4, 1], 'two of six')
    assert (len(part), part.classes, part.bands, part.treatment) == (2, land.classes, land.bands, 'two of six') and torch.equal(part[1]['mask'], land[1]['mask'])
    with pytest.raises(ConfigError, match='item 6 of a data set of 6'): Part(land, [6])

def test_scenes_are_divided_as_scenes(tmp_path):
    from rs_mtl.data.datasets import open_data
    from rs_mtl.data.samples import write_sample
    from rs_mtl.data.tables import folder_table
    from rasterio.transform import from_origin
    land = Land(6, 64, seed=2)
    for i in range(6): write_sample(tmp_path/f'{i}', land[i], {'crs': 'EPSG:32632', 'transform': from_origin(0, 1e4*i, 10, 10)}, land.bands, land.sar_bands, land.classes, land.palette, clip=True)
    table = folder_table({k: f'{{place}}/{k}.tif' for k in ('image', 'sar', 'mask')}, land.classes, splits={'train': 'rest'}, val=0, name='mine')
    scenes = open_data(table, 'train', n=40, size=32, root=tmp_path)
    assert place_names(scenes) == [str(i) for i in range(6)]
    counts = class_counts(scenes)
    assert (counts == np.stack([np.bincount(land[i]['mask'].flatten(), minlength=7)[:7] for i in range(6)])).all()
    labelled, others, split = divide(scenes, 3, absent='warn')
    assert set(labelled.data.places) == set(split.labelled) and set(others.data.places) == set(split.unlabelled) and len(labelled) == len(others) == 40
    assert {labelled.data.where(i)[0] for i in range(40)} == set(split.labelled)
    for p in split.unlabelled: (tmp_path/p/'mask.tif').unlink()  # nobody needs these
    bare = open_data(table, 'train', n=40, size=32, root=tmp_path, layers=['image', 'sar'], splits={'train': split.unlabelled}, val=0)
    train = Pairs(labelled, bare)
    train.set_epoch(1)
    assert bare.windows.epoch == labelled.windows.epoch == 1 and train[0]['u_image'].shape == train[0]['image'].shape


# items

def test_both_streams_are_covered_evenly_whichever_is_longer():
    few, many = Few(3), Few(10)
    for a, b in ((few, many), (many, few)):
        train = Pairs(a, b, seed=1)
        assert len(train) == 10
        orders = []
        for epoch in range(2):
            train.set_epoch(epoch)
            orders.append(where := np.array([train.where(i) for i in range(10)]))
            for k, d in enumerate((a, b)): assert set(np.bincount(where[:, k], minlength=len(d)).tolist()) <= {10//len(d), -(-10//len(d))}
        assert (orders[0] != orders[1]).any(0).all(), 'each epoch has another order'

def test_looks_lie_on_each_other_to_the_pixel():
    class Marked(Few):  # a value per pixel that photometry keeps apart: a dark picture with one bright pixel
        def __getitem__(self, i):
            s = super().__getitem__(i)
            image, sar = torch.full_like(s['image'], .05), torch.full_like(s['sar'], -25.)
            image[:, 3, 7 + i % 4], sar[:, 3, 7 + i % 4] = .9, 10.
            return s | {'image': image, 'sar': sar}
    train = Pairs(Few(2), Marked(8), count=2)
    places = set()
    for i in range(8):
        s = train[i]
        at = {k: int(s[k].mean(0).argmax()) for k in s if k.startswith('u_') and k.endswith(('image', 'sar')) and 'valid' not in k}
        assert len(at) == 6 and len(set(at.values())) == 1, at
        places |= set(at.values())
    assert len(places) > 3, 'they are turned'

def test_masks_of_unlabelled_places_never_reach_a_batch_unless_asked_for():
    assert not [k for k in Pairs(Few(2), Few(4))[0] if k.startswith('u_') and 'mask' in k]
    with_truth = Pairs(Few(2), Few(4), truth=True)[0]
    assert {'u_mask', 'u_valid_mask'} <= with_truth.keys() and not [k for k in with_truth if 'strong' in k and 'mask' in k]
    class Bare(Few):
        def __getitem__(self, i): return {k: v for k, v in super().__getitem__(i).items() if k in ('image', 'sar')}
    bare, full = Pairs(Few(2), Bare(4))[1], Pairs(Few(2), Few(4))[1]
    assert all(torch.equal(v, full[k]) for k, v in bare.items()) and set(full) - set(bare) == {'u_valid_image', 'u_valid_sar'}

def test_an_error_in_one_stream_says_which_item_of_which():
    class Broken(Few):
        def __getitem__(self, i):
            if i == 2: raise DataError("'b.tif' is cut off", 'a whole file')
            return super().__getitem__(i)
    train = Pairs(Few(2), Broken(4))
    i = next(i for i in range(4) if train.where(i)[1] == 2)
    with pytest.raises(DataError, match="unlabelled item 2: 'b.tif' is cut off"): train[i]
    with pytest.raises(DataError, match="unlabelled item 2: 'b.tif' is cut off"): fit(two(), train, objective=method('supervised'), epochs=1, batch_size=4, device='cpu')

@pytest.mark.parametrize('wrong', [dict(count=3), dict(seed=-1), dict(augment='ful'), dict(layers=('height',))])
def test_settings_of_pairs_that_make_no_sense(wrong):
    with pytest.raises(ConfigError): Pairs(Few(2), Few(4), **wrong)

def test_streams_without_items_or_layers():
    with pytest.raises(ConfigError, match='no unlabelled items'): Pairs(Few(2), Few(0))
    with pytest.raises(ConfigError, match='no labelled items'): Pairs(Few(0), Few(2))
    with pytest.raises(IndexError): Pairs(Few(2), Few(4))[4]

@pytest.mark.parametrize('name', ['supervised', 'fixmatch'])
def test_workers_do_not_change_the_result(name):
    (a, _), (b, _) = (train(name, pairs(), workers=w, steps=None, epochs=2) for w in (0, 2))
    assert same(a.state_dict(), b.state_dict())


# every method

@pytest.mark.parametrize('name', ALL)
def test_each_method_lowers_its_loss_and_says_what_it_taught(name, data):
    net, run = train(name, data, steps=None, epochs=8, lr=.02, options={} if name == 'supervised' else {'ramp': .5, 'alone': .25})
    first, last = run.history[0], run.history[-1]
    assert last['loss_mask'] < .9*first['loss_mask'] and last['loss_mask_sar'] < first['loss_mask_sar']
    if name == 'supervised': return
    assert [r['unlabelled_weight'] == 0 for r in run.history] == ['right' not in r for r in run.history] == [True]*2 + [False]*6
    first = run.history[2]
    assert first['unlabelled_weight'] < .2*last['unlabelled_weight'] and last['loss_pseudo'] > 0
    assert sum(last[f'pseudo_{c}'] for c in data.classes) == pytest.approx(1, abs=1e-4) and 0 < last['kept'] <= 1.0001
    assert .5 < last['right'] <= 1 and (name == 'cps' or first['right'] < last['right'])   # crossed labels alone may get worse in so short a time

@pytest.mark.parametrize('name', TAUGHT)
def test_weight_0_is_the_supervised_baseline_bit_for_bit_and_another_weight_is_not(name, data):
    (a, _), (b, run), (c, _) = train('supervised', data), train(name, data, options={'weight': 0.}), train(name, data, options={'ramp': 0.})
    assert same(a.state_dict(), b.state_dict()) and run.history[0]['loss_pseudo'] == run.history[0]['unlabelled_weight'] == 0
    assert not same(a.state_dict(), c.state_dict())

@pytest.mark.parametrize('name', ALL)
def test_nobody_learns_from_masks_of_unlabelled_places(name):
    def lied(truth):
        class Other(Few):
            def __getitem__(self, i): return super().__getitem__(i) | ({'mask': torch.full((24, 24), 3)} if truth == 'lie' else {})
        return train(name, Pairs(Few(4), Other(8, seed=1), count=2, truth=bool(truth)), options={} if name == 'supervised' else {'ramp': 0.})[0].state_dict()
    none, true, lie = lied(''), lied('true'), lied('lie')
    assert same(none, true) and same(none, lie)

@pytest.mark.parametrize('name', TAUGHT)
def test_nan_where_unlabelled_pixels_are_not_valid_does_no_harm(name, batch):
    hole = torch.zeros(6, 1, 24, 24, dtype=torch.bool)
    hole[:, :, 4:12, 6:20] = True
    def step(fill, layers):
        net, how = two(), method(name, ramp=0.)
        new = dict(batch)
        for k in layers:
            new[f'u_valid_{k}'] = ~hole
            for p in ('u', 'u_strong', 'u_strong2'): new[f'{p}_{k}'] = torch.where(hole, torch.as_tensor(fill), batch[f'{p}_{k}'])
        how.begin(net)
        losses = how.learn(net.train(), new)
        losses['total'].backward()
        return losses, {k: p.grad for k, p in net.named_parameters()}
    for layers in (('image',), ('sar',), ('image', 'sar')):
        (a, da), (b, db) = step(torch.nan, layers), step(0., layers)
        assert all(v.isfinite().all() for v in (*a.values(), *da.values()))
        assert all(torch.equal(a[k], b[k]) for k in a) and all(torch.equal(da[k], db[k]) for k in da)

@pytest.mark.parametrize('name', TAUGHT)
def test_no_gradient_reaches_whoever_gives_the_targets(name, batch):
    net, how = two(), method(name, ramp=0.)
    how.begin(net)
    asked = []
    source = how.source(net)
    before = {k: v.clone() for k, v in source.state_dict().items()}
    hook = source.register_forward_hook(lambda m, args, out: asked.append((m.training, torch.is_grad_enabled(), {k: v.requires_grad for k, v in out.items()})))
    losses = how.learn(net.train(), batch)
    hook.remove()
    weak = [a for a in asked if not a[0]]
    assert len(weak) == 1 and not weak[0][1] and not any(weak[0][2].values()) and set(weak[0][2]) == {'mask', *SENSORS}
    losses['total'].backward()
    if how.source(net) is not net: assert all(p.grad is None and not p.requires_grad for p in source.parameters()) and same(before, source.state_dict())

def test_an_image_that_only_the_weak_look_has_gets_no_gradient(batch):
    for name in ('fixmatch', 'cps', 'mean_teacher', SQUARES):     # where the weak look is learned from once more, it has one
        net, how = two(), method(name, ramp=0.)
        how.begin(net)
        new = batch | {'u_image': batch['u_image'].clone().requires_grad_(), 'u_strong_image': batch['u_strong_image'].clone().requires_grad_()}
        how.learn(net.train(), new)['total'].backward()
        assert new['u_image'].grad is None and new['u_strong_image'].grad.abs().sum() > 0

@pytest.mark.parametrize('name', ALL)
def test_a_run_that_is_stopped_in_the_middle_of_an_epoch_goes_on_bit_for_bit(name, tmp_path):
    train(name, pairs(), out=tmp_path/'whole', steps=None, epochs=3)
    stopped = train(name, pairs(stop=17), out=tmp_path/'cut', steps=None, epochs=3)[1]
    assert stopped.stopped == 'SIGTERM' and 0 < stopped.done < 3 and 0 < stopped.step < stopped.steps
    net, rest = train(name, pairs(), out=tmp_path/'cut', steps=None, epochs=3, resume=True)
    a, b = weights(tmp_path/'whole'), weights(tmp_path/'cut')
    assert same(a, b)
    if name == 'mean_teacher': assert any('teacher' in k for k in a)
    if name == 'dllr': assert any('reassigners' in k for k in a)
    drop = lambda rows: [{k: v for k, v in r.items() if 'second' not in k} for r in rows]
    whole = read_pair(tmp_path/'whole', 'state')[1]['run']['history']
    assert drop(whole) == drop(rest.history)

def test_a_resume_with_another_method_or_other_labels_is_told(tmp_path):
    train('fixmatch', pairs(stop=17), out=tmp_path, steps=None, epochs=3)
    with pytest.raises(ConfigError, match="objective: .*'FixMatch'.* then, .*'CPS'.* now"): train('cps', pairs(), out=tmp_path, steps=None, epochs=3, resume=True)
    with pytest.raises(ConfigError, match="'cutmix': 0.5.* then, .*'cutmix': 0.2.* now"): train('fixmatch', pairs(), out=tmp_path, steps=None, epochs=3, resume=True, options={'cutmix': .2})
    with pytest.raises(ConfigError, match='training data: .*4 labelled items.* then, .*3 labelled items'): train('fixmatch', Pairs(Few(3), Few(12, seed=1), count=2), out=tmp_path, steps=None, epochs=3, resume=True)

def test_every_method_has_the_same_validation_loss():
    val = Few(4, seed=7)
    net = two()
    found = {evaluate(net, val, objective=method(n), device='cpu')['values']['loss'] for n in ALL}
    assert found == {evaluate(net, val, objective=Objective(('mask',)), device='cpu')['values']['loss']}

@pytest.mark.parametrize('name', ['mean_teacher', 'fixmatch', 'supervised'])
def test_a_net_without_heads_for_its_sensors_learns_too(name, data):
    class One(Two):
        def forward(self, batch): return {'mask': super().forward(batch)['mask']}
    net, run = train(name, data, net=two(One), steps=None, epochs=4)
    assert 'loss_mask_sar' not in run.history[0] and run.history[-1]['loss'] > 0
    with pytest.raises(ConfigError, match="no 'mask_image'"): train('cps', data, net=two(One), options={'ramp': 0.})

def test_one_sensor_alone(data):
    class Optical(Two):
        inputs = ('image',)
        def forward(self, batch): return {'mask': self.mask_image(self.image(self.seen(batch, 'image'))[0])}
    net, _ = train('fixmatch', Pairs(Few(4), Few(8, seed=1), inputs=('image',)), net=two(Optical), options={'ramp': 0.})
    assert not same(net.state_dict(), two(Optical).state_dict())

@pytest.mark.parametrize('wrong', [dict(weight=-1), dict(weight=float('inf')), dict(ramp=2), dict(heads=-1), dict(cutmix=1.5), dict(tasks=('height',)), dict(weight=float('nan'))])
def test_settings_of_methods_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))): semi_objective('cps', **wrong)

def test_a_batch_of_one_names_cutmix(batch):
    how = method('fixmatch', ramp=0.)
    net = two()
    how.begin(net)
    with pytest.raises(ConfigError, match='cutmix=0'): how.learn(net.train(), {k: v[:1] for k, v in batch.items()})

def test_data_without_an_unlabelled_half_are_named():
    with pytest.raises(ConfigError, match=r"(?s)no u_image|without u_image.*Pairs"): train('cps', Few(8))
    with pytest.raises(ConfigError, match='count=2'): train('unimatch', Pairs(Few(4), Few(8)))


# parts

def test_the_loss_is_the_weighted_mean_over_all_pixels_that_can_be_judged():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 6, 7, generator=g), torch.randint(0, 5, (2, 6, 7), generator=g)
    labels[torch.rand(2, 6, 7, generator=g) < .3] = IGNORE
    weight, valid = torch.rand(2, 6, 7, generator=g), torch.rand(2, 1, 6, 7, generator=g) < .8
    labels = torch.where(valid[:, 0], labels, IGNORE)
    by_hand = sum(weight[i].item()*-logits[i[0], :, i[1], i[2]].log_softmax(0)[labels[i]].item() for i in np.ndindex(2, 6, 7) if labels[i] != IGNORE)
    assert pseudo_loss(logits, Target(labels, weight, valid)).item() == pytest.approx(by_hand/valid.sum().item(), rel=1e-5)
    for loss, shares in ((pseudo_loss, None), (share_loss, torch.rand(2, 5, 6, 7, generator=g))):  # a NaN where nothing can be judged stays there
        target = Target(labels, weight, valid, shares)
        spoilt = torch.where(valid, logits, torch.nan).requires_grad_()
        value = loss(spoilt, target)
        value.backward()
        assert torch.equal(value, loss(logits, target)) and value > 0 and spoilt.grad.isfinite().all()
    nothing = Target(torch.full_like(labels, IGNORE), weight, torch.zeros_like(valid))
    assert pseudo_loss(logits, nothing) == 0

@pytest.mark.parametrize('balance', (.5, 1.))
def test_rare_classes_count_more_among_pseudo_labels_as_they_do_among_labels(balance):
    g = torch.Generator().manual_seed(1)
    labels = (torch.rand(2, 9, 9, generator=g) > .9).long()   # one class is nine times as frequent as the other
    labels[:, 0] = IGNORE
    target = Target(labels, torch.ones(2, 9, 9), torch.ones(2, 1, 9, 9, dtype=torch.bool))
    each = evened(target, 2, balance)
    counts = torch.bincount(labels[labels != IGNORE], minlength=2)
    assert each[labels == IGNORE].abs().max() == 0 and each[target.kept].mean().item() == pytest.approx(1, rel=1e-5)
    assert (each[labels == 1][0]/each[labels == 0][0]).item() == pytest.approx((counts[0]/counts[1]).item()**balance, rel=1e-5)
    logits = torch.randn(2, 2, 9, 9, generator=g)
    assert pseudo_loss(logits, target, balance) != pseudo_loss(logits, target)
    same = Target(torch.zeros_like(labels), target.weight, target.valid)   # one class only: nothing to even out
    assert torch.allclose(pseudo_loss(logits, same, balance), pseudo_loss(logits, same))
    assert pseudo_loss(logits, Target(torch.full_like(labels, IGNORE), target.weight, target.valid), balance) == 0

def test_boxes_carry_pictures_targets_weights_and_validity_alike(batch):
    n = 6
    number = torch.arange(n).view(n, 1, 1, 1).expand(n, 1, 24, 24)
    seen = {'image': number.float().expand(n, 4, 24, 24).clone(), 'sar': -number.float().expand(n, 2, 24, 24).clone(), 'valid_image': number % 2 == 0}
    target = {'mask': Target(number[:, 0].clone(), number[:, 0].float(), number % 2 == 0, number.float().expand(n, 7, 24, 24).clone())}
    new, pasted = paste(seen, target, (5,), share=1.)
    t = pasted['mask']
    assert (new['image'][:, 0] == t.labels).all() and (-new['sar'][:, 0] == t.labels).all() and (t.weight == t.labels).all() and (t.shares[:, 3] == t.labels).all()
    assert (t.valid[:, 0] == (t.labels % 2 == 0)).all() and torch.equal(new['valid_image'], t.valid)
    assert ((t.labels != number[:, 0]).flatten(1).any(1)).all()
    few = [(paste(seen, target, (s,), share=.3)[1]['mask'].labels != number[:, 0]).flatten(1).any(1).float().mean().item() for s in range(60)]
    assert .2 < np.mean(few) < .4
    assert paste(seen, target, (5,), share=0.)[0]['image'] is seen['image']

def test_reassignment_comes_before_boxes(batch, monkeypatch):
    "Targets must be made from whole pictures: what is asked about holds no pasted box."
    import rs_mtl.training.semi as semi
    order = []
    monkeypatch.setattr(semi, 'paste', lambda *a: (order.append('paste'), paste(*a))[1])
    for name in ('fixmatch', 'dllr', 'mean_teacher'):
        net, how = two(), method(name, ramp=0.)
        how.begin(net)
        inner = how.targets
        how.targets = lambda answers, where: (order.append('targets'), inner(answers, where))[1]
        how.learn(net.train(), batch)
    assert order == ['targets', 'paste']*3

def test_running_statistics_are_those_of_labelled_pictures_until_pseudo_labels_count(batch):
    def stats(name, steps):
        net, how = two(), method(name, **({} if name == 'supervised' else {'ramp': 0., 'alone': .5}))
        how.begin(net)
        for step in range(steps):
            how.before_step(step, 2)
            how.learn(net.train(), batch)
        return {k: v for k, v in net.state_dict().items() if 'running' in k or 'tracked' in k}
    first, second = (stats('supervised', n) for n in (1, 2))
    assert first and not same(first, second)
    assert all(same(first, stats(n, 1)) and same(first, stats(n, 2)) for n in ALL if n != 'supervised')

def test_once_pseudo_labels_count_every_net_answers_as_in_use(batch):
    for name in (n for n in ALL if n != 'supervised'):
        for alone, settled in ((0., True), (.5, False)):
            net, how, modes = two(), method(name, ramp=0., alone=alone), set()
            how.begin(net)
            how.before_step(1, 10)
            for m in net.modules():
                if isinstance(m, torch.nn.BatchNorm2d): m.register_forward_hook(lambda m, args, out: modes.add(m.training))
            losses = how.learn(net.train(), batch)
            assert modes == {not settled} and (losses['unlabelled_weight'] > 0) == settled and all(m.training for m in net.modules())

def test_the_share_of_the_labels_comes_first_and_the_weight_rises_after_it():
    how = method('cps', alone=.4, ramp=.5)
    def weight(step): how.before_step(step, 100); return how.unlabelled_weight
    assert [weight(s) for s in (0, 39)] == [0, 0] and weight(40) == ramped(0, 60, .5) and weight(55) == ramped(15, 60, .5) and weight(70) == weight(99) == 1
    assert method('cps', alone=1.).unlabelled_weight == 1     # nobody said how many steps there are

def test_what_was_switched_for_a_while_is_switched_back_even_after_an_error():
    net = two().train()
    net.image[1].eval()
    for how in (answering, statistics_kept, statistics_used):
        with pytest.raises(RuntimeError, match='boom'), how(net): raise RuntimeError('boom')
    assert net.training and not net.image[1].training and not net.all_heads
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)) and torch.is_grad_enabled()

def test_the_teacher_is_the_average_it_claims_to_be():
    net, how = two(), method('mean_teacher', decay=.9)
    how.begin(net)
    slow = {k: v.detach().clone() for k, v in net.named_parameters()}
    for step in range(40):
        how.before_step(step, 40)
        with torch.no_grad():
            for p in net.parameters(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        net.image[0].running_mean += 1
        how.after_step(net, {})
        d = min(.9, (1 + step)/(10 + step))
        slow = {k: d*slow[k] + (1 - d)*v.detach() for k, v in net.named_parameters()}
    assert all(torch.allclose(slow[k], v, atol=1e-4) for k, v in how.teacher.named_parameters())
    assert torch.equal(how.teacher.image[0].running_mean, net.image[0].running_mean) and not how.train().teacher.training

def test_crossing_asks_the_other_sensor_and_only_where_it_saw_something():
    C = 3
    def says(c): return torch.full((1, C, 2, 2), -9.).index_fill_(1, torch.tensor([c]), 9.)
    seen = {'image': torch.zeros(1, 4, 2, 2), 'sar': torch.zeros(1, 2, 2, 2), 'valid_sar': torch.tensor([[[[True, False], [True, True]]]])}
    how = method('cps')
    t = how.targets({'mask': says(0), 'mask_image': says(1), 'mask_sar': says(2)}, judged(seen))
    assert t['mask_image'].labels.tolist() == [[[2, IGNORE], [2, 2]]] and t['mask_sar'].labels.tolist() == [[[1, IGNORE], [1, 1]]]
    assert t['mask'].valid.sum() == 3

def test_rare_classes_count_half_as_much_more_among_pseudo_labels_unless_it_is_said(batch):
    assert (method('cps').evening, method('cps', balance=.6).evening, method('cps', balance=.6, evening=.1).evening) == (0, .3, .1)
    with pytest.raises(ConfigError, match='evening=2'): method('cps', evening=2.)
    def pseudo(name, **options):
        net, how = two(), method(name, ramp=0., **options)
        how.begin(net)
        return how.learn(net.train(), batch)['pseudo'].item()
    for name in (n for n in ALL if n != 'supervised'):
        assert pseudo(name, balance=.6) == pseudo(name, balance=.6, evening=.3) == pseudo(name, evening=.3) != pseudo(name)

def test_one_class_for_many_steps_warns_once_and_only_when_the_labels_hold_several():
    def told(top, labels, steps=250):
        how = method('fixmatch')
        how.begin(two())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            for i in range(steps): how.after_step(None, {'pseudo_1': top if i != 120 else .5, 'label_top': labels})
        return len(said)
    assert (told(.99, .5), told(.97, .5), told(.99, .99), told(.99, .5, 99)) == (2, 0, 0, 0)  # twice: it had got better in between

def test_the_weight_rises_and_stays():
    curve = [ramped(s, 1000) for s in range(1000)]
    assert curve[0] < .01 and all(a <= b for a, b in itertools.pairwise(curve)) and curve[200:] == [1.]*800


# dllr

def dllr(batch, net=None, seed=0, **options):
    net, how = net or two(), semi_objective('dllr', ramp=0., **options)
    how.begin(net, seed=seed)
    return how.learn(net.train(), batch), net, how

def test_all_switches_off_is_supervised(data):
    a = train('supervised', data)[0]
    for off in (dict(masking=None, complementary=False, reassignment=None, consistency=None), dict(consistency=None)):   # nothing hidden: no lesson either
        assert same(a.state_dict(), train('dllr', data, options=off)[0].state_dict())
        how = semi_objective('dllr', **off)
        how.begin(two())
        assert not how.numbers

def test_masking_of_nothing_is_no_masking(batch):
    losses = [dllr(batch, masking=m)[0] for m in (None, Masking(0., 0.), Masking())]
    assert all(torch.equal(losses[0][k], losses[1][k]) for k in losses[0]) and losses[1]['complementary'] == 0 and 'complementary' not in losses[0]
    assert losses[0]['pseudo'] != losses[2]['pseudo'] and losses[2]['complementary'] > 0

def test_squares_are_hidden_where_the_net_says_so_or_who_trains_it(batch):
    def told(net_says, **options):
        net = two()
        net.masking = net_says
        return dllr(batch, net=net, drop=0., **options)[0]
    plain, squares = told(None), told(None, masking=Masking())
    assert torch.equal(told(Masking())['total'], squares['total']) and squares['total'] != plain['total']
    assert torch.equal(told(Masking(), masking=False)['total'], plain['total']) and 'complementary' in squares and 'complementary' not in plain
    with pytest.raises(ConfigError, match='a net that hides nothing'): told(None, mask_labelled=True)

def test_only_the_strong_look_is_masked_and_both_sensors_differently(batch):
    calls = []
    class Spy(Two):
        def forward(self, seen):
            calls.append((self.training, {k: seen[k].float().mean().item() for k in ('hide_image', 'hide_sar') if k in seen}, 'hide_image' in seen and bool((seen['hide_image'] & seen['hide_sar']).any())))
            return super().forward(seen)
    dllr(batch, net=two(Spy), drop=0., masking=Masking(.5, .25, block=4))
    assert [c[0] for c in calls] == [True, False, True] and calls[0][1] == calls[1][1] == {}
    assert calls[2][1] == {'hide_image': pytest.approx(.5, abs=.05), 'hide_sar': pytest.approx(.25, abs=.05)} and not calls[2][2]
    calls.clear()
    losses, *_ = dllr(batch, net=two(Spy), drop=0., masking=Masking(.5, .25, block=4), mask_labelled=True)
    assert len(calls) == 4 and calls[3][1] and losses['masked'] > 0

@pytest.mark.parametrize('only', [dict(cutmix=0.), dict(cutmix=0., drop=0., masking=Masking()), dict(cutmix=1., drop=0.)])
def test_channels_masks_and_boxes_change_from_step_to_step_and_from_rank_to_rank_but_not_from_run_to_run(batch, only):
    def total(step=0, rank=0, seed=0):
        net, how = two(), semi_objective('dllr', ramp=0., alone=0., **only)
        how.begin(net, seed, rank)
        how.before_step(step, 10)
        return how.learn(net.train(), batch)['total'].item()
    assert total() == total() and len({total(), total(step=1), total(rank=1), total(seed=1)}) == 4

@pytest.mark.parametrize('off', [dict(complementary=False), dict(reassignment=None), dict(reassignment='pixel'), dict(consistency='self'), dict(consistency=None), dict(masking=None), dict(threshold=.6), dict(doubt=None), dict(agreed=True), dict(decay=0.), dict(drop=0.)])
def test_each_switch_changes_what_it_should(batch, off):
    on = dict(masking=Masking())
    full, other = dllr(batch, **on)[0], dllr(batch, **on | off)[0]
    assert semi_objective('dllr', **on | off).settings != semi_objective('dllr', **on).settings    # a run that is resumed is told
    assert torch.equal(full['mask'], other['mask']) and (full['total'] != other['total'] or 'decay' in off)  # at the first step the slow copy is the net
    if 'complementary' in off: assert 'complementary' not in other and torch.equal(full['pseudo'], other['pseudo'])
    if off.get('consistency', 1) is None: assert 'pseudo' not in other and other['complementary'] > 0
    if 'threshold' in off: assert other['kept'] < full['kept']
    if 'drop' in off: assert full['feature'] > 0 and 'feature' not in other and torch.equal(full['pseudo'], other['pseudo'])

@given(share=st.floats(0, .95), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_two_sensors_lose_channels_apart_whoever_is_asked_first(share, seed):
    net, x = two(width=32), {'image': torch.rand(5, 4, 8, 8), 'sar': torch.randn(5, 2, 8, 8)}
    for k in x: torch.nn.init.constant_(getattr(net, k)[1].second.bias, 9.)      # no channel is 0 by itself
    ask = lambda *order: {k: getattr(net, k)(x[k])[0] for k in order}
    whole = ask('image', 'sar')
    with channels_dropped(net, share, (seed,), apart=True): less, again = ask('image', 'sar'), ask('sar', 'image')
    gone = {k: (f == 0).all((2, 3)) for k, f in less.items()}
    for k in x: assert torch.equal(less[k], again[k]) and torch.allclose(less[k], torch.where(gone[k][..., None, None], 0, whole[k]/(1 - share)), rtol=1e-4)
    both = (gone['image'] & gone['sar']).float().mean()
    assert both == 0 if share <= .5 else abs(both - (2*share - 1)) < .2          # of more than a half of each, some are gone from both
    assert all(abs(g.float().mean() - share) < .2 for g in gone.values())
    assert all(torch.equal(f, whole[k]) for k, f in ask('image', 'sar').items())

def test_only_two_encoders_lose_channels_apart():
    with pytest.raises(ConfigError, match='two encoders'), channels_dropped(two().image, .5, (0,), apart=True): pass

def test_fewer_channels_are_one_more_weak_look_that_counts_half(batch):
    calls = []
    class Spy(Two):
        def forward(self, seen):
            calls.append((seen['image'], 'hide_image' in seen))
            return super().forward(seen)
    losses, *_ = dllr(batch, net=two(Spy), masking=Masking(), weight=3.)
    assert len(calls) == 4 and torch.equal(calls[3][0], batch['u_image']) and [c[1] for c in calls] == [False, False, True, False]
    once = dllr(batch, masking=Masking(), weight=1.)[0]
    assert (losses['total'] - once['total']).item() == pytest.approx(2*(.5*losses['pseudo'] + .5*losses['feature'] + losses['complementary']).item(), rel=1e-4)
    assert 'feature' not in dllr(batch, masking=Masking(), consistency=None)[0]          # nothing is taught, so nothing is learned there

def test_heads_are_taught_by_the_others_after_reassignment(batch):
    from rs_mtl.training.dllr import SOURCES, corrected
    _, net, how = dllr(batch)
    asked = {}
    for h, r in how.reassigners.items(): r.register_forward_hook(lambda m, args, out, h=h: asked.__setitem__(h, (args, out)))
    with answering(net): answers = net(look(batch))
    where = judged(look(batch))
    targets = how.targets(answers, where)
    for h, by in SOURCES['cross'].items():
        (logp, valid), found = asked[h]
        told = consensus([answers[s] for s in by])
        if h == 'mask': told = corrected(told, [consensus([answers[s] for s in ('mask_image', 'mask_sar')])], torch.ones_like(valid))
        assert torch.allclose(logp, told, atol=1e-5)
        assert torch.equal(targets[h].labels, found.labels) and torch.equal(targets[h].weight, torch.where(found.labels != IGNORE, found.confidence, 0))
    assert set(SOURCES['cross']['mask_image']) & {'mask_image'} == set() and set(SOURCES['cross']['mask_sar']) & {'mask_sar'} == set()

@pytest.mark.parametrize('agreed', [False, True])
def test_a_sensor_that_sees_nothing_does_not_correct_the_fused_head(batch, agreed):
    from rs_mtl.training.dllr import corrected
    _, net, how = dllr(batch, agreed=agreed)
    with answering(net): answers = net(look(batch))
    where = judged(look(batch))
    nothing = torch.zeros_like(where['mask'])
    blind = answers | {'mask_sar': torch.full_like(answers['mask_sar'], float('nan'))}
    told = how.opinion('mask', blind, where | {'mask_sar': nothing})
    assert torch.allclose(told, corrected(consensus([answers['mask']]), [consensus([answers['mask_image']])], where['mask']), atol=1e-5)
    assert not torch.allclose(told, consensus([answers['mask']]), atol=1e-3)

def test_sensors_that_have_to_agree_are_heard_one_by_one(batch):
    from rs_mtl.training.dllr import corrected
    _, net, how = dllr(batch, agreed=True)
    with answering(net): answers = net(look(batch))
    where = judged(look(batch))
    each = [consensus([answers[h]]) for h in ('mask_image', 'mask_sar')]
    assert torch.allclose(how.opinion('mask', answers, where), corrected(consensus([answers['mask']]), each, where['mask']), atol=1e-5)
    assert not torch.allclose(how.opinion('mask', answers, where), dllr(batch)[2].opinion('mask', answers, where), atol=1e-4)

@given(st.floats(.05, .9), st.floats(.05, .9), st.floats(.05, .9), st.floats(.01, 1))
def test_a_class_gains_or_loses_as_far_as_both_sensors_say_so(fused, a, b, doubt):
    from rs_mtl.training.dllr import corrected
    flat = lambda share: torch.tensor([share, 1 - share]).log()[None, :, None, None].expand(1, 2, 7, 7)
    seen = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    told = corrected(flat(fused), [flat(a), flat(b)], seen, doubt)
    nearer = min(max(fused, min(a, b)), max(a, b))               # where they contradict each other about the fused answer, it stays
    assert torch.allclose(told, corrected(flat(fused), [flat(nearer)], seen, doubt), atol=1e-4)
    assert torch.allclose(told, corrected(flat(fused), [flat(b), flat(a)], seen, doubt), atol=1e-6)
    if min(a, b) <= fused <= max(a, b): assert torch.allclose(told, flat(fused), atol=1e-4)

@given(st.integers(0, 99), st.floats(.01, 10), st.integers(2, 5))
def test_a_correction_is_a_probability_that_follows_the_sensors_and_only_where_they_see(seed, doubt, classes):
    from rs_mtl.training.dllr import REACH, corrected
    g = torch.Generator().manual_seed(seed)
    fused, sensors = ((3*torch.randn(2, classes, 12, 14, generator=g)).log_softmax(1) for _ in range(2))
    seen = torch.zeros(2, 1, 12, 14, dtype=torch.bool); seen[..., :6] = True
    blind = torch.where(seen, sensors, float('nan'))          # what a blind sensor says does not count, whatever it is
    p = corrected(fused, [blind], seen, doubt)
    assert torch.allclose(p.exp().sum(1), torch.ones(2, 12, 14), atol=1e-4)
    assert torch.allclose(p[..., 6 + REACH//2:], fused[..., 6 + REACH//2:], atol=1e-4)
    flat = [x.exp().mean((2, 3), keepdim=True).expand_as(x).log() for x in (fused, sensors)]
    moved = corrected(flat[0], flat[1:], torch.ones_like(seen), doubt) - flat[0]
    first = (flat[1].exp() + doubt)/(flat[0].exp() + doubt)
    assert torch.equal(moved[:, :, 0, 0].argmax(1), first[:, :, 0, 0].argmax(1))   # the class of which they see most more gains most

def test_reassigners_see_labels_but_not_those_that_are_not_valid(batch):
    seen = []
    net, how = two(), semi_objective('dllr', ramp=0.)
    how.begin(net)
    how.reassigners['mask'].observe = lambda labels, logits: seen.append(labels) or seen.append(logits)
    valid = torch.rand(6, 1, 24, 24, generator=torch.Generator().manual_seed(0)) < .5
    how.learn(net.train(), batch | {'valid_mask': valid})
    assert torch.equal(seen[0], torch.where(valid[:, 0], batch['mask'], IGNORE)) and seen[1].shape == (6, 3, 24, 24) and not seen[1].requires_grad

@pytest.mark.parametrize('wrong', [dict(reassignment='all'), dict(consistency='crossed'), dict(complementary=-1), dict(threshold=2), dict(masking=None, mask_labelled=True), dict(doubt=0), dict(doubt=float('nan')), dict(drop=1.), dict(drop=-.1)])
def test_settings_of_dllr_that_make_no_sense(wrong):
    with pytest.raises(ConfigError): semi_objective('dllr', **wrong)


# two processes

PAIR = '''
import sys, torch
from two import *
from rs_mtl.training.fit import fit
from rs_mtl.training.semi import semi_objective
import torch.distributed as dist
for name in ('mean_teacher', 'dllr'):
    how, net = semi_objective(name, ramp=0.), two()
    fit(net, pairs(), Few(4, seed=5), objective=how, steps=6, batch_size=4, lr=.02, device='cpu', out=f'{sys.argv[1]}/{name}')
    mine = {'weights': torch.cat([p.detach().flatten() for p in how.parameters()] + [p.detach().flatten() for p in net.parameters()])}
    both = [torch.zeros_like(mine['weights']) for _ in range(2)]
    dist.all_gather(both, mine['weights'])
    assert torch.equal(*both), name
dist.barrier(); dist.destroy_process_group()
'''

def test_two_processes_keep_the_same_objective(tmp_path):
    (tmp_path/'pair.py').write_text(PAIR)
    said = torchrun(tmp_path/'pair.py', tmp_path)
    assert said.returncode == 0, said.stderr[-3000:]
    for name in ('mean_teacher', 'dllr'):
        (row,) = read_pair(tmp_path/name, 'state')[1]['run']['history'][-1:]
        assert row['step'] == 6 and row['kept'] > .9 and row['val_pixels'] == 4*24*24


# the command line

def history(folder):
    import csv
    return list(csv.DictReader(open(folder/'history.csv')))

TINY = {'quick': True, 'encoder': 'mobilenetv3_small_050', 'options': 'width=8,full=8,detail=4'}

def test_a_run_with_a_share_of_the_labels_trains_dllr_and_leaves_its_split(tmp_path):
    from rs_mtl.apply.runs import run
    run('train', tmp_path/'a', model='dllr', data='land', labels='1/4', method_options='alone=0', out=str(tmp_path/'a'), **TINY)
    metrics = json.loads((tmp_path/'a'/'metrics.json').read_text())
    split = read_split(tmp_path/'a'/'labels.json')
    assert (metrics['parameters']['method'], metrics['parameters']['inputs'], metrics['labels']['sha256']) == ('dllr', 'image,sar', split.hash)
    assert (split.fraction, len(split.labelled), metrics['items']['train']) == ('1/4', 1, 3)
    row = history(tmp_path/'a')[-1]
    assert float(row['unlabelled_weight']) == 1 and float(row['loss_feature']) > 0 and 'loss_complementary' not in row and 0 <= float(row['right']) <= 1

TABLE = '''
classes = ['farmland', 'city', 'village', 'water', 'forest', 'road', 'others']
image = {pattern = '{place}/image.tif'}
sar = {pattern = '{place}/sar.tif'}
mask = {pattern = '{place}/mask.tif'}
splits = {train = ['0', '1', '2'], val = ['3'], test = ['4']}
'''

def test_a_run_with_a_split_file_needs_no_label_files_of_other_places(tmp_path):
    from rasterio.transform import from_origin

    from rs_mtl.apply.runs import run
    from rs_mtl.data.samples import write_sample
    land = Land(5, 160, seed=2)
    for i in range(5): write_sample(tmp_path/'data'/f'{i}', land[i], {'crs': 'EPSG:32632', 'transform': from_origin(0, 1e5*i, 10, 10)}, land.bands, land.sar_bands, land.classes, land.palette, clip=True)
    for i in (1, 2): (tmp_path/'data'/f'{i}'/'mask.tif').unlink()
    (tmp_path/'own.toml').write_text(TABLE)
    write_split(label_split(['0', '1', '2'], 1, next(s for s in range(99) if label_split(['0', '1', '2'], 1, s).labelled == ('0',))), tmp_path/'split.json')
    run('train', tmp_path/'out', model='plain', data=str(tmp_path/'own.toml'), root=str(tmp_path/'data'), labels=str(tmp_path/'split.json'), method='fixmatch', method_options='threshold=0.1', inputs='image,sar', out=str(tmp_path/'out'), **TINY)
    row = history(tmp_path/'out')[-1]
    assert float(row['kept']) > 0 and 'right' not in row and read_split(tmp_path/'out'/'labels.json') == read_split(tmp_path/'split.json')

def test_a_method_with_all_labels_is_an_error_that_names_the_share(tmp_path):
    from rs_mtl.apply.runs import RunFailed, run
    with pytest.raises(RunFailed, match="labels='1/16'"): run('train', tmp_path, method='cps', out=str(tmp_path), quick=True)
