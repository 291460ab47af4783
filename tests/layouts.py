"""Small copies of public data sets, in their true layout: the same names, folders, types, georeference or the lack of it, and quirks. All pixels are made up."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import from_origin

from rs_mtl.data.datasets import POTSDAM, VAIHINGEN, WHU_OPT_SAR
from rs_mtl.data.rasters import _quiet

COLOURS = np.array([*POTSDAM.palette, (0, 0, 0)], 'uint8')  # and the black of eroded borders


def tiff(path: Path, values: np.ndarray, crs: Any = None, transform: Any = None, **kwargs: Any) -> Path:
    "A plain GeoTIFF, written by GDAL as publishers do: no names of bands, no scale."
    values = values[None] if values.ndim == 2 else values
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {k: v for k, v in (('crs', crs), ('transform', transform)) if v is not None}
    with _quiet(), rasterio.open(path, 'w', driver='GTiff', count=len(values), height=values.shape[1], width=values.shape[2], dtype=values.dtype, **place, **kwargs) as dst: dst.write(values)
    return path


def jpeg(path: Path, values: np.ndarray) -> Path:
    "Grey bytes as JPEG: lossy, and without any place."
    path.parent.mkdir(parents=True, exist_ok=True)
    with _quiet(), rasterio.open(path, 'w', driver='JPEG', count=1, height=values.shape[0], width=values.shape[1], dtype='uint8', QUALITY=100) as dst: dst.write(values, 1)
    Path(f'{path}.aux.xml').unlink(missing_ok=True)
    return path


def label(rng: np.random.Generator, shape: tuple[int, int], classes: int = 6) -> np.ndarray:
    "Classes in blocks of eight pixels."
    blocks = rng.integers(0, classes, (-(-shape[0]//8), -(-shape[1]//8)))
    return np.kron(blocks, np.ones((8, 8), int))[:shape[0], :shape[1]]


def heights(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    "Decimetres in blocks of eight pixels, which JPEG keeps; one block is as high as a byte can say."
    out = np.kron(rng.integers(0, 24, (-(-shape[0]//8), -(-shape[1]//8)))*10, np.ones((8, 8), int))[:shape[0], :shape[1]].astype('uint8')
    out[:8, :8] = 255
    return out


def eroded(classes: np.ndarray) -> np.ndarray:
    "Black where the next pixel is another class."
    out = classes.copy()
    out[:, 1:][classes[:, 1:] != classes[:, :-1]] = 6
    return out


def vaihingen(root: Path, shape: tuple[int, int] = (40, 56), tiles: Sequence[str] | None = None) -> Path:
    "top and dsm with a place but no CRS, labels and heights without either; labels of the 17 test tiles come from another archive."
    rng = np.random.default_rng(1)
    official = VAIHINGEN.splits['official']
    for i, tile in enumerate(tiles or [*official['train'], *official['test']]):
        here = {'transform': from_origin(496_000 + 100*i, 5_420_000, .09, .09)}
        classes = label(rng, shape)
        tiff(root/f'top/top_mosaic_09cm_area{tile}.tif', rng.integers(1, 255, (3, *shape), dtype='uint8'), photometric='rgb', **here)
        tiff(root/f'dsm/dsm_09cm_matching_area{tile}.tif', rng.normal(260, 3, shape).astype('float32'), **here)
        jpeg(root/f'nDSM/dsm_09cm_matching_area{tile}_normalized.jpg', heights(rng, shape))
        folder = 'gts_for_participants' if tile in official['train'] else 'ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE'
        tiff(root/folder/f'top_mosaic_09cm_area{tile}.tif', COLOURS[classes].transpose(2, 0, 1), photometric='rgb')
        folder = 'gts_eroded_for_participants' if tile in official['train'] else 'ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE'
        tiff(root/folder/f'top_mosaic_09cm_area{tile}_noBoundary.tif', COLOURS[eroded(classes)].transpose(2, 0, 1), photometric='rgb')
    return root


def potsdam(root: Path, size: int = 40) -> Path:
    "Pictures with a place, labels without; surface models with two digits, those of 3_13 one column short; 4_12 holds odd colours."
    rng = np.random.default_rng(2)
    for place in (p for ps in POTSDAM.splits['official'].values() for p in ps):
        row, col = place.split('_')
        here = {'crs': 'EPSG:32633', 'transform': from_origin(367_000 + 300*int(col), 5_809_000 - 300*int(row), .05, .05)}
        bands, classes = rng.integers(1, 255, (4, size, size), dtype='uint8'), label(rng, (size, size))
        for folder, ending, index in (('2_Ortho_RGB', 'RGB', [0, 1, 2]), ('3_Ortho_IRRG', 'IRRG', [3, 0, 1]), ('4_Ortho_RGBIR', 'RGBIR', [0, 1, 2, 3])):
            tiff(root/folder/f'top_potsdam_{place}_{ending}.tif', bands[index], photometric='rgb', **({'alpha': 'unspecified'} if len(index) == 4 else {}), **here)
        wide = size - (place == '3_13')
        long = f'{int(row):02}_{int(col):02}'
        tiff(root/f'1_DSM/dsm_potsdam_{long}.tif', rng.normal(70, 3, (size, wide)).astype('float32'), **here)
        jpeg(root/f'1_DSM_normalisation/dsm_potsdam_{long}_normalized_lastools.jpg', heights(rng, (size, size))[:, :wide])
        jpeg(root/f'1_DSM_normalisation/dsm_potsdam_{long}_normalized_ownapproach.jpg', np.zeros((size, wide), 'uint8'))
        for folder, ending, c in (('5_Labels_all', '', classes), ('5_Labels_all_noBoundary', '_noBoundary', eroded(classes))):
            rgb = COLOURS[c].transpose(2, 0, 1).copy()
            if place == '4_12': rgb[:, 5, 7:10] = np.array([[252], [255], [0]])
            tiff(root/folder/f'top_potsdam_{place}_label{ending}.tif', rgb, photometric='rgb')
    return root


def whu_opt_sar(root: Path, shape: tuple[int, int] = (24, 32), places: Sequence[str] | None = None) -> Path:
    "No georeference anywhere; four bytes per optical pixel, one of radar; the label of NH50E007004 is one column short."
    rng = np.random.default_rng(3)
    for place in places or sorted(p for ps in WHU_OPT_SAR.splits['official'].values() for p in ps):
        codes = label(rng, shape, 8)*10
        tiff(root/f'optical/{place}.tif', (np.array([40, 80, 120, 200])[:, None, None] + rng.integers(-9, 9, (4, *shape))).astype('uint8'), photometric='rgb', alpha='yes')
        tiff(root/f'sar/{place}.tif', rng.integers(0, 255, shape, dtype='uint8'))
        tiff(root/f'lbl/{place}.tif', codes[:, :-1 if place == 'NH50E007004' else None].astype('uint8'))
    return root


def eerds(root: Path, n: int = 6, shape: tuple[int, int] = (24, 32)) -> Path:
    "Nobody knows; folders as in its sister set."
    rng = np.random.default_rng(4)
    for i in range(n):
        tiff(root/f'optical/{i}.tif', rng.integers(1, 255, (3, *shape), dtype='uint8'))
        tiff(root/f'sar/{i}.tif', rng.integers(1, 255, shape, dtype='uint8'))
        tiff(root/f'lbl/{i}.tif', (label(rng, shape, 3) + 1).astype('uint8'))
    return root


def radar(rng: np.random.Generator, shape: tuple[int, int], dtype: str = 'float32') -> np.ndarray:
    return rng.normal([[[-12.]], [[-19.]]], 2, (2, *shape)).astype(dtype)


def m3mcr(root: Path, places: Sequence[str] = ('train/fall_1_p_457', 'train/fall_2_p_3', 'train/spring_7_p_10', 'train/winter_4_p_0', 'test/summer_33_p_1')) -> Path:
    "3 m pictures with nodata 0, 10 m radar as float64 and labels with codes of WorldCover, a cloud mask as a NumPy file of truth values."
    rng = np.random.default_rng(5)
    for i, place in enumerate(places):
        part, name = place.split('/')
        season, roi, _, patch = name.split('_')
        def path(kind: str, ending: str = 'tif') -> Path: return root/part/f'{kind}_{season}'/f'{kind}_{season}_{roi}'/f'{kind}_{season}_{roi}_p_{patch}.{ending}'
        fine, coarse = ({'crs': 'EPSG:32632', 'transform': from_origin(500_000 + 900*i + d, 5_000_000 - d, g, g)} for g, d in ((3, 0), (10, 1.3)))
        clear = rng.integers(200, 4000, (4, 300, 300)).astype('uint16')
        clear[:, :2, :5] = 0
        cloud = np.kron(rng.random((10, 10)) > .7, np.ones((30, 30), bool))
        tiff(path('planet_cloudfree'), clear, nodata=0, compress='deflate', **fine)
        tiff(path('planet_cloudy'), np.where(cloud, 7000, clear).astype('uint16'), nodata=0, compress='deflate', **fine)
        tiff(path('S1'), radar(rng, (90, 90), 'float64'), **coarse)
        codes = np.array([10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100], 'uint8')[label(rng, (90, 90), 11)]
        codes[:3, :3] = 0
        tiff(path('landcover'), codes, **coarse)
        path('cloudmask', 'npy').parent.mkdir(parents=True, exist_ok=True)
        np.save(path('cloudmask', 'npy'), cloud)
    return root


def sentinel2(rng: np.random.Generator, offset: int = 0) -> np.ndarray:
    "13 bands of which the eleventh, cirrus, sees next to nothing."
    out = rng.integers(300, 4000, (13, 256, 256))
    out[10] = rng.integers(5, 40, (256, 256))
    return (out + offset).astype('uint16')


def luojiaset(root: Path, places: Sequence[str] = ('0-20%/01_p4', '0-20%/02_p1', '20%-40%/05_p3', '40%-60%/08_p2', '80%-100%/10_p23'), offset: int = 1000) -> Path:
    "13 bands with 1000 too much, radar whose corner lies some metres off, labels 0..6, a cloud mask in floats."
    rng = np.random.default_rng(6)
    for i, place in enumerate(places):
        cover, name = place.split('/')
        roi, p = name.split('_')
        fine, off = ({'crs': 'EPSG:32755', 'transform': from_origin(400_000 + 1280*i + d, 5_300_000 - d, 10, 10)} for d in (0, 3.7))
        clear, cloud = sentinel2(rng, offset), np.kron(rng.random((8, 8)) > .5, np.ones((32, 32), bool))
        tiff(root/cover/f's2/ROIs_{roi}_s2_{p}.tif', clear, compress='deflate', **fine)
        tiff(root/cover/f's2_cloudy/ROIs_{roi}_s2_cloudy_{p}.tif', np.where(cloud & (np.arange(13) != 10)[:, None, None], 6000, clear).astype('uint16'), compress='deflate', **fine)
        tiff(root/cover/f's1/ROIs_{roi}_s1_{p}.tif', radar(rng, (256, 256)), **off)
        tiff(root/cover/f'land_cover_maps/ROIs_{roi}_s2_{p}.tif', label(rng, (256, 256), 7).astype('uint8'), **fine)
        tiff(root/cover/f'cloud_detection_results/ROIs_{roi}_s2_cloudy_{p}.tif', cloud.astype('float32'), **fine)
    return root


def sen12mscr(root: Path, places: Sequence[str] = ('ROIs1158_spring_1_p407', 'ROIs1158_spring_17_p30', 'ROIs1970_fall_3_p1', 'ROIs1970_fall_139_p839', 'ROIs2017_winter_112_p797')) -> Path:
    "Three trees of folders whose names repeat the kind; radar in dB, cut at 0; no offset."
    rng = np.random.default_rng(7)
    for i, place in enumerate(places):
        seed, season, roi, p = place.split('_')
        here = {'crs': 'EPSG:32650', 'transform': from_origin(700_000.5 + 2560*i, 3_700_000.25, 10, 10)}
        for kind, values in (('s1', np.minimum(radar(rng, (256, 256)), 0)), ('s2', sentinel2(rng)), ('s2_cloudy', np.minimum(sentinel2(rng) + 2000, 9000).astype('uint16'))):
            tiff(root/f'{seed}_{season}_{kind}/{kind}_{roi}/{seed}_{season}_{kind}_{roi}_{p}.tif', values, compress='deflate', **here)
    return root
