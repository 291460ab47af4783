"The command line and the run notebooks: what is wrong is said before a kernel starts, and what a run leaves can be read."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from rs_mtl.apply.cli import main, parse
from rs_mtl.apply.runs import RunFailed, find_run, list_runs, parameters_of, run
from rs_mtl.core import ConfigError

ENV = os.environ | {'OMP_NUM_THREADS': '1', 'RS_MTL_PROGRESS': 'log'}
CLI = [sys.executable, '-c', 'import sys; from rs_mtl.apply.cli import main; sys.exit(main())']

def cli(*argv, **kwargs): return subprocess.run([*CLI, *map(str, argv)], env=ENV, capture_output=True, text=True, timeout=100, **kwargs)

def notebook(folder, *cells, name='work', tag='parameters'):
    v4 = nbformat.v4
    nb = v4.new_notebook(metadata={'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}, cells=[v4.new_code_cell(c, metadata={'tags': [tag]} if i == 0 and tag else {}) for i, c in enumerate(cells)])
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, folder/f'{name}.ipynb')
    return folder/f'{name}.ipynb'

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run folder whose name would trip up a careless shell, a careless format string and a careless papermill."
    folder = tmp_path_factory.mktemp('runs')/'it\'s a "small" {run} ünï'
    said = cli('train', 'plain', '--data', 'city', '--quick', '--out', folder, '--encoder', 'mobilenetv3_small_050')
    return folder, said


def test_train_leaves_a_folder_that_tells_everything(trained):
    folder, said = trained
    assert said.returncode == 0, said.stderr
    found = {p.name for p in folder.iterdir() if not p.name.startswith('.')}
    assert found == {'train.ipynb', 'metrics.json', 'history.csv', 'model.json', 'model.safetensors', 'state.json', 'state.safetensors', 'figures'}
    metrics = json.loads((folder/'metrics.json').read_text())
    assert {'miou', 'oa', 'height_mae'} <= metrics['values'].keys() and 'mask' in metrics['protocol'] and 'torch' in metrics['versions']
    assert metrics['parameters']['encoder'] == 'mobilenetv3_small_050' and metrics['parameters']['quick'] is True
    assert {'sample.png', 'curves.png', 'confusion.png', 'test-0.png'} <= {p.name for p in (folder/'figures').iterdir()}
    executed = nbformat.read(folder/'train.ipynb', 4)
    assert any('image/png' in o.get('data', {}) for c in executed.cells for o in c.get('outputs', []))
    assert 'train: mIoU 0.' in said.stdout and 'train.ipynb' in said.stdout

def test_a_second_run_over_the_first_is_refused_in_words_and_the_first_stays(trained):
    folder, _ = trained
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    said = cli('train', 'plain', '--quick', '--out', folder, '--encoder', 'mobilenetv3_small_050')
    assert said.returncode == 1 and 'already holds a run' in said.stderr and 'what to do' in said.stderr and 'Traceback' not in said.stderr
    failed = folder/'train-failed.ipynb'
    assert str(failed) in said.stderr and 'ConfigError' in failed.read_text()
    failed.unlink()
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before

def test_a_run_starts_from_another_and_says_what_it_could_not_take_over(trained, tmp_path):
    folder, _ = trained
    how = ('train', 'plain', '--quick', '--encoder', 'mobilenetv3_small_050', '--precision', 'bf16', '--tasks', 'mask')
    said = cli(*how, '--start', folder, '--data', 'land', '--out', tmp_path/'next')
    assert said.returncode == 0, said.stderr
    assert 'to_mask' in ''.join(o.get('text', '') for c in nbformat.read(tmp_path/'next'/'train.ipynb', 4).cells for o in c.get('outputs', []))  # other classes, a new head
    said = cli(*how, '--start', tmp_path/'nowhere', '--out', tmp_path/'other')
    assert said.returncode == 1 and 'nowhere' in said.stderr and 'Traceback' not in said.stderr

def test_evaluate_and_predict_read_the_run_folder(trained):
    folder, _ = trained
    said = cli('evaluate', folder, '--quick', '--seed', 3)
    assert said.returncode == 0 and json.loads((folder/'evaluate.json').read_text())['parameters']['seed'] == 3, said.stderr
    said = cli('predict', folder, '--quick')
    assert said.returncode == 0, said.stderr
    assert {p.suffix for p in (folder/'maps').iterdir()} == {'.tif'} and (folder/'figures'/'scene.png').stat().st_size > 5000
    scene = json.loads((folder/'scene.json').read_text())['values']
    assert scene['pixels'] == scene['height_pixels'] == 160*160 or scene['pixels'] > 20_000

def test_a_run_can_predict_a_raster_of_the_users_own(trained, tmp_path):
    folder, _ = trained
    image = next(p for p in (folder/'scene').iterdir() if p.name == 'image.tif')
    said = cli('predict', folder, '--image', image, '--out', tmp_path/'my maps', '--tile', 64)
    assert said.returncode == 0 and list((tmp_path/'my maps').glob('*.tif')), said.stderr
    assert not (tmp_path/'scene.json').exists() and 'mIoU' not in said.stdout  # nor the scores of an earlier run


# the wrong words

@pytest.mark.parametrize(('argv', 'hint'), [
    (['train', 'plain', '--epoch', '5'], "did you mean '--epochs'?"), (['train', '--batch_size', '4'], "did you mean '--batch-size'?"), (['trian'], "did you mean 'train'?"),
    (['train', '--lr', 'fast'], "invalid float value: 'fast'"), (['train', '--epochs', '1.5'], "invalid int value: '1.5'"), (['train', 'plain', 'twice'], "one word too many: 'twice'"), (['report'], 'run')])
def test_a_wrong_command_line_exits_with_2_and_a_hint(capsys, argv, hint):
    with pytest.raises(SystemExit, match='2'): parse(argv)
    assert hint in capsys.readouterr().err

def test_evaluating_or_predicting_with_nothing_trained_is_said_at_once(tmp_path, capsys):
    for command in ('evaluate', 'predict', 'report'): assert main([command, str(tmp_path/'none')]) == 1
    assert capsys.readouterr().err.count('rs-mtl train plain --out') == 3 and not list(tmp_path.iterdir())

def test_help_is_quick_and_complete_and_needs_no_torch():
    code = "import sys; from rs_mtl.apply.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\nprint(sorted({'torch', 'papermill', 'numpy', 'IPython'} & set(sys.modules)))"
    start = time.perf_counter()
    said = subprocess.run([sys.executable, '-c', code], env=ENV | {'COLUMNS': '200'}, capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 3 and said.endswith('[]\n')
    for p in parameters_of('train')[1:]: assert f'--{p.name.replace("_", "-")}' in said and f'{p.kind}{" or none" if p.optional else ""}, default {p.default!r}]' in said and p.help in said
    assert 'examples:' in said and 'rs-mtl train plain --data city' in said

def test_list_names_models_and_data_without_torch():
    code = "import sys; from rs_mtl.apply.cli import main; main(['list']); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True, check=True).stdout
    assert 'plain' in said and {'city', 'land', 'vaihingen'} <= {w.strip(',') for w in said.split()} and said.endswith('False\n')

def test_every_parameter_has_a_type_a_default_and_a_help():
    assert list_runs() == ['ablate', 'evaluate', 'predict', 'train']
    for name in list_runs():
        for p in parameters_of(name): assert p.kind in ('int', 'float', 'str', 'bool') and p.help, (name, p)


# parameters, before a kernel starts and in the first cell

CELLS = ("who: str = 'you'   # to greet\ntimes: int = 1\nshare: float = 0.5\nmost: int | None = None",
         "from rs_mtl.apply.runs import check_params\ncheck_params(globals(), times=(1, 3))", "open('ran', 'w').close()")

@pytest.mark.parametrize(('wrong', 'message'), [
    ({'whom': 'me'}, "did you mean 'who'?"), ({'times': '2'}, "times='2' is str"), ({'times': None}, 'times=None is None'), ({'times': True}, 'times=True is bool'),
    ({'share': float('nan')}, 'share=nan'), ({'who': 3}, 'who=3 is int')])
def test_fault_46_a_wrong_parameter_stops_before_a_kernel_starts(tmp_path, monkeypatch, wrong, message):
    import jupyter_client.manager
    monkeypatch.setattr(jupyter_client.manager.AsyncKernelManager, 'start_kernel', lambda *a, **k: pytest.fail('a kernel was started'))
    with pytest.raises(ConfigError) as e: run(notebook(tmp_path, *CELLS), tmp_path/'out', **wrong)
    assert message in str(e.value)

@pytest.mark.parametrize(('wrong', 'message'), [({'whom': 'me'}, "no parameter 'whom'"), ({'times': 9}, 'times=9')])
def test_fault_46_a_wrong_parameter_given_to_papermill_itself_stops_in_the_first_cell(tmp_path, monkeypatch, wrong, message):
    import papermill
    monkeypatch.chdir(tmp_path)
    with pytest.raises(papermill.PapermillExecutionError, match=message): papermill.execute_notebook(str(notebook(tmp_path, *CELLS)), str(tmp_path/'out.ipynb'), wrong, kernel_name='python3', progress_bar=False)
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('name', ['train', 'evaluate', 'predict'])
def test_fault_46_each_run_notebook_stops_at_a_misspelt_parameter(tmp_path, name):
    import papermill
    with pytest.raises(papermill.PapermillExecutionError, match="no parameter 'sede'.*(?s:.)*did you mean 'seed'"):
        papermill.execute_notebook(str(find_run(name)), None, {'sede': 1}, kernel_name='python3', progress_bar=False)

def test_fault_46_a_notebook_without_a_parameters_cell_says_how_to_tag_one(tmp_path):
    with pytest.raises(ConfigError, match='(?s)no cell tagged.*Cell Tags'): run(notebook(tmp_path, 'x = 1', tag=None), tmp_path/'out')
    (tmp_path/'torn.ipynb').write_text('{"cells": [')
    with pytest.raises(ConfigError, match='is no notebook'): run(tmp_path/'torn.ipynb', tmp_path/'out')

def test_text_with_quotes_backslashes_and_newlines_arrives_as_it_was(tmp_path, capsys):
    text = 'a "b" \'c\' \\n {d}\nü $HOME `ls`'
    out = run(notebook(tmp_path, "who: str = ''", 'print(repr(who))'), tmp_path/'out {x}', who=text)
    assert repr(text) in capsys.readouterr().out and out.is_file()

def test_the_kernel_is_this_python_whatever_the_user_has_installed_as_python3(tmp_path, monkeypatch, capsys):
    fake = tmp_path/'jupyter'/'kernels'/'python3'
    fake.mkdir(parents=True)
    (fake/'kernel.json').write_text(json.dumps({'argv': ['/bin/false'], 'display_name': 'x', 'language': 'python'}))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path/'jupyter'))
    run(notebook(tmp_path, 'x: int = 1', 'import sys; print(sys.executable)'), tmp_path/'out')
    assert sys.executable in capsys.readouterr().out and os.environ['JUPYTER_PATH'] == str(tmp_path/'jupyter')

