"""`parallelism: auto`: the planner's sizes for GPUs, two ranks without, and clear refusals."""

from pathlib import Path

import pytest

from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.domain.slo import Slo
from expertmesh.errors import ManifestError
from expertmesh.launch.chosen import chosen_lines
from expertmesh.spec.auto_parallelism import Wanted, choose
from expertmesh.spec.catalog import models
from expertmesh.spec.load import System, load_system

QWEN = "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8"
PLATFORM = """
kind: Platform
name: here
pools:
  - {name: big, market: on-demand, usd_per_node_hour: 27, accelerator: H200,
     accelerators_per_node: 8, nodes: {max: 4}}
  - {name: new, market: spot, usd_per_node_hour: 14, accelerator: B200,
     accelerators_per_node: 8, nodes: {max: 2}}
  - {name: tiny, market: on-demand, usd_per_node_hour: 1, accelerator: L40S,
     accelerators_per_node: 1}
  - {name: odd, market: on-demand, usd_per_node_hour: 1, accelerator: X9, accelerators_per_node: 8}
  - {name: cpus, market: local, usd_per_node_hour: 1, nodes: {max: 4}}
"""


def system(
    tmp_path: Path, pools: str, source: str = QWEN, extra: str = "", auto: str = "auto"
) -> System:
    (tmp_path / "platform.yaml").write_text(PLATFORM)
    (tmp_path / "model.yaml").write_text(
        "kind: ModelDeployment\nname: m\n"
        f"model: {{source: {source}, max_model_len: 16384}}\n"
        f"parallelism: {auto}\npools: [{pools}]\n{extra}"
    )
    return load_system([tmp_path / "platform.yaml", tmp_path / "model.yaml"])


def refusal(tmp_path: Path, pools: str, **changes: str) -> str:
    with pytest.raises(ManifestError) as caught:
        system(tmp_path, pools, **changes)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def cpu_pool(workers: int, nodes: int) -> Pool:
    return Pool("cpus", Market.LOCAL, 1.0, None, 0, workers, 0, nodes)


def test_the_planner_chooses_for_all_pools(tmp_path: Path) -> None:
    loaded = system(tmp_path, "big, new")
    (model,) = loaded.models
    chosen = loaded.chosen["m"]
    assert [plan.pool.name for plan in chosen.plans] == ["big", "new"]
    assert {plan.serving_group.parallelism for plan in chosen.plans} == {model.parallelism}
    sizes = model.parallelism
    assert sizes.tensor * sizes.data <= 16
    copies = chosen.plans[0].serving_group.layout.redundant_experts
    assert model.engine.get("enable_eplb", False) is (copies > 0)
    assert chosen.plans[0].pool.usd_per_gpu_hour == 27 / 8


def test_groups_carry_the_users_of_the_plan(tmp_path: Path) -> None:
    loaded = system(tmp_path, "big, new")
    users = [plan.serving_group.users for plan in loaded.chosen["m"].plans]
    assert loaded.models[0].scaling.target_in_flight_per_group == min(users) > 16
    own = system(tmp_path, "big", extra="scaling: {target_in_flight_per_group: 7}\n")
    assert own.models[0].scaling.target_in_flight_per_group == 7


def test_targets_change_the_plan(tmp_path: Path) -> None:
    strict = system(tmp_path, "big", extra="scaling: {slo: {tpot_s: 0.03}}\n")
    loose = system(tmp_path, "big", extra="scaling: {slo: {tpot_s: 0.1}}\n")
    for loaded, tpot_s in ((strict, 0.03), (loose, 0.1)):
        assert loaded.chosen["m"].plans[0].serving_group.tpot_s.expected <= tpot_s
    before, after = (
        loaded.models[0].scaling.target_in_flight_per_group for loaded in (strict, loose)
    )
    assert before < after


def test_the_manifest_s_own_arguments_come_first(tmp_path: Path) -> None:
    plain = system(tmp_path, "big").models[0].engine
    assert "max_num_seqs" not in plain and "gpu_memory_utilization" not in plain
    engine = system(tmp_path, "big", extra="engine: {enable_eplb: false, seed: 1}\n")
    assert engine.models[0].engine["enable_eplb"] is False
    assert engine.models[0].engine["seed"] == 1
    assert (
        engine.models[0].engine.items()
        >= {k: v for k, v in plain.items() if k != "enable_eplb"}.items()
    )


