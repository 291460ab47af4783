"A checkpoint is whole or an error, whatever happens to its files, its writer or its reader."
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_bytes
from tiny import forkserver
from torch import nn

import rs_mtl  # noqa: F401
from rs_mtl.core import CheckpointError, create_model
from rs_mtl.training.checkpoint import load, read_pair, read_pth, save, write_pair


def small(classes=3): return create_model('plain', bands=3, classes=classes, encoder='mobilenetv3_small_050', width=16, detail=4)

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    net = small()
    net.meta = {'classes': ['a', 'b', 'c'], 'gsd': .5}
    folder = tmp_path_factory.mktemp('saved')
    save(net, folder)
    return net, folder

@pytest.fixture()
def copy(saved, tmp_path):
    for f in saved[1].iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    return tmp_path

def rewrite(folder, tensors=None, **about):
    "A checkpoint with other tensors or another description, and a hash that fits."
    old, described = read_pair(folder, 'model')
    data = to_bytes(old if tensors is None else tensors)
    described |= {'sha256': hashlib.sha256(data).hexdigest(), 'bytes': len(data)} | about
    (folder/'model.safetensors').write_bytes(data)
    (folder/'model.json').write_text(json.dumps(described))


def test_a_net_comes_back_with_its_weights_its_config_and_what_it_knows(saved):
    net, folder = saved
    again = load(folder)
    assert sorted(p.name for p in folder.iterdir()) == ['model.json', 'model.safetensors']
    assert again.config == net.config and again.meta == net.meta and not again.training
    x = {'image': torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        a, b = net.eval()(x), again(x)
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_loading_never_looks_for_pretrained_weights(copy):
    about = json.loads((copy/'model.json').read_text())
    about['config'] |= {'pretrained': True, 'weights': '/not/there.safetensors'}
    (copy/'model.json').write_text(json.dumps(about))
    assert load(copy).config['model'] == 'plain'

@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_tensors(saved, tmp_path_factory, share):
    folder = tmp_path_factory.mktemp('cut')
    data = (saved[1]/'model.safetensors').read_bytes()
    (folder/'model.json').write_bytes((saved[1]/'model.json').read_bytes())
    (folder/'model.safetensors').write_bytes(data[:int(share*len(data))])
    with pytest.raises(CheckpointError, match=rf'model.safetensors\' has {int(share*len(data))} bytes'): load(folder)

@settings(max_examples=40, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), which=st.sampled_from(['model.safetensors', 'model.json']))
def test_one_changed_byte_anywhere_never_gives_other_weights(saved, tmp_path_factory, at, flip, which):
    net, origin = saved
    folder = tmp_path_factory.mktemp('garbled')
    for f in origin.iterdir():
        data = bytearray(f.read_bytes())
        if f.name == which: data[int(at*len(data))] ^= flip
        (folder/f.name).write_bytes(data)
    if which == 'model.safetensors':
        with pytest.raises(CheckpointError, match='was changed: its SHA-256'): load(folder)
        return
    try: again = load(folder)  # a change in the description may be harmless, but not to the weights
    except CheckpointError: return
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))

def test_missing_json(copy):
    (copy/'model.json').unlink()
    with pytest.raises(CheckpointError, match='(?s)no checkpoint.*found model.safetensors'): load(copy)

def test_missing_tensors(copy):
    (copy/'model.safetensors').unlink()
    with pytest.raises(CheckpointError, match='is missing'): load(copy)

def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match='no checkpoint'): load(tmp_path/'nowhere')

@pytest.mark.parametrize('text', ['', '{', '[1, 2]', '"model"', '{}', '\x00\x01', 'null'])
def test_a_json_that_describes_no_checkpoint(copy, text):
    (copy/'model.json').write_text(text)
    with pytest.raises(CheckpointError, match='model.json'): load(copy)

