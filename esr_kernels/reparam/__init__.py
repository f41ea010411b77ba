"""Re-parameterised convolutions: several branches in training, one convolution in use.

`algebra` has the folding mathematics as plain functions, `base` the class of the modules that use it, `network` what
folds a whole network or a whole state dict, `pruning` what makes deployed networks smaller. All branches of these forms
are linear, so their sum is one convolution exactly. docs/reparam.md lists the forms.
"""

from __future__ import annotations

from .algebra import add_identity, branch, compose, compose_depthwise, fold_batch_norm, fold_conv3xc, merge
from .base import Reparameterized, slim_message
from .network import deploy, fold_state_dict, fuse_batch_norms

__all__ = [
    "Reparameterized",
    "add_identity",
    "branch",
    "compose",
    "compose_depthwise",
    "deploy",
    "fold_batch_norm",
    "fold_conv3xc",
    "fold_state_dict",
    "fuse_batch_norms",
    "merge",
    "slim_message",
]
