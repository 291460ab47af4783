"Archives: nothing evil, torn or oversized leaves a trace; what is good arrives whole, even if the process is killed."
import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rs_mtl.core import ConfigError, DataError, DatasetNotFoundError, RsMtlError
from rs_mtl.data.archives import check_md5, extract, inside, md5sum, open_archive, plan, whole_folder

FILES = {'top/image/1.tif': bytes(range(256))*40, 'top/image/2.tif': b'', 'top/labels/1.tif': b'\0'*3000, 'top/ü ö.txt': 'Grüße'.encode()}
PACKERS = {'zip': None, 'tar': open, 'tar.gz': gzip.open, 'tar.bz2': bz2.open, 'tar.xz': lzma.open}


def tar_of(*entries, fmt=tarfile.PAX_FORMAT) -> bytes:
    "A tar from (name, content) or TarInfo objects."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=fmt) as tar:
        for entry in entries:
            info, data = (entry, b'') if isinstance(entry, tarfile.TarInfo) else (tarfile.TarInfo(entry[0]), entry[1])
            if data: info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if data else None)
    return out.getvalue()


def special(name: str, kind: bytes, link: str = '') -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_of(*entries, method=zipfile.ZIP_DEFLATED) -> bytes:
    "A zip from (name or ZipInfo, content)."
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # zipfile warns of duplicate names
        with zipfile.ZipFile(out, 'w', method) as z:
            for name, data in entries: z.writestr(name, data)
    return out.getvalue()


