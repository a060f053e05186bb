"""`parallelism`: the planner's sizes or the manifest's, as options, and clear refusals."""

from pathlib import Path

import pytest

from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.domain.option import GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.core.perf.start import NODE_S, UNPLANNED_S
from expertmesh.core.planner.engine_arguments import engine_settings
from expertmesh.core.planner.search import SIZES
from expertmesh.errors import ManifestError
from expertmesh.launch.chosen import chosen_lines
from expertmesh.spec.auto_parallelism import choose
from expertmesh.spec.catalog import models
from expertmesh.spec.group_options import INPUT_TOKENS, OUTPUT_TOKENS, Wanted
from expertmesh.spec.load import System, load_system

QWEN = "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8"
PLATFORM = """
kind: Platform
name: here
pools:
  - {name: big, market: on-demand, usd_per_node_hour: 27, accelerator: H200,
     accelerators_per_node: 8, nodes: {max: 4}}
  - {name: big-spot, market: spot, usd_per_node_hour: 9, accelerator: H200,
     accelerators_per_node: 8, nodes: {min: 2, max: 4}}
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


def test_the_planner_chooses_for_each_pool(tmp_path: Path) -> None:
    loaded = system(tmp_path, "big, new")
    (model,) = loaded.models
    chosen = loaded.chosen["m"]
    assert model.options == chosen.options
    assert [plan.pool.name for plan in chosen.plans] == [option.pool for option in model.options]
    for name in ("big", "new"):
        own = [option for option in model.options if option.pool == name]
        assert 1 <= len(own) <= SIZES
        assert len({option.workers for option in own}) == len(own)
    first = model.options[0]
    assert (model.parallelism, model.engine) == (first.parallelism, first.engine)
    for option, plan in zip(model.options, chosen.plans, strict=True):
        group = plan.serving_group
        copies = group.layout.redundant_experts
        assert option.engine == engine_settings(group, plan.pool).engine
        assert option.engine.get("enable_eplb", False) is (copies > 0)
        assert option.usd_per_hour == pytest.approx(group.usd_per_hour)
        assert option.workers == group.gpus
    assert chosen.plans[0].pool.usd_per_gpu_hour == 27 / 8


def test_the_rates_of_an_option_are_those_of_its_plan(tmp_path: Path) -> None:
    """A group that is busy for all of a second with usual requests does the plan's tokens in it."""
    loaded = system(tmp_path, "big, new")
    for option, plan in zip(loaded.models[0].options, loaded.chosen["m"].plans, strict=True):
        seconds = option.rates.seconds(INPUT_TOKENS, OUTPUT_TOKENS)
        assert seconds is not None
        requests_per_s = plan.serving_group.tokens_per_s.expected / OUTPUT_TOKENS
        assert seconds * requests_per_s == pytest.approx(1.0, rel=0.02)
        assert option.rates.in_flight == plan.serving_group.users > 16


def test_pools_that_differ_in_price_alone_get_the_same_groups(tmp_path: Path) -> None:
    options = system(tmp_path, "big, big-spot").models[0].options
    dear, cheap = ([o for o in options if o.pool == name] for name in ("big", "big-spot"))
    assert [(o.parallelism, o.rates, o.engine) for o in dear] == [
        (o.parallelism, o.rates, o.engine) for o in cheap
    ]
    for one, other in zip(dear, cheap, strict=True):
        assert other.usd_per_hour == pytest.approx(one.usd_per_hour / 3)
        # Its two nodes are there already.
        assert one.start_s - other.start_s == pytest.approx(NODE_S if one.workers <= 16 else 0)


def test_groups_carry_the_users_of_the_plan_or_of_the_manifest(tmp_path: Path) -> None:
    (planned,) = system(tmp_path, "big, new").models
    assert planned.scaling.target_in_flight_per_group == planned.options[0].rates.in_flight
    (own,) = system(tmp_path, "big", extra="scaling: {target_in_flight_per_group: 7}\n").models
    assert own.scaling.target_in_flight_per_group == 7
    assert {option.rates.in_flight for option in own.options} == {7}


