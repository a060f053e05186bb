"""The shipped GPUs and prices, and that mistakes in such files are named."""

import datetime
from typing import Any

import pytest
import yaml

from expertmesh.core.domain.accelerator import (
    PRICE_LASTS_S,
    Price,
    PriceMarket,
    prices_of,
    stale,
)
from expertmesh.core.domain.model_shape import Dtype
from expertmesh.errors import ManifestError
from expertmesh.spec.catalog_hardware import (
    accelerators,
    prices,
    read_accelerators,
    read_prices,
)
from expertmesh.spec.planning import catalog_pool
from expertmesh.spec.platform import PlatformManifest

DAY_S = 86400.0


def gpu(**changes: Any) -> dict[str, Any]:
    return {
        "name": "X1",
        "era": "hopper",
        "memory_gib": 80,
        "memory_gb_per_s": 3000,
        "tflops": {"bf16": 900},
        "tdp_watts": 700,
        "source": "a test",
    } | changes


def price(**changes: Any) -> dict[str, Any]:
    return {
        "accelerator": "H100",
        "usd_per_hour": 2.5,
        "market": "spot",
        "provider": "somebody",
        "dated": datetime.date(2026, 11, 1),
        "source": "a test",
    } | changes


def read_gpus(*gpus: dict[str, Any]) -> Any:
    return read_accelerators(yaml.safe_dump({"accelerators": list(gpus)}), "gpus.yaml")


def read_own(*own: dict[str, Any]) -> tuple[Price, ...]:
    return read_prices(yaml.safe_dump({"prices": list(own)}), "own.yaml", accelerators())


REFERENCE = {
    # Name: memory in marketing GB, TB/s, TFLOPs in BF16, FP8 and FP4, GPUs of a link domain.
    "A100": (80, 2.04, 312, None, None, 8),
    "L40S": (48, 0.864, 362, 733, None, 8),
    "H20": (96, 4.0, 148, 296, None, 8),
    "H800": (80, 3.35, 989, 1979, None, 8),
    "H100": (80, 3.35, 989, 1979, None, 8),
    "H200": (141, 4.8, 989, 1979, None, 8),
    "B200": (180, 7.7, 2250, 4500, 9000, 8),
    "GB200": (192, 8.0, 2500, 5000, 10000, 72),
    "B300": (288, 7.75, 2250, 4500, 13500, 8),
    "GB300": (288, 8.0, 2500, 5000, 15000, 72),
    "MI300X": (192, 5.3, 1307, 2615, None, 8),
    "MI325X": (256, 6.0, 1307, 2615, None, 8),
    "MI355X": (288, 8.0, 2516, 5033, 10066, 8),
    "RTX-PRO-6000": (96, 1.79, 468, 936, 1871, 8),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_each_gpu_of_the_reference(name: str) -> None:
    marketing_gb, tb_per_s, bf16, fp8, fp4, domain = REFERENCE[name]
    found = accelerators()[name]
    assert found.memory_bytes_per_s == pytest.approx(tb_per_s * 1e12, rel=0.01)
    for dtype, tflops in ((Dtype.BF16, bf16), (Dtype.FP8, fp8), (Dtype.FP4, fp4)):
        assert found.flops_per_s.get(dtype) == (None if tflops is None else tflops * 1e12)
    assert found.link_domain == domain
    # What software can use: never more than the binary reading of the box, nor 12 % less.
    assert 0.88 * marketing_gb * 1e9 < found.memory_bytes < marketing_gb * 2**30
    assert found.tdp_watts > 0 and found.source


def test_no_gpu_is_missing_and_aliases_lead_to_one() -> None:
    assert {a.name for a in accelerators().values()} == set(REFERENCE)
    assert accelerators()["A100-80G"] is accelerators()["A100"]


def test_weights_are_widened_where_the_gpu_has_no_such_arithmetic() -> None:
    a100, h100, b200 = (accelerators()[name] for name in ("A100", "H100", "B200"))
    assert a100.computes_in(Dtype.FP8) is Dtype.BF16
    assert h100.computes_in(Dtype.FP8) is Dtype.FP8
    assert h100.computes_in(Dtype.FP4) is Dtype.BF16
    assert b200.computes_in(Dtype.FP4) is Dtype.FP4
    assert b200.computes_in(Dtype.INT4) is Dtype.BF16
    assert h100.computes_in(Dtype.FP32) is None


def test_prices_are_dated_and_of_known_gpus() -> None:
    shipped = prices()
    assert len(shipped) >= 50
    assert {p.market for p in shipped} == set(PriceMarket)
    assert all(p.accelerator in accelerators() and p.provider and p.source for p in shipped)
    first = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).timestamp()
    assert all(p.dated_s >= first and p.dated_s % DAY_S == 0 for p in shipped)
    assert len({(p.accelerator, p.market, p.provider) for p in shipped}) == len(shipped)


