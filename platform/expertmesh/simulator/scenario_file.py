"""From a scenario file to a scenario."""

from pathlib import Path

from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.option import GroupOption, GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.simulator.scenario import Availability, Scenario, SimulatedOption, StartTime
from expertmesh.simulator.service_time import ServiceTime
from expertmesh.simulator.slo_rates import slo_rates
from expertmesh.simulator.spot_zones import spot_zone
from expertmesh.spec.scenario import OptionManifest, ScenarioManifest, read_scenario


def load_scenario(file: Path, seed: int | None = None) -> Scenario:
    """`seed`: in place of the file's. Raises ManifestError."""
    return to_scenario(read_scenario(file), seed)


def to_scenario(manifest: ScenarioManifest, seed: int | None = None) -> Scenario:
    chosen_seed = manifest.seed if seed is None else seed
    slo = Slo(manifest.slo.ttft_s, manifest.slo.tpot_s, manifest.slo.attainment)
    return Scenario(
        name=manifest.name,
        options=tuple(_option(manifest, option, slo, chosen_seed) for option in manifest.options),
        slo=slo,
        max_wait_s=manifest.max_wait_s,
        min_groups=manifest.min_groups,
        budget_usd_per_hour=manifest.budget.usd_per_hour if manifest.budget else None,
        tick_s=manifest.tick_s,
        metric_delay_s=manifest.metric_delay_s,
        drain_deadline_s=manifest.drain_deadline_s,
        initial_groups=tuple(option.initial_groups for option in manifest.options),
        seed=chosen_seed,
        output_cv2=manifest.output_cv2,
    )


def _option(
    manifest: ScenarioManifest, option: OptionManifest, slo: Slo, seed: int
) -> SimulatedOption:
    service = ServiceTime(**option.service.model_dump())
    start, layout = option.start, option.parallelism.to_core()
    return SimulatedOption(
        option=GroupOption(
            pool=option.pool,
            parallelism=Parallelism(layout.tensor, layout.data, layout.expert),
            usd_per_hour=option.usd_per_hour,
            rates=_rates(manifest, option, service, slo),
            start_s=start.median_s if start.told_s is None else start.told_s,
        ),
        service=service,
        start=StartTime(start.median_s, start.sigma, start.failure_probability),
        nodes=option.nodes,
        market=option.market,
        max_groups=option.max_groups,
        availability=_availability(option, seed),
    )


def _rates(
    manifest: ScenarioManifest, option: OptionManifest, service: ServiceTime, slo: Slo
) -> GroupRates:
    if option.rates is not None:
        return GroupRates(**option.rates.model_dump())
    typical = manifest.typical_request
    true = slo_rates(
        service,
        slo.tpot_s,
        typical.prompt_tokens,
        typical.output_tokens,
        manifest.output_cv2,
    )
    return GroupRates(
        in_flight=float(true.batch) * option.plan_error,
        prefill_tokens_per_s=float(true.prefill_tokens_per_s) * option.plan_error,
        decode_tokens_per_s=float(true.decode_tokens_per_s) * option.plan_error,
        lone_tpot_s=service.iteration_s(1, typical.prompt_tokens, 0) / option.plan_error,
    )


def _availability(option: OptionManifest, seed: int) -> Availability | None:
    zone = option.availability
    if zone is None:
        return None
    if zone.generated_hours is None:
        return Availability(zone.at_s, zone.nodes, zone.notice_s)
    nodes = option.nodes * option.max_groups
    return spot_zone(nodes, zone.generated_hours * 3600, f"{seed}/{option.pool}", zone.notice_s)
