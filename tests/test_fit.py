"Training that can be stopped, killed, starved and misled, and what it leaves behind."
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tiny import ENV, Send, Squares, die, even, forkserver, tiny, torchrun

from rs_mtl.core import CheckpointError, ConfigError, DataError, LabelError, TrainingDiverged
from rs_mtl.training.checkpoint import load, read_pair
from rs_mtl.training.fit import evaluate, fit, fit_stats
from rs_mtl.training.losses import Objective
from rs_mtl.training.runtime import folder_lock


@pytest.fixture(autouse=True)
def quiet(monkeypatch): monkeypatch.setenv('RS_MTL_PROGRESS', '0')

def train(out=None, data=None, net=None, **kwargs):
    net = net or tiny()
    kwargs = dict(epochs=3, batch_size=4, lr=.02, device='cpu') | kwargs
    return net, fit(net, Squares(16) if data is None else data, kwargs.pop('val', Squares(4, seed=1)), out=out, **kwargs)

def weights(folder): return {k: v for k, v in read_pair(folder, 'state')[0].items() if k.startswith('task.')}

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def history(run): return [{k: v for k, v in row.items() if 'second' not in k} for row in run.history]


def test_training_lowers_the_loss_and_leaves_a_whole_folder(tmp_path):
    net, run = train(tmp_path, epochs=8)
    assert run.history[-1]['loss'] < run.history[0]['loss']/2 and run.step == run.steps == 32
    assert sorted(p.name for p in tmp_path.iterdir()) == ['history.csv', 'model.json', 'model.safetensors', 'state.json', 'state.safetensors']
    rows = list(csv.DictReader(open(tmp_path/'history.csv')))
    assert [float(r['val_loss']) for r in rows] == [r['val_loss'] for r in run.history]
    assert equal(load(tmp_path).state_dict(), net.state_dict())
    about = json.loads((tmp_path/'model.json').read_text())
    assert about['meta']['classes'] == ['ground', 'roof'] and about['scores']['values']['miou'] == run.best['val_miou']

def test_the_net_that_comes_back_is_the_one_of_the_best_epoch(tmp_path):
    for out in (tmp_path, None):
        net, run = train(out, epochs=4, lr=.5)  # too fast, so that the last epoch is not the best
        best = min(run.history, key=lambda r: r['val_loss'])
        assert run.best == best and best is not run.history[-1]
        found = evaluate(net, Squares(4, seed=1), objective=Objective(net.tasks), batch_size=4)['values']
        assert found['loss'] == pytest.approx(best['val_loss'], rel=1e-6)

def test_monitor_names_what_decides(tmp_path):
    _, run = train(None, epochs=4, lr=.3, monitor='miou')
    assert run.best['val_miou'] == max(r['val_miou'] for r in run.history)
    with pytest.raises(ConfigError, match="'mioo'"): train(None, epochs=1, monitor='mioo')

def test_one_batch_can_be_learnt_by_heart():
    _, run = train(None, Squares(4), tiny(width=16, dropout=0.), val=None, epochs=150, lr=.03)
    assert run.history[-1]['loss'] < .25*run.history[0]['loss']

def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    (a, _), (b, _), (c, _) = train(seed=1), train(seed=1), train(seed=2)
    assert equal(a.state_dict(), b.state_dict()) and not equal(a.state_dict(), c.state_dict())
    assert torch.equal(before, torch.get_rng_state())

def test_workers_do_not_change_the_result():
    (a, _), (b, _) = train(workers=0, epochs=2), train(workers=2, epochs=2)
    assert equal(a.state_dict(), b.state_dict())

def test_learned_loss_weights_are_trained_saved_and_resumed(tmp_path):
    def objective(): return Objective(('mask', 'height'), weighting='uncertainty')
    train(tmp_path/'whole', objective=objective())
    train(tmp_path/'half', objective=objective(), data=Squares(16, spoil=Send(signal.SIGTERM, 20)))
    train(tmp_path/'half', objective=objective(), resume=True)
    a, b = weights(tmp_path/'whole'), weights(tmp_path/'half')
    assert (a['task.objective.log_variance'] != 0).all() and equal(a, b)


# resume, signals, kill

