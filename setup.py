"Everything a wheel says about itself comes from settings.ini; this file only reads it."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
ini = ConfigParser(delimiters=('=',), interpolation=None)
ini.read(HERE / 'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_path']

PYTHONS = ['3.11', '3.12', '3.13']
STATUS = {'2': 'Pre-Alpha', '3': 'Alpha', '4': 'Beta', '5': 'Production/Stable'}
LICENCES = {'apache2': 'Apache-2.0'}


class BuildWithRuns(build_py):
    "The run notebooks travel inside the wheel, so that `rs-mtl train` works without a checkout."

    def run(self) -> None:
        super().run()
        if getattr(self, 'editable_mode', False): return  # the checkout itself is used
        target = Path(self.build_lib) / lib / 'notebooks'
        for notebook in sorted((HERE / cfg['nbs_path'] / 'runs').glob('*.ipynb')):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(notebook, target / notebook.name)


setup(
    version=cfg['version'],
    description=cfg['description'],
    long_description=(HERE / 'README.md').read_text(encoding='utf-8') if (HERE / 'README.md').exists() else '',
    long_description_content_type='text/markdown',
    python_requires=f'>={cfg["min_python"]}',
    license_expression=LICENCES[cfg['license']],
    author=cfg['author'],
    author_email=cfg['author_email'],
    keywords=cfg['keywords'].split(),
    classifiers=[f'Development Status :: {cfg["status"]} - {STATUS[cfg["status"]]}', f'Intended Audience :: {cfg["audience"]}', 'Programming Language :: Python :: 3',
                 *(f'Programming Language :: Python :: {p}' for p in PYTHONS), 'Topic :: Scientific/Engineering :: Image Processing'],
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: ['py.typed', 'notebooks/*.ipynb']},
    install_requires=cfg['requirements'].split(),
    extras_require={key.removesuffix('_requirements'): cfg[key].split() for key in cfg if key.endswith('_requirements')},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    cmdclass={'build_py': BuildWithRuns},
)