def zip_entry(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def pack(path: Path, kind: str, files=FILES) -> Path:
    if kind == 'zip': path.write_bytes(zip_of(*files.items()))
    else:
        with PACKERS[kind](path, 'wb') as f: f.write(tar_of(*files.items()))
    return path


def content(folder: Path) -> dict:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def refused(tmp: Path, data: bytes, words: str, **how) -> None:
    "Extraction raises, and the disk is as it was."
    room = tmp/'room'
    (room/'deep').mkdir(parents=True, exist_ok=True)
    path = room/'archive'
    path.write_bytes(data)
    before = sorted(tmp.rglob('*'))
    with pytest.raises(DataError, match=words) as e: extract(path, room/'deep'/'set', **how)
    assert e.value.expected and e.value.todo and 'archive' in str(e.value)
    assert sorted(tmp.rglob('*')) == before


# -- good archives --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', PACKERS)
def test_what_is_good_arrives_whole_whatever_the_file_is_called(tmp_path, kind):
    path = pack(tmp_path/'download', kind)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    assert md5sum(path) == md5
    assert extract(path, tmp_path/'a'/'set', md5=md5.upper()) == tmp_path/'a'/'set'
    assert content(tmp_path/'a'/'set') == FILES and os.listdir(tmp_path/'a') == ['set']
    with open_archive(path) as archive: assert {m.name: m.size for m in plan(archive)} == {k: len(v) for k, v in FILES.items()}


@pytest.mark.parametrize('fmt', [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_dots_folders_and_long_names_are_taken(tmp_path, fmt):
    long = 'x'*90 + '/' + 'y'*80
    (tmp_path/'a').write_bytes(tar_of(special('.', tarfile.DIRTYPE), special('./empty', tarfile.DIRTYPE), ('./one.txt', b'1'), (long, b'2'), fmt=fmt))
    extract(tmp_path/'a', tmp_path/'set')
    assert content(tmp_path/'set') == {'one.txt': b'1', long: b'2'} and (tmp_path/'set'/'empty').is_dir()


def test_an_empty_folder_may_be_filled_and_a_full_one_may_not(tmp_path):
    path = pack(tmp_path/'a.zip', 'zip')
    (tmp_path/'empty').mkdir()
    extract(path, tmp_path/'empty')
    for occupied in (tmp_path/'empty', path):
        with pytest.raises(DataError, match='already exists'): extract(path, occupied)
    assert content(tmp_path/'empty') == FILES
    (tmp_path/'link').symlink_to(tmp_path/'elsewhere')
    with pytest.raises(DataError, match='already exists'): extract(path, tmp_path/'link')


def test_links_between_files_become_copies_that_stand_alone(tmp_path):
    (tmp_path/'a').write_bytes(tar_of(special('top/early', tarfile.SYMTYPE, 'data/1'), ('top/data/1', b'one'), special('top/data/hard', tarfile.LNKTYPE, 'top/data/1'), special('top/data/up', tarfile.SYMTYPE, '../data/1')))
    extract(tmp_path/'a', tmp_path/'set')
    assert content(tmp_path/'set') == dict.fromkeys(('top/early', 'top/data/1', 'top/data/hard', 'top/data/up'), b'one')
    assert all(not p.is_symlink() and p.stat().st_nlink == 1 for p in (tmp_path/'set').rglob('*') if p.is_file())


def test_files_get_the_permissions_of_new_files(tmp_path):
    info = tarfile.TarInfo('run')
    info.mode, info.uid, info.size = 0o6777, 1234, 0
    (tmp_path/'a').write_bytes(tar_of(info))
    extract(tmp_path/'a', tmp_path/'set')
    (tmp_path/'plain').write_bytes(b'')
    assert stat.S_IMODE((tmp_path/'set'/'run').stat().st_mode) == stat.S_IMODE((tmp_path/'plain').stat().st_mode) and (tmp_path/'set'/'run').stat().st_uid == os.getuid()


# -- fault 25: archives that write elsewhere ----------------------------------------------------------------------------------------

NAMES = {'../evil': 'leads outside', 'a/../../evil': 'leads outside', 'a/..': 'leads outside', '/HERE/evil': 'absolute', '//x/y': 'absolute', 'C:/evil': 'absolute', 'c:evil': 'absolute', '..\\evil': 'backslash', 'a\\b': 'backslash',
         'bell\a.tif': 'control', 'line\nbreak': 'control', 'é'*200: 'longer than 255'}


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('kind', ['tar', 'zip'])
def test_fault_25_a_name_that_leads_outside_is_refused_before_anything_is_written(tmp_path, kind, name):
    entries = (('good.txt', b'1'), (name.replace('/HERE', str(tmp_path)), b'evil'))
    refused(tmp_path, tar_of(*entries) if kind == 'tar' else zip_of(*entries), NAMES[name])


@pytest.mark.parametrize(('entry', 'words'), [
    (special('l', tarfile.SYMTYPE, '../outside'), 'leads outside'), (special('l', tarfile.SYMTYPE, '/etc/passwd'), 'leads outside'), (special('a/l', tarfile.SYMTYPE, '../../x'), 'leads outside'), (special('l', tarfile.LNKTYPE, '../x'), 'leads outside'),
    (special('l', tarfile.LNKTYPE, '/etc/passwd'), 'leads outside'), (special('l', tarfile.SYMTYPE, 'nowhere'), "leads to 'nowhere'"), (special('l', tarfile.SYMTYPE, 'l'), "leads to 'l'"), (special('l', tarfile.SYMTYPE, '.'), "leads to '.'"),
    (special('d', tarfile.CHRTYPE), 'a device or a pipe'), (special('d', tarfile.BLKTYPE), 'a device or a pipe'), (special('d', tarfile.FIFOTYPE), 'a device or a pipe')])
def test_fault_25_links_to_elsewhere_and_devices_are_refused(tmp_path, entry, words):
    refused(tmp_path, tar_of(('good.txt', b'1'), entry), words)


def test_fault_25_a_file_through_a_link_is_refused_even_if_the_link_stays_inside(tmp_path):
    refused(tmp_path, tar_of(('real/x', b'1'), special('l', tarfile.SYMTYPE, 'real/x'), ('l/y', b'2')), 'as a file and as a folder')
    refused(tmp_path, tar_of(special('l', tarfile.SYMTYPE, 'real'), ('real/x', b'1'), ('l', b'2')), "'l' twice")


@pytest.mark.parametrize('mode', [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_fault_25_links_and_devices_in_a_zip_are_refused(tmp_path, mode):
    refused(tmp_path, zip_of(('good.txt', b'1'), (zip_entry('l', mode | 0o777), '/etc/passwd')), 'a link or a device')


@pytest.mark.parametrize('make', [tar_of, zip_of])
def test_fault_25_a_name_twice_or_a_file_in_the_place_of_a_folder_is_refused(tmp_path, make):
    refused(tmp_path, make(('a.txt', b'first'), ('b', b'x'), ('a.txt', b'second')), "'a.txt' twice")
    refused(tmp_path, make(('./a.txt', b'first'), ('a.txt', b'second')), "'a.txt' twice")
    refused(tmp_path, make(('a', b'file'), ('a/b', b'below')), 'as a file and as a folder')
    refused(tmp_path, make(('a/b/c', b'below'), ('a', b'file')), 'as a file and as a folder')


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.sampled_from('ab./\\:~ \0\n-é'), max_size=12))
def test_fault_25_no_name_that_is_taken_leads_outside(tmp_path, name):
    try: taken = inside(name, Path('a.zip'))
    except DataError: return
    root = tmp_path/'set'
    assert os.path.normpath(root/taken) == str(root/taken) and Path(os.path.normpath(root/taken)).is_relative_to(root)
    assert '\\' not in taken and '\0' not in taken


# -- fault 25: bombs ------------------------------------------------------------------------------------------------------------------

def test_fault_25_a_bomb_is_known_by_its_ratio_and_by_the_budget(tmp_path):
    zeros = bytes(70 << 20)
    for data in (zip_of(('zeros', zeros)), gzip.compress(tar_of(('zeros', zeros)), 9)):
        refused(tmp_path, data, 'more than 200 times its size')
        refused(tmp_path, data, 'or more\n  expected: at most 1,000', ratio=10_000, budget=1000)
    refused(tmp_path, tar_of(*((f'{i}', b'') for i in range(30))), 'more than 20 members', count=20)
    refused(tmp_path, tar_of(('a', b'x'*600), special('b', tarfile.LNKTYPE, 'a'), special('c', tarfile.LNKTYPE, 'a')), 'with copies for its links', budget=1500)
    with pytest.raises(ConfigError): extract(tmp_path/'x', tmp_path/'y', ratio=0)


def test_fault_25_a_bomb_of_a_terabyte_is_not_walked_to_its_end(tmp_path):
    info = tarfile.TarInfo('huge')
    info.size = 1 << 40
    head = info.tobuf(tarfile.GNU_FORMAT)
    start = time.perf_counter()
    refused(tmp_path, gzip.compress(head + bytes(1 << 20)), 'more than 200 times')
    assert time.perf_counter() - start < 2


def test_fault_25_a_header_that_asks_for_gigabytes_of_memory_is_refused(tmp_path):
    info = special('pax', tarfile.XHDTYPE)
    info.size = 8 << 30
    refused(tmp_path, gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)), 'a header of 8,589,93')


def test_fault_25_zip_members_that_lie_over_each_other_are_refused(tmp_path):
    "Two entries of the table of contents that point to the same bytes."
    data = bytearray(zip_of(('aaaa', os.urandom(500)), ('bbbb', os.urandom(500))))
    second = data.rindex(b'PK\x01\x02')
    data[second + 42:second + 46] = struct.pack('<I', 0)   # its local header is the first one
    refused(tmp_path, bytes(data), 'lies over another')


def test_a_zip_that_says_less_than_it_holds_stops_there_and_leaves_nothing(tmp_path):
    for size in (100, 5000):
        data = bytearray(zip_of(('a', b'x'*3000)))
        for start in (data.index(b'PK\x03\x04') + 22, data.index(b'PK\x01\x02') + 24): data[start:start + 4] = struct.pack('<I', size)
        refused(tmp_path, bytes(data), 'cannot be read|bytes\n  expected: 5,000, as it says')


# -- torn, encrypted, or something else --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', PACKERS)
def test_an_archive_that_was_cut_off_anywhere_is_refused(tmp_path, kind):
    files = {f'top/{i}.bin': os.urandom(700) for i in range(6)}
    data = pack(tmp_path/'whole', kind, files).read_bytes()
    needed = len(data) if kind != 'tar' else len(data.rstrip(b'\0')) + 512   # the padding behind the end of a tar is not missed
    for cut in sorted({1, 3, 10, 300, *range(512, len(data), 512), needed - 513, len(data) - 200, len(data) - 9, len(data) - 1} & set(range(1, needed))):
        refused(tmp_path, data[:cut], 'cannot be read|is cut off|is a|, as it says|holds no files')


@pytest.mark.parametrize('kind', ['zip', 'tar.gz', 'tar.xz'])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_one_wrong_byte_is_an_error_in_words_or_changes_nothing(tmp_path, kind, where, byte):
    path = tmp_path/'whole'
    if not path.exists(): pack(path, kind)
    data = bytearray(path.read_bytes())
    data[int(where*len(data))] = byte
    (tmp_path/'bad').write_bytes(data)
    target = tmp_path/'set'
    try: extract(tmp_path/'bad', target)
    except RsMtlError: assert not target.exists()
    else:
        got = content(target)
        if kind != 'zip': assert got == FILES
        else: assert sorted(got.values()) == sorted(FILES.values())   # a zip protects contents by CRC, and not its names
        __import__('shutil').rmtree(target)
    assert not list(tmp_path.glob('.*'))


def test_a_zip_whose_directory_swallows_a_member_is_refused(tmp_path):
    data = bytearray(zip_of(('a.tif', b'x'*100), ('b.tif', b'y'*100), ('c.tif', b'z'*100)))
    first, second, third = (m.start() for m in re.finditer(b'PK\x01\x02', data))
    data[first + 32:first + 34] = struct.pack('<H', third - second)      # the length of a comment
    refused(tmp_path, bytes(data), '3 members, and lists 2(?s:.*)download it again')
    empty = bytearray(zip_of(('a.tif', b'x'*100), ('b.tif', b'')))
    empty[empty.rindex(b'b.tif') + 4] = ord('/')                         # an empty file becomes a folder
    refused(tmp_path, bytes(empty), 'differ')


def test_an_encrypted_or_strangely_compressed_zip_is_refused_with_a_way_out(tmp_path):
    for where, value, words in ((6, 1, 'is encrypted'), (8, 9, 'compressed by method 9')):
        data = bytearray(zip_of(('a.tif', b'x'*100)))
        data[where:where + 2] = data[(at := data.index(b'PK\x01\x02') + where + 2):at + 2] = struct.pack('<H', value)
        refused(tmp_path, bytes(data), f'(?s){words}.*7z')


@pytest.mark.parametrize(('data', 'words'), [(b'', 'is empty'), (b'<!DOCTYPE html><title>Log in</title>', 'a web page(?s:.*)log in'), (b'Rar!\x1a\x07\x00' + bytes(900), 'a RAR(?s:.*)7z'), (b'7z\xbc\xaf\x27\x1c' + bytes(900), 'a 7z'),
                                             (os.urandom(3000), 'cannot be read'), (bytes(20_480), 'cannot be read|holds no files'), (zip_of(), 'holds no files'), (tar_of(special('d', tarfile.DIRTYPE)), 'holds no files'), (gzip.compress(b'no tar', mtime=0), 'cannot be read')],
                         ids=['empty', 'web page', 'rar', '7z', 'noise', 'zeros', 'empty zip', 'empty tar', 'gzip of no tar'])
def test_what_is_no_archive_is_named(tmp_path, data, words): refused(tmp_path, data, words)


def test_a_missing_archive_is_not_found(tmp_path):
    with pytest.raises(DatasetNotFoundError, match='there is no archive'): extract(tmp_path/'none.zip', tmp_path/'set')
    with pytest.raises(DatasetNotFoundError, match='there is no archive'): extract(tmp_path, tmp_path/'set')
    with pytest.raises(DatasetNotFoundError, match='no file'): md5sum(tmp_path/'none.zip')


def test_a_tar_that_ends_in_a_zip_is_a_tar(tmp_path):
    inner = zip_of(('inner.txt', b'1'), method=zipfile.ZIP_STORED)
    (tmp_path/'a').write_bytes(tar_of(('sets/part.zip', inner)))
    assert zipfile.is_zipfile(tmp_path/'a')                 # which is why this is not asked
    extract(tmp_path/'a', tmp_path/'set')
    assert content(tmp_path/'set') == {'sets/part.zip': inner}


def test_a_zip_member_without_a_name_is_refused(tmp_path):
    data = bytearray(zip_of(('\1', b'')))
    for start in (data.index(b'PK\x03\x04') + 30, data.index(b'PK\x01\x02') + 46): data[start] = 0    # its name ends before it begins
    refused(tmp_path, bytes(data), 'control characters')


# -- fault 26: md5 ------------------------------------------------------------------------------------------------------------------------

def test_fault_26_another_md5_is_an_error_before_anything_is_opened(tmp_path):
    path = pack(tmp_path/'a.zip', 'zip')
    with pytest.raises(DataError, match=f"has the md5 {md5sum(path)}\n  expected: {'0'*32}"): extract(path, tmp_path/'set', md5='0'*32)
    assert os.listdir(tmp_path) == ['a.zip']


@pytest.mark.parametrize('md5', ['d41d8cd98f00b204e98009', '', 'z'*32, 'd41d8cd98f00b204e9800998ecf8427e0'])
def test_fault_26_an_md5_that_is_none_is_an_error_of_the_argument(tmp_path, md5):
    with pytest.raises(ConfigError, match='32 hexadecimal digits'): check_md5(pack(tmp_path/'a.zip', 'zip'), md5)


# -- whole or not at all ------------------------------------------------------------------------------------------------------------------

def test_an_error_on_the_way_leaves_nothing_and_the_disk_may_be_full(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path/'set') as part:
        (part/'a').write_text('half')
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    path = pack(tmp_path/'a.tar', 'tar', {f'{i}': os.urandom(30_000) for i in range(5)})
    code = f"""import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from rs_mtl.data.archives import extract
try: extract({str(path)!r}, {str(tmp_path/'set')!r})
except Exception as e: print(type(e).__name__, e)
"""
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'RS_MTL_PROGRESS': '0'})
    assert said.stdout.startswith('DataError') and 'cannot be written' in said.stdout and os.listdir(tmp_path) == ['a.tar'], said


