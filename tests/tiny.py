"A world and nets so small that a training run takes less than a second; also imported by child processes."
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import rs_mtl  # noqa: F401
from rs_mtl.core import MODELS

ENV = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parent), 'RS_MTL_PROGRESS': '0'}  # of child processes


class Squares(Dataset):
    "Bright squares are roofs; the brighter, the higher."
    name, classes, bands, sar_bands, gsd = 'squares', ('ground', 'roof'), ('grey',), (), 1.
    palette = ((120, 160, 90), (200, 60, 60))
    def __init__(self, n=16, seed=0, spoil=None, pause=0., classes=None):
        self.n, self.seed, self.spoil, self.pause = n, seed, spoil or (lambda i, sample: sample), pause
        if classes: self.classes = classes
    def __len__(self): return self.n
    def __getitem__(self, i):
        time.sleep(self.pause)
        g = torch.Generator().manual_seed(self.seed*1000 + i)
        y, x = torch.randint(2, 14, (2,), generator=g).tolist()
        height = torch.zeros(1, 24, 24)
        height[:, y:y+8, x:x+8] = torch.rand((), generator=g)*20 + 3
        image = .1 + height/40 + .02*torch.randn(1, 24, 24, generator=g)
        return self.spoil(i, {'image': image, 'height': height, 'mask': (height[0] > 0).long()})


@MODELS.register('tiny')
class Tiny(nn.Module):
    inputs, tasks = ('image',), ('mask', 'height')
    def __init__(self, width=8, dropout=.2, norm=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(width, 3, 3, padding=1))
        self.config, self.meta = {'model': 'tiny', 'width': width, 'dropout': dropout, 'norm': norm}, {}
    def forward(self, batch):
        y = self.body(batch['image'])
        return {'mask': y[:, :2], 'height': 10*nn.functional.softplus(y[:, 2:])}

def tiny(**kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny(**kwargs)

def even(out, batch):
    "A loss that is a mean over items, so that the mean of two halves is that of the whole."
    losses = {'mask': nn.functional.cross_entropy(out['mask'], batch['mask']), 'height': (out['height'] - batch['height']).square().mean()/100}
    return losses | {'total': sum(losses.values())}

class Send:
    "Sends a signal to this very process when an item is read for the n-th time."
    def __init__(self, number, at, again=0): self.number, self.at, self.again, self.seen = number, at, again, 0
    def __call__(self, i, sample):
        self.seen += 1
        if self.at <= self.seen <= self.at + self.again: signal.raise_signal(self.number)
        return sample

def die(i, sample):
    "A worker that is killed, as by a machine out of memory."
    if i == 3: os.kill(os.getpid(), signal.SIGKILL)
    return sample

def forkserver():
    "Starts children that have everything imported: one server for all tests, since its imports are chosen once."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['rs_mtl', 'rs_mtl.apply.predict', 'rs_mtl.training.fit', 'rs_mtl.training.metrics', 'accelerate', 'tiny'])  # rs_mtl first: it repairs torchvision
    return context

class Slow(nn.Module):
    "Takes its time for each window."
    inputs = ('image',)
    def forward(self, batch):
        time.sleep(.005)
        return {'height': batch['image'], 'mask': torch.cat([batch['image'], 1 - batch['image']], 1)}

def map_slowly(image, out):
    "A scene for a process that will be killed."
    from rs_mtl.apply.predict import predict_scene
    torch.set_num_threads(1)
    predict_scene(Slow(), {'image': image}, out, 64)


def torchrun(*script):
    "A script and its arguments in two processes on this machine."
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=0', '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0', *map(str, script)],
                          env=ENV, capture_output=True, text=True, timeout=300)