@pytest.mark.parametrize('newer', [2, 99, 'two', None])
def test_a_newer_format_says_who_wrote_it_and_to_update(copy, newer):
    rewrite(copy, format=newer, versions={'rs_mtl': '9.9'})
    with pytest.raises(CheckpointError, match='(?s)written by rs_mtl 9.9.*pip install -U'): load(copy)

def tensors_of(copy): return read_pair(copy, 'model')[0]

def test_missing_keys_are_named_first_five(copy):
    t = tensors_of(copy)
    gone = sorted(t)[:7]
    rewrite(copy, {k: v for k, v in t.items() if k not in gone})
    with pytest.raises(CheckpointError, match='lacks: .* and 2 more') as e: load(copy)
    assert sum(k in e.value.what for k in gone) == 5

def test_unknown_keys_are_named(copy):
    rewrite(copy, tensors_of(copy) | {'extra.weight': torch.ones(2)})
    with pytest.raises(CheckpointError, match='unknown tensors: extra.weight'): load(copy)

def test_other_shapes_are_named_and_never_dropped(copy):
    about = json.loads((copy/'model.json').read_text())
    rewrite(copy, config=about['config'] | {'classes': 5})
    with pytest.raises(CheckpointError, match=r'other shapes: head.to_mask.out.weight \(3, 32, 1, 1\) for \(5, 32, 1, 1\)'): load(copy)

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_numbers_are_refused(copy, value):
    t = tensors_of(copy)
    t['head.to_mask.out.bias'][1] = value
    rewrite(copy, t)
    with pytest.raises(CheckpointError, match='not finite: head.to_mask.out.bias'): load(copy)

def test_a_model_that_is_not_known_here(copy):
    rewrite(copy, config={'model': 'plane'})
    with pytest.raises(CheckpointError, match="(?s)cannot be built.*plane"): load(copy)

def test_a_model_argument_that_is_not_known_here(copy):
    rewrite(copy, config={'model': 'plain', 'bands': 3, 'wings': 2})
    with pytest.raises(CheckpointError, match="(?s)cannot be built.*wings"): load(copy)

def test_a_net_of_your_own_is_filled_and_one_without_a_config_says_how(tmp_path):
    net = nn.Linear(3, 2)
    save(net, tmp_path)
    assert torch.equal(load(tmp_path, net=nn.Linear(3, 2)).weight, net.weight)
    with pytest.raises(CheckpointError, match='net=my_net'): load(tmp_path)

def test_a_forged_hash_does_not_make_garbage_a_checkpoint(copy):
    data = b'\xff'*100
    about = json.loads((copy/'model.json').read_text()) | {'sha256': hashlib.sha256(data).hexdigest(), 'bytes': 100}
    (copy/'model.json').write_text(json.dumps(about))
    (copy/'model.safetensors').write_bytes(data)
    with pytest.raises(CheckpointError, match='not safetensors'): load(copy)

def test_the_json_cannot_point_outside_the_folder(copy, tmp_path_factory):
    other = tmp_path_factory.mktemp('other')
    data = to_bytes({k: v + 1 for k, v in tensors_of(copy).items()})
    (other/'evil.safetensors').write_bytes(data)
    about = json.loads((copy/'model.json').read_text()) | {'weights': f'../{other.name}/evil.safetensors', 'sha256': hashlib.sha256(data).hexdigest(), 'bytes': len(data)}
    (copy/'model.json').write_text(json.dumps(about))
    with pytest.raises(CheckpointError): load(copy)


class Payload:
    def __init__(self, flag): self.flag = flag
    def __reduce__(self): return os.system, (f'touch {self.flag}',)

@pytest.mark.parametrize('suffix', ['pth', 'pt', 'ckpt', 'bin', 'pkl'])
def test_a_pickle_with_a_payload_is_refused_and_its_code_does_not_run(tmp_path, suffix):
    flag, file = tmp_path/'ran', tmp_path/f'net.{suffix}'
    torch.save({'state_dict': Payload(flag)}, file)
    with pytest.raises(CheckpointError, match='(?s)pickle.*read_pth'): load(file)
    with pytest.raises(CheckpointError, match='more than tensors'): read_pth(file)
    (tmp_path/'model.json').write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError): load(tmp_path)
    assert not flag.exists()
    torch.load(file, weights_only=False)  # and the payload is a real one
    assert flag.exists()

