"Multi-task learning for remote sensing: classes, height and clear images from optical and SAR."
__version__ = '0.1.0'

import importlib as _importlib
from typing import Any as _Any

from .repair import install_repair as _install_repair

_install_repair()

# Public name -> the module that defines it. Nothing is imported until a name is used,
# so that `import rs_mtl` costs milliseconds and needs neither torch nor rasterio.
_PUBLIC = {
    'create_model': 'core', 'list_models': 'core', 'show_progress': 'core',
    'City': 'worlds.city', 'Land': 'worlds.land', 'simulate_clouds': 'worlds.clouds', 'Scene': 'data.scene',
    'open_data': 'data.datasets', 'list_data': 'data.datasets', 'open_dataset': 'data.datasets', 'check_dataset': 'data.check', 'Windows': 'data.windows',
    'Augment': 'data.augment', 'Augmented': 'data.augment', 'strong': 'data.augment', 'weak': 'data.augment', 'extract': 'data.archives',
    'label_split': 'data.label_splits', 'divide': 'data.label_splits', 'Pairs': 'data.pairs', 'Reassigner': 'labels.reassignment',
    'sinkhorn': 'labels.sinkhorn', 'Plan': 'labels.sinkhorn', 'read_table': 'data.table_file',
    'Objective': 'training.losses', 'Scores': 'training.metrics', 'fit': 'training.fit', 'fit_stats': 'training.fit', 'evaluate': 'training.fit',
    'semi_objective': 'training.semi', 'save': 'training.checkpoint', 'load': 'training.checkpoint', 'start_from': 'training.checkpoint',
    'predict_scene': 'apply.predict', 'predict_scenes': 'apply.many_scenes', 'predict_sample': 'apply.predict', 'show_sample': 'apply.figures', 'show_map': 'apply.maps',
    'explore': 'apply.explore',
    'write_report': 'apply.report', 'compare_runs': 'apply.compare', 'save_onnx': 'apply.onnx',
}


def __getattr__(name: str) -> _Any:
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(_importlib.import_module(f'.{_PUBLIC[name]}', __name__), name)
    globals()[name] = value  # found once, kept
    return value


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, '__version__'])