def test_the_final_name_is_given_in_one_step_to_what_is_complete_and_on_the_disk(tmp_path, monkeypatch):
    rename, fsync, steps, synced = os.rename, os.fsync, [], set()
    def watch(a, b):
        assert not Path(b).exists() and content(Path(a)) == FILES and Path(a).parent == Path(b).parent
        assert {p.stat().st_ino for p in [Path(a), *Path(a).rglob('*')]} <= synced
        steps.append(Path(b).name)
        rename(a, b)
    monkeypatch.setattr(os, 'fsync', lambda fd: (synced.add(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, 'rename', watch)
    extract(pack(tmp_path/'a.zip', 'zip'), tmp_path/'set')
    assert steps == ['set'] and tmp_path.stat().st_ino in synced


@pytest.mark.skipif(os.name == 'nt', reason='no SIGKILL')
def test_fault_25_a_killed_extraction_never_leaves_half_a_data_set_under_its_name(tmp_path):
    files = {f'top/{i}.bin': os.urandom(20_000) for i in range(400)}
    path = pack(tmp_path/'a.tar', 'tar', files)
    code = "import sys; from rs_mtl.data.archives import extract; extract(sys.argv[1], sys.argv[2])"
    killed = 0
    for k in range(8):
        run = subprocess.Popen([sys.executable, '-c', code, path, tmp_path/f'set{k}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and not list(tmp_path.glob(f'.set{k}.*')): time.sleep(.002)   # until it writes, however busy the machine is
        time.sleep(.015*k)
        run.send_signal(signal.SIGKILL)
        killed += run.wait() == -signal.SIGKILL
        if (tmp_path/f'set{k}').exists(): assert content(tmp_path/f'set{k}') == files
    left = list(tmp_path.glob('.set*.part'))
    assert killed and left, 'no run was killed while it wrote'
    name = left[0].name.split('.')[1]
    with pytest.warns(UserWarning, match='an interrupted extraction left'): extract(path, tmp_path/name)
    assert content(tmp_path/name) == files
