"""The benchmarks as modules, for tests in which no figure counts."""

import importlib
import sys
from contextlib import contextmanager
from types import SimpleNamespace

from launching import ROOT

from guided_diffusion import logger


@contextmanager
def speed_programs(monkeypatch, names):
    """Import programs of benchmarks/ anew, with a small matrix product and short timings."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    monkeypatch.setattr(modules.speed_tasks, "SIDE", 64)
    monkeypatch.setattr(modules.speed_measuring, "ENOUGH", 0.0)
    yield modules
    for name in names:
        sys.modules.pop(name, None)
    logger.reset()