def test_prices_of_one_gpu_cheapest_first() -> None:
    h100 = accelerators()["H100"]
    spot = prices_of(prices(), h100, PriceMarket.SPOT)
    assert [(p.provider, p.usd_per_hour) for p in spot] == [("Verda", 0.80), ("GCP a3-high", 6.57)]
    every = prices_of(prices(), h100)
    assert {p.market for p in every} == set(PriceMarket)
    assert [p.usd_per_hour for p in every] == sorted(p.usd_per_hour for p in every)
    assert prices_of(prices(), accelerators()["H20"]) == ()


def test_a_price_is_stale_after_ninety_days() -> None:
    [own] = read_own(price())
    assert not stale(own, own.dated_s + 90 * DAY_S)
    assert stale(own, own.dated_s + 90 * DAY_S + 1)
    assert not stale(own, own.dated_s - DAY_S)
    assert PRICE_LASTS_S == 90 * DAY_S


def test_a_price_of_ones_own_goes_before_all_of_the_catalogue() -> None:
    own = read_own(price(usd_per_hour=99.0))
    found = catalog_pool("H100", 0.0, own)
    assert (found.usd_per_gpu_hour, found.market) == (99.0, own[0].market.value)
    assert catalog_pool("H200", 0.0, own) == catalog_pool("H200", 0.0)
    assert catalog_pool("H100", 0.0).usd_per_gpu_hour < 99.0


def test_the_platform_file_may_hold_prices() -> None:
    platform = {
        "kind": "Platform",
        "name": "ours",
        "pools": [{"name": "a", "market": "local", "usd_per_node_hour": 1.0}],
        "prices": [price()],
    }
    manifest = PlatformManifest.model_validate(platform)
    [own] = manifest.prices
    assert own.to_core() == read_own(price())[0]
    assert PlatformManifest.model_validate({**platform, "prices": []}).prices == ()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"memory_gib": 0}, ["accelerators.0.memory_gib", "0", "greater than 0"]),
        ({"memory_gib": float("inf")}, ["accelerators.0.memory_gib", "finite"]),
        ({"memory_gb_per_s": -1}, ["accelerators.0.memory_gb_per_s", "-1"]),
        ({"tflops": {}}, ["accelerators.0.tflops", "at least 1"]),
        ({"tflops": {"fp9": 1}}, ["tflops", "fp9"]),
        ({"tdp_watts": -700}, ["accelerators.0.tdp_watts", "-700"]),
        ({"all_in_watts": 600}, ["all_in_watts is below tdp_watts 700"]),
        ({"era": "stone"}, ["accelerators.0.era", "stone", "hopper"]),
        ({"memory_gb": 80}, ["accelerators.0.memory_gb", "unknown key", "memory_gib"]),
    ],
)
def test_a_wrong_gpu_is_refused(changes: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(ManifestError) as refused:
        read_gpus(gpu(**changes))
    assert all(part in str(refused.value) for part in ["gpus.yaml", *told]), refused.value


def test_a_name_is_used_once() -> None:
    with pytest.raises(ManifestError, match=r"gpus\.yaml: accelerators: 'X1': is named twice"):
        read_gpus(gpu(), gpu(name="X2", aliases=["X1"]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"usd_per_hour": -0.01}, ["prices.0.usd_per_hour", "-0.01", "greater than or equal to 0"]),
        ({"usd_per_hour": float("nan")}, ["prices.0.usd_per_hour", "finite"]),
        ({"accelerator": "H1000"}, ["prices.0.accelerator", "'H1000'", "known: A100"]),
        ({"market": "grey"}, ["prices.0.market", "grey", "on-demand"]),
        ({"dated": "yesterday"}, ["prices.0.dated", "yesterday"]),
        ({"provider": ""}, ["prices.0.provider"]),
    ],
)
def test_a_wrong_price_is_refused(changes: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(ManifestError) as refused:
        read_own(price(**changes))
    assert all(part in str(refused.value) for part in ["own.yaml", *told]), refused.value


@pytest.mark.parametrize("text", ["prices: [", "- 1", "", "prices: 5"])
def test_a_file_that_holds_no_prices_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match=r"^own\.yaml"):
        read_prices(text, "own.yaml", accelerators())