@pytest.mark.parametrize('at', [1, 9, 17, 30, 47])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(tmp_path, at):
    _, whole = train(tmp_path/'whole')
    _, half = train(tmp_path/'half', Squares(16, spoil=Send(signal.SIGTERM, at + 1)))  # one item is looked at before the start
    assert half.stopped == 'SIGTERM' and half.step == -(-at//4) and load(tmp_path/'half') is not None
    net, rest = train(tmp_path/'half', resume=True)
    assert equal(weights(tmp_path/'whole'), weights(tmp_path/'half')) and history(rest) == history(whole)
    a, b = (read_pair(tmp_path/d, 'state')[0] for d in ('whole', 'half'))
    assert equal(a, b), 'optimiser and random state too'
    assert rest.best == whole.best or {k: v for k, v in rest.best.items() if 'second' not in k} == {k: v for k, v in whole.best.items() if 'second' not in k}

def test_a_kill_between_the_last_step_of_an_epoch_and_its_validation(tmp_path, monkeypatch):
    train(tmp_path/'whole', save_every=0.)
    from rs_mtl.training import fit as module
    monkeypatch.setattr(module, '_evaluate', lambda *a: exec('raise KeyboardInterrupt'))
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'half', save_every=0.)
    monkeypatch.undo()
    assert read_pair(tmp_path/'half', 'state')[1]['run']['done'] == 4
    monkeypatch.setenv('RS_MTL_PROGRESS', '0')
    _, rest = train(tmp_path/'half', save_every=0., resume=True)
    assert rest.step == 12 and equal(weights(tmp_path/'whole'), weights(tmp_path/'half'))

def test_a_finished_run_that_is_resumed_does_nothing(tmp_path):
    net, run = train(tmp_path)
    before = (tmp_path/'state.json').read_bytes()
    again, run2 = train(tmp_path, resume=True)
    assert run2.step == run.step and equal(net.state_dict(), again.state_dict()) and (tmp_path/'state.json').read_bytes() == before

def test_resume_without_anything_to_resume_starts(tmp_path):
    assert train(tmp_path, resume=True, epochs=1)[1].step == 4

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(tmp_path, number):
    before = signal.getsignal(number)
    _, run = train(tmp_path, Squares(16, spoil=Send(number, 8)))
    assert run.stopped == number.name and run.step == 2 and read_pair(tmp_path, 'state')[1]['run']['step'] == 2
    assert signal.getsignal(number) is before

def test_a_second_signal_exits_at_once(tmp_path):
    train(tmp_path, epochs=1)
    kept = (tmp_path/'state.json').read_bytes()
    with pytest.raises(KeyboardInterrupt): train(tmp_path, Squares(16, spoil=Send(signal.SIGINT, 8, again=1)), force=True)
    with pytest.raises(SystemExit, match='143'): train(tmp_path, Squares(16, spoil=Send(signal.SIGTERM, 8, again=1)), force=True)
    assert (tmp_path/'state.json').read_bytes() == kept and not (tmp_path/'.lock').exists()

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_a_terminal_or_a_cluster_reaches_the_workers_too_and_spoils_nothing(tmp_path, number):
    code = f"from tiny import *; from rs_mtl.training.fit import fit; r = fit(tiny(), Squares(64, pause=.02), epochs=50, batch_size=4, workers=2, out={str(tmp_path)!r}, device='cpu'); print(r.stopped, r.step)"
    child = subprocess.Popen([sys.executable, '-c', code], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path/'state.json').exists() and child.poll() is None: time.sleep(.05)
    os.killpg(child.pid, number)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 0 and out.startswith(number.name), err
    assert read_pair(tmp_path, 'state')[1]['run']['step'] == int(out.split()[1])

def test_training_in_a_thread_works_without_signals():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(train(epochs=1)[1].step))
    thread.start()
    thread.join()
    assert seen == [4]

def train_for_ever(folder):
    warnings.simplefilter('ignore')
    os.environ['RS_MTL_PROGRESS'] = '0'
    torch.set_num_threads(1)
    fit(tiny(), Squares(16), Squares(4, seed=1), epochs=400, batch_size=4, lr=.02, device='cpu', out=folder, resume=True, save_every=0.)

