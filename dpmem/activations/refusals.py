"""Code in which compression would silently do nothing, and that is refused for it."""

import sys
import threading
from contextlib import AbstractContextManager

import torch
from torch import nn

COMPILED = (
    "activation compression needs the model to run uncompiled; received a call of code that "
    "torch.compile made: it saves all tensors at once, under no function's name, and asks for all "
    "at once; leave torch.compile or the compression away"
)


def check_visible(model: nn.Module) -> None:
    """Raise NotImplementedError for a model whose torch functions do not run in this thread.

    A frozen TorchScript part is let pass: what it saves stays exact, and the rest is compressed.
    """
    for name, module in model.named_modules():
        where = f"its module {name!r}" if name else "it"
        if isinstance(module, torch.jit.ScriptModule) and (
            module is model or any(parameter.requires_grad for parameter in module.parameters())
        ):
            raise NotImplementedError(
                "activation compression tells tensors by the torch functions that save them; "
                f"received a model that calls none, for {where} is TorchScript; pass the module "
                "that was scripted or traced"
            )
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise NotImplementedError(
                "activation compression sees the thread that it was entered in; received a model "
                f"that runs in one thread a device, for {where} is torch.nn.DataParallel; run a "
                "process a device, with dpmem.wrap"
            )


class CompiledCode:
    """Refuses code that torch.compile made, as long as any context is inside.

    The stance is one for all threads: the first to enter sets it and the last to leave puts it
    back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: AbstractContextManager[None] | None = None

    def refuse(self) -> None:
        """Raise NotImplementedError in compiled code; from now on, no other is compiled."""
        if torch.compiler.is_compiling():
            raise NotImplementedError(COMPILED)
        with self._lock:
            if self._stance is None and "torch._dynamo" in sys.modules:
                # Compiled without the tracker's mode: torch's own guards notice.
                try:
                    self._stance = torch.compiler.set_stance("fail_on_recompile")
                except RuntimeError as error:
                    raise NotImplementedError(COMPILED) from error
            self._inside += 1

    def allow(self) -> None:
        """Take one `refuse` back."""
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


compiled_code = CompiledCode()
