"Public data sets, read from small copies in their true layout: every number, name and code where it belongs, and no place lost without a word."
import pickle
import random
import shutil
import subprocess
import sys
import warnings

import layouts
import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_mtl.core import IGNORE, AlignmentError, BandError, ConfigError, DataError, DatasetNotFoundError, LabelError
from rs_mtl.data import datasets
from rs_mtl.data.datasets import EERDS, LUOJIASET, POTSDAM, SEN12MSCR, TABLES, VAIHINGEN, WHU_OPT_SAR, list_data, open_data, open_dataset
from rs_mtl.data.grid import Source
from rs_mtl.data.layout import LayerTable, Table, find_places
from rs_mtl.data.splits import split_places
from rs_mtl.data.tables import folder_table, open_table
from rs_mtl.training.fit import evaluate, fit, fit_stats

pytestmark = pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning', 'ignore:.*known to be faulty', 'ignore:B10 of', 'ignore:.*places are left out', 'ignore:Use .@. matmul:PendingDeprecationWarning')


def stored(path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with rasterio.open(path) as src: return src.read()

def whole(data, place):
    "A place of a data set in one window."
    return data.scenes[data.places.index(place)].read()

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('public')
    for name in ('vaihingen', 'potsdam', 'whu_opt_sar', 'eerds', 'm3mcr', 'luojiaset', 'sen12mscr'): getattr(layouts, name)(folder/name)
    return folder

@pytest.fixture
def copy(root, tmp_path):
    "A copy of one data set that a test may spoil."
    def make(name):
        shutil.copytree(root/name, tmp_path/name)
        return tmp_path/name
    return make


# --- the constants themselves: fixtures are made from them, so no fixture would notice a slip ---

@pytest.mark.parametrize('table', TABLES.values(), ids=lambda t: t.name)
def test_constants_palettes_classes_and_codes(table):
    assert len(set(table.palette)) == len(table.palette) == len(table.classes) == len(set(table.classes))
    assert all(0 <= v <= 255 and isinstance(v, int) for c in table.palette for v in c)
    for layer in table.layers.values():
        to = {*(layer.codes or {}).values(), *(layer.colours or {}).values()}
        assert not to or to == {*range(len(table.classes)), IGNORE} or to == set(range(len(table.classes)))
        assert layer.bands == () or len(set(layer.bands)) == len(layer.bands) == (len(layer.index) or len(layer.bands))
    assert table.title and table.terms and table.notes

def test_fault_26_every_shipped_checksum_has_32_hex_digits():
    shipped = {archive: m for t in TABLES.values() for archive, m in t.md5.items()}
    assert len(shipped) == 3 and len(set(shipped.values())) == 3
    assert all(len(m) == 32 and set(m) <= set('0123456789abcdef') and a.endswith('.zip') for a, m in shipped.items())

@pytest.mark.parametrize('table', [VAIHINGEN, POTSDAM, WHU_OPT_SAR], ids=lambda t: t.name)
def test_constants_listed_splits_are_disjoint_and_the_official_ones_complete(table):
    everywhere = {p for ps in table.splits['official'].values() for p in ps}
    assert len(everywhere) == {'vaihingen': 33, 'potsdam': 38, 'whu_opt_sar': 100}[table.name]
    for name, splits in table.splits.items():
        lists = list(splits.values())
        assert len(set().union(*lists)) == sum(map(len, lists)), name
        assert set().union(*lists) <= everywhere

def test_constants_sen12mscr_names_ten_regions_for_validation_and_ten_for_testing():
    official = SEN12MSCR.splits['official']
    assert len(set(official['val'])) == len(set(official['test'])) == 10 and not set(official['val']) & set(official['test'])
    seeds = {'ROIs1158': 'spring', 'ROIs1868': 'summer', 'ROIs1970': 'fall', 'ROIs2017': 'winter'}
    assert all(seeds[r.split('_')[0]] == r.split('_')[1] and r.split('_')[2].isdigit() for s in ('val', 'test') for r in official[s])

def test_a_layer_of_a_table_takes_every_field_of_a_source():
    assert set(Source.__dataclass_fields__) - {'path'} <= set(LayerTable.__dataclass_fields__)

@pytest.mark.parametrize('name', [n for n in TABLES if n != 'eerds'])
def test_every_split_of_every_set_holds_other_places_whatever_the_seed(root, name):
    found = list(find_places(TABLES[name], root/name))
    for splits in TABLES[name].splits:
        parts = [p for s in ('train', 'val', 'test') if (name, splits) != ('luojiaset', 'random') for p in split_places(TABLES[name], found, s, splits)]
        assert len(set(parts)) == len(parts)
    a, b = (open_dataset(name, root/name, 'val', seed=s, partial=name == 'sen12mscr').places for s in (0, 7))
    assert a == b


# --- Vaihingen ---

def test_vaihingen_heights_are_decimetres_and_255_is_no_height(root):
    data = open_dataset('vaihingen', root/'vaihingen', 'train+val')
    grey = stored(root/'vaihingen/nDSM/dsm_09cm_matching_area5_normalized.jpg')[0]
    sample = whole(data, '5')
    assert (grey == 255).sum() > 30
    np.testing.assert_array_equal(sample['valid_height'][0], grey != 255)
    np.testing.assert_allclose(sample['height'][0], np.where(grey == 255, 0, grey/10), rtol=1e-5)
    assert 20 < sample['height'].max() < 25.5  # metres, not grey values and not shares

def test_vaihingen_bands_are_near_infrared_red_green_as_shares_of_255(root):
    data = open_dataset('vaihingen', root/'vaihingen')
    assert data.bands == ('near infrared', 'red', 'green') and data.gsd == .09
    place = data.places[0]
    np.testing.assert_allclose(whole(data, place)['image'], stored(root/f'vaihingen/top/top_mosaic_09cm_area{place}.tif')/np.float32(255), rtol=1e-6)

def test_vaihingen_official_split_and_the_other_one_in_circulation(root):
    parts = {s: open_dataset('vaihingen', root/'vaihingen', s, look=False).places for s in ('train', 'val', 'train+val', 'test')}
    assert [len(p) for p in parts.values()] == [14, 2, 16, 17]
    assert set(parts['train']) | set(parts['val']) == set(parts['train+val']) == set(VAIHINGEN.splits['official']['train'])
    assert open_dataset('vaihingen', root/'vaihingen', 'test', splits='12-4').places == ['5', '15', '21', '30']
    assert len(open_dataset('vaihingen', root/'vaihingen', splits='12-4', val=0).places) == 12

def test_vaihingen_palette_is_read_red_first_and_black_is_ignored(root):
    full, eroded = (open_dataset('vaihingen', root/'vaihingen', 'test', variants=v) for v in ((), 'eroded'))
    rgb = stored(root/'vaihingen/ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE/top_mosaic_09cm_area2.tif')
    mask, ring = whole(full, '2')['mask'].numpy(), whole(eroded, '2')['mask'].numpy()
    for i, colour in enumerate(VAIHINGEN.palette): assert ((rgb == np.array(colour)[:, None, None]).all(0) == (mask == i)).all() and (mask == i).any()
    assert VAIHINGEN.classes[mask[(rgb[0] == 255) & (rgb[1] == 255) & (rgb[2] == 0)][0]] == 'car'
    assert (ring == IGNORE).any() and (mask != IGNORE).all() and (mask[ring != IGNORE] == ring[ring != IGNORE]).all()
    assert not whole(eroded, '2')['valid_mask'][0][torch.from_numpy(ring == IGNORE)].any()

def test_vaihingen_labels_that_an_archive_unpacked_into_the_root_are_found(copy):
    folder = copy('vaihingen')
    for p in (folder/'ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE').iterdir(): p.rename(folder/p.name)
    assert len(open_dataset('vaihingen', folder, 'test').places) == 17

def test_vaihingen_without_the_heights_says_where_they_come_from_and_how_to_do_without(copy):
    folder = copy('vaihingen')
    shutil.rmtree(folder/'nDSM')
    with pytest.raises(DataError, match='lacks 14 files, of 14 among 14 places') as e: open_dataset('vaihingen', folder)
    assert 'Gerke' in str(e.value) and "layers=('image', 'mask')" in str(e.value)
    assert 'height' not in open_dataset('vaihingen', folder, layers=('image', 'mask'))[0]

def test_vaihingen_without_the_archive_of_test_labels_names_five_of_them(copy):
    folder = copy('vaihingen')
    shutil.rmtree(folder/'ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE')
    with pytest.raises(DataError, match='lacks 17 files') as e: open_dataset('vaihingen', folder, 'test')
    assert str(e.value).count('(mask)') == 5 and '_area2.tif' in str(e.value)
    assert len(open_dataset('vaihingen', folder, 'train')) == 14


# --- Potsdam ---

def test_potsdam_surface_models_with_two_digits_belong_to_pictures_with_one(root):
    data = open_dataset('potsdam', root/'potsdam', 'train+val')
    grey = stored(root/'potsdam/1_DSM_normalisation/dsm_potsdam_06_07_normalized_lastools.jpg')[0]
    sample = whole(data, '6_7')
    np.testing.assert_allclose(sample['height'][0][grey != 255], grey[grey != 255]/10, rtol=1e-5)
    np.testing.assert_allclose(sample['image'], stored(root/'potsdam/2_Ortho_RGB/top_potsdam_6_7_RGB.tif')/np.float32(255), rtol=1e-6)

def test_potsdam_tile_3_13_is_as_wide_as_its_surface_model_and_no_more_may_be_missing(root, copy):
    data = open_dataset('potsdam', root/'potsdam', 'test')
    shapes = {p: tuple(s.shape) for p, s in zip(data.places, data.scenes)}
    assert shapes.pop('3_13') == (40, 39) and set(shapes.values()) == {(40, 40)}
    np.testing.assert_allclose(whole(data, '3_13')['image'], stored(root/'potsdam/2_Ortho_RGB/top_potsdam_3_13_RGB.tif')[:, :, :39]/np.float32(255), rtol=1e-6)
    folder = copy('potsdam')
    path = folder/'1_DSM_normalisation/dsm_potsdam_05_13_normalized_lastools.jpg'
    layouts.jpeg(path, stored(path)[0][:, :30])
    with pytest.raises(AlignmentError, match='40x30'): open_dataset('potsdam', folder, 'test')

@pytest.mark.filterwarnings('default:.*known to be faulty')
def test_fault_17_potsdam_label_4_12_is_left_out_aloud_or_an_error_or_ignored_explicitly(root):
    with pytest.warns(UserWarning, match='4_12: its label holds colours') as said: data = open_dataset('potsdam', root/'potsdam', 'train+val')
    assert len(data.places) == 23 and len(said) == 1
    kept = open_dataset('potsdam', root/'potsdam', 'train+val', faulty='keep', look=False)
    with pytest.raises(LabelError) as e: whole(kept, '4_12')
    assert '(252, 255, 0) in 3 pixels' in str(e.value) and 'row 5, column 7' in str(e.value) and 'top_potsdam_4_12_label.tif' in str(e.value)
    mask = whole(open_dataset('potsdam', root/'potsdam', 'train+val', faulty='keep', variants='unknown colours ignored'), '4_12')['mask']
    assert (mask == IGNORE).sum() == 3 and (mask[5, 7:10] == IGNORE).all()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(open_dataset('potsdam', root/'potsdam', 'train+val', layers=('image', 'height')).places) == 24  # nothing is wrong with its picture

def test_potsdam_bands_of_the_three_pictures_and_the_fourth_is_no_transparency(root):
    rgb, irrg, rgbir = (open_dataset('potsdam', root/'potsdam', 'test', variants=v, layers=('image',)) for v in ((), 'irrg', 'rgbir'))
    assert (rgb.bands, irrg.bands, rgbir.bands) == (('red', 'green', 'blue'), ('near infrared', 'red', 'green'), ('red', 'green', 'blue', 'near infrared'))
    a, b, c = (whole(d, '2_13') for d in (rgb, irrg, rgbir))
    assert torch.equal(a['image'], c['image'][:3]) and torch.equal(b['image'], c['image'][[3, 0, 1]])
    assert c['valid_image'].all()

def test_potsdam_official_split_and_eroded_labels(root):
    assert len(open_dataset('potsdam', root/'potsdam', 'test', variants=('irrg', 'eroded')).places) == 14
    assert open_dataset('potsdam', root/'potsdam', 'test', splits='18-6').places == ['2_11', '3_10', '4_10', '5_11', '6_11', '7_12']
    mask = whole(open_dataset('potsdam', root/'potsdam', 'test', variants='eroded'), '2_13')['mask']
    assert (mask == IGNORE).any() and set(mask.unique().tolist()) == {*range(6), IGNORE}
    with pytest.raises(ConfigError, match="did you mean 'irrg'"): open_dataset('potsdam', root/'potsdam', variants='irgg')


# --- WHU-OPT-SAR and its unknown sister ---

def test_whu_codes_bands_and_radar(root):
    data = open_dataset('whu_opt_sar', root/'whu_opt_sar', 'test')
    assert data.bands == ('blue', 'green', 'red', 'near infrared') and len(data.sar_bands) == 1 and data.gsd == 5
    place = data.places[0]
    sample, codes = whole(data, place), stored(root/f'whu_opt_sar/lbl/{place}.tif')[0]
    assert sample['image'].shape[0] == 4 and sample['valid_image'].all()
    assert (sample['image'].mean((1, 2)).diff() > .1).all()  # blue is darkest in the fixture, near infrared brightest
    np.testing.assert_array_equal(sample['mask'], np.where(codes == 0, IGNORE, codes//10 - 1))
    np.testing.assert_allclose(sample['sar'], stored(root/f'whu_opt_sar/sar/{place}.tif')/np.float32(255), rtol=1e-6)

def test_whu_label_that_is_one_column_short(root):
    data = open_dataset('whu_opt_sar', root/'whu_opt_sar', 'train+val')
    assert {p for p, s in zip(data.places, data.scenes) if tuple(s.shape) == (24, 31)} == {'NH50E007004'}

def test_whu_splits_in_circulation_and_validation_by_rows_of_the_map_sheet(root):
    parts = {s: open_dataset('whu_opt_sar', root/'whu_opt_sar', s, look=False).places for s in ('train', 'val', 'test')}
    assert len(parts['train']) + len(parts['val']) == 80 and len(parts['test']) == 20
    assert not {p[:8] for p in parts['train']} & {p[:8] for p in parts['val']}
    assert len(open_dataset('whu_opt_sar', root/'whu_opt_sar', 'val', splits='blocks', look=False).places) == 20
    assert {p[:4] for p in open_dataset('whu_opt_sar', root/'whu_opt_sar', 'test', splits='sorted', look=False).places} == {'NI49', 'NH50'}

def test_fault_15_half_of_whu_is_no_data_set(copy):
    "One of its two download places had only half of the scenes."
    folder = copy('whu_opt_sar')
    for p in folder.glob('*/N[HI][45][09]*.tif'):
        if p.name[:4] != 'NH49': p.unlink()
    with pytest.raises(DataError) as e: open_dataset('whu_opt_sar', folder, 'test')
    assert 'lacks 9 files, of 3 among 20 places' in str(e.value) and 'NH50E007002' in str(e.value) and str(e.value).count('.tif') == 5
    with pytest.warns(UserWarning, match='3 of 20 places are left out'): assert len(open_dataset('whu_opt_sar', folder, 'test', partial=True).places) == 17

def test_whu_code_that_is_no_class(copy):
    folder = copy('whu_opt_sar')
    path = folder/'lbl/NH49E001014.tif'
    codes = stored(path)
    codes[0, 3, 4] = 80
    layouts.tiff(path, codes)
    with pytest.raises(LabelError, match='80 in 1 pixel'): open_dataset('whu_opt_sar', folder, 'test')

def test_eerds_is_a_frame_that_says_what_is_missing(root):
    with pytest.raises(ConfigError, match=r'classes of eerds are not known') as e: open_dataset('eerds', root/'eerds')
    assert 'table.changed(' in str(e.value)
    with pytest.raises(DataError, match='declares no scale'): open_dataset('eerds', root/'eerds', layers=('image', 'sar'))
    filled = EERDS.changed(classes=('water', 'crops', 'town'), mask={'codes': {1: 0, 2: 1, 3: 2}}, image={'scale': 1/255}, sar={'scale': 1/255, 'limits': (0, 1)})
    data = open_dataset(filled, root/'eerds', 'test', crop=24)
    assert data.places == ['4'] and set(data[0]['mask'].unique().tolist()) <= {0, 1, 2, IGNORE} and len(data.classes) == 3


# --- clouds ---

def test_m3mcr_has_two_grids_and_windows_start_where_both_have_whole_pixels(root):
    data = open_dataset('m3mcr', root/'m3mcr', crop=160, n=20)
    shapes = {k: tuple(v.shape) for k, v in data[0].items() if not k.startswith('valid_')}
    assert shapes == {'image': (4, 160, 160), 'clear': (4, 160, 160), 'sar': (2, 48, 48), 'mask': (48, 48), 'cloud_impact': (1, 160, 160)}
    starts = {data.where(i)[1:] for i in range(20)}
    assert len(starts) > 5 and all(r % 10 == c % 10 == 0 for r, c in starts)
    for i in range(3):
        place, row, col = data.where(i)
        part, name = place.split('/')
        season, roi, _, p = name.split('_')
        db = stored(root/f'm3mcr/{part}/S1_{season}/S1_{season}_{roi}/S1_{season}_{roi}_p_{p}.tif')[:, row*3//10:row*3//10 + 48, col*3//10:col*3//10 + 48]
        np.testing.assert_allclose(data[i]['sar'], db, rtol=1e-5)
    with pytest.raises(ConfigError, match='take size=160'): open_dataset('m3mcr', root/'m3mcr', crop=155)

def test_m3mcr_nodata_of_worldcover_is_not_forest_and_unknown_is_no_class(root):
    sample = whole(open_dataset('m3mcr', root/'m3mcr', 'test'), 'test/summer_33_p_1')
    codes = stored(root/'m3mcr/test/landcover_summer/landcover_summer_33/landcover_summer_33_p_1.tif')[0]
    merged = {10: 0, 20: 1, 30: 1, 40: 2, 50: 3, 60: 4, 80: 5, 90: 5}
    np.testing.assert_array_equal(sample['mask'], np.vectorize(lambda c: merged.get(c, IGNORE))(codes))
    assert (codes == 0).any() and (codes == 70).any() and sample['mask'].max() == IGNORE and sample['mask'][sample['mask'] != IGNORE].max() == 5

def test_m3mcr_cloud_mask_from_a_numpy_file_and_nodata_of_pictures(root):
    data = open_dataset('m3mcr', root/'m3mcr', 'test')
    sample = whole(data, 'test/summer_33_p_1')
    cloud = np.load(root/'m3mcr/test/cloudmask_summer/cloudmask_summer_33/cloudmask_summer_33_p_1.npy')
    np.testing.assert_array_equal(sample['cloud_impact'][0], cloud)
    assert not sample['valid_clear'][0, :2, :5].any() and sample['valid_clear'].float().mean() > .999
    assert torch.equal(sample['image'][:, ~torch.from_numpy(cloud)], sample['clear'][:, ~torch.from_numpy(cloud)])
    assert abs(sample['image'].max().item() - .7) < 1e-6

def test_m3mcr_on_one_grid_repeats_pixels_under_the_centres(root):
    native, one = (open_dataset('m3mcr', root/'m3mcr', 'test', one_grid=g)[0] for g in (False, True))
    assert one['sar'].shape == (2, 300, 300) and one['mask'].shape == (300, 300) and one['valid_sar'].shape == (1, 300, 300)
    under = ((torch.arange(300) + .5)*.3).long()
    assert torch.equal(one['mask'], native['mask'][under][:, under]) and torch.equal(one['image'], native['image'])
    assert one['mask'].unique().tolist() == native['mask'].unique().tolist()

def test_a_torn_or_pickled_numpy_mask_is_an_error_with_its_path(copy):
    folder = copy('m3mcr')
    path = folder/'test/cloudmask_summer/cloudmask_summer_33/cloudmask_summer_33_p_1.npy'
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match='summer_33_p_1.npy'): open_dataset('m3mcr', folder, 'test')
    np.save(path, np.array([{'a': 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match='no NumPy array'): open_dataset('m3mcr', folder, 'test')

def test_luojiaset_offset_is_found_and_a_declared_one_wins(root, tmp_path):
    raw = stored(root/'luojiaset/0-20%/s2/ROIs_01_s2_p4.tif')
    found = whole(open_dataset('luojiaset', root/'luojiaset'), '0-20%/01_p4')
    np.testing.assert_allclose(found['clear'], (raw.astype('float64') - 1000)/1e4, atol=1e-6)
    none = open_dataset(LUOJIASET.changed(clear={'offset': 0.}, image={'offset': 0.}), root/'luojiaset')
    np.testing.assert_allclose(whole(none, '0-20%/01_p4')['clear'], raw/1e4, atol=1e-6)
    clean = layouts.luojiaset(tmp_path/'clean', offset=0)
    np.testing.assert_allclose(whole(open_dataset('luojiaset', clean), '0-20%/01_p4')['clear'], stored(clean/'0-20%/s2/ROIs_01_s2_p4.tif')/1e4, atol=1e-6)
    with pytest.raises(DataError, match='holds -0.0'): open_dataset(LUOJIASET.changed(clear={'offset': -.1}), clean)  # taken off where it never was

@pytest.mark.filterwarnings('default:B10 of')
def test_luojiaset_detection_says_what_it_saw_and_does_not_guess(root, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, '_TOLD', set())
    with pytest.warns(UserWarning, match=r'B10 of .* first percentile of 10\d\d .* 1000 is taken off'): open_dataset('luojiaset', root/'luojiaset')
    with pytest.raises(DataError, match='declare it'): open_dataset('luojiaset', layouts.luojiaset(tmp_path/'odd', offset=700))

def test_luojiaset_regions_are_never_torn_and_the_published_draw_can_be_repeated(root, tmp_path):
    parts = {s: open_dataset('luojiaset', root/'luojiaset', s).places for s in ('train', 'val', 'test')}
    assert parts == {'train': ['0-20%/01_p4', '0-20%/02_p1'], 'val': ['80%-100%/10_p23'], 'test': ['20%-40%/05_p3', '40%-60%/08_p2']}
    names = [f'{c}/{r:02}_p{i}' for c in ('0-20%', '20%-40%', '40%-60%', '60%-80%', '80%-100%') for r in (1, 3) for i in range(1, 24)]
    drawn, rng = {'train': [], 'val': [], 'test': []}, random.Random(42)
    for c in ('0-20%', '20%-40%', '40%-60%', '60%-80%', '80%-100%'):  # the rule as published: files by name, one generator, 80/10/10 in each folder
        files = sorted(f"ROIs_{p.split('/')[1].split('_')[0]}_s2_{p.split('_')[1]}.tif" for p in names if p.startswith(f'{c}/'))
        rng.shuffle(files)
        for k, part in (('train', files[:36]), ('val', files[36:40]), ('test', files[40:])): drawn[k] += [f"{c}/{f.split('_')[1]}_{f.split('_')[3][:-4]}" for f in part]
    for k in drawn: assert set(split_places(LUOJIASET, names, k, 'random')) == set(drawn[k])

def test_luojiaset_radar_whose_corner_is_off_is_read_pixel_by_pixel_and_copies_are_noticed(root, copy):
    sample = whole(open_dataset('luojiaset', root/'luojiaset'), '0-20%/02_p1')
    np.testing.assert_allclose(sample['sar'], stored(root/'luojiaset/0-20%/s1/ROIs_02_s1_p1.tif'), rtol=1e-6)
    folder = copy('luojiaset')
    shutil.copy(folder/'20%-40%/s2/ROIs_05_s2_p3.tif', folder/'20%-40%/s2_cloudy/ROIs_05_s2_cloudy_p3.tif')
    with pytest.warns(UserWarning, match='hold the same pixels'): open_dataset('luojiaset', folder, 'test')

def test_a_patch_of_another_size_is_an_error(copy):
    folder = copy('luojiaset')
    for p in folder.glob('20%-40%/*/*.tif'): layouts.tiff(p, stored(p)[:, :200])
    with pytest.raises(DataError, match='200x256 pixels'): open_dataset('luojiaset', folder, 'test')

def test_sen12mscr_official_regions_and_clipping_that_was_asked_for(root):
    parts = {s: open_dataset('sen12mscr', root/'sen12mscr', s, partial=True).places for s in ('train', 'val', 'test')}
    assert parts == {'train': ['ROIs1158_spring_1_p407', 'ROIs1970_fall_3_p1', 'ROIs2017_winter_112_p797'], 'val': ['ROIs1158_spring_17_p30'], 'test': ['ROIs1970_fall_139_p839']}
    plain, clipped = (whole(open_dataset('sen12mscr', root/'sen12mscr', 'test', variants=v, partial=True), 'ROIs1970_fall_139_p839') for v in ((), 'clipped at -25 dB'))
    raw = stored(root/'sen12mscr/ROIs1970_fall_s1/s1_139/ROIs1970_fall_s1_139_p839.tif')
    assert raw.min() < -25
    np.testing.assert_allclose(plain['sar'], raw, rtol=1e-6)
    np.testing.assert_allclose(clipped['sar'], raw.clip(-25, 0), rtol=1e-6)
    assert plain['image'].max() < 1 and clipped['image'].max() <= 1 and plain['clear'].shape == (13, 256, 256)

@pytest.mark.parametrize('variant', [(), 'clipped', 'clipped at -25 dB'], ids=str)
def test_fault_14_radar_in_linear_power_is_refused_clipped_or_not(copy, variant):
    folder = copy('sen12mscr')
    for p in folder.glob('*_s1/*/*.tif'):
        with rasterio.open(p, 'r+') as src: src.write(10**(src.read()/10))
    with pytest.raises(BandError, match='no negative value'): open_dataset('sen12mscr', folder, variants=variant)


# --- missing, misplaced, mispaired ---

@pytest.mark.parametrize('name', [n for n in TABLES if n != 'eerds'])
def test_fault_24_a_root_that_is_not_there_draws_the_tree_and_names_the_folder_where_it_begins(root, tmp_path, name):
    inside = next(p for p in sorted((root/name).iterdir()) if p.is_dir())
    for wrong, said in ((tmp_path/'nowhere', 'there is no such folder'), (tmp_path, 'it holds nothing'), (root/name/'README', 'there is no such folder')):
        with pytest.raises(DatasetNotFoundError, match=said) as e: open_dataset(name, wrong)
        assert '<root>/' in str(e.value) and all(n in str(e.value) for n in TABLES[name].layers)
    (tmp_path/'outer').symlink_to(root)
    (tmp_path/'deeper').mkdir()
    (tmp_path/'deeper'/'unzipped').symlink_to(root/name)
    with pytest.raises(DatasetNotFoundError) as e: open_dataset(name, tmp_path/'deeper')
    assert f"use root='{tmp_path/'deeper'/'unzipped'}'" in str(e.value) and 'unzipped/' in str(e.value)
    with pytest.raises(DatasetNotFoundError) as e: open_dataset(name, inside)
    assert f"use root='{root/name}'" in str(e.value)
    (tmp_path/'file').write_text('x')
    with pytest.raises(DatasetNotFoundError, match='that is a file'): open_dataset(name, tmp_path/'file')
    with pytest.raises(ConfigError, match='no folder was named'): open_dataset(name)

def test_fault_15_a_missing_partner_is_named_and_never_a_shorter_data_set(copy):
    folder = copy('sen12mscr')
    for p in ('ROIs1970_fall_s1/s1_3/ROIs1970_fall_s1_3_p1.tif', 'ROIs1158_spring_s2/s2_1/ROIs1158_spring_s2_1_p407.tif'): (folder/p).unlink()
    with pytest.raises(DataError) as e: open_dataset('sen12mscr', folder)
    assert 'lacks 2 files, of 2 among 3 places' in str(e.value) and 'ROIs1970_fall_s1_3_p1.tif (sar)' in str(e.value) and 'ROIs1158_spring_s2_1_p407.tif (clear)' in str(e.value)
    with pytest.raises(DataError, match='of 9 among 10 places: all of ROIs1158_spring_31, all of ROIs1158_spring_44'): open_dataset('sen12mscr', folder, 'test')  # whole regions
    assert len(open_dataset('sen12mscr', folder, 'test', partial=True).places) == 1
    (folder/'ROIs2017_winter_s2_cloudy/s2_cloudy_112/ROIs2017_winter_s2_cloudy_112_p797.tif').unlink()
    with pytest.raises(DataError, match='cloudy_112_p797.tif'): open_dataset('sen12mscr', folder)  # the place is known by its radar

def test_fault_15_files_are_paired_by_name_and_not_by_order(tmp_path):
    rng = np.random.default_rng(0)
    for i, name in enumerate(['a', 'b', 'c']):
        layouts.tiff(tmp_path/f'img/{name}.tif', np.full((3, 16, 16), 10*i + 10, 'uint8'))
        layouts.tiff(tmp_path/f'lab/{name}_label.tif', np.full((16, 16), i, 'uint8'))
    layouts.tiff(tmp_path/'img/.a.tif', rng.integers(0, 9, (3, 16, 16), dtype='uint8'))
    table = folder_table({'image': 'img/{place}.tif', 'mask': 'lab/{place}_label.tif'}, classes=('x', 'y', 'z'), scales={'image': 1/255}, splits={'train': 'rest'}, val=0)
    data = open_table(table, tmp_path, crop=16, grid=True)
    assert [(round(data[i]['image'].max().item()*255), data[i]['mask'].unique().tolist()) for i in range(3)] == [(10, [0]), (20, [1]), (30, [2])]
    layouts.tiff(tmp_path/'img/d.tif', np.full((3, 16, 16), 1, 'uint8'))
    with pytest.raises(DataError, match=r'lab/d_label.tif \(mask\)'): open_table(table, tmp_path)
    (tmp_path/'img/d.tif').rename(tmp_path/'lab/d_label.tif')
    with pytest.raises(DataError, match=r'img/d.tif \(image\)'): open_table(table, tmp_path)

def test_names_of_sets_splits_layers_and_arguments_are_checked(root):
    for call, said in ((lambda: open_dataset('vaihingenn', root), "did you mean 'vaihingen'"), (lambda: open_dataset('vaihingen', root/'vaihingen', 'validation'), 'one of train, test, val'),
                       (lambda: open_dataset('vaihingen', root/'vaihingen', splits='offical'), "did you mean 'official'"), (lambda: open_dataset('vaihingen', root/'vaihingen', layers=('image', 'sar')), "no layer 'sar'"),
                       (lambda: open_dataset('vaihingen', root/'vaihingen', crops=3), "did you mean 'crop'"), (lambda: open_dataset('vaihingen', root/'vaihingen', faulty='no'), "'drop' or 'keep'")):
        with pytest.raises(ConfigError) as e: call()
        assert said in str(e.value)
    assert {'city', 'land', *TABLES} == set(list_data())


# --- a folder of one's own ---

@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(1, 13): layouts.tiff(tmp_path/f'img/t{i}.tif', rng.integers(0, 255, (3, 20, 20), dtype='uint8'))
    return tmp_path

def mine(**kwargs): return folder_table({'image': 'img/{place}.tif'}, scales={'image': 1/255}, **kwargs)

def test_own_folder_by_rule_list_wildcard_and_text_file(folder):
    assert open_table(mine(), folder, 'test').places == ['t5', 't10']
    assert len(open_table(mine(), folder, 'train+val').places) == 10
    (folder/'test.txt').write_text('# held out\nimg/t3.tif\nt12\n')
    for rule in (['t3', 't12'], 'test.txt', folder/'test.txt', ['t3', 't1[2]*']):
        assert open_table(mine(), folder, 'test', splits={'train': 'rest', 'test': rule}).places == ['t3', 't12']
    for rule, error, said in ((['t3', 't99'], DataError, 'img/t99.tif'), ('gone.txt', DatasetNotFoundError, 'gone.txt'), ('every fifth', ConfigError, 'every 5th')):
        with pytest.raises(error, match=said): open_table(mine(), folder, 'test', splits={'train': 'rest', 'test': rule})
    with pytest.raises(ConfigError, match='t5 of folder is in'): open_table(mine(), folder, 'test', splits={'test': 'every 5th', 'train': ['t5']})

def test_own_folder_bands_from_several_files_are_stacked(tmp_path):
    for i, band in enumerate(('B4', 'B3', 'B8')): layouts.tiff(tmp_path/f'{band}/p_{band}.tif', np.full((12, 12), 100*i + 100, 'uint16'))
    table = folder_table({'image': ('B4/{place}_B4.tif', 'B3/{place}_B3.tif', 'B8/{place}_B8.tif')}, scales={'image': 1e-4}, splits={'train': 'rest'}, val=0)
    torch.testing.assert_close(open_table(table, tmp_path, crop=12)[0]['image'][:, 0, 0], torch.tensor([.01, .02, .03]))
    (tmp_path/'B8/p_B8.tif').unlink()
    with pytest.raises(DataError, match='B8/p_B8.tif'): open_table(table, tmp_path)

def test_a_validation_part_needs_two_regions_and_is_cut_by_region(folder):
    table = mine(splits={'train': ['t1'], 'test': 'rest'})
    assert open_table(table, folder).places == ['t1']
    with pytest.raises(DataError, match='needs two regions'): open_table(table, folder, 'val')
    by_ten = Table('tens', {'image': LayerTable('img/t{place}.tif', scale=1/255)}, region='{place}')
    assert len(open_table(by_ten, folder, 'val', val=('3', '4')).places) == 2

@given(st.sets(st.integers(1, 400), min_size=3, max_size=60), st.integers(1, 5), st.floats(.01, .6))
@settings(max_examples=60, deadline=None)
def test_property_splits_are_disjoint_complete_and_never_tear_a_region(numbers, width, share):
    places = [f'{n//width}_{n % width}' for n in numbers]
    table = Table('t', {'image': LayerTable('{a}_{b}.tif')}, place='{a}_{b}', region='{a}', splits={'s': {'train': 'rest', 'test': 'every 4th'}})
    parts = {}
    for s in ('train', 'val', 'test'):
        try: parts[s] = split_places(table, places, s, val=share)
        except DataError: parts[s] = []
    assert sorted(p for ps in parts.values() for p in ps) == sorted(places)
    regions = [{p.split('_')[0] for p in ps} for ps in parts.values()]
    assert len(set().union(*regions)) == sum(map(len, regions))


# --- as a data set ---

@pytest.mark.parametrize('crop', [16, 23, 40, 64])
def test_evaluation_scores_every_pixel_once_and_padding_never(root, crop):
    data = open_dataset('potsdam', root/'potsdam', 'test', crop=crop)
    known = sum((whole(data, p)['mask'] != IGNORE).sum().item() for p in data.places)
    assert sum((data[i]['mask'] != IGNORE).sum().item() for i in range(len(data))) == known == 14*40*40 - 40

def test_random_windows_differ_by_epoch_and_repeat_by_seed_in_other_processes_too(root):
    data = open_dataset('vaihingen', root/'vaihingen', crop=16, n=12, seed=3)
    first = [data.where(i) for i in range(12)]
    again = pickle.loads(pickle.dumps(open_dataset('vaihingen', root/'vaihingen', crop=16, n=12, seed=3)))
    assert first == [again.where(i) for i in range(12)] and torch.equal(data[5]['image'], again[5]['image'])
    data.set_epoch(1)
    assert first != [data.where(i) for i in range(12)]
    assert first != [open_dataset('vaihingen', root/'vaihingen', crop=16, n=12, seed=4).where(i) for i in range(12)]
    loader = torch.utils.data.DataLoader(again, batch_size=4, num_workers=2)
    assert torch.equal(torch.cat([b['image'] for b in loader]), torch.stack([again[i]['image'] for i in range(12)]))

def test_n_of_an_evaluation_is_a_part_of_the_grid_spread_over_all_places(root):
    data = open_dataset('vaihingen', root/'vaihingen', 'test', crop=16, n=17)
    assert len(data) == 17 and len({data.where(i)[0] for i in range(17)}) >= 12

def test_worlds_open_by_the_same_door_and_need_no_root():
    assert open_dataset('city', split='test', crop=32, n=2)[0]['image'].shape[-1] == 32
    assert torch.equal(open_dataset('land', 'ignored', 'val', crop=32, n=1)[0]['sar'], open_data('land', 'val', n=1, size=32)[0]['sar'])

def test_patches_of_one_size_are_listed_without_opening_any(tmp_path, monkeypatch):
    "There may be a hundred thousand; the table knows bands and size, so a plan of windows needs no file."
    for kind in ('s1', 's2', 's2_cloudy'):
        for roi in range(1, 5):
            (tmp_path/f'ROIs1158_spring_{kind}/{kind}_{roi}').mkdir(parents=True)
            for p in range(100): (tmp_path/f'ROIs1158_spring_{kind}/{kind}_{roi}/ROIs1158_spring_{kind}_{roi}_p{p}.tif').touch()
    def opened(*args, **kwargs): raise AssertionError(f'{args[0]} was opened')
    monkeypatch.setattr(rasterio, 'open', opened)
    data = open_dataset('sen12mscr', tmp_path, 'train+val', splits={'train': 'rest'}, look=False)
    assert len(data) == len(data.places) == 400 and data.bands == datasets.S2_BANDS
    with pytest.raises(AssertionError, match='was opened'): data[0]


# --- nets learn from it ---

@pytest.fixture(scope='module')
def small_net():
    from rs_mtl.core import create_model
    def make(data, tasks):
        torch.manual_seed(0)
        return create_model('plain', bands=len(data.bands), sar_bands=len(data.sar_bands), classes=len(data.classes), tasks=tasks, encoder='mobilenetv3_small_050')
    return make

def test_two_steps_on_vaihingen_with_statistics_of_its_training_part(root, small_net):
    data = open_dataset('vaihingen', root/'vaihingen', crop=32, n=4)
    mean, std = fit_stats(data)['image']
    assert all(.3 < m < .7 for m in mean) and all(.2 < s < .4 for s in std)  # bytes that are spread evenly, as shares of 255
    net = small_net(data, ('mask', 'height'))
    run = fit(net, data, steps=2, batch_size=2, epochs=1)
    assert run.step == 2 and net.meta['scaling']['height']['scale'] == .1 and net.meta['data'] == 'vaihingen' and net.meta['gsd'] == .09
    scores = evaluate(net, open_dataset('vaihingen', root/'vaihingen', 'test', crop=32, n=4))['values']
    assert 0 <= scores['miou'] <= 1 and scores['height_mae'] > 0

def test_two_steps_on_m3mcr_with_radar_and_labels_brought_to_one_grid(root, small_net):
    data = open_dataset('m3mcr', root/'m3mcr', crop=160, n=4, layers=('image', 'sar', 'mask'), one_grid=True)
    net = small_net(data, ('mask',))
    assert fit(net, data, steps=2, batch_size=2, epochs=1).step == 2
    assert net.meta['scaling']['sar'] == {'unit': 'dB'} and net.meta['bands'] == ['blue', 'green', 'red', 'near infrared']

def command(*argv):
    return subprocess.run([sys.executable, '-c', 'import sys; from rs_mtl.apply.cli import main; sys.exit(main())', *map(str, argv)], capture_output=True, text=True, timeout=100)

def test_command_line_trains_on_a_public_set_and_says_at_once_where_it_is_not(root, tmp_path):
    said = command('train', 'plain', '--data', 'vaihingen', '--root', root, '--quick', '--out', tmp_path/'wrong', '--encoder', 'mobilenetv3_small_050')
    assert said.returncode == 1 and f"use root='{root/'vaihingen'}'" in said.stderr and 'Traceback' not in said.stderr
    assert not (tmp_path/'wrong'/'figures').exists()  # before anything was drawn or trained
    said = command('train', 'plain', '--data', 'vaihinge', '--root', root, '--quick', '--out', tmp_path/'wrong')
    assert said.returncode == 1 and "did you mean 'vaihingen'" in said.stderr
    said = command('train', 'plain', '--data', 'm3mcr', '--root', root/'m3mcr', '--inputs', 'image,sar', '--quick', '--size', 100, '--out', tmp_path/'run', '--encoder', 'mobilenetv3_small_050')
    assert said.returncode == 0, said.stderr
    said = command('evaluate', tmp_path/'run', '--root', root/'m3mcr', '--size', 100)
    assert said.returncode == 0 and 'evaluate: mIoU' in said.stdout, said.stderr
