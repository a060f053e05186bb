"""`expertmesh plan`: what a person and a program get, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

import expertmesh.cli.plan as command
from expertmesh.cli.plan_view import render
from expertmesh.core.planner.plan import Plan
from expertmesh.core.planner.question import Checkpoint, Question, Targets
from expertmesh.core.planner.search import search
from expertmesh.errors import UpstreamUnavailable
from expertmesh.spec.catalog import models
from expertmesh.spec.planning import catalog_pool

app = typer.Typer()
app.command("plan")(command.plan)

QWEN = "Qwen/Qwen3-30B-A3B-Instruct-2507"
MANIFEST = f"""
kind: ModelDeployment
name: small
model: {{source: {QWEN}, max_model_len: 16384}}
parallelism: auto
pools: [ours]
scaling: {{slo: {{ttft_s: 3.0, tpot_s: 0.04}}}}
"""
PLATFORM = """
kind: Platform
name: here
pools:
  - {name: ours, market: on-demand, usd_per_node_hour: 16, accelerator: H100,
     accelerators_per_node: 8, nodes: {max: 2}}
  - {name: other, market: spot, usd_per_node_hour: 8, accelerator: h200, accelerators_per_node: 4}
  - {name: cpus, market: local, usd_per_node_hour: 1}
prices:
  - {accelerator: B200, usd_per_hour: 4, market: on-demand, provider: Us, dated: 2024-01-01,
     source: a bill}