def test_a_kernel_that_is_killed_is_an_error_in_words(tmp_path):
    with pytest.raises(Exception, match='(?s)kernel of work.ipynb died.*out of memory'): run(notebook(tmp_path, 'x: int = 1', 'import os; os.kill(os.getpid(), 9)'), tmp_path/'out')
    assert [p.name for p in (tmp_path/'out').iterdir()] == ['work-failed.ipynb']

def test_a_folder_that_cannot_be_written_is_an_error_before_a_kernel_starts(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(ConfigError, match='cannot be written'): run(notebook(tmp_path, 'x: int = 1'), tmp_path/'file'/'out')

def test_without_papermill_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'papermill', None)
    with pytest.raises(ConfigError, match=r"(?s)papermill.*pip install 'rs_mtl\[notebooks\]'"): run(notebook(tmp_path, 'x: int = 1'), tmp_path/'out')


def test_ctrl_c_stops_training_after_the_step_keeps_a_checkpoint_and_exits_with_130(tmp_path):
    folder = tmp_path/'run'
    argv = ['train', 'plain', '--out', folder, '--encoder', 'mobilenetv3_small_050', '--n', 64, '--size', 64, '--epochs', 200]
    child = subprocess.Popen([*CLI, *map(str, argv)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (folder/'state.json').exists() and child.poll() is None: time.sleep(.1)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    out, err = child.communicate(timeout=30)
    assert child.returncode == 130, err
    assert 'stopped by SIGINT after step' in err and '--resume' in err and 'Traceback' not in err
    from rs_mtl.training.checkpoint import load, read_pair
    assert read_pair(folder, 'state')[1]['run']['step'] > 0 and load(folder) is not None and not (folder/'.lock').exists()
    assert not [p for p in Path(folder).iterdir() if 'running' in p.name]


# ablations

def test_an_ablation_writes_its_table_and_what_is_done_is_not_trained_again(tmp_path):
    how = dict(quick=True, only='hard-shared; full', options='width=8,full=8,detail=4', out=str(tmp_path))
    run('ablate', tmp_path, **how)
    found = json.loads((tmp_path/'ctme_ablation.json').read_text())
    assert [r['variant'] for r in found['rows']] == ['hard-shared', 'full'] and all(r['params'] and r['step_ms'] and 0 <= r['miou'] <= 1 and r['rmse'] > 0 for r in found['rows'])
    assert {'command', 'versions', 'protocol', 'summary'} <= set(found) and all((tmp_path/f'ctme_ablation{what}.png').is_file() for what in ('', '_gains'))
    kept = {p: p.stat().st_mtime_ns for what in ('*/row.json', '*/net-0/model.safetensors') for p in tmp_path.glob(what)}
    assert len(kept) == 4
    run('ablate', tmp_path, **how)
    assert kept == {p: p.stat().st_mtime_ns for p in kept}

@pytest.mark.parametrize(('plan', 'file'), [('dllr', 'dllr_labels'), ('dllr_clouds', 'dllr_clouds')])
def test_an_ablation_of_learning_from_few_labels_draws_them_and_leaves_a_curve(tmp_path, plan, file):
    run('ablate', tmp_path, model=plan, quick=True, only='supervised;dllr', options='width=8,full=8,detail=4', out=str(tmp_path))
    found = json.loads((tmp_path/f'{file}.json').read_text())
    assert [(r['variant'], r['labels']) for r in found['rows']] == [('supervised', '8'), ('dllr', '8')] and 'keep theirs' in found['protocol'] and ('cover' in found['protocol']) == (plan == 'dllr_clouds')


def test_an_ablation_under_cloud_is_told_by_cover_and_without_clouds(tmp_path):
    run('ablate', tmp_path, model='segcr', quick=True, only='concat;full', options='width=8,full=8,detail=4', out=str(tmp_path))
    found = json.loads((tmp_path/'segcr_ablation.json').read_text())
    whole = [r for r in found['rows'] if r['bucket'] == 'all']
    assert [r['variant'] for r in whole] == ['concat', 'full'] and all(r['psnr'] > 0 and 'miou_on_clear' in r for r in whole)
    assert {r['bucket'] for r in found['rows']} == {'all', '0-20%', '20-40%', '40-60%', '60-80%', '80-100%'} and 'cover' in found['protocol']


def test_an_ablation_of_a_variant_that_does_not_exist_names_what_was_meant(tmp_path):
    with pytest.raises(RunFailed, match="did you mean 'full'"): run('ablate', tmp_path, quick=True, only='ful', out=str(tmp_path))


# many scenes

@pytest.fixture
def town(tmp_path):
    "Two nets with arbitrary weights, one of which needs radar, and four scenes."
    import numpy as np
    import torch

    import rs_mtl
    from rs_mtl.data.rasters import write_raster
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for run, sensors in (('run', {'bands': 3}), ('both', {'bands': 3, 'sar_bands': 1})):
            rs_mtl.save(rs_mtl.create_model('plain', **sensors, classes=3, encoder='resnet10t', width=8, full=8, detail=4), tmp_path/run)
    for i, name in enumerate('abcd'):
        for layer, bands in (('image', 3), ('sar', 1)):
            write_raster(tmp_path/layer/f'{name}.tif', np.random.default_rng(i).random((bands, 90, 90), 'float32')*(1 if layer == 'image' else -20), {'crs': 'EPSG:32632', 'transform': (.5, 0, 5e5, 0, -.5, 5.3e6)}, nodata=-1)
    return tmp_path

def told(capsys, *argv):
    "Exit code, the object on stdout, and stderr."
    code = main(['--json', *map(str, argv)])
    out, err = capsys.readouterr()
    return code, json.loads(out), err

@pytest.mark.parametrize('shape', ['pattern', 'folder'])
def test_many_scenes_are_mapped_the_finished_are_skipped_and_the_failed_are_told(town, capsys, shape):
    torn = town/'image'/'c.tif'
    whole = torn.read_bytes()
    torn.write_bytes(whole[:len(whole)//2])
    how = ['--image', f'{town}/image/{{place}}.tif', '--sar', f'{town}/sar/{{place}}.tif'] if shape == 'pattern' else ['--image', town/'image']
    argv = ['predict', town/('both' if shape == 'pattern' else 'run'), *how, '--out', town/'maps', '--tile', 64, '--uncertainty']
    code, said, err = told(capsys, *argv)
    assert (code, said['state'], [said['values'][k] for k in ('done', 'skipped', 'failed')]) == (1, 'problems', [3, 0, 1])
    assert [(s['name'], s['state']) for s in said['values']['scenes']] == [('a', 'done'), ('b', 'done'), ('c', 'failed'), ('d', 'done')]
    assert 'rs-mtl: c: DataError' in err and 'c.tif' in err and 'Traceback' not in err
    assert {Path(f).relative_to(town/'maps').as_posix() for f in said['files']} == {f'{n}/{m}.tif' for n in 'abd' for m in ('classes', 'height', 'uncertainty')}
    torn.write_bytes(whole)
    assert main(list(map(str, argv))) == 0 and '1 done, 3 finished before, 0 failed' in capsys.readouterr().out
    assert main([*map(str, argv), '-q']) == 0 and capsys.readouterr() == (f'{town/"maps"}\n', '')

def test_many_scenes_are_shared_among_workers(town):
    said = cli('predict', town/'run', '--image', f'{town}/image/*.tif', '--out', town/'maps', '--tile', 64, '--workers', 2, '--json')
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)['values']['done'] == 4
    where = {json.loads((town/'maps'/n/'finished.json').read_text())['where'] for n in 'abcd'}
    assert len(where) in (1, 2) and not any(w.endswith(f'-{os.getpid()}') for w in where)

@pytest.mark.parametrize(('options', 'message'), [
    (['--image', 'nowhere/*.tif'], 'no raster fits'), (['--image', 'image/*.tif', '--size', '100'], '--size for scenes of your own'), (['--workers', '2'], '--workers without scenes'),
    (['--image', 'image', '--workers', '2', '--cluster', 'tcp://127.0.0.1:1'], 'at most one of the two'), (['--image', 'image', '--workers', '0'], '0 workers'),
    (['--image', 'image/{place}.tif', '--sar', 'sar/*.tif'], 'patterns with {place}'), (['--image', 'image/{place}.tif', '--sar', 'sar/{place}_vv.tif'], 'no raster fits')])
def test_what_is_wrong_with_many_scenes_is_said_before_any_is_begun(town, capsys, monkeypatch, options, message):
    monkeypatch.chdir(town)
    assert main(['predict', 'run', *options]) == 1 and message in capsys.readouterr().err and not (town/'run'/'maps').exists()

def test_a_scene_that_lacks_its_radar_is_named(town, capsys):
    (town/'sar'/'b.tif').unlink()
    assert main(['predict', str(town/'both'), '--image', f'{town}/image/{{place}}.tif', '--sar', f'{town}/sar/{{place}}.tif']) == 1
    assert '1 of 4 scenes have no sar: b' in capsys.readouterr().err

def test_predict_helps_with_many_scenes(capsys):
    with pytest.raises(SystemExit): main(['predict', '--help'])
    said = capsys.readouterr().out
    assert all(w in said for w in ('--workers INT', '--cluster STR', "--image 'scenes/*.tif' --out maps --workers 2", 'exit code 1'))
    with pytest.raises(SystemExit): main(['predict', '--worker', '2'])
    assert "did you mean '--workers'?" in capsys.readouterr().err