def test_the_plan_can_be_told_to_a_person(tmp_path: Path) -> None:
    lines = list(chosen_lines(system(tmp_path, "big, new").chosen))
    assert len(lines) == 3 and lines[0].startswith("plan of m: expert ")
    assert "in big: " in lines[1] and "KV tokens" in lines[1] and "$27.00 an hour" in lines[1]
    assert "in new: " in lines[2] and "tokens/s" in lines[2]
    assert list(chosen_lines(system(tmp_path, "big", auto="{expert: 8}").chosen)) == []


def test_without_gpus_up_to_two_ranks_share_the_experts() -> None:
    shape = models()[QWEN].shape
    wanted = Wanted(QWEN, shape, 1024, Slo())
    for pools, ranks in (
        ((cpu_pool(1, 4),), 2),
        ((cpu_pool(4, 1),), 2),
        ((cpu_pool(1, 1),), 1),
        ((cpu_pool(1, 4), cpu_pool(1, 1)), 1),
    ):
        chosen = choose(wanted, pools)
        assert chosen.parallelism == Parallelism(tensor=1, data=ranks, expert=ranks)
        assert "without GPUs" in chosen.why and chosen.plans == ()
        assert chosen.users_per_group is None
    dense = Wanted("d", models()["Qwen/Qwen2.5-72B"].shape, 1024, Slo())
    assert choose(dense, (cpu_pool(4, 4),)).parallelism == Parallelism(1, 1, 1)


def test_on_cpus_a_model_loads_and_says_so(tmp_path: Path) -> None:
    loaded = system(tmp_path, "cpus")
    assert loaded.models[0].parallelism == Parallelism(1, 2, 2)
    assert loaded.models[0].scaling.target_in_flight_per_group == 16
    (line,) = chosen_lines(loaded.chosen)
    assert "2 ranks share the experts" in line


@pytest.mark.parametrize(
    ("pools", "source", "words"),
    [
        ("tiny", QWEN, ("pool tiny", "does not fit", "GiB short")),
        ("big, cpus", QWEN, ("some of its pools have GPUs",)),
        ("odd", QWEN, ("pool odd", "'X9'", "no such GPU")),
        ("big", "nobody/nothing", ("nobody/nothing", "use a local folder")),
    ],
)
def test_what_cannot_be_planned_is_refused(
    tmp_path: Path, pools: str, source: str, words: tuple[str, ...]
) -> None:
    message = refusal(tmp_path, pools, source=source)
    assert "model.yaml: parallelism: 'auto': " in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("automatic", ("parallelism", "'automatic'", "write auto, or sizes")),
        ("4", ("parallelism", "write auto, or sizes")),
        ("{expert: 6, tensor: 4}", ("expert 6", "no multiple of tensor 4")),
        ("{expert: 4, tensor: 2, data: 4}", ("expert 4", "leave data out")),
        ("{expert: 1, redundant_experts: 8}", ("redundant_experts", "remove them")),
        ("{tensor: 2}", ("parallelism.expert", "missing")),
        ("{expert: 2, tensr: 2}", ("parallelism.tensr", "did you mean 'tensor'?")),
    ],
)
def test_sizes_that_make_no_sense_are_refused(
    tmp_path: Path, written: str, words: tuple[str, ...]
) -> None:
    message = refusal(tmp_path, "big", auto=written)
    assert all(word in message for word in words), message


def test_sizes_without_expert_parallelism_and_with_copies(tmp_path: Path) -> None:
    for written, sizes in (
        ("{expert: 1, tensor: 8}", Parallelism(8, 1, 1)),
        ("{expert: 1, tensor: 2, data: 4}", Parallelism(2, 4, 1)),
        ("{expert: 16, tensor: 2, redundant_experts: 16}", Parallelism(2, 8, 16)),
    ):
        (model,) = system(tmp_path, "big", auto=written).models
        assert model.parallelism == sizes
    assert model.engine["eplb_config"] == {"num_redundant_experts": 16}
    small = refusal(tmp_path, "tiny", auto="{expert: 1, tensor: 2}")
    assert "holds at most 1 workers, a group needs 2" in small
