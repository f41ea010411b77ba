"""The networks of the NTIRE 2024 Efficient Super-Resolution challenge, rebuilt from `esr_kernels`.

    model = python_models.create("span", weights="span.pth")
    sharp = model(image)  # [N, 3, H, W] in [0, model.data_range] -> [N, 3, 4 H, 4 W]

One file per network. Each is checked against the published checkpoint; the checkpoints themselves are in the
challenge's public repository.
"""

from importlib import import_module

from .registry import ModelCard, bundled, card, create, list_models, plain

__all__ = ["ModelCard", "bundled", "card", "create", "list_models", "plain"]

# Each file registers its models; `list_models` has this order.
_MODULES = (
    *("span", "rlfn"),
    *("r2net", "rden", "asr_prune", "slim_rlfn", "light_rlfn", "errn", "rfdn", "eern", "efqn", "dipnet"),  # 3x3
    *("pfdn_lite", "safmn_pp", "smrn", "ifadnet", "lsanet", "depth_rlfn", "rlfn_bn", "rlff", "rcn"),
    "efficient_srgan",
    # Pointwise and depthwise convolutions, attention.
    *("smfan", "egfmn", "gfmn", "dirn", "emaxgman", "lkfn", "agdn", "msn", "harn", "craft", "dvmsr", "magicsr"),
)
for _name in _MODULES:
    import_module(f".{_name}", __name__)
