"""How well: plain tensors in, figures with errors out; each says what it detects and to what it is blind."""

from lmppl.diagnostics.calibration import exchangeability, holm, rank_calibration
from lmppl.diagnostics.chains import (
    ChainFigure,
    autocorrelation_time,
    bulk_ess,
    mcse,
    nested_rhat,
    nested_rhat_floor,
    rhat,
    stuck_chains,
    tail_ess,
)
from lmppl.diagnostics.divergences import (
    elbo,
    eubo,
    kl_divergence,
    self_normalised_kl,
    total_variation,
    total_variation_from_weights,
)
from lmppl.diagnostics.intervals import binomial_upper, clopper_pearson, empirical_bernstein
from lmppl.diagnostics.normalizers import log_acceptance, log_mean_weight, log_mean_weight_bounded, stack
from lmppl.diagnostics.quasi_rejection import (
    QuasiRejectionCurve,
    log_bound_of_acceptance,
    log_quasi_acceptance,
    quasi_rejection_curve,
)
from lmppl.diagnostics.weights import (
    TailShape,
    effective_sample_size,
    entropy_effective_sample_size,
    max_weight_share,
    normalised_log_weights,
    pareto_khat,
    pareto_smooth,
    zero_weight_share,
)

__all__ = [
    "ChainFigure",
    "QuasiRejectionCurve",
    "TailShape",
    "autocorrelation_time",
    "binomial_upper",
    "bulk_ess",
    "clopper_pearson",
    "effective_sample_size",
    "elbo",
    "empirical_bernstein",
    "entropy_effective_sample_size",
    "eubo",
    "exchangeability",
    "holm",
    "kl_divergence",
    "log_acceptance",
    "log_bound_of_acceptance",
    "log_mean_weight",
    "log_mean_weight_bounded",
    "log_quasi_acceptance",
    "max_weight_share",
    "mcse",
    "nested_rhat",
    "nested_rhat_floor",
    "normalised_log_weights",
    "pareto_khat",
    "pareto_smooth",
    "quasi_rejection_curve",
    "rank_calibration",
    "rhat",
    "self_normalised_kl",
    "stack",
    "stuck_chains",
    "tail_ess",
    "total_variation",
    "total_variation_from_weights",
    "zero_weight_share",
]