"""


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(source: str, revision: str, name: str) -> Path | None:
        raise UpstreamUnavailable("no connection")

    monkeypatch.setattr(command, "hub_file", unreachable)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    manifest, platform = tmp_path / "small.yaml", tmp_path / "platform.yaml"
    manifest.write_text(MANIFEST)
    platform.write_text(PLATFORM)
    return str(manifest), str(platform)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def shown(*arguments: str, code: int = 0) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    return result.output


def plans(*arguments: str, code: int = 0) -> list[dict[str, Any]]:
    found = json.loads(shown(*arguments, "--json", code=code))["plans"]
    assert isinstance(found, list)
    return found


def refusal(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert not result.stdout
    return result.stderr


def test_a_name_is_planned_on_the_usual_pools() -> None:
    output = shown("Qwen3-30B-A3B")
    rows = [line for line in output.splitlines() if line.lstrip().startswith(("H100", "H200"))]
    assert len(rows) == 2 and all(" yes " in row for row in rows)
    for header in ("fits", "groups", "KV tokens", "users", "tokens/s", "$/h", "Wh/Mtok"):
        assert header in output
    assert "on-demand (Verda, 2026-11-24)" in output
    for line in ("why", "latency", "limit", "engine", "failures"):
        assert f"    {line}" in output


def test_no_colours_in_a_pipe() -> None:
    assert "\x1b" not in shown("Qwen3-30B-A3B", "--pool", "H100", "--explain")


def test_lines_are_whole_in_a_pipe() -> None:
    output = shown("Qwen3-30B-A3B", "--pool", "GB300")
    rows = [line for line in output.splitlines() if line.startswith(" GB300 ")]
    assert len(rows) == 1 and " yes " in rows[0] and "tpot, " in rows[0]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_figures_stay_whole_on_every_terminal(width: int) -> None:
    targets = Targets(16384, 2000, 500, 2.0, 0.05)
    asked = Question((Checkpoint(QWEN, models()[QWEN].shape),), targets)
    subject = command.Subject("small", asked.checkpoints, targets)
    answers = [
        command.Answer(subject, search(asked, catalog_pool(gpu, 0.0)), 0.1)
        for gpu in ("H100", "RTX-PRO-6000")
    ]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(answers, width=width, details=True, explain=True))
    output = console.export_text()
    assert max(map(len, output.splitlines())) <= width
    assert "…" not in output
    table = output.partition("price H100")[0]
    for plan in (answer.plan for answer in answers):
        assert isinstance(plan, Plan)
        assert f"{plan.usd_per_hour:,.2f}" in table
        price = plan.usd_per_mtok
        assert f"{price.low:.2f}-{price.high:.2f}" in table and f"{plan.users:,}" in table
    assert ("Wh/Mtok" in table) == (width >= 120)


def test_json_has_what_a_chart_and_a_controller_need() -> None:
    (plan,) = plans(QWEN, "--pool", "H100")
    assert plan["fits"] is True and plan["checkpoint"] == QWEN
    (group,) = plan["groups"]
    parallelism = group["group_spec"]["parallelism"]
    assert parallelism["tensor"] * parallelism["data"] == group["gpus"] == plan["gpus"]
    assert group["group_spec"]["engine"] == group["engine"]
    assert group["group_spec"]["max_model_len"] == plan["targets"]["context_tokens"]
    assert group["node_resources"]["gpus"] <= plan["pool"]["gpus_per_node"]
    assert group["vllm_serve"][:3] == ["vllm", "serve", QWEN]
    memory = dict(group["memory_bytes"])
    assert memory.pop("gpu") == sum(memory.values())
    for figure in ("tokens_per_s", "usd_per_mtok_out"):
        assert plan[figure]["low"] < plan[figure]["expected"] < plan[figure]["high"]
    assert plan["runners_up"] and plan["ruled_out"] is not None
    assert plan["search_s"] >= 0 and plan["considered"] > 1


def test_a_manifest_brings_its_targets_and_its_pools(files: tuple[str, str]) -> None:
    manifest, platform = files
    (plan,) = plans(manifest, "--platform", platform)
    assert plan["model"] == "small"
    assert plan["targets"]["tpot_s"] == 0.04 and plan["targets"]["ttft_s"] == 3.0
    assert plan["targets"]["context_tokens"] == 16384
    assert plan["pool"]["name"] == "ours" and plan["pool"]["usd_per_gpu_hour"] == 2.0
    assert plan["pool"]["max_nodes"] == 2
    (changed,) = plans(manifest, "--platform", platform, "--tpot", "0.1", "--context", "8192")
    assert changed["targets"]["tpot_s"] == 0.1
    assert changed["targets"]["context_tokens"] == 8192
    assert changed["usd_per_mtok_out"]["expected"] < plan["usd_per_mtok_out"]["expected"]


def test_the_options_of_the_controller_are_shown(files: tuple[str, str], tmp_path: Path) -> None:
    manifest, platform = files
    (found,) = plans(manifest, "--platform", platform)
    first, *others = found["options"]
    group = found["groups"][0]
    assert first["parallelism"] == group["group_spec"]["parallelism"]
    assert first["in_flight"] == group["users"]
    assert others and all(option["gpus"] != first["gpus"] for option in others)
    seconds = 2000 / first["prefill_tokens_per_s"] + 500 / first["decode_tokens_per_s"]
    assert 500 / seconds == pytest.approx(group["tokens_per_s"]["expected"])
    text = shown(manifest, "--platform", platform)
    assert "starts in s" in text and "smaller than the best, +" in text
    poor = tmp_path / "poor.yaml"
    poor.write_text(MANIFEST.replace("scaling: {", "scaling: {budget: {usd_per_hour: 4}, "))
    (found,) = plans(str(poor), "--platform", platform)
    assert found["options"] and all(option["usd_per_hour"] <= 4 for option in found["options"])


def test_sizes_that_the_manifest_gives_are_the_options(
    files: tuple[str, str], tmp_path: Path
) -> None:
    manifest = tmp_path / "given.yaml"
    given = "parallelism: [{expert: 8}, {expert: 1, tensor: 2}]"
    manifest.write_text(MANIFEST.replace("parallelism: auto", given))
    (found,) = plans(str(manifest), "--platform", files[1])
    sizes = [tuple(option["parallelism"].values()) for option in found["options"]]
    assert sizes == [(1, 8, 8), (2, 1, 1)]


def test_a_limit_of_sequences_limits_users(files: tuple[str, str], tmp_path: Path) -> None:
    manifest = tmp_path / "few.yaml"
    manifest.write_text(MANIFEST + "engine: {max_num_seqs: 4}\n")
    (found,) = plans(str(manifest), "--platform", files[1])
    (group,) = found["groups"]
    assert group["batch_per_rank"] == 4 and group["limit"] == "sequences"


def test_the_load_of_experts_changes_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "loads.json"
    balances = {}
    for name, tokens in (("even", [9] * 128), ("hot", [90] * 8 + [1] * 120)):
        layer = {str(expert): count for expert, count in enumerate(tokens)}
        file.write_text(json.dumps({"layers": [{"layer": 0, "tokens": layer}]}))
        (found,) = plans(QWEN, "--pool", "H200", "--expert-load", str(file))
        balances[name] = found["groups"][0]["balance"]
    (usual,) = plans(QWEN, "--pool", "H200")
    assert balances["even"]["before"] == pytest.approx(1.0, abs=0.06)
    assert balances["hot"]["before"] < usual["groups"][0]["balance"]["before"]
    text = shown(QWEN, "--pool", "H200", "--explain", "--expert-load", str(file))
    assert "balancedness" in text and "copies" in text and "<- chosen" in text


def test_loads_that_cannot_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXPERTMESH_MESH_TOKEN", raising=False)
    assert "no such file" in refusal(QWEN, "--expert-load", "nowhere.json")
    assert "EXPERTMESH_MESH_TOKEN is not set" in refusal(QWEN, "--expert-load", "http://x/em")
    assert "has no experts" in refusal("Qwen2.5-72B", "--expert-load", "nowhere.json")
    (tmp_path / "loads.json").write_text('{"layers": [{"layer": 0, "tokens": {"500": 1}}]}')
    assert "the model has 128 experts" in refusal(QWEN, "--expert-load", "loads.json")


def test_the_share_of_requests_in_time_is_part_of_the_target() -> None:
    arguments = (QWEN, "--pool", "H200", "--ttft", "0.08", "--tpot", "0.2")
    (most,) = plans(*arguments, "--attainment", "0.5")
    (nearly_all,) = plans(*arguments, "--attainment", "0.999")
    assert nearly_all["users"] < most["users"]
    assert "for 0.99 of requests" in shown(QWEN, "--pool", "H200")
    (none,) = plans(QWEN, "--pool", "H200", "--attainment", "1.5", code=1)
    assert "no share of requests" in none["problem"]


def test_pools_can_be_named(files: tuple[str, str]) -> None:
    manifest, platform = files
    found = plans(manifest, "--platform", platform, "--pool", "other", "--pool", "b200")
    assert [plan["pool"]["name"] for plan in found] == ["other", "B200"]
    assert found[0]["pool"]["gpus_per_node"] == 4
    assert found[1]["pool"]["usd_per_gpu_hour"] == 4.0


def test_old_prices_are_said_to_be_old(files: tuple[str, str]) -> None:
    manifest, platform = files
    output = shown(manifest, "--platform", platform, "--pool", "B200")
    assert "Us, 2024-01-01, STALE: older than 90 days" in output


def test_a_gpu_without_a_known_price_has_no_cost() -> None:
    output = shown(QWEN, "--pool", "H20")
    assert "no price is known" in output
    (row,) = (line for line in output.splitlines() if line.lstrip().startswith("H20 "))
    assert row.count("?") == 2


def test_comparing_takes_all_gpus_and_several_models() -> None:
    output = shown("Qwen3-30B-A3B", "gpt-oss-20b", "--compare")
    assert output.count("B300") >= 2 and output.count("MI300X") >= 2
    assert "gpt-oss-20b" in output and "    engine" not in output


def test_explaining_says_why_others_lost() -> None:
    output = shown("Qwen3-30B-A3B", "--pool", "L40S", "--explain")
    assert "candidates in" in output and "runner-up" in output and "lost by" in output
    assert "memory" in output and "GiB of a GPU with 44.4" in output
    assert "short on each" in output


def test_objectives_and_users() -> None:
    (small,) = plans(QWEN, "--pool", "H100", "--objective", "smallest")
    assert small["gpus"] == 1
    (many,) = plans(QWEN, "--pool", "H100", "--users", "1000", "--spare", "1")
    assert many["users"] == 1000 and many["availability"]["spare_groups"] == 1
    (apart,) = plans("DeepSeek-V3", "--pool", "H200", "--apart")
    assert apart["serving"] in ("apart", "together")


def test_what_does_not_fit_says_by_how_much_and_ends_with_1() -> None:
    output = shown("DeepSeek-V3", "--pool", "L40S", "--nodes", "1", code=1)
    assert " no " in output and "does not fit" in output and "GiB short" in output
    assert "nearest:" in output
    (plan,) = plans("DeepSeek-V3", "--pool", "L40S", "--nodes", "1", code=1)
    assert plan["fits"] is False and plan["constraint"] == "memory" and plan["nearest"]


def test_one_pool_that_fits_is_enough() -> None:
    found = plans("deepseek-ai/DeepSeek-V3", "--pool", "H100", "--pool", "B300", "--nodes", "1")
    assert [plan["fits"] for plan in found] == [False, True]


def test_targets_that_nobody_meets_are_answered_with_the_nearest() -> None:
    output = shown("DeepSeek-V3", "--pool", "H200", "--tpot", "0.001", code=1)
    assert "no group meets the targets" in output and "is possible in this pool" in output


def test_nonsense_is_refused_with_what_is_possible() -> None:
    assert "write seconds above 0" in shown(QWEN, "--pool", "H100", "--tpot", "-1", code=1)
    beyond = shown(QWEN, "--pool", "H100", "--context", "999999", code=1)
    assert "beyond the model's 262,144" in beyond


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Qwen3-30B-A3B", "--pool", "H2000"), ("no such GPU", "did you mean 'H200'?")),
        (("nobody/nothing",), ("nobody/nothing", "catalog has no such model")),
        (("Qwen3-30B",), ("Qwen3-30B", "did you mean", "Qwen3-30B-A3B")),
        (("not a model",), ("not a model", "the catalogue has no such model", "Kimi-K2")),
        (("./nowhere",), ("nowhere", "no such folder")),
        (("nowhere.yaml",), ("nowhere.yaml", "no such file")),
    ],
)
def test_what_is_not_known_is_refused(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    message = refusal(*arguments)
    assert message.startswith("error: ")
    assert all(word in message for word in words), message


def test_a_pool_without_gpus_is_refused(files: tuple[str, str]) -> None:
    manifest, platform = files
    message = refusal(manifest, "--platform", platform, "--pool", "cpus")
    assert "has no GPUs" in message and "ours, other" in message


def test_pools_that_cannot_be_planned_are_said(files: tuple[str, str]) -> None:
    manifest, platform = files
    assert "its pools ours are in a platform file: use --platform" in shown(manifest)
    text = Path(manifest).read_text()
    Path(manifest).write_text(text.replace("[ours]", "[cpus]"))
    output = shown(manifest, "--platform", platform)
    assert "not planned, as they have no GPUs here: cpus" in output
    Path(manifest).write_text(text.replace("[ours]", "[ours, cpus]"))
    (plan,) = plans(manifest, "--platform", platform)
    assert plan["pool"]["name"] == "ours"
    assert plan["warnings"] == ["not planned, as they have no GPUs here: cpus"]


def test_a_negative_price_is_refused(files: tuple[str, str]) -> None:
    manifest, platform = files
    text = Path(platform).read_text().replace("usd_per_node_hour: 16", "usd_per_node_hour: -16")
    Path(platform).write_text(text)
    assert "usd_per_node_hour: -16: Input should be greater" in refusal(
        manifest, "--platform", platform
    )


def test_a_platform_is_no_model(files: tuple[str, str]) -> None:
    assert "expected one ModelDeployment" in refusal(files[1])
    assert "expected one Platform" in refusal(files[0], "--platform", files[0])


def test_a_model_that_others_serve_needs_no_plan(tmp_path: Path) -> None:
    file = tmp_path / "external.yaml"
    file.write_text(
        "kind: ModelDeployment\nname: far\nmodel: {max_model_len: 1024}\nexternal:\n"
        "  - {pool: api, model: big, tariff: {usd_per_mtok_in: 1, usd_per_mtok_cached: 1, "
        "usd_per_mtok_out: 2}}\n"
    )
    assert "nothing to plan" in refusal(str(file))


def test_a_usual_request_fits_in_a_short_context(files: tuple[str, str]) -> None:
    manifest, platform = files
    Path(manifest).write_text(MANIFEST.replace("16384", "1000"))
    (plan,) = plans(manifest, "--platform", platform)
    targets = plan["targets"]
    assert (targets["input_tokens"], targets["output_tokens"]) == (800, 200)
    (told,) = plans(QWEN, "--pool", "H100", "--input", "40000", "--output", "1000")
    assert told["targets"]["context_tokens"] == 41000
    assert plans(QWEN, "--pool", "H100")[0]["targets"]["input_tokens"] == 2000


def test_a_cache_in_fp8_holds_more(files: tuple[str, str]) -> None:
    manifest, platform = files
    (plain,) = plans(manifest, "--platform", platform)
    Path(manifest).write_text(MANIFEST + "engine: {kv_cache_dtype: fp8}\n")
    (fp8,) = plans(manifest, "--platform", platform)
    (told,) = plans(manifest, "--platform", platform, "--kv", "bf16")
    per_gpu = [p["groups"][0]["kv_tokens"] / p["gpus"] for p in (plain, fp8, told)]
    assert per_gpu[1] > 1.5 * per_gpu[0] and per_gpu[2] == per_gpu[0]
    assert fp8["groups"][0]["engine"]["kv_cache_dtype"] == "fp8"


def test_a_folder_is_read_without_a_network(tmp_path: Path) -> None:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "moe_intermediate_size": 256,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (plan,) = plans(str(tmp_path), "--pool", "L40S")
    assert plan["fits"] is True and plan["targets"]["context_tokens"] == 4096


def test_the_command_is_part_of_the_program() -> None:
    from expertmesh.cli.main import app as program

    result = CliRunner().invoke(program, ["plan", "--help"])
    assert result.exit_code == 0 and "--compare" in result.output
