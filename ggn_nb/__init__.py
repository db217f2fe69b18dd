"""Generalized Gauss-Newton products and loss Hessians in JAX."""

from importlib.metadata import version

from ggn_nb.fisher import Fisher as Fisher
from ggn_nb.fisher import create_fisher_mv as create_fisher_mv
from ggn_nb.fisher import create_fisher_mv_without_data as create_fisher_mv_without_data
from ggn_nb.ggn import GGN as GGN
from ggn_nb.ggn import UnboundGGN as UnboundGGN
from ggn_nb.ggn import create_ggn_mv as create_ggn_mv
from ggn_nb.ggn import create_ggn_mv_without_data as create_ggn_mv_without_data
from ggn_nb.hessian import Hessian as Hessian
from ggn_nb.hessian import create_hessian_mv as create_hessian_mv
from ggn_nb.hessian import create_hessian_mv_without_data as create_hessian_mv_without_data
from ggn_nb.loss_hessian import LossFn as LossFn
from ggn_nb.loss_hessian import LossHessian as LossHessian
from ggn_nb.loss_hessian import create_loss_hessian_mv as create_loss_hessian_mv
from ggn_nb.losses.closed_form import ClosedFormLoss as ClosedFormLoss
from ggn_nb.losses.closed_form import register_loss as register_loss
from ggn_nb.losses.custom import CustomLoss as CustomLoss
from ggn_nb.losses.custom import create_loss as create_loss
from ggn_nb.losses.loss import Loss as Loss
from ggn_nb.losses.multi_head import multi_head as multi_head
from ggn_nb.operator import Operator as Operator
from ggn_nb.operator import Streamed as Streamed
from ggn_nb.streams import Stream as Stream
from ggn_nb.subset import select_params as select_params
from ggn_nb.verification import Report as Report
from ggn_nb.verification import is_psd as is_psd
from ggn_nb.verification import verify as verify

__version__ = version("ggn_nb")