def test_tensors_of_a_pth_file_can_be_read_and_a_cut_one_is_an_error(tmp_path):
    torch.save({'model': {'module.w': torch.ones(3)}}, tmp_path/'a.pth')
    assert torch.equal(read_pth(tmp_path/'a.pth')['w'], torch.ones(3))
    (tmp_path/'b.pth').write_bytes((tmp_path/'a.pth').read_bytes()[:-300])
    with pytest.raises(CheckpointError): read_pth(tmp_path/'b.pth')
    torch.save([1, 2], tmp_path/'c.pth')
    with pytest.raises(CheckpointError, match='no dictionary'): read_pth(tmp_path/'c.pth')


@pytest.mark.parametrize('step', range(4))
def test_a_writer_that_dies_between_any_two_steps_leaves_one_whole_pair(tmp_path, monkeypatch, step):
    "The same moments as a kill, one by one: each rename of the writer may be its last."
    write_pair(tmp_path, 'model', {'w': torch.zeros(4)}, {'n': 0})
    real, done = os.replace, []
    def dies(a, b):
        if len(done) == step: raise KeyboardInterrupt
        done.append(b)
        real(a, b)
    monkeypatch.setattr(os, 'replace', dies)
    try: write_pair(tmp_path, 'model', {'w': torch.ones(4)}, {'n': 1})
    except KeyboardInterrupt: pass
    monkeypatch.undo()
    tensors, about = read_pair(tmp_path, 'model')
    assert tensors['w'].tolist() == [about['n']]*4 and about['n'] == (step >= 2)
    write_pair(tmp_path, 'model', {'w': torch.full((4,), 2.)}, {'n': 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.json', 'model.safetensors']

def write_for_ever(folder, told):
    torch.set_num_threads(1)
    n = 0
    while True:
        n += 1
        write_pair(folder, 'model', {'w': torch.full((300_000,), float(n))}, {'n': n})
        told.send(n)

def test_kill_9_at_50_random_moments_of_writing_always_leaves_a_whole_pair(tmp_path):
    start, torn = forkserver(), 0
    for pause in torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist():
        here, there = start.Pipe(duplex=False)
        child = start.Process(target=write_for_ever, args=(tmp_path, there), daemon=True)
        child.start()
        here.recv()
        time.sleep(.02*pause)
        child.kill()
        child.join()
        tensors, about = read_pair(tmp_path, 'model')
        assert (tensors['w'] == about['n']).all()
        torn += sorted(p.name for p in tmp_path.iterdir()) != ['model.json', 'model.safetensors']
    write_pair(tmp_path, 'model', {'w': torch.zeros(1)}, {'n': 0})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.json', 'model.safetensors']
    assert torn, 'no kill fell into a write: make the tensors larger'

FULL = '''
import resource, sys, torch
from rs_mtl.core import CheckpointError
from rs_mtl.training.checkpoint import write_pair
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try: write_pair(sys.argv[1], 'model', {'w': torch.ones(100_000)}, {'n': 1})
except CheckpointError as e: print(e)
'''

def test_a_full_disk_is_an_error_and_the_previous_checkpoint_stays(tmp_path):
    write_pair(tmp_path, 'model', {'w': torch.zeros(100)}, {'n': 0})
    said = subprocess.run([sys.executable, '-c', FULL, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert 'could not be written' in said and 'previous checkpoint is still whole' in said
    tensors, about = read_pair(tmp_path, 'model')
    assert about['n'] == 0 and (tensors['w'] == 0).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.json', 'model.safetensors']

def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path/'x').write_text('')
    with pytest.raises(CheckpointError, match='could not be written'): write_pair(tmp_path/'x', 'model', {'w': torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match='is a file'): load(Path(tmp_path/'x'))
