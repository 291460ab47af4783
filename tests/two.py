"A landscape and a net with two sensors, so small that a training run takes less than a second; also imported by child processes."
import signal

import torch
from torch import nn
from torch.utils.data import Dataset

import rs_mtl  # noqa: F401
from rs_mtl.data.pairs import Pairs
from rs_mtl.layers.encoder import Encoder


class Few(Dataset):
    "Three classes in blocks: the image tells two apart, the radar the third."
    name, classes, bands, sar_bands, gsd = 'few', ('field', 'forest', 'water'), ('b1', 'b2', 'b3', 'b4'), ('VV', 'VH'), 10.
    palette = ((200, 180, 90), (60, 120, 60), (40, 80, 200))
    def __init__(self, n=8, seed=0, stop=0): self.n, self.seed, self.stop, self.read = n, seed, stop, 0
    def __len__(self): return self.n
    def __getitem__(self, i):
        self.read += 1
        if self.stop and self.read == self.stop: signal.raise_signal(signal.SIGTERM)
        g = torch.Generator().manual_seed(self.seed*1000 + i)
        mask = torch.randint(0, 3, (6, 6), generator=g).repeat_interleave(4, 0).repeat_interleave(4, 1)
        image = torch.tensor([.1, .3, .12])[mask] + .03*torch.randn(4, 24, 24, generator=g)
        sar = torch.tensor([-10., -9., -20.])[mask] + 2*torch.randn(2, 24, 24, generator=g)
        every = torch.ones(1, 24, 24, dtype=torch.bool)
        return {'image': image.clamp(0, 1), 'sar': sar, 'mask': mask, 'valid_image': every, 'valid_sar': every.clone(), 'valid_mask': every.clone()}


class Small(Encoder):
    "Two convolutions in the place of a timm pyramid."
    def __init__(self, bands, width):
        nn.Module.__init__(self)
        self.first, self.second = nn.Conv2d(bands, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
    def forward(self, x): return [self.second(self.first(x).relu()).relu()]


class Two(nn.Module):
    "The contract of the dllr net: 'mask' always, a head per sensor in training or when asked, and pixels that it must not see."
    inputs, tasks = ('image', 'sar'), ('mask',)
    def __init__(self, width=8, classes=3):
        super().__init__()
        self.image, self.sar = (nn.Sequential(nn.BatchNorm2d(n), Small(n, width)) for n in (4, 2))
        self.mask, self.mask_image, self.mask_sar = (nn.Conv2d(n, classes, 1) for n in (2*width, width, width))
        self.all_heads, self.config, self.meta = False, {'model': 'two', 'classes': classes}, {}
    def seen(self, batch, k):
        x = batch[k]
        if f'valid_{k}' in batch: x = torch.where(batch[f'valid_{k}'], x, 0)
        return torch.where(batch[f'hide_{k}'], 0, x) if f'hide_{k}' in batch else x
    def forward(self, batch):
        (a,), (b,) = self.image(self.seen(batch, 'image')), self.sar(self.seen(batch, 'sar'))
        out = {'mask': self.mask(torch.cat([a, b], 1))}
        return out | {'mask_image': self.mask_image(a), 'mask_sar': self.mask_sar(b)} if self.training or self.all_heads else out

def two(kind=Two, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**kwargs)

def pairs(stop=0): return Pairs(Few(4), Few(12, seed=1, stop=stop), count=2, truth=True)
