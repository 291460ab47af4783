"The page that compares runs, and the command line for programs: made from small files by hand, nothing is trained."
import contextlib
import json
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from rs_mtl.apply.cli import main, parse, wants_json
from rs_mtl.apply.compare import compare_runs, count_parameters, find_runs, groups_of, scores_of
from rs_mtl.apply.figures import _png
from rs_mtl.core import ConfigError, DatasetNotFoundError, write_json

RULES = {'mask': 'one confusion matrix', 'height': 'metres'}


def put(folder, values=None, history=((1, 10, 3., .2), (2, 20, 2., .4)), rules=RULES, pictures=True, classes=('roof', 'road'), **settings):
    "A run folder as training leaves it, as small as can be."
    folder.mkdir(parents=True)
    how = {'model': 'plain', 'data': 'city', 'data_options': '', 'seed': 0, 'size': 64, 'encoder': 'resnet10t'} | settings
    write_json(folder/'model.json', {'config': {'model': how['model'], 'encoder': how['encoder']}, 'meta': {'classes': classes, 'data': how['data']}})
    head = json.dumps({'__metadata__': {}, 'a.weight': {'shape': [3, 5]}, 'a.bias': {'shape': []}, 'bn.running_mean': {'shape': [99]}, 'first.mean': {'shape': [7]}}).encode()
    (folder/'model.safetensors').write_bytes(struct.pack('<Q', len(head)) + head)
    (folder/'history.csv').write_text('epoch,step,val_loss,val_miou,val_pixels\n' + ''.join(','.join(map(str, row)) + ',77\n' for row in history))
    if values is not None:
        values = {'iou': dict.fromkeys(classes, values.get('miou', .5)), 'pixels': 1000} | values
        write_json(folder/'metrics.json', {'parameters': how, 'values': values, 'protocol': rules, 'run': {'steps': history[-1][1], 'seconds': 1234.5}})
    (folder/'train.ipynb').write_text('{}')
    if pictures:
        from matplotlib.figure import Figure
        (folder/'figures').mkdir()
        (folder/'figures'/'test-0.png').write_bytes(_png(Figure(figsize=(1, 1)), 40))
    return folder


def groups(folders): return [[s.run.name for s in g] for g in groups_of(s for r in find_runs(folders)[0] for s in scores_of(r))]


def row(html, name, nth=0):
    "The cells of a run in the nth table that has it."
    found = [r for r in re.findall(r'<tr>(.*?)</tr>', html, re.S) if f'<b>{name}</b>' in r]
    return re.findall(r'<td[^>]*>(.*?)</td>', found[nth], re.S)


def test_the_best_of_each_column_is_marked_and_only_among_scores_that_were_counted_alike(tmp_path):
    put(tmp_path/'a', {'miou': .5001, 'height_rmse': 2.})
    put(tmp_path/'b', {'miou': .7, 'height_rmse': 3.})
    put(tmp_path/'c', {'miou': .6996, 'height_rmse': None})
    put(tmp_path/'other pixels', {'miou': .9, 'height_rmse': 1., 'pixels': 999})
    page = compare_runs(sorted(tmp_path.iterdir()))
    html = page.read_text()
    assert page.resolve() == tmp_path/'report.html'
    assert row(html, 'a')[-2:] == ['50.0', '<b>2.00</b>']  # less height error is better
    assert row(html, 'b')[-2:] == ['<b>70.0</b>', '3.00'] and row(html, 'c')[-2:] == ['<b>70.0</b>', '–']  # the same as far as is shown
    assert row(html, 'other pixels')[-2:] == ['90.0', '1.00'] and 'Not to be compared with group 1: other pixels' in html
    assert row(html, 'a')[1:7] == ['plain<br>city', 'resnet10t', '0.00 M', '2 / 20', '0', '1,234'] and count_parameters(tmp_path/'a'/'model.safetensors') == 16
    assert 'href="a/train.ipynb"' in html and 'href="other%20pixels/train.ipynb"' in html


