"""Products with the Generalized Gauss-Newton matrix, the Hessian and the Fisher, in JAX."""

from importlib.metadata import version

from ggn_nb.losses import (
    ClosedFormLoss,
    CustomLoss,
    Loss,
    LossFn,
    LossHessian,
    create_loss,
    create_loss_hessian_mv,
    multi_head,
    register_loss,
)
from ggn_nb.operators.batches import Batch
from ggn_nb.operators.creation import DataOptions, ProblemOptions, Unbound
from ggn_nb.operators.curvature import Curvature
from ggn_nb.operators.fisher import Fisher, create_fisher_mv, create_fisher_mv_without_data
from ggn_nb.operators.ggn import GGN, create_ggn_mv, create_ggn_mv_without_data
from ggn_nb.operators.hessian import Hessian, create_hessian_mv, create_hessian_mv_without_data
from ggn_nb.operators.operator import (
    Damped,
    Diagonal,
    Flat,
    Operator,
    Scaled,
    Sum,
    register_operator,
    static_field,
)
from ggn_nb.operators.samples import Samples
from ggn_nb.operators.streamed import Streamed
from ggn_nb.operators.streams import Stream
from ggn_nb.operators.subset import select_params
from ggn_nb.operators.verification import Check, Report, is_psd, verify

__version__ = version("ggn_nb")

__all__ = [
    # products with a matrix of a model on data
    "create_ggn_mv",
    "create_hessian_mv",
    "create_fisher_mv",
    # the same, with the data in each product
    "create_ggn_mv_without_data",
    "create_hessian_mv_without_data",
    "create_fisher_mv_without_data",
    # losses
    "create_loss",
    "create_loss_hessian_mv",
    "multi_head",
    "register_loss",
    "LossFn",
    "Loss",
    "ClosedFormLoss",
    "CustomLoss",
    "LossHessian",
    # data and parameters
    "Samples",
    "Stream",
    "Batch",
    "select_params",
    # operators, what they are and how to make a kind
    "Operator",
    "register_operator",
    "static_field",
    "Curvature",
    "GGN",
    "Hessian",
    "Fisher",
    "Streamed",
    "Unbound",
    "Diagonal",
    "Sum",
    "Scaled",
    "Damped",
    "Flat",
    # the keywords that creating functions share
    "DataOptions",
    "ProblemOptions",
    # checks
    "verify",
    "is_psd",
    "Report",
    "Check",
]
