"""TARGET strings -> Job: `file.py:function`, `package.module:function`, `hf:gpt2`."""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from dpmem import zoo
from dpmem_profiling import Job

# A name of its own: a job file called queue.py must not become everybody's `queue`.
_PREFIX = "dpmem_target_"


class TargetError(ValueError):
    """A TARGET that names no Job, or whose Job fails: says what was received and what to do."""


def load_job(target: str) -> Job:
    """The Job that `target` names.

    target   "path/to/file.py:function" or "package.module:function"; the function takes no
             arguments and returns a dpmem.Job. Or a known model with random weights (dpmem.zoo):
             "hf:gpt2-xl?seq=1024", "torchvision:resnet50", "timm:vit_base_patch16_224"

    The folder of the file, or the working folder for a module, comes first in sys.path, as it does
    for `python file.py` and `python -m package.module`; after an error sys.path is as it was.

    Raises TargetError where it cannot be found, imported or called, or returns something else, and
    for an option of a known model that is none.
    """
    if zoo.has(target):
        return _from_zoo(target)
    place, separator, function_name = target.rpartition(":")
    if not separator or not place or not function_name.isidentifier():
        raise TargetError(
            f"a TARGET must be file.py:function or package.module:function; received {target!r}; "
            "known models are hf:NAME, torchvision:NAME and timm:NAME"
        )
    path_before = list(sys.path)
    try:
        return _call(_import(place, target), function_name, target)
    except BaseException:
        sys.path[:] = path_before
        raise


def _from_zoo(target: str) -> Job:
    try:
        return zoo.load(target)
    except ValueError as error:
        raise TargetError(f"TARGET {target!r}: {error}") from error
    except Exception as error:
        # What a library raises for settings that it refuses, at times inside an error of its own.
        cause = error.__cause__ or error
        raise TargetError(f"TARGET {target!r}: its library {describe(cause)}") from error


def describe(error: BaseException) -> str:
    """One line about an exception that user code raised: what, and in which line of which file."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r}){where}"
    message = str(error).strip().split("\n")[0]
    return f"raised {type(error).__name__}{': ' if message else ''}{message}{where}"


def _import(place: str, target: str) -> ModuleType:
    path = Path(place)
    from_file = path.suffix == ".py"
    if from_file and not path.is_file():
        raise TargetError(f"TARGET {target!r}: there is no file {place}")
    sys.path.insert(0, str(path.resolve().parent if from_file else Path.cwd()))
    try:
        return _run_file(path) if from_file else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise TargetError(f"TARGET {target!r} does not import: {describe(error)}") from error


def loaded_files() -> list[Path]:
    """The files of targets that this process ran; another one unpickles their jobs once it has."""
    loaded = [module for name, module in sys.modules.items() if name.startswith(_PREFIX)]
    return [Path(module.__file__) for module in loaded if module.__file__ is not None]


def load_files(paths: list[Path]) -> None:
    """Run the files of targets that another process did. Raises whatever they do."""
    for path in paths:
        _run_file(path)


def _run_file(path: Path) -> ModuleType:
    name = f"{_PREFIX}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _call(module: ModuleType, function_name: str, target: str) -> Job:
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [
            name
            for name, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise TargetError(
            f"TARGET {target!r} must name a function; there is no {function_name!r} among "
            f"those of {module.__file__}: {', '.join(own) or 'none'}"
        )
    try:
        job = function()
    except (Exception, SystemExit) as error:
        raise TargetError(f"TARGET {target!r}: its function {describe(error)}") from error
    if not isinstance(job, Job):
        raise TargetError(
            f"TARGET {target!r} must return a dpmem.Job; received {type(job).__name__}"
        )
    return job
