"Many scenes: nothing twice, nothing lost, and the same maps from workers that are killed as from this process."
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

rasterio = pytest.importorskip('rasterio')
from rasterio.transform import from_origin

import rs_mtl
from rs_mtl import predict_scenes
from rs_mtl.apply import many_scenes
from rs_mtl.core import ConfigError
from rs_mtl.data.grid import Source
from rs_mtl.data.rasters import write_raster

from tiny import tiny

PLACE = {'crs': 'EPSG:32632', 'transform': from_origin(500_000, 5_300_000, .5, .5)}


def checkpoint(folder, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = rs_mtl.create_model('plain', bands=3, classes=3, encoder='resnet10t', width=8, full=8, detail=4)
    rs_mtl.save(net, folder)
    return folder


def rasters(folder, names, side=90, bands=3):
    return {n: {'image': write_raster(folder/f'{n}.tif', np.random.default_rng(i).random((bands, side, side), 'float32'), PLACE, nodata=-1, overviews=False)} for i, n in enumerate(names)}


@pytest.fixture
def three(tmp_path): return SimpleNamespace(run=checkpoint(tmp_path/'run'), scenes=rasters(tmp_path/'in', 'abc'), out=tmp_path/'out')

def states(rows): return ''.join(r.state[0] for r in rows)  # d, s, f

def do(t, scenes=None, **kwargs): return predict_scenes(t.run, scenes or t.scenes, t.out, **{'tile': 64} | kwargs)

def maps(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*.tif')}


@pytest.mark.parametrize('engine', ['none', 'executor'])
def test_a_torn_scene_is_told_and_the_others_are_done_and_only_it_is_done_again(three, engine):
    torn = three.scenes['b']['image']
    whole = torn.read_bytes()
    torn.write_bytes(whole[:len(whole)//2])
    with ThreadPoolExecutor(2) as pool:
        client = pool if engine == 'executor' else None
        with pytest.warns(UserWarning, match=r'1 of 3 scenes failed: b; b: DataError: .*b\.tif'): rows = do(three, client=client)
        assert states(rows) == 'dfd' and [r.name for r in rows] == ['a', 'b', 'c'] and 'b.tif' in rows[1].error
        assert not list(three.out.glob('b/*.tif')) and {p.name for p in rows[0].folder.iterdir()} == {'classes.tif', 'height.tif', 'finished.json'}
        before = maps(three.out)
        torn.write_bytes(whole)
        assert states(do(three, client=client)) == 'sds' and before.items() < maps(three.out).items()


def test_what_decides_the_maps_makes_a_scene_unfinished_and_nothing_else_does(three):
    assert states(do(three, probabilities=True)) == 'ddd'
    assert states(do(three, probabilities=True, batch=2, device='cpu', fold=False)) == 'sss'  # rounding at most
    assert states(do(three)) == 'ddd' and not list(three.out.rglob('probabilities.tif'))     # nor is there a map left that nobody asked for
    (three.out/'a'/'height.tif').write_bytes(b'')
    (three.out/'b'/'finished.json').write_text('{"digest"')
    os.utime(three.scenes['c']['image'], (1, 1))
    assert states(do(three)) == 'ddd' and states(do(three)) == 'sss'
    checkpoint(three.run, seed=1)
    old = maps(three.out)
    assert states(do(three)) == 'ddd' and states(do(three)) == 'sss' and all(v != old[k] for k, v in maps(three.out).items())
    assert states(do(three, {'a': {'image': Source(three.scenes['a']['image'], index=(3, 2, 1))}})) == 'd' and states(do(three, how={'scales': {'image': .5}})) == 'ddd'


def test_a_run_that_died_between_maps_of_two_digests_counts_for_neither(three, monkeypatch):
    assert states(do(three)) == 'ddd'
    real = many_scenes.predict_scene
    def dies(net, scene, folder, **kwargs):
        real(net, scene, folder, **kwargs)
        raise KeyboardInterrupt
    monkeypatch.setattr(many_scenes, 'predict_scene', dies)
    with pytest.raises(KeyboardInterrupt): do(three, tile=48)  # the maps of `a` are new, its mark was of the old ones
    assert json.loads((three.out/'a'/'finished.json').read_text())['digest'] == ''  # and holds for neither, should their sizes be equal by chance
    monkeypatch.undo()
    assert states(do(three)) == 'dss'


def test_a_scene_is_tried_again_after_the_others_and_its_error_says_where(three, monkeypatch):
    real, seen = many_scenes.predict_scene, []
    def flaky(net, scene, folder, **kwargs):
        seen.append(folder.name)
        if seen.count('a') <= 1 and folder.name == 'a' or folder.name == 'b': raise OSError('the file server sleeps')
        return real(net, scene, folder, **kwargs)
    monkeypatch.setattr(many_scenes, 'predict_scene', flaky)
    with pytest.warns(UserWarning, match='1 of 3 scenes failed: b; b: OSError'): rows = do(three, retries=2)
    assert states(rows) == 'dfd' and seen == [*'abc', *'ab', 'b'] and 'the file server sleeps (in flaky, test_many_scenes.py:' in rows[1].error


def test_names_and_arguments_are_checked_before_anything_is_done(three, monkeypatch):
    monkeypatch.setattr(many_scenes, '_work', lambda job: pytest.fail('a scene was begun'))
    image = three.scenes['a']['image']
    for scenes, words in (([image, {'image': three.out/'A.tif'}], "'a' and 'A'"), ({'a/b': {'image': image}}, 'name of a folder'), ({'..': {'image': image}}, 'name of a folder'), ({'a': image}, 'layers by name'),
                          ({'a': {}}, 'layers by name'), ([{}], 'layers by name'), (image, 'predict_scene')):
        with pytest.raises(ConfigError, match=words): do(three, scenes)
    for wrong in ({'tile': 0}, {'overlap': 1}, {'retries': -1}, {'client': 7}):
        with pytest.raises(ConfigError, match=next(iter(wrong))): do(three, **wrong)
    assert not three.out.exists()


def test_without_dask_an_address_names_the_extra(three, monkeypatch):
    monkeypatch.setitem(sys.modules, 'distributed', None)
    with pytest.raises(ConfigError) as e: do(three, client='tcp://localhost:1')
    assert 'rs_mtl[cluster]' in e.value.todo


def test_a_checkpoint_that_is_overwritten_on_the_way_is_an_error_and_no_mixture(three, monkeypatch):
    monkeypatch.setattr(many_scenes, 'read_pair', lambda *a: checkpoint(three.run, seed=2))  # after this, the digest of the new one is taken …
    real = many_scenes.load
    monkeypatch.setattr(many_scenes, 'load', lambda run: real(checkpoint(three.run, seed=3)))  # … and a third one is loaded
    with pytest.warns(UserWarning, match='written again'): rows = do(three)
    assert states(rows) == 'fff' and not list(three.out.rglob('*.tif'))


class Broken:
    "An engine that gives up: the first scene was cancelled, and it takes no other."
    def __init__(self): self.sent = 0
    def submit(self, work, job):
        self.sent += 1
        if self.sent > 3: raise RuntimeError('cannot schedule new futures after shutdown')
        future = Future()
        if self.sent == 1:
            future.cancel()
            future.set_running_or_notify_cancel()
        else: future.set_exception(MemoryError('worker of 4 GB')) if self.sent == 2 else future.set_result(work(job))
        return future

def test_an_engine_that_gives_up_loses_no_error(three):
    with pytest.warns(UserWarning, match='2 of 3 scenes failed: a, b'): rows = do(three, client=Broken())
    assert states(rows) == 'ffd' and 'gave the scene up' in rows[0].error and 'MemoryError: worker of 4 GB' in rows[1].error and all('after shutdown' in r.error for r in rows[:2])


def test_a_warning_in_a_worker_reaches_the_caller(three, monkeypatch):
    monkeypatch.setattr(many_scenes, 'show_progress', lambda on: None)
    monkeypatch.setattr(many_scenes, '_here', iter('abcdef').__next__)  # every call from another process
    net = rs_mtl.load(three.run)
    net.set_stats({'image': ([9.]*3, [.1]*3)})
    rs_mtl.save(net, three.run)
    with pytest.warns(UserWarning, match='a: band 1 of image .* sigma'): rows = do(three, {'a': three.scenes['a']})
    assert 'sigma' in rows[0].warnings[0]


def test_a_worker_that_is_killed_loses_no_scene_and_the_maps_are_those_of_one_process(tmp_path):
    distributed, dask = pytest.importorskip('distributed'), pytest.importorskip('dask')
    run, names = rs_mtl.save(tiny(width=24), tmp_path/'run'), ['a', 'b', 'c', 'd', 'torn']
    scenes = rasters(tmp_path/'in', names, 400, 1)
    scenes['torn']['image'].write_bytes(scenes['torn']['image'].read_bytes()[:100_000])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers: the order of a sum is then the same
    try:
        with pytest.warns(UserWarning, match='1 of 5'): assert states(predict_scenes(run, scenes, tmp_path/'one', tile=64)) == 'ddddf'
    finally: torch.set_num_threads(threads)

    killed: list[int] = []
    def kill_the_first_that_writes() -> None:
        while not killed:
            for part in (tmp_path/'two').glob('*/.*.part.tif'):
                killed.append(int(part.name.removesuffix('.part.tif').rpartition('-')[2]))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(.005)

    # a net of one's own must be registered in the workers, in the one that takes the dead one's place as well
    with dask.config.set({'distributed.worker.preload': ['tiny']}), distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        pids = set(client.run(os.getpid).values())
        killer = threading.Thread(target=kill_the_first_that_writes, daemon=True)
        killer.start()
        with pytest.warns(UserWarning, match='1 of 5 scenes failed: torn; torn: DataError'): rows = predict_scenes(run, scenes, tmp_path/'two', tile=64, client=client)
        killer.join(1)
        assert killed and killed[0] in pids and killed[0] not in client.run(os.getpid).values()
    assert states(rows) == 'ddddf' and maps(tmp_path/'two') == maps(tmp_path/'one')
    where = {json.loads((r.folder/'finished.json').read_text())['where'] for r in rows[:4]}
    assert not any(w.endswith(f'-{os.getpid()}') for w in where)  # the workers did it
    assert states(predict_scenes(run, {n: scenes[n] for n in names[:4]}, tmp_path/'two', tile=64)) == 'ssss'