def test_kill_9_at_random_moments_leaves_a_loadable_folder_and_the_result_of_the_uninterrupted_run(tmp_path):
    "Killed again and again, resumed again and again, stopped at the end, and compared with a run of as many steps."
    start, rng, kills, steps = forkserver(), random.Random(0), 0, 0
    lock = tmp_path/'killed'/'.lock'
    deadline = time.monotonic() + 18
    while kills < 25 and time.monotonic() < deadline:
        child = start.Process(target=train_for_ever, args=(tmp_path/'killed',), daemon=True)
        child.start()
        while not (lock.exists() and f'"pid": {child.pid},' in lock.read_text()) and child.is_alive(): time.sleep(.01)
        time.sleep(rng.uniform(.02, .35))
        child.kill()
        child.join()
        kills += 1
        if (tmp_path/'killed'/'state.json').exists(): steps, before = read_pair(tmp_path/'killed', 'state')[1]['run']['step'], steps
        if steps:
            assert steps >= before, 'a kill lost a checkpoint'
            if (tmp_path/'killed'/'model.json').exists(): load(tmp_path/'killed')
    assert kills >= 8 and steps > 8
    with pytest.warns(UserWarning, match='was killed'): train(tmp_path/'killed', Squares(16, spoil=Send(signal.SIGTERM, 2)), epochs=400, resume=True)
    about = read_pair(tmp_path/'killed', 'state')[1]
    train(tmp_path/'whole', Squares(16, spoil=Send(signal.SIGTERM, 4*(about['run']['step'] - 1) + 2)), epochs=400)
    assert read_pair(tmp_path/'whole', 'state')[1]['run']['step'] == about['run']['step']
    assert equal(weights(tmp_path/'killed'), weights(tmp_path/'whole'))

def test_a_checkpoint_within_a_long_epoch(tmp_path):
    code = f"from tiny import *; from rs_mtl.training.fit import fit; fit(tiny(), Squares(1000, pause=.01), epochs=1, batch_size=2, save_every=.1, out={str(tmp_path)!r}, device='cpu')"
    child = subprocess.Popen([sys.executable, '-c', code], env=ENV)
    while not (tmp_path/'state.json').exists() and child.poll() is None: time.sleep(.05)
    child.kill()
    child.wait()
    run = read_pair(tmp_path, 'state')[1]['run']
    assert run['epoch'] == 0 and 0 < run['done'] < 500 and run['sums']['total'] > 0


# what would fail in the night fails at the start

def test_resume_with_other_settings_lists_them_and_force_goes_on(tmp_path):
    train(tmp_path, Squares(16, spoil=Send(signal.SIGTERM, 6)))
    other = Squares(20, classes=('ground', 'house'))
    with pytest.raises(ConfigError) as e: train(tmp_path, other, tiny(width=8), lr=.01, resume=True)
    for part in ('lr: 0.02 then, 0.01 now', 'training items: 16 then, 20 now', "'roof'] then, ['ground', 'house'] now"): assert part in e.value.what
    assert 'force=True' in e.value.todo and 'seed' not in e.value.what
    assert train(tmp_path, other, lr=.01, resume=True, force=True)[1].step == 15

def test_resume_with_another_net_lists_it_and_force_does_not_bend_weights(tmp_path):
    train(tmp_path, Squares(16, spoil=Send(signal.SIGTERM, 6)))
    with pytest.raises(ConfigError, match="net: .*'width': 8.* then, .*'width': 12.* now"): train(tmp_path, net=tiny(width=12), resume=True)
    with pytest.raises(CheckpointError, match='other shapes'): train(tmp_path, net=tiny(width=12), resume=True, force=True)

def test_an_old_run_is_not_overwritten_by_accident(tmp_path):
    train(tmp_path, epochs=1)
    with pytest.raises(ConfigError, match='already holds a run'): train(tmp_path, epochs=1)
    assert train(tmp_path, epochs=2, force=True)[1].step == 8

def test_two_processes_with_the_same_folder(tmp_path):
    code = f"import time; from rs_mtl.training.runtime import folder_lock\nwith folder_lock({str(tmp_path)!r}): print('held', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=ENV)
    assert child.stdout.readline() == 'held\n'
    with pytest.raises(ConfigError, match=rf'another process trains in .*"pid": {child.pid}, "host": "{os.uname().nodename}"'): train(tmp_path)
    child.kill()
    child.wait()
    child.stdout.close()
    with pytest.warns(UserWarning, match=rf'was killed: .*"pid": {child.pid}'): assert train(tmp_path, epochs=1)[1].step == 4
    assert not (tmp_path/'.lock').exists()

def test_a_lock_is_released_by_an_error(tmp_path):
    with pytest.raises(RuntimeError, match='boom'), folder_lock(tmp_path): raise RuntimeError('boom')
    with folder_lock(tmp_path): pass

def test_a_folder_that_cannot_be_written_fails_before_the_first_step(tmp_path):
    (tmp_path/'file').write_text('')
    def never(i, sample): raise AssertionError('a step was prepared') if i else AssertionError
    for out in (tmp_path/'file', tmp_path/'file'/'below'):
        with pytest.raises(ConfigError, match=f"'{out}' cannot be written"): train(out, Squares(16, spoil=lambda i, s: s if i == 0 else never(i, s)))

