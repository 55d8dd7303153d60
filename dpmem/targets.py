"""TARGET strings -> Job: `file.py:function` and `package.module:function`."""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from dpmem_profiling import Job


class TargetError(ValueError):
    """A TARGET that names no Job, or whose Job fails: says what was received and what to do."""


def load_job(target: str) -> Job:
    """The Job that `target`'s function returns.

    target   "path/to/file.py:function" or "package.module:function"; the function takes no
             arguments and returns a dpmem.Job

    Raises TargetError where it cannot be found, imported or called, or returns something else.
    """
    place, separator, function_name = target.rpartition(":")
    if not separator or not place or not function_name.isidentifier():
        raise TargetError(
            f"a TARGET must be file.py:function or package.module:function; received {target!r}"
        )
    module = _import(place, target)
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value)]
        own = [n for n in names if getattr(vars(module)[n], "__module__", "") == module.__name__]
        raise TargetError(
            f"TARGET {target!r}: {place} has no function {function_name!r}; "
            f"it has {', '.join(own) or 'none'}"
        )
    try:
        job = function()
    except Exception as error:
        raise TargetError(f"TARGET {target!r}: {describe(error)}") from error
    if not isinstance(job, Job):
        raise TargetError(
            f"TARGET {target!r} must return a dpmem.Job; received {type(job).__name__}"
        )
    return job


def describe(error: BaseException) -> str:
    """One line about an exception that user code raised: what, and in which line of which file."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    first_line = str(error).strip().split("\n")[0]
    return f"raised {type(error).__name__}: {first_line}{where}"


def _import(place: str, target: str) -> ModuleType:
    path = Path(place)
    try:
        if path.suffix != ".py":
            return importlib.import_module(place)
        if not path.is_file():
            raise TargetError(f"TARGET {target!r}: there is no file {place}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # A job file imports its neighbours, as it would when run as a script.
        sys.path.insert(0, str(path.resolve().parent))
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(f"TARGET {target!r} does not import: {describe(error)}") from error
    return module