@pytest.mark.parametrize('other', [{'data': 'land'}, {'data_options': 'cover=0.5'}, {'classes': ('roof', 'tree')}, {'rules': RULES | {'mask': 'mean over images'}}, {'values': {'miou': .5, 'pixels': 2}}])
def test_another_protocol_is_another_group(tmp_path, other):
    put(tmp_path/'a', {'miou': .5})
    put(tmp_path/'b', **{'values': {'miou': .5}} | other)
    assert groups([tmp_path/'a', tmp_path/'b']) == [['a'], ['b']]


def test_what_only_one_of_them_learned_and_how_options_are_spelt_separates_nobody(tmp_path):
    put(tmp_path/'a', {'miou': .5}, rules={'mask': RULES['mask']}, data_options='cover=0.5,sky=1')
    put(tmp_path/'b', {'miou': .6, 'height_rmse': 1., 'height_pixels': 9}, data_options='sky=1, cover=.5', seed=3)
    assert groups([tmp_path/'a', tmp_path/'b']) == [['a', 'b']]
    assert 'The seed of the places differs (0, 3)' in compare_runs([tmp_path/'a', tmp_path/'b']).read_text()


def test_what_evaluate_found_is_a_row_of_its_own_protocol(tmp_path):
    put(tmp_path/'a', {'miou': .5}); put(tmp_path/'b', {'miou': .6})
    write_json(tmp_path/'a'/'evaluate.json', {'parameters': {'data': '', 'split': 'val', 'seed': 0}, 'values': {'miou': .99, 'pixels': 1000}, 'protocol': RULES})
    html = compare_runs([tmp_path/'a', tmp_path/'b']).read_text()
    assert 'evaluated' in row(html, 'a', 1)[0] and row(html, 'a', 1)[-1] == '99.0' and row(html, 'b')[-1] == '<b>60.0</b>' and 'other split' in html


def test_what_is_no_run_unfinished_torn_or_never_scored_is_named_on_the_page_and_on_stderr(tmp_path, capsys):
    put(tmp_path/'good', {'miou': .5})
    write_json(put(tmp_path/'early')/'state.json', {'run': {'step': 25}, 'signature': {'planned steps': 90}})
    put(tmp_path/'old', {'miou': .9}); (tmp_path/'old'/'history.csv').write_text('epoch,step,val_loss\n1,5,2\n')
    put(tmp_path/'torn', {'miou': .5}); (tmp_path/'torn'/'metrics.json').write_text('{"values": {"mi')
    put(tmp_path/'empty', {'miou': .5}); write_json(tmp_path/'empty'/'metrics.json', {'parameters': {}})
    (tmp_path/'notes').mkdir(); (tmp_path/'file.txt').write_text('')
    (tmp_path/'table'/'row').mkdir(parents=True); write_json(tmp_path/'table'/'row'/'row.json', {})
    html, said = compare_runs([*sorted(tmp_path.iterdir()), tmp_path/'gone']).read_text(), capsys.readouterr().err
    for name, why in {'early': 'unfinished: it stands at step 25 of 90', 'old': 'unfinished: it stands at step 5, and metrics.json is of an earlier training of 20 steps', 'torn': 'metrics.json cannot be read', 'empty': 'metrics.json holds no scores',
                      'notes': 'no run: it holds none of', 'file.txt': 'a file, and no run folder', 'table': 'an ablation', 'gone': 'there is no such folder'}.items():
        assert f'<li>{name}: {why}' in html and f"'{name}': {why}" in said, name
    assert '90.0' not in html  # the scores of another training
    with pytest.raises(DatasetNotFoundError, match="(?s)none of these is a run: 'notes': no run.*'gone'"): compare_runs([tmp_path/'notes', tmp_path/'gone'])


def test_a_page_of_last_time_is_no_news_and_a_folder_that_is_missing_moves_the_page_nowhere(tmp_path, capsys):
    put(tmp_path/'runs'/'a', {'miou': .5}); put(tmp_path/'runs'/'b', {'miou': .6})
    first = compare_runs(sorted((tmp_path/'runs').iterdir()))
    assert compare_runs([*sorted((tmp_path/'runs').iterdir()), tmp_path/'elsewhere'/'c']) == first == tmp_path/'runs'/'report.html'
    assert capsys.readouterr().err == "report: '../elsewhere/c': there is no such folder\n"
    put(tmp_path/'a'/'inner', {'miou': .5}); write_json(tmp_path/'a'/'metrics.json', {})
    assert compare_runs([tmp_path/'a', tmp_path/'a'/'inner']) == tmp_path/'report.html'  # not over the page of the run a