def test_a_read_only_folder_fails_before_the_first_step(tmp_path):
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK): pytest.skip('this user (root) may write into a read-only folder; the case above shows the same error')
        with pytest.raises(ConfigError, match='cannot be written: Permission denied'): train(tmp_path)
    finally: tmp_path.chmod(0o700)

FULL = '''
import resource, sys
from tiny import *
from rs_mtl.core import CheckpointError
from rs_mtl.training.fit import fit
def fill_up(i, sample):
    fill_up.n += 1
    if fill_up.n == 25: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    return sample
fill_up.n = 0
try: fit(tiny(), Squares(16, spoil=fill_up), epochs=3, batch_size=4, lr=.02, device='cpu', out=sys.argv[1])
except CheckpointError as e: print(e)
'''

def test_a_disk_that_fills_up_keeps_the_checkpoint_of_the_epoch_before(tmp_path):
    said = subprocess.run([sys.executable, '-c', FULL, str(tmp_path)], env=ENV, capture_output=True, text=True, check=True).stdout
    assert 'could not be written: File too large' in said and 'resume=True' in said
    assert read_pair(tmp_path, 'state')[1]['run']['epoch'] == 1 and load(tmp_path) is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ['history.csv', 'model.json', 'model.safetensors', 'state.json', 'state.safetensors']
    train(tmp_path, resume=True, val=None)
    train(tmp_path/'whole', val=None)
    assert equal(weights(tmp_path), weights(tmp_path/'whole'))

def test_data_sets_without_items(tmp_path):
    with pytest.raises(ConfigError, match='training set without items'): train(tmp_path, Squares(0))
    with pytest.raises(ConfigError, match='validation set without items'): train(tmp_path, val=Squares(0))
    with pytest.raises(ConfigError, match='without items'): evaluate(tiny(), Squares(0))
    with pytest.raises(ConfigError): fit_stats(Squares(0))
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('n', [1, 2, 3, 5, 7, 9])
def test_sets_smaller_than_a_batch_or_not_a_multiple_of_it(n):
    _, run = train(None, Squares(n), batch_size=4, epochs=2)
    assert run.step == 2*max(1, n//4)

def test_batch_norm_with_batches_of_one_item():
    with pytest.raises(ConfigError, match="1 batch norms .body.1") as e: train(None, net=tiny(norm=True), batch_size=1)
    assert 'batch_size >= 2' in e.value.todo
    with pytest.raises(ConfigError, match='batch norms'): train(None, Squares(1), tiny(norm=True))
    assert train(None, net=tiny(norm=False), batch_size=1, epochs=1)[1].step == 16

@pytest.mark.parametrize('wrong', [dict(lr=0), dict(lr=float('nan')), dict(epochs=0), dict(steps=0), dict(batch_size=0), dict(clip=0), dict(workers=-1), dict(on_nan='skip'), dict(precision='fp8'), dict(device='tpu9')])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match=str(next(iter(wrong)))): train(None, **wrong)

def test_data_without_a_layer_that_the_net_needs():
    def blind(i, s): return {k: v for k, v in s.items() if k != 'height'}
    with pytest.raises(ConfigError, match="training set has no 'height', only image, mask"): train(None, Squares(8, spoil=blind))

def test_a_net_with_other_classes_than_the_data():
    net = tiny()
    net.config['classes'] = 3
    with pytest.raises(ConfigError, match='a net of 3 classes for a training set of 2: ground, roof'): train(None, net=net)


# losses and data that go wrong on the way

def nan_height(i, s):
    if i == 7: s['height'][0, 0, 0] = torch.nan
    return s

def test_a_nan_loss_names_step_task_rate_and_items_keeps_the_batch_and_leaves_the_checkpoint(tmp_path):
    train(tmp_path, epochs=1)
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(TrainingDiverged, match=r'step \d+: the loss of height is nan \(learning rate \d\.\d\de-\d\d; items \[.*7.*\]; saved') as e:
        train(tmp_path, Squares(16, spoil=nan_height), epochs=2, resume=True, force=True)
    assert 'mask' not in e.value.what
    (dump,) = tmp_path.glob('diverged-step-*.safetensors')
    batch = load_file(dump)
    assert 7 in batch['item'] and batch['height'].isnan().sum() == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p != dump} == kept

