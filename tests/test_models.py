"""What every model must hold. A new model joins with one line in `CASES`."""
import json

import pytest
import torch

import rs_mtl
from rs_mtl.core import BandError, DataError

TINY = dict(encoder='resnet10t', width=16)
CASES = {
    'plain': dict(model='plain', bands=4, classes=6, **TINY),
    'plain, own decoders': dict(model='plain', bands=4, classes=6, share='encoder', **TINY),
    'plain, two sensors': dict(model='plain', bands=4, sar_bands=2, classes=7, tasks=('mask', 'clear', 'cloud_impact'), **TINY),
    'plain, radar alone': dict(model='plain', bands=0, sar_bands=1, classes=3, tasks=('mask',), **TINY),
    'plain, one band': dict(model='plain', bands=1, classes=2, **TINY),
    'plain, thirteen bands': dict(model='plain', bands=13, classes=6, **TINY),
    'plain, no stem': dict(model='plain', bands=3, classes=6, detail=0, **TINY),
    'plain, group norm': dict(model='plain', bands=3, classes=6, norm='group', **TINY),
    'plain, convnext': dict(model='plain', bands=3, classes=6, encoder='convnext_atto', width=16),
    'plain, swin': dict(model='plain', bands=3, classes=6, encoder='swin_tiny_patch4_window7_224', width=16),
    'plain, pvt': dict(model='plain', bands=3, classes=6, encoder='pvt_v2_b0', width=16),
    'plain, mobilenet': dict(model='plain', bands=3, classes=6, encoder='mobilenetv3_small_100', width=16),
    'ctme': dict(model='ctme', bands=4, classes=6, **TINY),
    'ctme, nothing on': dict(model='ctme', bands=4, classes=6, embedding=False, distillation=False, interaction=None, answers=False, **TINY),
    'ctme, controls': dict(model='ctme', bands=3, classes=6, embedding='aux', interaction='concat', **TINY),
    'ctme, own keys': dict(model='ctme', bands=3, classes=6, interaction='self', **TINY),
    'ctme, two sensors, three tasks': dict(model='ctme', bands=4, sar_bands=2, classes=7, tasks=('mask', 'height', 'clear'), **TINY),
    'ctme, one task': dict(model='ctme', bands=3, classes=6, tasks=('height',), **TINY),
    'ctme, convnext': dict(model='ctme', bands=3, classes=6, encoder='convnext_atto', width=16),
    'ctme, pvt': dict(model='ctme', bands=13, classes=6, encoder='pvt_v2_b0', width=16),
    'ctme, swin': dict(model='ctme', bands=3, classes=6, encoder='swin_tiny_patch4_window7_224', width=16),
    'dllr': dict(model='dllr', bands=4, sar_bands=2, classes=7, **TINY),
    'dllr, plain fusion': dict(model='dllr', bands=4, sar_bands=2, classes=7, masking=False, complementary=False, **TINY),
    'dllr, one sar band': dict(model='dllr', bands=3, sar_bands=1, classes=6, complementary='mean', alone=2, **TINY),
    'dllr, three tasks': dict(model='dllr', bands=4, sar_bands=2, classes=7, tasks=('mask', 'height', 'clear'), norm='group', detail=0, **TINY),
    'dllr, convnext': dict(model='dllr', bands=13, sar_bands=2, classes=7, encoder='convnext_atto', width=16),
    'dllr, pvt': dict(model='dllr', bands=4, sar_bands=2, classes=7, encoder='pvt_v2_b0', width=16),
    'segcr': dict(model='segcr', bands=4, sar_bands=2, classes=7, **TINY),
    'segcr, plain fusion': dict(model='segcr', bands=4, sar_bands=2, classes=7, fusion='concat', cloud_impact=False, translation=False, **TINY),
    'segcr, translation alone': dict(model='segcr', bands=13, sar_bands=1, classes=7, fusion='concat', tasks=('mask', 'clear'), norm='group', **TINY),
    'segcr, four tasks': dict(model='segcr', bands=3, sar_bands=2, classes=6, translation=False, tasks=('mask', 'height', 'clear', 'cloud_impact'), detail=0, **TINY),
    'segcr, optical alone': dict(model='segcr', bands=4, classes=7, fusion='image', **TINY),
    'segcr, convnext': dict(model='segcr', bands=4, sar_bands=2, classes=7, encoder='convnext_atto', width=16),
    'segcr, swin': dict(model='segcr', bands=4, sar_bands=2, classes=7, encoder='swin_tiny_patch4_window7_224', width=16),
}


@pytest.fixture(params=CASES, scope='module')
def case(request):
    config = dict(CASES[request.param])
    torch.manual_seed(0)
    return rs_mtl.create_model(config.pop('model'), **config), CASES[request.param]


