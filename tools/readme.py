"""README.md and its pictures, made from index.ipynb.

    python tools/readme.py            write README.md and README_files/
    python tools/readme.py --check    only say what differs
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURES = 'README_files'
NOTE = '<!-- Made from index.ipynb by tools/readme.py: edit that notebook. -->\n\n'
# a map shows its picture here, since a page on the web runs no widget
PRIORITY = ['image/svg+xml', 'image/png', 'image/jpeg', 'text/markdown', 'text/html', 'text/plain']


def rendered(root: Path = ROOT) -> dict[str, bytes]:
    "File name -> content: README.md, and each picture that it shows."
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    nb = nbformat.read(root / 'index.ipynb', as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}  # cleaned away in the repository; names the language of the code blocks
    nb.cells = [cell for cell in nb.cells if not re.search(r'^#\|\s*hide\b', cell.source, flags=re.M)]
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    exporter = MarkdownExporter(config=Config({'NbConvertBase': {'display_data_priority': PRIORITY}}))
    text, resources = exporter.from_notebook_node(nb, resources={'output_files_dir': PICTURES, 'unique_key': 'index'})
    text = re.sub(r'[ \t]+$', '', text, flags=re.M)
    text = NOTE + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'
    return {'README.md': text.encode()} | {name.replace('\\', '/'): data for name, data in resources['outputs'].items()}


def differences(root: Path = ROOT) -> list[str]:
    "What stands on disk and is not what index.ipynb gives."
    made = rendered(root)
    stored = {p.relative_to(root).as_posix() for p in [root / 'README.md', *(root / PICTURES).glob('*')] if p.exists()}
    wrong = [f'{name} is missing' for name in made.keys() - stored] + [f'{name} is not shown by index.ipynb' for name in stored - made.keys()]
    wrong += [f'{name} differs from what index.ipynb gives' for name in made.keys() & stored if made[name] != (root / name).read_bytes()]
    return sorted(wrong)


def write(root: Path = ROOT) -> list[str]:
    "Write what `rendered` gives and drop pictures that are no longer shown; returns what changed."
    changed, made = differences(root), rendered(root)
    for old in (root / PICTURES).glob('*'):
        if old.relative_to(root).as_posix() not in made: old.unlink()
    for name, data in made.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return changed


if __name__ == '__main__':
    check = '--check' in sys.argv[1:]
    rows = differences() if check else write()
    print('\n'.join(rows) or 'README.md is what index.ipynb gives')
    sys.exit(bool(rows) and check)