def test_a_nan_in_one_task_can_be_left_out_on_purpose():
    with pytest.warns(UserWarning, match='loss of height is nan; it is left out') as said:
        net, run = train(None, Squares(16, spoil=nan_height), on_nan='drop_task', epochs=4)
    assert sum('left out' in str(w.message) for w in said) == 1
    assert run.step == 16 and all(p.isfinite().all() for p in net.parameters()) and all(r['loss'] < 10 for r in run.history)

def test_a_nan_in_every_task_stops_even_then():
    def nan_image(i, s): s['image'][:] = torch.nan; return s
    with pytest.raises(TrainingDiverged, match='loss of mask, height'): train(None, Squares(16, spoil=nan_image), on_nan='drop_task')

def test_a_loss_that_is_finite_with_a_gradient_that_is_not():
    class Root(Objective):
        def forward(self, out, batch, skip=()): return {'height': (total := ((out['height']*0).sum().sqrt() + 1)), 'total': total}
    with pytest.raises(TrainingDiverged, match='the gradient is nan'): train(None, objective=Root(('height',)))

@pytest.mark.parametrize('workers', [0, 2])
def test_an_item_that_cannot_be_read_is_named(workers):
    def broken(i, s):
        if i == 11: raise OSError("'tiles/0011.tif' is cut off")
        return s
    with pytest.raises(DataError, match="item 11 of 'squares' cannot be read: OSError: 'tiles/0011.tif' is cut off") as e: train(None, Squares(16, spoil=broken), workers=workers)
    assert 'in broken' in ''.join(e.value.__notes__)

def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match='a worker that reads the data died') as e: train(None, Squares(16, spoil=die), workers=2)
    assert 'workers=0' in e.value.todo

@pytest.mark.parametrize('workers', [0, 2])
def test_a_label_without_a_class_is_found_in_the_loader(workers):
    def six(i, s): s['mask'][0, 0] = 6; return s
    with pytest.raises(DataError, match=r"item \d+ of 'squares' cannot be read: mask holds 6 \(1 pixels\)"): train(None, Squares(16, spoil=six), workers=workers)
    with pytest.raises(LabelError): Objective(['mask'])({'mask': torch.zeros(1, 2, 24, 24)}, {'mask': six(0, Squares(1)[0])['mask'][None]})

def test_items_of_different_sizes_are_named():
    def small(i, s): return {k: v[..., :20] for k, v in s.items()} if i == 5 else s
    with pytest.raises(DataError, match=r'do not fit into one batch: .*image \(1, 24, 20\)'): train(None, Squares(8, spoil=small), batch_size=8)

def test_heights_that_are_all_missing_train_the_classes_alone():
    def flat(i, s): return s | {'height': torch.full_like(s['height'], torch.nan), 'valid_height': torch.zeros_like(s['height'], dtype=torch.bool)}
    _, run = train(None, Squares(16, spoil=flat), objective=Objective(('mask', 'height'), weighting='uncertainty'), val=Squares(4, seed=1, spoil=flat))
    assert all(r['loss_height'] == 0 for r in run.history) and run.history[-1]['loss_mask'] < run.history[0]['loss_mask'] and run.history[-1]['val_height_mae'] is None


# statistics, scores, several processes

def test_statistics_look_only_at_valid_pixels():
    def holes(i, s):
        valid = torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(i)) < .6
        return s | {'image': torch.where(valid, s['image'], -9999.), 'valid_image': valid}
    data = Squares(10, spoil=holes)
    pixels = torch.cat([s['image'][s['valid_image']] for s in (data[i] for i in range(10))])
    (mean,), (std,) = fit_stats(data)['image']
    assert mean == pytest.approx(pixels.mean().item(), rel=1e-5) and std == pytest.approx(pixels.std(correction=0).item(), rel=1e-5)

def test_a_new_net_learns_the_statistics_of_its_data_and_a_trained_one_keeps_them(tmp_path):
    from rs_mtl.core import create_model
    net = create_model('plain', bands=1, classes=2, encoder='mobilenetv3_small_050', width=16, detail=4)
    (mean,), (std,) = fit_stats(Squares(8))['image']
    train(tmp_path, Squares(8), net, epochs=1, val=None)
    again = load(tmp_path)
    for n in (net, again): assert float(n.normalise['image'].mean) == pytest.approx(mean) and float(n.normalise['image'].std) == pytest.approx(std)
    assert again.meta['bands'] == ['grey']
    train(None, Squares(8, spoil=lambda i, s: s | {'image': s['image']*9}), again, epochs=1, val=None)
    assert float(again.normalise['image'].mean) == pytest.approx(mean)

