"""Losses: value, gradient, curvature, its square root, and a sampler, each by one short module."""

from ggn_nb.losses.binary_cross_entropy import binary_cross_entropy as binary_cross_entropy
from ggn_nb.losses.closed_form import none as none
from ggn_nb.losses.cross_entropy import cross_entropy as cross_entropy
from ggn_nb.losses.gamma import gamma as gamma
from ggn_nb.losses.gaussian import gaussian as gaussian
from ggn_nb.losses.heteroscedastic_gaussian import heteroscedastic_gaussian as heteroscedastic_gaussian
from ggn_nb.losses.huber import huber as huber
from ggn_nb.losses.laplace import laplace as laplace
from ggn_nb.losses.mse import mse as mse
from ggn_nb.losses.multi_head import multi_head as multi_head
from ggn_nb.losses.negative_binomial import negative_binomial as negative_binomial
from ggn_nb.losses.poisson import poisson as poisson
from ggn_nb.losses.student_t import student_t as student_t
from ggn_nb.losses.closed_form import ClosedFormLoss as ClosedFormLoss
from ggn_nb.losses.closed_form import register_loss as register_loss
from ggn_nb.losses.create import LossFn as LossFn
from ggn_nb.losses.create import LossHessian as LossHessian
from ggn_nb.losses.create import create_loss as create_loss
from ggn_nb.losses.create import create_loss_hessian_mv as create_loss_hessian_mv
from ggn_nb.losses.custom import CustomLoss as CustomLoss
from ggn_nb.losses.loss import Loss as Loss