def test_pictures_stand_together_only_where_the_places_are_the_same(tmp_path):
    for name, how in (('a', {}), ('b', {'model': 'ctme'}), ('c', {'seed': 1}), ('d', {'size': 96})): put(tmp_path/name, {'miou': .5}, **how)
    html = compare_runs(sorted(tmp_path.iterdir())).read_text()
    assert html.count('<div class="places">') == 1 and html.count('type="checkbox"') == 2 and 'no other run shows are in the notebooks of: c, d' in html


def test_the_page_fetches_nothing_and_names_are_no_markup(tmp_path):
    evil = '<script>alert(1)<'
    put(tmp_path/f'x{evil}'.replace('/', ''), {'miou': .5}, encoder=evil, model=evil, classes=(evil, 'x$y$'), rules={evil: evil}, labels=evil)
    put(tmp_path/'$\\frac{', {'miou': .5}, labels='1/2')
    html = compare_runs(sorted(tmp_path.iterdir())).read_text()
    assert '<script' not in html and not re.findall(r'https?:|url\((?!data:)|@import|src="(?!data:)', re.sub(r'base64,[A-Za-z0-9+/=]+', '', html))


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folders = [put(tmp_path/'a', {'miou': .5}), put(tmp_path/'b', {'miou': .6})]
    old = compare_runs(folders).read_bytes()
    put(tmp_path/'c', {'miou': .7})
    monkeypatch.setattr('os.replace', lambda *a: (_ for _ in ()).throw(OSError('disk')))
    with pytest.raises(OSError): compare_runs([*folders, tmp_path/'c'])
    assert (tmp_path/'report.html').read_bytes() == old and not list(tmp_path.glob('.*part*'))


def test_the_page_in_a_browser_fits_and_a_picture_grows(tmp_path):
    from test_report import BROWSER, FLAGS
    if BROWSER is None: pytest.skip('no Chromium on this machine: install the package chromium to run the browser tests')
    playwright = pytest.importorskip('playwright.sync_api')
    scores = {'miou': .51, 'mf1': .62, 'oa': .7, 'height_rmse': 2.123, 'height_mae': 1.5}
    for i in range(8): put(tmp_path/f'a run with a long name and number {i}', {k: v*(1 + i/50) for k, v in scores.items()}, encoder='mobilenetv3_small_050')
    page_file = compare_runs(sorted(tmp_path.iterdir()))
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_context(offline=True, viewport={'width': 1000, 'height': 900}).new_page()
        said: list[str] = []
        page.on('console', lambda m: said.append(m.text))
        page.goto(page_file.as_uri())
        wide = page.evaluate("[...document.querySelectorAll('.wide')].map(e => e.scrollWidth - e.clientWidth)")
        assert page.evaluate('document.documentElement.scrollWidth') == 1000 and max(wide) == 0, wide
        picture = page.locator('.places img').first
        small = picture.bounding_box()['width']
        picture.click()
        assert picture.bounding_box()['width'] > 1.8*small and said == []
        page.set_viewport_size({'width': 380, 'height': 700})
        assert page.evaluate('document.documentElement.scrollWidth') <= 380
        browser.close()


# the command line, for programs

def told(capsys, *argv):
    "Exit code, stdout and stderr."
    try: code = main([str(a) for a in argv])
    except SystemExit as e: code = e.code
    out, err = capsys.readouterr()
    return code, out, err