def test_evaluation_does_not_depend_on_the_batch_size_and_leaves_the_net_as_it_was():
    net = tiny().train()
    a, b = (evaluate(net, Squares(7), objective=Objective(net.tasks), batch_size=n)['values'] for n in (1, 7))
    assert net.training and a['confusion'] == b['confusion']
    for k in ('miou', 'height_rmse'): assert a[k] == pytest.approx(b[k])
    assert a['loss_height'] == pytest.approx(b['loss_height'], rel=1e-5)

def test_any_net_and_any_objective_that_keep_the_contract_can_be_trained():
    class Own(torch.nn.Module):
        inputs, tasks = ('image',), ('height',)
        def __init__(self): super().__init__(); self.conv = torch.nn.Conv2d(1, 1, 1)
        def forward(self, batch): return {'height': self.conv(batch['image'])}
    def squared(out, batch): return {'height': (loss := (out['height'] - batch['height']).square().mean()), 'total': loss}
    _, run = train(None, net=Own(), objective=squared)
    assert run.history[-1]['loss'] < run.history[0]['loss'] and 'val_height_mae' in run.history[0]

LEAVE = '''
import os, torch
import torch.distributed as dist
from rs_mtl.training.runtime import make_accelerator
make_accelerator('cpu')
dist.barrier()
for t in map(int, os.listdir('/proc/self/task')):
    os.sched_setaffinity(t, {min(os.sched_getaffinity(0))})
    if 'gloo_runloop' in open(f'/proc/self/task/{t}/comm').read(): os.sched_setscheduler(t, os.SCHED_IDLE, os.sched_param(0))
def ask(): dist.all_reduce(torch.ones(3))
for _ in range(30): ask()
'''
BUSY = 'import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass'

@pytest.mark.skipif(not hasattr(os, 'SCHED_IDLE'), reason='starves a thread in the way of Linux')
def test_processes_leave_in_peace_though_their_threads_hardly_get_to_run(tmp_path):
    (tmp_path/'leave.py').write_text(LEAVE)
    busy = [subprocess.Popen([sys.executable, '-c', BUSY]) for _ in range(4)]   # beside fewer, the thread came to run in time on an idle machine
    try: said = [torchrun(tmp_path/'leave.py') for _ in range(2)]                   # once finds three faults of four
    finally:
        for p in busy: p.kill(); p.wait()
    assert not any(s.returncode for s in said), '\n'.join(s.stderr[-3000:] for s in said)

PAIR = '''
import sys
from tiny import *
from rs_mtl.training.fit import fit
run = fit(tiny(dropout=0.), Squares(16), Squares(5, seed=1), epochs=2, batch_size=4, lr=.02, device='cpu', out=sys.argv[1])
run = fit(tiny(dropout=0.), Squares(16), epochs=2, batch_size=4, lr=.02, device='cpu', out=sys.argv[1] + '-even', objective=even)
'''

def test_two_processes_train_the_same_net_as_one(tmp_path):
    (tmp_path/'pair.py').write_text(PAIR)
    said = torchrun(tmp_path/'pair.py', tmp_path/'two')
    assert said.returncode == 0, said.stderr[-3000:]
    net, one = train(tmp_path/'one', net=tiny(dropout=0.), val=Squares(5, seed=1), epochs=2)
    a, b = weights(tmp_path/'one'), weights(tmp_path/'two')
    # not equal: Dice is a ratio over a process's share of the batch
    assert all(torch.allclose(a[k], b[k], atol=.03) for k in a) and not equal(a, {f'task.net.{k}': v for k, v in tiny(dropout=0.).state_dict().items()})
    two = read_pair(tmp_path/'two', 'state')[1]['run']['history']
    assert [r['step'] for r in two] == [4, 8] and two[-1]['val_pixels'] == one.history[-1]['val_pixels'] == 5*24*24
    assert two[-1]['val_miou'] == pytest.approx(one.history[-1]['val_miou'], abs=.05)
    # a loss that is a mean over items: the same items in the same order give the same weights
    train(tmp_path/'one-even', net=tiny(dropout=0.), val=None, epochs=2, objective=even)
    a, b = weights(tmp_path/'one-even'), weights(tmp_path/'two-even')
    assert a.keys() == b.keys() and max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5
    assert max(float((a[f'task.net.{k}'] - v).abs().max()) for k, v in tiny(dropout=0.).state_dict().items()) > .01
    shutil.rmtree(tmp_path/'two')
