"""What every notebook in the repository must look like.

    python tools/notebooks.py            tidy all of them, then say what is still wrong
    python tools/notebooks.py --check    only say what is wrong
    python tools/notebooks.py a.ipynb …  only these
"""
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {'name': 'python3', 'language': 'python', 'display_name': 'python3'}  # without one, JupyterLab asks and papermill refuses
LARGEST = 1_000_000  # bytes
ABSOLUTE = re.compile(r'(?<![\w.:/~<])/(?:home|root|tmp|Users|var|mnt|opt|work)/\w|[A-Z]:\\\\?Users')  # a path that exists on one machine only
SHOWN = ('tutorials', 'benchmarks')  # folders whose notebooks are read for their pictures


def notebooks(root: Path = ROOT) -> list[Path]:
    "index.ipynb and everything below nbs/, in reading order."
    found = [p for p in sorted((root / 'nbs').rglob('*.ipynb')) if not any(part.startswith(('.', '_')) for part in p.relative_to(root).parts)]
    return [root / 'index.ipynb', *found] if (root / 'index.ipynb').exists() else found


def tidied(path: Path, root: Path = ROOT) -> str:
    "The text of a notebook after `nbdev-clean`, with the kernel it needs and without the marks of editors."
    from fastcore.nbio import nb2str
    from nbdev.clean import clean_nb
    config = tomllib.loads((root / 'pyproject.toml').read_text(encoding='utf-8'))['tool']['nbdev']
    nb = json.loads(path.read_text(encoding='utf-8'))
    clean_nb(nb, allowed_cell_metadata_keys=config['allowed_cell_metadata_keys'])
    for cell in nb['cells']:  # progress bars and warnings are for whoever runs it, not for whoever reads it
        if 'outputs' in cell: cell['outputs'] = [o for o in cell['outputs'] if o.get('name') != 'stderr']
    nb['metadata'] = {key: value for key, value in nb['metadata'].items() if key not in ('jupytext', 'widgets')} | {'kernelspec': dict(KERNEL)}
    return nb2str(nb)


def problems(path: Path, root: Path = ROOT) -> list[str]:
    "What is wrong with a notebook, in words; empty if nothing is."
    text, name = path.read_text(encoding='utf-8'), path.relative_to(root).as_posix()
    nb, wrong = json.loads(text), []
    outputs: list[dict[str, Any]] = [out for cell in nb['cells'] for out in cell.get('outputs', [])]
    if 'widgets' in nb['metadata']: wrong.append('carries saved widget state')
    if any(out['output_type'] == 'error' for out in outputs): wrong.append('holds the error of a cell that failed')
    if len(text.encode()) > LARGEST: wrong.append(f'has {len(text.encode()):,} bytes, more than {LARGEST:,}: store fewer or smaller pictures (dpi)')
    for out in outputs:
        words = ''.join(out.get('text', [])) + ''.join(''.join(value) for key, value in out.get('data', {}).items() if key.startswith('text/'))
        if found := ABSOLUTE.search(words): wrong.append(f'shows a path of one machine: {words[found.start():found.start() + 60]!r}')
    folders = path.relative_to(root).parts[:-1]
    if (not folders or set(SHOWN) & set(folders)) and not any(kind.startswith('image/') for out in outputs for kind in out.get('data', {})):
        wrong.append('shows no picture: run it and keep the outputs')
    if 'runs' in folders: wrong += run_problems(nb)
    if not wrong and text != tidied(path, root): wrong.append('is not tidy: run `python tools/notebooks.py`')
    return [f'{name} {what}' for what in wrong]


def run_problems(nb: dict[str, Any]) -> list[str]:
    "What papermill needs of a run notebook."
    code = [cell for cell in nb['cells'] if cell['cell_type'] == 'code']
    tagged = [cell for cell in nb['cells'] if 'parameters' in cell['metadata'].get('tags', [])]
    wrong = []
    if len(tagged) != 1: wrong.append(f'has {len(tagged)} cells tagged `parameters`, papermill needs exactly one')
    elif tagged[0] is not code[0]: wrong.append('has its `parameters` behind other code, so that code cannot see them')
    if any(re.search(r'^#\|\s*(export|default_exp)', ''.join(cell['source']), flags=re.M) for cell in code): wrong.append('exports: a run notebook is executed, not exported')
    return wrong


def main(args: list[str]) -> int:
    chosen = [Path(arg).resolve() for arg in args if not arg.startswith('-')] or notebooks()
    if '--check' not in args:
        for path in chosen:
            before, after = path.read_text(encoding='utf-8'), tidied(path)
            if before != after:
                path.write_text(after, encoding='utf-8')
                print(f'tidied {path.relative_to(ROOT)}')
    wrong = [row for path in chosen for row in problems(path)]
    print('\n'.join(wrong) or f'{len(chosen)} notebooks are in order')
    return bool(wrong)


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
