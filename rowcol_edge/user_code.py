"""The user's own Python: factories, data callables and metrics, named by reference and never trusted to behave."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from .errors import InputError, MissingDependencyError, RowcolError, did_you_mean

_INSTALLED = (
    Path(__file__).resolve().parent,
    *(Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
)


def resolve(reference: str, error: type[InputError], what: str) -> Callable[..., Any]:
    """The callable behind ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        error: nothing of that name, or the module does not import; says why.
        MissingDependencyError: the module imports a package that is not installed.
    """
    module_name, separator, name = reference.rpartition(":")
    if not separator or not module_name or not name:
        raise error(
            f"{what} {reference!r}", expected="package.module:name or path/to/file.py:name", got="an empty part"
        )
    if module_name.endswith(".py"):
        module = import_file(Path(module_name), error)
    else:
        module = _import(module_name, reference, error, what)
    found = getattr(module, name, None)
    if not callable(found):
        got = "none there" if found is None else type(found).__name__
        hint = did_you_mean(name, [key for key, value in vars(module).items() if callable(value)])
        raise error(f"{what} {reference!r}", expected=f"a callable {name} in {module_name}", got=got, hint=hint)
    return found  # type: ignore[no-any-return]  # an attribute of a module is untyped by nature


def call(function: Callable[..., Any], error: type[InputError], what: str, *arguments: Any) -> Any:
    """``function(*arguments)``; whatever it raises becomes an ``error`` that names it and the line it came from."""
    try:
        return function(*arguments)
    except RowcolError:
        raise
    except Exception as e:  # boundary: the user's code may raise anything
        raise error(what, expected="code that runs", got=f"{type(e).__name__}: {e}", hint=_raised_at(e)) from e


def _raised_at(e: BaseException) -> str:
    """The last line of the user's own that an exception came through."""
    lines = [frame for frame in traceback.extract_tb(e.__traceback__) if _is_users_file(Path(frame.filename))]
    return f"it came from {lines[-1].filename}, line {lines[-1].lineno}" if lines else ""


def import_file(path: Path, error: type[InputError]) -> ModuleType:
    """Import a Python file by path, once, under a name of its own, without touching ``sys.path``."""
    path = path.resolve()
    if not path.is_file():
        raise error(str(path), expected="a Python file", got="no such file")
    name = f"rowcol_edge_user_{path.parent.name}_{path.stem}_{abs(hash(str(path))):x}".replace("-", "_")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise error(str(path), expected="a Python file", got="Python cannot import it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as e:
        del sys.modules[name]
        raise _import_error(e, str(path), error) from e
    return module


def _import(name: str, reference: str, error: type[InputError], what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name is not None and (name == e.name or name.startswith(f"{e.name}.")):
            hint = "a file is named with its ending: path/to/file.py:name"
            raise error(f"{what} {reference!r}", expected="an importable module", got=str(e), hint=hint) from e
        raise _import_error(e, f"{what} {reference!r}", error) from e
    except BaseException as e:
        raise _import_error(e, f"{what} {reference!r}", error) from e


def _import_error(e: BaseException, what: str, error: type[InputError]) -> BaseException:
    """What an import that failed becomes; Ctrl-C and our own errors stay what they are."""
    if isinstance(e, ModuleNotFoundError) and e.name:
        return MissingDependencyError(what, package=e.name.partition(".")[0])
    if isinstance(e, RowcolError) or not isinstance(e, Exception):
        return e
    return error(what, expected="a file that imports", got=f"{type(e).__name__}: {e}")


def source(thing: Any) -> str:
    """What a class or function does, as text: its source (its qualified name where there is none to be had), and that
    of the user's modules whose names it can reach. A helper or a constant beside it decides as much as its own lines.
    """
    try:
        own = inspect.getsource(thing)
    except (OSError, TypeError):
        own = f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', repr(thing))}"
    found: dict[str, str] = {}
    waiting = [sys.modules.get(getattr(thing, "__module__", None) or "")]
    while waiting:
        module = waiting.pop()
        if module is None or module.__name__ in found or not _is_users(module):
            continue
        found[module.__name__] = Path(str(module.__file__)).read_text(encoding="utf-8", errors="replace")
        waiting += [_home(value) for value in list(vars(module).values())]
    return "\n".join([own, *(found[name] for name in sorted(found))])


def _home(value: object) -> ModuleType | None:
    """The module a name of another module stands for, or comes from."""
    if isinstance(value, ModuleType):
        return value
    return sys.modules.get(value.__module__ or "") if isinstance(value, (type, FunctionType)) else None


def _is_users(module: ModuleType) -> bool:
    """Neither Python's own, nor an installed package (tool versions stand for those), nor this one."""
    file = getattr(module, "__file__", None)
    if file is None or not file.endswith(".py"):
        return False
    return _is_users_file(Path(file))


def _is_users_file(path: Path) -> bool:
    path = path.resolve()
    return path.is_file() and not any(path.is_relative_to(folder) for folder in _INSTALLED)