def test_no_group_costs_more_than_the_budget(tmp_path: Path) -> None:
    rich = system(tmp_path, "new").models[0].options
    least = min(option.usd_per_hour for option in rich)
    assert max(option.usd_per_hour for option in rich) > least
    extra = f"scaling: {{budget: {{usd_per_hour: {least}}}}}\n"
    poor = system(tmp_path, "new", extra=extra).models[0].options
    assert all(option.usd_per_hour <= least for option in poor)
    message = refusal(tmp_path, "big", extra="scaling: {budget: {usd_per_hour: 2}}\n")
    assert "parallelism: 'auto': pool big: a group costs at least $" in message
    assert "may cost $2.00; a budget of $" in message


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
    assert plain["max_num_seqs"] > 0 and "seed" not in plain
    engine = system(tmp_path, "big", extra="engine: {enable_eplb: false, seed: 1}\n")
    assert engine.models[0].engine["enable_eplb"] is False
    assert engine.models[0].engine["seed"] == 1
    assert (
        engine.models[0].engine.items()
        >= {k: v for k, v in plain.items() if k != "enable_eplb"}.items()
    )


def test_the_options_can_be_told_to_a_person(tmp_path: Path) -> None:
    loaded = system(tmp_path, "big, new")
    lines = list(chosen_lines(loaded.chosen))
    options = loaded.models[0].options
    assert lines[0].startswith(f"groups of m: {len(options)} options (")
    for line, option in zip(lines[1:], options, strict=True):
        assert line.startswith(f"  {option.name}: expert ")
        assert f"${option.usd_per_hour:.2f} an hour" in line
        assert "KV tokens" in line and "prompt tokens/s" in line and "ready after about" in line
    head, line = chosen_lines(system(tmp_path, "cpus", auto="{expert: 4}").chosen)
    assert head == "groups of m: 1 option (as the manifest says)"
    assert "cpus/t1d4e4" in line and line.endswith("its rates are not known: it has no GPUs")


def test_without_gpus_up_to_two_ranks_share_the_experts() -> None:
    shape = models()[QWEN].shape
    wanted = Wanted(QWEN, 1024, Slo())
    for pools, ranks in (
        ((cpu_pool(1, 4),), 2),
        ((cpu_pool(4, 1),), 2),
        ((cpu_pool(1, 1),), 1),
        ((cpu_pool(1, 4), cpu_pool(1, 1)), 1),
    ):
        chosen = choose(wanted, shape, pools)
        assert len(chosen.options) == len(pools) and chosen.plans == ()
        for option in chosen.options:
            assert option.parallelism == Parallelism(tensor=1, data=ranks, expert=ranks)
            assert option.rates == GroupRates(16.0)
            assert option.start_s == UNPLANNED_S
        assert "without GPUs" in chosen.why
    dense = models()["Qwen/Qwen2.5-72B"].shape
    (option,) = choose(wanted, dense, (cpu_pool(4, 4),)).options
    assert option.parallelism == Parallelism(1, 1, 1)


def test_on_cpus_a_model_loads_and_says_so(tmp_path: Path) -> None:
    loaded = system(tmp_path, "cpus")
    assert loaded.models[0].parallelism == Parallelism(1, 2, 2)
    assert loaded.models[0].scaling.target_in_flight_per_group == 16
    assert "2 ranks share the experts" in next(chosen_lines(loaded.chosen))


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
        ("automatic", ("parallelism", "'automatic'", "write auto, sizes")),
        ("4", ("parallelism", "write auto, sizes")),
        ("{expert: 6, tensor: 4}", ("expert 6", "no multiple of tensor 4")),
        ("{expert: 4, tensor: 2, data: 4}", ("expert 4", "leave data out")),
        ("{expert: 1, redundant_experts: 8}", ("redundant_experts", "remove them")),
        ("{tensor: 2}", ("parallelism.expert", "missing")),
        ("{expert: 2, tensr: 2}", ("parallelism.tensr", "did you mean 'tensor'?")),
        ("[]", ("parallelism", "at least 1")),
        ("[{expert: 8}, auto]", ("parallelism.1", "'auto'")),
        ("[{expert: 8}, {expert: 8, redundant_experts: 8}]", ("parallelism", "there twice")),
        ("[{expert: 8}, {expert: 6, tensor: 4}]", ("parallelism.1", "no multiple of tensor 4")),
        ("[{expert: 8}, {expert: 64}]", ("parallelism.1", "64", "largest of its pools holds 32")),
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
    (option,) = model.options
    assert option.rates.seconds(2000, 500) is not None
    assert model.engine["eplb_config"] == {"num_redundant_experts": 16}
    small = refusal(tmp_path, "tiny", auto="{expert: 1, tensor: 2}")
    assert "holds at most 1 workers, a group needs 2" in small