def batch_for(config, n=2, h=64, w=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    bands = {'image': config['bands'], 'sar': config.get('sar_bands', 0)}
    return {k: torch.rand(n, b, h, w, generator=g) for k, b in bands.items() if b}


def channels(config):
    all_ = {'mask': config['classes'], 'height': 1, 'clear': config['bands'], 'cloud_impact': 1}
    if config['model'] == 'segcr': return {t: all_[t] for t in config.get('tasks', ('mask', 'clear', 'cloud_impact'))}
    if config['model'] != 'dllr': return {t: all_[t] for t in config.get('tasks', ('mask', 'height'))}
    return {f'{t}{own}': all_[t] for t in config.get('tasks', ('mask',)) for own in ('', '_image', '_sar')}  # while training, each sensor answers, too


def test_forward_and_backward_reach_every_parameter(case):
    net, config = case
    out = net.train()(batch_for(config))
    assert {k: v.shape[1] for k, v in out.items() if not k.startswith('aux_')} == channels(config)
    sum(m.float().square().mean() for m in out.values()).backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    net.zero_grad()
    assert not idle


@pytest.mark.parametrize('size', [(1, 1), (1, 300), (31, 33), (65, 47)])
def test_any_size_comes_back_at_its_size(case, size):
    net, config = case
    with torch.no_grad():
        out = net.eval()(batch_for(config, 1, *size))
    assert {tuple(m.shape[-2:]) for m in out.values()} == {size}
    assert all(m.isfinite().all() for m in out.values())


def test_an_answer_does_not_depend_on_the_rest_of_the_batch(case):
    net, config = case
    both = batch_for(config, 2)
    with torch.no_grad():
        pair, one = net.eval()(both), net({k: v[:1] for k, v in both.items()})
    for k in one:
        torch.testing.assert_close(pair[k][:1], one[k], rtol=1e-4, atol=1e-4)


def test_same_seed_same_net(case):
    _, config = case
    config = dict(config)
    name = config.pop('model')
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(rs_mtl.create_model(name, **config).state_dict())
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])


def test_wrong_bands_are_refused(case):
    net, config = case
    batch = batch_for(config)
    key = next(iter(batch))
    with pytest.raises(BandError, match='as this net was built for'):
        net({**batch, key: torch.rand(2, batch[key].shape[1] + 1, 64, 64)})
    with pytest.raises(DataError, match='the batch has no'):
        net.train()({k: v for k, v in batch.items() if k != key})


def test_config_is_json_and_builds_the_same_net(case):
    net, _ = case
    config = json.loads(json.dumps(net.config))
    again = rs_mtl.create_model(config.pop('model'), **config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_save_and_load_give_the_same_maps(case, tmp_path):
    net, config = case
    net.set_stats({k: ([.3] * v.shape[1], [.2] * v.shape[1]) for k, v in batch_for(config).items()})
    net.meta['classes'] = [str(i) for i in range(config['classes'])]
    rs_mtl.save(net, tmp_path / 'net')
    again = rs_mtl.load(tmp_path / 'net').eval()
    assert again.meta == net.meta and again.config == json.loads(json.dumps(net.config))
    with torch.no_grad():
        a, b = net.eval()(batch_for(config)), again(batch_for(config))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_channels_last_gives_the_same_maps(case):
    net, config = case
    batch = batch_for(config)
    with torch.no_grad():
        a = net.eval()(batch)
        b = net.to(memory_format=torch.channels_last)({k: v.to(memory_format=torch.channels_last) for k, v in batch.items()})
    net.to(memory_format=torch.contiguous_format)
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-3)


def test_bfloat16_autocast_runs_and_stays_close(case):
    net, config = case
    batch = batch_for(config)
    with torch.no_grad():
        a = net.eval()(batch)
        with torch.autocast('cpu', torch.bfloat16):
            b = net(batch)
    for k in a:
        assert (a[k] - b[k].float()).abs().mean() < .1 * (a[k].abs().mean() + .1)


@pytest.mark.parametrize('name', ['plain', 'plain, own decoders', 'ctme', 'ctme, two sensors, three tasks', 'dllr', 'segcr', 'segcr, four tasks'])
def test_the_parts_of_a_net_cost_what_the_whole_costs(name):
    from rs_mtl.models.net import cost_table
    config = dict(CASES[name])
    *parts, whole = cost_table(rs_mtl.create_model(config.pop('model'), **config), batch_for(CASES[name], 1))
    for k in ('gflops', 'params'): assert sum(r[k] for r in parts) == pytest.approx(whole[k], rel=1e-6), k


@pytest.mark.parametrize('name', ['plain', 'plain, two sensors', 'plain, convnext', 'ctme', 'ctme, controls', 'ctme, own keys', 'ctme, swin', 'dllr', 'dllr, three tasks', 'dllr, convnext', 'segcr', 'segcr, four tasks', 'segcr, swin'])
def test_torch_export_gives_the_same_maps(name):
    config = dict(CASES[name])
    torch.manual_seed(0)
    net = rs_mtl.create_model(config.pop('model'), **config).eval()
    batch = batch_for(CASES[name], 1)
    program = torch.export.export(net, (batch,))
    with torch.no_grad():
        a, b = net(batch), program.module()(batch)
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['plain, two sensors', 'ctme', 'ctme, two sensors, three tasks', 'ctme, swin', 'dllr', 'dllr, one sar band', 'segcr', 'segcr, translation alone'])
def test_onnx_runtime_gives_the_same_maps(name, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    config = dict(CASES[name])
    torch.manual_seed(0)
    net = rs_mtl.create_model(config.pop('model'), **config).eval()
    for p in net.parameters():  # gains that start at zero would hide what they multiply
        if not p.any():
            torch.nn.init.normal_(p, std=.1)
    batch = batch_for(CASES[name], 1, 72, 56)
    file = rs_mtl.save_onnx(net, tmp_path / 'net.onnx', batch)
    session = ort.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {k: v.numpy() for k, v in batch.items()}), strict=True))
    with torch.no_grad():
        a = net(batch)
    assert found.keys() == a.keys()
    for k in a:
        torch.testing.assert_close(torch.from_numpy(found[k]), a[k], rtol=1e-3, atol=1e-3)
