"""State dicts of a wrapper have the module's own keys, and load with and without `module.`."""

from typing import Any

from torch import nn


def register_plain_keys(wrapper: nn.Module) -> None:
    """Give `wrapper`, whose model is its attribute `module`, the state dict of that model."""
    wrapper.register_state_dict_post_hook(_drop_prefix)
    wrapper.register_load_state_dict_pre_hook(_add_prefix)


def _drop_prefix(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """State-dict hook: `module.x` becomes `x`."""
    wrapped = prefix + "module."
    own = [key for key in state if key.startswith(wrapped)]
    state.update({prefix + key.removeprefix(wrapped): state.pop(key) for key in own})
    # The versions of the modules' formats, by module path.
    versions = getattr(state, "_metadata", {})
    for key in [key for key in versions if key == wrapped[:-1] or key.startswith(wrapped)]:
        versions[(prefix + key.removeprefix(wrapped[:-1]).lstrip(".")).rstrip(".")] = versions.pop(
            key
        )


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Load hook: the module's plain keys become `module.x`, unless the dict has those already.

    A module may own both `weight` and `module.weight`, so the form is the whole dict's.
    """
    inner = module.module
    assert isinstance(inner, nn.Module)
    plain = [prefix + key for key in inner.state_dict()]
    wrapped = [prefix + "module." + key.removeprefix(prefix) for key in plain]
    if sum(key in state for key in plain) < sum(key in state for key in wrapped):
        return
    renamed = dict(zip(plain, wrapped, strict=True))
    state.update({renamed[key]: state.pop(key) for key in plain if key in state})
