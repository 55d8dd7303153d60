"""Import torchvision beside a torch that it was not built for.

A CPU build of torch with PyPI's torchvision lacks torchvision's compiled operators, and the import
ends in "operator torchvision::nms does not exist". Classifiers call none of them: it is enough to
declare those that are looked up on import. Import this before whatever imports torchvision.
"""

import importlib
from types import ModuleType

import torch

_LOOKED_UP_ON_IMPORT = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# Declarations live as long as their library object does.
_DECLARED: list[torch.library.Library] = []


def _import() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for schema in _LOOKED_UP_ON_IMPORT:
        library.define(schema)
    _DECLARED.append(library)
    return importlib.import_module("torchvision")


torchvision = _import()
