"""Import torchvision beside a torch that it was not built for.

A CPU build of torch with PyPI's torchvision lacks torchvision's compiled operators, and the import
ends in "operator torchvision::nms does not exist". Classifiers call none of them: it is enough to
declare those that are looked up on import.
"""

import importlib

import torch

_LOOKED_UP_ON_IMPORT = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# Declarations live as long as their library object does.
_DECLARED: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Import torchvision, with its missing operators declared where it does not import without."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error) or _DECLARED:
            raise
        library = torch.library.Library("torchvision", "DEF")
        for schema in _LOOKED_UP_ON_IMPORT:
            library.define(schema)
        _DECLARED.append(library)
        importlib.import_module("torchvision")
