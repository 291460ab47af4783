"A JupyterLab and a browser of their own, for tests that look at a notebook as a reader does."
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

BROWSER = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync',
         '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']  # this machine only: the map of streets stays grey, with a network and without
SETTINGS = {'notebook-extension/tracker': {'windowingMode': 'none'},  # cells that are out of sight stay on the page
            'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False}}  # no question about news lies over the page
needs_browser = pytest.mark.skipif(BROWSER is None, reason='no Chromium on this machine: install the package chromium to run the browser tests')


def notebook(path: Path, *cells: str) -> None:
    code = [{'cell_type': 'code', 'execution_count': None, 'id': f'c{i}', 'metadata': {}, 'outputs': [], 'source': c} for i, c in enumerate(cells)]
    path.write_text(json.dumps({'cells': code, 'metadata': {'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}}, 'nbformat': 4, 'nbformat_minor': 5}))


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab of its own, without any of the user's settings; yields its address."
    pytest.importorskip('jupyterlab')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    scratch = {k: str(tmp_path/k.lower()) for k in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR')}
    for plugin, values in SETTINGS.items():
        file = tmp_path/'jupyter_config_dir'/'lab'/'user-settings'/'@jupyterlab'/f'{plugin}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    command = [sys.executable, '-m', 'jupyterlab', '--allow-root', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', "--IdentityProvider.token=", '--ServerApp.password=',
               '--LabApp.news_url=None', '--LabApp.expose_app_in_browser=True', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', f'--ServerApp.root_dir={tmp_path}']
    server = subprocess.Popen(command, env=os.environ | scratch, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f'http://127.0.0.1:{port}'
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f'{address}/api', timeout=1)
                break
            except OSError:
                assert server.poll() is None, 'JupyterLab ended at once'
                time.sleep(.25)
        else: pytest.fail('JupyterLab did not come up in 60 s')
        yield address
    finally:
        server.terminate()
        server.wait(20)


RUN_ALL = '''async () => {
  const panel = jupyterapp.shell.currentWidget;
  await panel.context.ready; await panel.sessionContext.ready;   // before that, JupyterLab would ask which kernel is meant, or do nothing
  jupyterapp.commands.execute('notebook:run-all-cells');
}'''


@contextmanager
def opened(address: str, name: str, wait: str = '.leaflet-image-layer', size: tuple[int, int] = (1300, 900)) -> Iterator:
    "A page on which the notebook has run to the end, as far as the element `wait`."
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={'width': size[0], 'height': size[1]})
        page.set_default_timeout(90_000)  # a busy machine is slow, not broken
        page.goto(f'{address}/lab/tree/{name}', timeout=120_000)
        page.wait_for_selector('.jp-Notebook')
        page.evaluate("jupyterapp.shell.collapseLeft()")  # the file browser takes room from the map
        page.evaluate(RUN_ALL)
        try: page.wait_for_selector(wait, timeout=240_000, state='attached')
        except playwright.TimeoutError: pytest.fail(f'no {wait} on the page, which says: {page.inner_text(".jp-Notebook")[-1500:]}')
        page.wait_for_timeout(2500)
        yield page
        browser.close()


def colours(png: bytes, name: str = '') -> np.ndarray: # (h, w, 3)
    "The pixels of a screenshot; kept under a name where RS_MTL_SHOTS names a folder."
    from PIL import Image
    if name and (folder := os.environ.get('RS_MTL_SHOTS')): (Path(folder)/f'{name}.png').write_bytes(png)
    return np.asarray(Image.open(io.BytesIO(png)).convert('RGB')).astype(int)


def like(seen: np.ndarray, colour: tuple[int, int, int], far: int = 40) -> np.ndarray: # (h, w)
    "Where a screenshot has a colour, or one close to it."
    return np.abs(seen - colour).max(-1) < far
