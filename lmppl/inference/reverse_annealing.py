"""Annealing in reverse, from exact draws of π*: upper bounds of log Z, and with forward runs the sandwich."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lmppl.diagnostics.normalizers import mean_of_logs
from lmppl.errors import ModelError
from lmppl.inference.ais import AIS
from lmppl.inference.annealed_sweep import AnnealedSweep, AnnealedSweepResult, AnnealingSchedule, backward_path
from lmppl.inference.annealing_ladder import check_ladder
from lmppl.inference.approximation import LEVEL
from lmppl.inference.conditional_smc import Sandwich, retained_rows
from lmppl.inference.engine import Request, Shard, shard_generator
from lmppl.inference.exact_draws import check_count, log_z_holding
from lmppl.inference.run import infer
from lmppl.inference.tempered_smc import TemperedSMC
from lmppl.lm.randomness import Source
from lmppl.modeling.model import Model
from lmppl.modeling.target import Target
from lmppl.sequences import Draws, Estimate

__all__ = ["conditional_annealing", "reverse_ais", "sandwich_annealing"]

REVERSE_STREAM = -1  # the id of the seed of reverse runs, which no shard has


def conditional_annealing(
    target: Target,
    engine: AIS | TemperedSMC,
    rows: Draws,
    source: Source,
    *,
    ladder: tuple[float, ...] | None = None,
    num_particles: int | None = None,
) -> AnnealedSweepResult:
    """One conditional sweep for each row of `rows` (G,): the reverse run from it, among N − 1 fresh particles.

    The row is x_{K−1}; the kernels' time reversals at λ_{K−1}, …, λ_1 give x_{K−2}, …, x_0. That path is one of the N
    particles: without resampling (AIS) its weight is averaged with the others'; with resampling it survives each time
    by the law of the scheme given that it does. If the rows are exact draws, E[1/Ẑ] = Pr(Ẑ>0)/Z and E log Ẑ ≥ log Z.

    Parameters
    ----------
    target : Target
    engine : AIS or TemperedSMC
        Its kernels must each be reversible, as those of `lmppl.inference.mcmc` are; a tuple of them is reversed as a
        whole, by its order.
    rows : Draws (G,)
        Outcomes with γ > 0.
    source : Source
    ladder : tuple of float, optional
        λ_0..λ_K; by default the engine's, if it is fixed.
    num_particles : int, optional
        N; by default the engine's. 1 is plain reverse AIS.

    Raises
    ------
    ModelError
        Where the engine has no fixed ladder and none is given, is waste-free, or a row has γ = 0 or is no outcome of
        the prior.

    References
    ----------
    neal2001, grosse2015, andrieu2010
    """
    engine.check(target)
    if num_particles is not None:
        check_count("reverse run", "num_particles", num_particles)
    rows = retained_rows(target, rows, "reverse run")
    schedule = _reversible_schedule(engine, ladder, num_particles)
    path = backward_path(target, rows, schedule.ladder, schedule.kernels[::-1], source)
    return AnnealedSweep(target, rows.context, schedule, source, path=path).run()


def reverse_ais(
    model: Model,
    engine: AIS | TemperedSMC,
    exact_draws: Draws,
    *,
    ladder: Sequence[float] | Tensor | None = None,
    num_particles: int | None = None,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    """An upper bound of log Z from exact draws: the mean of log Ẑ over reverse runs, E log Ẑ ≥ log Z.

    The only cheap figure that sees missed modes: exact draws visit them, and the path back to the prior pays for it.
    It is a bound only if the draws are exact (`Rejection`, `Exact(...).draw`) and the ladder is fixed beforehand; an
    engine with a pilot gets the ladder that its run with this seed has.

    Parameters
    ----------
    model : Model
    engine : AIS or TemperedSMC
    exact_draws : Draws
        Equally weighted exact draws of π*, two or more of each context.
    ladder : sequence of float, optional
        `info["ladder"]` of a run; by default the engine's own.
    num_particles : int, optional
        N; by default the engine's. The bound tightens with N, at N times the cost.
    seed : int
    level : float
        Coverage of the t interval for E log Ẑ.

    Returns
    -------
    Estimate (C,)
        Kind "upper_bound", in nats.

    Raises
    ------
    ModelError
        Where the engine is another one, or the draws are none, or weighted.

    References
    ----------
    neal2001, grosse2015
    """
    if not isinstance(engine, AIS | TemperedSMC):
        raise ModelError(
            f"reverse_ais: got {type(engine).__name__}, expected AIS or TemperedSMC; `lmppl.sandwich` takes SMC too"
        )
    target = Target(model)
    fixed = _ladder_of(model, engine, seed) if ladder is None else tuple(float(x) for x in ladder)
    count = engine.num_particles if num_particles is None else num_particles
    check_count("reverse_ais", "num_particles", count)
    source = Source(shard_generator(Shard(REVERSE_STREAM, 0, seed, (), 0)))

    def run(rows: Draws) -> Tensor:
        return conditional_annealing(target, engine, rows, source, ladder=fixed, num_particles=count).log_z

    high = log_z_holding(exact_draws, model, count, run, who="reverse_ais")
    note = f"mean of log Ẑ over {min(map(len, high))} reverse runs from exact draws, N = {count}, Student's t"
    return mean_of_logs(high, "upper_bound", note, level)


def sandwich_annealing(
    model: Model,
    engine: AIS | TemperedSMC,
    exact_draws: Draws,
    *,
    num_sweeps: int | None = None,
    seed: int = 0,
    level: float = LEVEL,
) -> Sandwich:
    """The part of `sandwich` that anneals: the mean of log Ẑ from below, `reverse_ais` on the same ladder from above.

    Parameters
    ----------
    model, engine, exact_draws, seed, level
        As in `reverse_ais`; two or more exact draws of each context.
    num_sweeps : int, optional
        Sweeps for the lower bound; by default the engine's.

    References
    ----------
    grosse2015
    """
    if engine.fixed_ladder() == ():
        raise ModelError("sandwich: ladder='online' gives a biased Ẑ, and no bound follows; use ladder='pilot'")
    sweeps = engine.num_sweeps if num_sweeps is None else num_sweeps
    check_count("sandwich", "num_sweeps", sweeps)
    run = infer(model, engine, sweeps * engine.num_particles, seed=seed, progress=False)
    note = f"mean of log Ẑ over {sweeps} independent sweeps, N = {engine.num_particles}, Student's t"
    lower = mean_of_logs(list(run.info["log_z_sweeps"]), "lower_bound", note, level)
    upper = reverse_ais(model, engine, exact_draws, ladder=run.info["ladder"], seed=seed, level=level)
    return Sandwich(lower, upper)


def _reversible_schedule(
    engine: AIS | TemperedSMC, ladder: tuple[float, ...] | None, num_particles: int | None
) -> AnnealingSchedule:
    fixed = engine.fixed_ladder() if ladder is None else ladder
    if not fixed:
        raise ModelError("reverse run: needs a ladder that is fixed beforehand; pass ladder=, such as info['ladder']")
    check_ladder("reverse run", fixed)
    if isinstance(engine, TemperedSMC) and engine.chain_length > 1:
        raise ModelError(
            "reverse run: a waste-free sweep has no reverse run here; use the same engine with chain_length=1"
        )
    schedule = engine.schedule(fixed)
    return schedule if num_particles is None else schedule._replace(num_particles=num_particles)


def _ladder_of(model: Model, engine: AIS | TemperedSMC, seed: int) -> tuple[float, ...]:
    """The ladder of the engine's run with this seed: its own, or that of its pilot."""
    fixed = engine.fixed_ladder()
    if fixed is None:
        target = Target(model)
        (pilot,) = engine.plan(target, Request(None, None, seed))
        return tuple(engine.run_shard(target, pilot).info["ladder"].tolist())
    if fixed == ():
        raise ModelError("reverse run: ladder='online' has no ladder that is fixed beforehand; use ladder='pilot'")
    return fixed