def test_a_manifest_may_give_several_sizes(tmp_path: Path) -> None:
    (model,) = system(tmp_path, "big, new", auto="[{expert: 8}, {expert: 32}]").models
    # The second is too large for the two nodes of the other pool.
    assert [option.name for option in model.options] == [
        "big/t1d8e8",
        "big/t1d32e32",
        "new/t1d8e8",
    ]
    assert model.parallelism == Parallelism(1, 8, 8)
    assert all(option.rates.decode_tokens_per_s for option in model.options)
    assert [option.usd_per_hour for option in model.options] == [27, 108, 14]


def test_sizes_that_cannot_be_rated_are_kept_as_they_are(tmp_path: Path) -> None:
    strict = "scaling: {slo: {tpot_s: 0.001}}\n"
    for pools, source, extra, sizes, why in (
        ("big", "nobody/nothing", "", "{expert: 8}", "the catalogue has no nobody/nothing"),
        ("odd", QWEN, "", "{expert: 8}", "the catalogue has no X9"),
        ("big", QWEN, strict, "{expert: 8}", "the target 1 ms"),
        ("big", QWEN, "", "{expert: 1, tensor: 8}", "1,536 wide are cut in 8"),
        ("big", "Qwen/Qwen3-235B-A22B", "", "{expert: 2}", "does not fit"),
    ):
        loaded = system(tmp_path, pools, source, extra, auto=sizes)
        (option,) = loaded.models[0].options
        assert option.rates == GroupRates(16.0)
        assert option.start_s == UNPLANNED_S
        (reason,) = loaded.chosen["m"].unrated.values()
        assert why in reason
        assert reason in list(chosen_lines(loaded.chosen))[1]


def test_the_revision_reaches_the_engine_of_every_option(tmp_path: Path) -> None:
    source = f"{QWEN}, revision: abc"
    (model,) = system(tmp_path, "big, new", source).models
    assert {option.engine["tokenizer_revision"] for option in model.options} == {"abc"}


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (
            "{max_num_seqs: 512, max_num_batched_tokens: 256}",
            ("engine.max_num_seqs", "512", "above max_num_batched_tokens 256", "at most 256"),
        ),
        (
            "{all2all_backend: mori_low_latency}",
            ("engine.all2all_backend", "'mori_low_latency'", "no kernels", "deepep_low_latency"),
        ),
        (
            "{enable_eplb: true, eplb_config: {num_redundant_experts: 3}}",
            ("engine.eplb_config", "3", "128 + 3 experts", "write 8"),
        ),
    ],
)
def test_arguments_with_which_vllm_would_not_start_are_refused(
    tmp_path: Path, engine: str, words: tuple[str, ...]
) -> None:
    message = refusal(tmp_path, "big", auto="{expert: 8}", extra=f"engine: {engine}\n")
    assert all(word in message for word in ("model.yaml", "pool big", *words)), message


def test_experts_that_cannot_be_moved_are_left_where_they_are(tmp_path: Path) -> None:
    extra = "engine: {enable_eplb: true}\n"
    message = refusal(
        tmp_path, "big", source="openai/gpt-oss-120b", auto="{expert: 8}", extra=extra
    )
    assert "engine.enable_eplb: True: pool big: vLLM cannot move experts of this model" in message


def test_a_step_too_large_for_the_buffers_of_the_exchange_is_said(tmp_path: Path) -> None:
    extra = (
        "engine: {all2all_backend: deepep_low_latency, max_num_batched_tokens: 32768}\n"
        "scaling: {slo: {tpot_s: 0.1}}\n"
    )
    sizes = "{expert: 16, redundant_experts: 16}"
    loaded = system(tmp_path, "big", auto=sizes, extra=extra)
    assert "does not fit" in loaded.chosen["m"].unrated["big/t1d16e16"]
    small = extra.replace("32768", "256")
    assert not system(tmp_path, "big", auto=sizes, extra=small).chosen["m"].unrated