def test_report_of_several_runs_says_where_the_page_is(tmp_path, capsys, monkeypatch):
    put(tmp_path/'runs'/'a', {'miou': .5}); put(tmp_path/'runs'/'b', {'miou': .6}); put(tmp_path/'runs'/'c')
    monkeypatch.chdir(tmp_path)
    code, out, err = told(capsys, 'report', 'runs/a', 'runs/b', 'runs/c')
    assert (code, out) == (0, 'report: runs/report.html\n') and "'c': unfinished" in err
    assert told(capsys, 'report', '-q', 'runs/*')[1] == 'runs/report.html\n'  # a pattern that no shell has opened; the page of last time is no run
    code, out, _ = told(capsys, '--json', 'report', 'runs/a', 'runs/b', 'runs/c', 'runs/d', '--out', 'x/page.html')
    found = json.loads(out)
    assert code == 0 and found['values'] == {'runs': ['a', 'b', 'c'], 'without_scores': {'c': found['values']['without_scores']['c']}, 'left_out': {'d': 'there is no such folder'}} and found['files'] == ['x/page.html']
    assert told(capsys, 'report', 'runs/a')[1] == 'report: runs/a/report.html\n'  # one alone: its own page, as ever
    assert told(capsys, 'report', 'runs/x', 'runs/y')[0] == 1


@pytest.mark.parametrize('argv', [['evaluate', 'none', '--json'], ['--json', 'predict', 'none'], ['report', '--json', 'none', 'nothing'], ['train', '--json', '--epoch', '5'], ['--json', 'trian'], ['--json'], ['report', '--json'],
                                  ['check', 'vaihingn', '--json'], ['--json', 'check', 'own', '.'], ['check', '--json', '--quik', 'city'], ['train', '--json', '--lr', 'fast'], ['ablate', 'ctme', '--json', '--seeds', 'x']])
