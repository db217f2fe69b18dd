"""Losses: value, gradient, curvature, its square root, and a sampler, each by one short module."""

# What every loss can do, and how to make one from a name or a function.
from ggn_nb.losses.create import LossFn as LossFn
from ggn_nb.losses.create import LossHessian as LossHessian
from ggn_nb.losses.create import create_loss as create_loss
from ggn_nb.losses.create import create_loss_hessian_mv as create_loss_hessian_mv
from ggn_nb.losses.loss import Loss as Loss

# Losses of your own.
from ggn_nb.losses.closed_form import ClosedFormLoss as ClosedFormLoss
from ggn_nb.losses.closed_form import Formulas as Formulas
from ggn_nb.losses.closed_form import entrywise as entrywise
from ggn_nb.losses.closed_form import register_loss as register_loss
from ggn_nb.losses.closed_form import registered_losses as registered_losses
from ggn_nb.losses.custom import CustomLoss as CustomLoss

# Losses by name. The functions take the places of the modules that they are named like.
from ggn_nb.losses.binary_cross_entropy import binary_cross_entropy as binary_cross_entropy
from ggn_nb.losses.closed_form import none as none
from ggn_nb.losses.cross_entropy import cross_entropy as cross_entropy
from ggn_nb.losses.gamma import gamma as gamma
from ggn_nb.losses.gaussian import gaussian as gaussian
from ggn_nb.losses.heteroscedastic_gaussian import heteroscedastic_gaussian as heteroscedastic_gaussian
from ggn_nb.losses.huber import huber as huber
from ggn_nb.losses.laplace import laplace as laplace
from ggn_nb.losses.mse import mse as mse
from ggn_nb.losses.negative_binomial import negative_binomial as negative_binomial
from ggn_nb.losses.poisson import poisson as poisson
from ggn_nb.losses.student_t import student_t as student_t

# Several losses as one.
from ggn_nb.losses.multi_head import MultiHeadLoss as MultiHeadLoss
from ggn_nb.losses.multi_head import multi_head as multi_head

__all__ = [
    # make a loss
    "Loss", "LossFn", "create_loss",
    "LossHessian", "create_loss_hessian_mv",
    # by name
    "mse", "cross_entropy", "binary_cross_entropy", "none",
    "gaussian", "heteroscedastic_gaussian", "student_t", "huber", "laplace",
    "poisson", "negative_binomial", "gamma",
    # several heads
    "MultiHeadLoss", "multi_head",
    # losses of your own
    "ClosedFormLoss", "CustomLoss", "Formulas", "entrywise",
    "register_loss", "registered_losses",
]
