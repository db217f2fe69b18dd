"""Generalized Gauss-Newton products and loss Hessians in JAX."""

from importlib.metadata import version

from ggn_nb.operators.fisher import Fisher as Fisher
from ggn_nb.operators.fisher import create_fisher_mv as create_fisher_mv
from ggn_nb.operators.fisher import create_fisher_mv_without_data as create_fisher_mv_without_data
from ggn_nb.operators.ggn import GGN as GGN
from ggn_nb.operators.ggn import UnboundGGN as UnboundGGN
from ggn_nb.operators.ggn import create_ggn_mv as create_ggn_mv
from ggn_nb.operators.ggn import create_ggn_mv_without_data as create_ggn_mv_without_data
from ggn_nb.operators.hessian import Hessian as Hessian
from ggn_nb.operators.hessian import create_hessian_mv as create_hessian_mv
from ggn_nb.operators.hessian import create_hessian_mv_without_data as create_hessian_mv_without_data
from ggn_nb.losses.create import LossFn as LossFn
from ggn_nb.losses.create import LossHessian as LossHessian
from ggn_nb.losses.create import create_loss_hessian_mv as create_loss_hessian_mv
from ggn_nb.losses.closed_form import ClosedFormLoss as ClosedFormLoss
from ggn_nb.losses.closed_form import register_loss as register_loss
from ggn_nb.losses.custom import CustomLoss as CustomLoss
from ggn_nb.losses.create import create_loss as create_loss
from ggn_nb.losses.loss import Loss as Loss
from ggn_nb.losses.multi_head import multi_head as multi_head
from ggn_nb.operators.operator import Operator as Operator
from ggn_nb.operators.operator import Streamed as Streamed
from ggn_nb.operators.streams import Stream as Stream
from ggn_nb.operators.subset import select_params as select_params
from ggn_nb.operators.verification import Report as Report
from ggn_nb.operators.verification import is_psd as is_psd
from ggn_nb.operators.verification import verify as verify

__version__ = version("ggn_nb")
