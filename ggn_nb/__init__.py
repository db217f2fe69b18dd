"""Generalized Gauss-Newton products and loss Hessians in JAX."""

from importlib.metadata import version

from ggn_nb.ggn import GGN as GGN
from ggn_nb.ggn import UnboundGGN as UnboundGGN
from ggn_nb.ggn import create_ggn_mv as create_ggn_mv
from ggn_nb.ggn import create_ggn_mv_without_data as create_ggn_mv_without_data
from ggn_nb.loss_hessian import LossFn as LossFn
from ggn_nb.loss_hessian import create_loss_hessian_mv as create_loss_hessian_mv
from ggn_nb.losses.loss import Loss as Loss

__version__ = version("ggn_nb")
