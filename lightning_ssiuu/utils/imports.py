"""What libraries import for the sake of features that a command may never use waits until it is used."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from inspect import isroutine
from threading import RLock
from types import ModuleType
from typing import Any


def put_off() -> None:
    """From now on, modules of which Lightning wants no more than a name or two run when something else of them is used.

    Lightning names a class of torch's compiler and one of torchmetrics; to import them is to import all of both, with
    sympy, scipy and matplotlib: two seconds and a half. Nothing else can be told from outside, and what is loaded
    already stays as it is. For the command line, which has a process of its own.

    Example:
        >>> put_off()
        >>> from torchmetrics import MeanMetric  # is not what Lightning names, so torchmetrics runs now
        >>> MeanMetric.__module__
        'torchmetrics.aggregation'
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Compiled(type):
    # There is no instance of a class whose module has not run.
    def __instancecheck__(cls, instance: object) -> bool:
        compiler = sys.modules.get("torch._dynamo.eval_frame")
        return compiler is not None and isinstance(instance, getattr(compiler, "OptimizedModule", ()))


def _disable(fn: Any = None, *args: Any, **options: Any) -> Any:
    if fn is None:
        return partial(_disable, **options)
    if not isroutine(fn):  # a class or a module has to stay one
        return _that_has_run("torch._dynamo").disable(fn, *args, **options)
    disabled: list[Callable[..., Any]] = []

    @wraps(fn)
    def called(*given: Any, **named: Any) -> Any:
        compiler: Any = sys.modules["torch._dynamo"]
        if isinstance(compiler, _Waiting):  # nothing is compiled
            return fn(*given, **named)
        if not disabled:
            disabled.append(compiler.disable(fn, *args, **options))
        return disabled[0](*given, **named)

    return called


def _of_torchmetrics(name: str, part: str) -> Any:
    import_module("torchmetrics.utilities")  # parts import each other in a circle that begins there
    return getattr(import_module(f"torchmetrics.{part}"), name)


def _plot(*args: Any, **kwargs: Any) -> Any:
    return _that_has_run("torchmetrics.utilities.plot").plot_single_or_multi_val(*args, **kwargs)


def _that_has_run(name: str) -> Any:
    module = import_module(name)
    if isinstance(module, _Waiting):
        module.run()
    return module


#: Module -> what is told of it before it runs. The types of plots are what torchmetrics takes without matplotlib.
_TOLD: dict[str, Mapping[str, Callable[[], Any]]] = {
    "torch._dynamo": {
        "OptimizedModule": lambda: _Compiled("OptimizedModule", (), {}),
        "disable": lambda: _disable,
        "graph_break": lambda: lambda msg="": None,
    },
    "torchmetrics": {
        "Metric": lambda: _of_torchmetrics("Metric", "metric"),
        "MetricCollection": lambda: _of_torchmetrics("MetricCollection", "collections"),
        "_logger": lambda: logging.getLogger("torchmetrics"),
        "__version__": lambda: import_module("torchmetrics.__about__").__version__,
    },
    "torchmetrics.utilities.plot": {
        "_AX_TYPE": lambda: object,
        "_PLOT_OUT_TYPE": lambda: tuple[object, object],
        "plot_single_or_multi_val": lambda: _plot,
    },
}
#: Parts that can be imported although the whole has not run; others rely on it.
_APART = ("torchmetrics.__about__", "torchmetrics.utilities")
_APART_AFTER = ("torchmetrics.metric", "torchmetrics.collections")


class _Waiting(ModuleType):
    _loader: Loader
    _runs = False

    def __getattr__(self, name: str) -> Any:
        if not self._runs and (tell := _TOLD[self.__name__].get(name)) is not None:
            return tell()
        # The first two are asked of every module, and here to say: it is none.
        if name not in ("__path__", "__wrapped__") and self.run():
            return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def run(self, wait: bool = True) -> bool:
        """Whether it has run by now, and does not run; what another thread has begun is waited for."""
        if not _one_runs.acquire(wait):
            return False
        try:
            if isinstance(self, _Waiting) and not self._runs:
                self._runs = True
                try:
                    self._loader.exec_module(self)
                    del self._loader
                    self.__class__ = ModuleType  # type: ignore[assignment]
                finally:  # if it failed, it waits and will fail again
                    del self._runs
            return not isinstance(self, _Waiting)
        finally:
            _one_runs.release()


_one_runs = RLock()


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if target is not None:  # is loaded anew
            _that_has_run(name)
            return None
        whole = sys.modules.get(name.rpartition(".")[0])
        if isinstance(whole, _Waiting) and not _stands_alone(name):
            whole.run(wait=False)  # this thread has locked `name`, which the other one may need
            if name in sys.modules:  # by now
                return spec_from_loader(name, _Ran(sys.modules[name]))
        if name not in _TOLD or (spec := PathFinder.find_spec(name, path)) is None or spec.loader is None:
            return None
        spec.loader = _Later(spec.loader)
        return spec


def _stands_alone(name: str) -> bool:
    return name in _APART or (name in _APART_AFTER and "torchmetrics.utilities" in sys.modules)


class _Later(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def exec_module(self, module: Any) -> None:
        module._loader = module.__loader__ = module.__spec__.loader = self.loader
        module.__class__ = _Waiting


class _Ran(Loader):
    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
