"""Products with the Generalized Gauss-Newton matrix, the Hessian and the Fisher, in JAX."""

from importlib.metadata import version

from ggn_nb.applications.evidence import log_marginal_likelihood
from ggn_nb.applications.influence import influence
from ggn_nb.applications.predictive import predictive_covariance
from ggn_nb.layers.dense_blocks import DenseBlocks
from ggn_nb.layers.gram import Gram, gram
from ggn_nb.linalg.closed_forms import Solution
from ggn_nb.linalg.frobenius_norm import frobenius_norm
from ggn_nb.linalg.functions import (
    eigsh,
    inverse,
    inverse_sqrt,
    logdet,
    sample,
    solve,
    solve_many,
)
from ggn_nb.linalg.spectral_density import SpectralDensity, spectral_density
from ggn_nb.linalg.lineax import to_lineax
from ggn_nb.linalg.matfree import to_matfree
from ggn_nb.linalg.scipy import to_scipy
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
from ggn_nb.layers.blocks import BlockDiagonal, block_diagonal
from ggn_nb.layers.diagonal import Estimate, diagonal, trace
from ggn_nb.layers.explain import Explanation, explain
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
from ggn_nb.operators.square_root import SquareRoot, square_root
from ggn_nb.operators.streamed import Streamed
from ggn_nb.operators.streams import Stream
from ggn_nb.operators.subset import select_params
from ggn_nb.operators.verification import Check, Report, is_psd, verify
from ggn_nb.tools.progress import show_progress

__version__ = version("ggn_nb")

__all__ = [
    # products with a matrix of a model on data
    "create_ggn_mv",
    "create_hessian_mv",
    "create_fisher_mv",
    # G = A Aᵀ
    "square_root",
    "SquareRoot",
    # what the layers of the model give
    "diagonal",
    "trace",
    "block_diagonal",
    "explain",
    "Estimate",
    "BlockDiagonal",
    "Explanation",
    "show_progress",
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
    # representations of a matrix
    "gram",
    "Gram",
    "DenseBlocks",
    # functions of a damped matrix
    "solve",
    "solve_many",
    "Solution",
    "inverse",
    "inverse_sqrt",
    "logdet",
    "sample",
    "eigsh",
    "spectral_density",
    "SpectralDensity",
    "frobenius_norm",
    # the same matrix in other libraries
    "to_scipy",
    "to_lineax",
    "to_matfree",
    # what people come for
    "predictive_covariance",
    "log_marginal_likelihood",
    "influence",
    # the keywords that creating functions share
    "DataOptions",
    "ProblemOptions",
    # checks
    "verify",
    "is_psd",
    "Report",
    "Check",
]