def test_an_error_as_json_is_one_object_with_three_parts_and_a_code(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    code, out, _ = told(capsys, *argv)
    found = json.loads(out)
    assert code == found['exit'] in (1, 2) and found['state'] in ('error', 'usage') and list(found) == ['command', 'state', 'exit', 'out', 'result', 'files', 'values', 'error']
    assert found['error']['what'] and {'what', 'expected', 'todo', 'kind'} <= found['error'].keys() and out.count('\n') == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def notebook(monkeypatch, tmp_path):
    "A run notebook that is a function: no kernel is started."
    def use(work):
        def run(command, folder, **values):
            print('what the notebook says')
            work(tmp_path/folder)
            return tmp_path/folder/f'{command}.ipynb'
        monkeypatch.setattr('rs_mtl.apply.cli.run', run)
        monkeypatch.chdir(tmp_path)
    return use


def test_a_run_is_told_in_lines_in_one_line_or_as_one_object(notebook, capsys, tmp_path, monkeypatch):
    seen = []
    def work(folder):
        from rs_mtl.core import progress_shown
        seen.append(progress_shown())
        folder.mkdir(exist_ok=True)
        write_json(folder/'metrics.json', {'values': {'miou': .5, 'oa': .25, 'none': None, 'iou': {'a': 1}}})
    notebook(work)
    monkeypatch.delenv('RS_MTL_PROGRESS', raising=False)
    (tmp_path/'r').mkdir(); (tmp_path/'r'/'old.txt').write_text('')
    assert told(capsys, 'train', '--out', 'r')[1] == f'what the notebook says\ntrain: mIoU 0.500, accuracy 0.250\ntrain: see {tmp_path}/r/train.ipynb\n'
    assert told(capsys, 'train', '--out', 'r', '-q') == told(capsys, '--quiet', 'train', '--out', 'r') == (0, 'r\n', '')
    code, out, err = told(capsys, 'train', '--json', '--out', 'r')
    assert json.loads(out) == {'command': 'train', 'state': 'done', 'exit': 0, 'out': 'r', 'result': 'r', 'files': ['r/metrics.json'], 'values': {'miou': .5, 'oa': .25}, 'error': None}
    assert 'what the notebook says' in err and seen == [True, False, False, True]  # bars are off while it is quiet, and on again after


def test_a_run_that_stops_or_fails_is_told_in_three_parts(notebook, capsys, tmp_path):
    from rs_mtl.apply.runs import _failure
    def fail(ename, evalue):
        def work(folder): raise _failure(type('E', (Exception,), {'ename': ename, 'evalue': evalue})(), folder/'train-failed.ipynb')
        notebook(work)
    fail('Stopped', 'stopped by SIGINT after step 3\n  what to do: go on with --resume')
    code, out, _ = told(capsys, 'train', '--out', 'r', '--json')
    found = json.loads(out)
    assert code == found['exit'] == 130 and found['state'] == 'stopped' and found['out'] == 'r'
    assert found['error'] == {'kind': 'Stopped', 'what': 'stopped by SIGINT after step 3', 'expected': '', 'todo': 'go on with --resume', 'notebook': str(tmp_path/'r'/'train-failed.ipynb')}
    assert "go on with --resume\n  the whole run: '" in told(capsys, 'train', '--out', 'r')[2]
    fail('DataError', "a\nb\n  expected: c\n  what to do: d")
    assert list(json.loads(told(capsys, '--json', 'train')[1])['error'].values())[:4] == ['DataError', 'a\nb', 'c', 'd']
    fail('KeyError', "'x'")
    assert json.loads(told(capsys, '--json', 'train')[1])['error']['what'] == "KeyError: 'x'"
    def interrupted(folder): raise KeyboardInterrupt
    notebook(interrupted)
    code, out, _ = told(capsys, 'train', '--json')
    assert code == 130 and json.loads(out)['state'] == 'stopped'


def test_check_has_a_json_of_its_own_and_says_problems(tmp_path, capsys, monkeypatch):
    from layouts import tiff
    monkeypatch.chdir(tmp_path)
    for i in range(2): tiff(tmp_path/'d'/f'{i}.tif', np.full((3, 40, 40), .1*i + .2, 'float32'))
    own = ['check', 'own', 'd', '--image', '{place}.tif']
    code, out, _ = told(capsys, *own, '--json')
    assert json.loads(out)['exit'] == code and json.loads(out)['values']['name'] == 'own'
    assert told(capsys, *own, '--json', 'f.json')[1].startswith('own in') and json.loads((tmp_path/'f.json').read_text())['name'] == 'own'
    assert json.loads(told(capsys, '--json', *own, '--json', 'g.json')[1])['files'] == ['g.json']
    assert told(capsys, *own, '-q')[1].count('\n') == 1
    (tmp_path/'d'/'1.tif').write_bytes(b'')
    code, out, _ = told(capsys, '--json', *own)
    assert code == 1 and json.loads(out)['state'] == 'problems' and json.loads(out)['error'] is None
    assert 'ends in .json' in told(capsys, 'check', '--json', 'vaihingen', 'd')[2]


def test_the_two_options_stand_before_or_after_the_command():
    for argv in (['-q', '--json', 'list'], ['list', '--json', '--quiet'], ['--json', 'list', '-q']):
        args = parse(argv)
        assert args.quiet and args.as_json and args.command == 'list'
    assert not wants_json(['check', 'city', '--json', 'x.json']) and wants_json(['check', 'city', '--json']) and wants_json(['check', '--json', '--quick', 'city'])
    args = parse(['train', 'ctme', '--epochs', '3', '-q'])
    assert args.model == 'ctme' and args.epochs == 3 and args.quiet and not args.as_json


def test_help_teaches_the_first_steps_the_codes_and_every_ablation(capsys):
    from rs_mtl.apply.ablation import ABLATIONS
    with contextlib.suppress(SystemExit): main(['--help'])
    said = capsys.readouterr().out
    assert all(w in said for w in ('rs-mtl list', '--resume', 'rs-mtl report runs/*', '130 stopped', '--quiet', '--json')) and said.index('  train  ') < said.index('  ablate  ')
    with contextlib.suppress(SystemExit): main(['ablate', '--help'])
    said = capsys.readouterr().out
    assert all(name in said for name in ABLATIONS)


def test_the_command_line_for_programs_imports_nothing_heavy():
    code = "import sys; from rs_mtl.apply.cli import main\ntry: main(['report', '--help'])\nexcept SystemExit: pass\nprint(sorted({'torch', 'papermill', 'numpy', 'IPython', 'matplotlib'} & set(sys.modules)))\nmain(['--json', 'list']); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert '\n[]\n{' in said and said.endswith('}\nFalse\n')


def test_no_folder_at_all_is_an_error_in_words():
    with pytest.raises(ConfigError, match='no folder to compare'): compare_runs([])
