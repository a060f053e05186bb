"""Providers outside of the platform, and the names that clients use for models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.spec.test_load import Folder, set_field

from expertmesh.controller.configs import scaling_config, served_model
from expertmesh.core.domain.fleet import ExternalRoute, ExternalUse
from expertmesh.core.scaling.contract import Timing
from expertmesh.errors import ManifestError
from expertmesh.spec.load import load_system

PROVIDER = {
    "name": "api",
    "market": "external",
    "base_url": "https://api.example.com/openai/",
    "key_variable": "EXAMPLE_API_KEY",
}
TARIFF = {"usd_per_mtok_in": 0.5, "usd_per_mtok_cached": 0.1, "usd_per_mtok_out": 2.0}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    folder.platform["pools"].append(dict(PROVIDER))
    folder.deployment["external"] = [{"pool": "api", "model": "org/tiny", "tariff": dict(TARIFF)}]
    folder.deployment["aliases"] = ["gpt-4o", "org/Tiny:latest"]
    return folder


def without(target: str, key: str) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        node: Any = getattr(folder, target.partition(".")[0])
        for part in target.split(".")[1:]:
            node = node[int(part)] if part.isdigit() else node[part]
        del node[key]

    return change


def test_routes_and_aliases_reach_the_gateways(folder: Folder) -> None:
    folder.deployment["external"].append(
        {
            "pool": "api",
            "model": "org/tiny-turbo",
            "when": "overflow",
            "overflow_wait_s": 4,
            "tariff": dict(TARIFF),
        }
    )
    system = load_system(folder.write())
    served = served_model(system.models[0])
    assert served.aliases == ("gpt-4o", "org/Tiny:latest")
    fallback = ExternalRoute(
        pool="api",
        base_url="https://api.example.com/openai",
        model="org/tiny",
        key_variable="EXAMPLE_API_KEY",
        usd_per_mtok_in=0.5,
        usd_per_mtok_cached=0.1,
        usd_per_mtok_out=2.0,
    )
    first, second = served.external
    assert first == fallback
    assert (second.model, second.use, second.overflow_wait_s) == (
        "org/tiny-turbo",
        ExternalUse.OVERFLOW,
        4.0,
    )


def test_an_external_pool_has_no_part_in_scaling_and_nodes(folder: Folder) -> None:
    system = load_system(folder.write())
    assert [pool.name for pool in system.pools] == ["small", "large"]
    config = scaling_config(system.models[0], system.pools, Timing())
    assert [pool.name for pool in config.pools] == ["small", "large"]


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://api.example.com", "https://api.example.com"),
        ("https://api.example.com:8443/a/b//", "https://api.example.com:8443/a/b"),
        ("http://127.0.0.1:9000", "http://127.0.0.1:9000"),
        ("http://localhost:9000/", "http://localhost:9000"),
        ("http://[::1]:9000", "http://[::1]:9000"),
    ],
)
def test_urls_that_are_taken(folder: Folder, url: str, kept: str) -> None:
    folder.platform["pools"][2]["base_url"] = url
    assert load_system(folder.write()).models[0].external[0].base_url == kept


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://api.example.com", "would send the key in the clear; write https://"),
        ("http://10.0.0.1:9000", "would send the key in the clear"),
        ("http://127.0.0.1.example.com", "would send the key in the clear"),
        ("https://api.example.com/v1", "write the URL without /v1"),
        ("https://api.example.com/openai/v1/", "write the URL without /v1"),
        ("https://api.example.com/?key=1", "only scheme, host, port and path"),
        ("https://api.example.com/#x", "only scheme, host, port and path"),
        ("api.example.com", "is no URL; write https://<host>"),
        ("ftp://api.example.com", "is no URL"),
        ("https://", "is no URL"),
        ("https://api example.com", "is no URL"),
        ("https://api.example.com:99999", "Port out of range"),
        ("https://[::1", "Invalid IPv6 URL"),
        ("", "is no URL"),
    ],
)
def test_urls_that_are_refused(folder: Folder, url: str, words: str) -> None:
    folder.platform["pools"][2]["base_url"] = url
    message = folder.refusal()
    assert f"platform.yaml: pools.2.base_url: {url!r}: " in message
    assert words in message
    assert len(message.splitlines()) == 1


def test_secrets_in_the_wrong_place_are_not_repeated(folder: Folder) -> None:
    folder.platform["pools"][2]["key_variable"] = "sk-proj-hunter2"
    folder.platform["pools"][2]["base_url"] = "https://user:hunter2@api.example.com"
    message = folder.refusal()
    assert "pools.2.key_variable: '…': is no name of an environment variable" in message
    assert "pools.2.base_url: '…': write only scheme, host, port and path" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(
            without("platform.pools.2", "base_url"),
            ("platform.yaml: pools.2.base_url: None: missing in an external pool", "https://"),
            id="no URL",
        ),
        pytest.param(
            without("platform.pools.2", "key_variable"),
            ("platform.yaml: pools.2.key_variable: None: missing in an external pool",),
            id="no key",
        ),
        pytest.param(
            set_field("platform.pools.2.key_variable", "EXPERTMESH_MESH_TOKEN"),
            ("pools.2.key_variable: 'EXPERTMESH_MESH_TOKEN': belongs to this system itself",),
            id="a key that is a secret of this system",
        ),
        pytest.param(
            set_field("platform.pools.2.usd_per_node_hour", 0),
            ("platform.yaml: pools.2.usd_per_node_hour: 0", "priced per token", "tariff"),
            id="a price an hour",
        ),
        pytest.param(
            set_field("platform.pools.2.nodes", {"min": 0, "max": 1}),
            ("platform.yaml: pools.2.nodes: ", "has no nodes of ours; remove this key"),
            id="nodes",
        ),
        pytest.param(
            set_field("platform.pools.2.accelerators_per_node", 8),
            ("platform.yaml: pools.2.accelerators_per_node: 8: ", "has no nodes of ours"),
            id="accelerators",
        ),
        pytest.param(
            set_field("platform.pools.0.base_url", "https://api.example.com"),
            ("platform.yaml: pools.0.base_url: ", "is for pools with market: external"),
            id="a URL of a pool with nodes",
        ),
        pytest.param(
            set_field("platform.pools.0.key_variable", "KEY"),
            ("platform.yaml: pools.0.key_variable: 'KEY': is for pools with market: external",),
            id="a key of a pool with nodes",
        ),
        pytest.param(
            without("platform.pools.0", "usd_per_node_hour"),
            ("platform.yaml: pools.0.usd_per_node_hour: None: missing; write what a node",),
            id="a pool with nodes and no price",
        ),
        pytest.param(
            set_field("platform.pools.2.market", "extern"),
            ("platform.yaml: pools.2.market: 'extern'", "'external'"),
            id="unknown market",
        ),
        pytest.param(
            set_field("deployment.pools", ["small", "api"]),
            ("tiny.yaml: pools.1: 'api': is an external pool", "put it under external"),
            id="an external pool under pools",
        ),
        pytest.param(
            set_field("deployment.external.0.pool", "large"),
            ("tiny.yaml: external.0.pool: 'large': is no external pool; put it under pools",),
            id="a pool with nodes under external",
        ),
        pytest.param(
            set_field("deployment.external.0.pool", "ipa"),
            ("tiny.yaml: external.0.pool: 'ipa': no such pool", "external pools: api"),
            id="a pool that does not exist",
        ),
        pytest.param(
            set_field("deployment.external.0.when", "always"),
            ("tiny.yaml: external.0.when: 'always'", "'fallback' or 'overflow'"),
            id="unknown use",
        ),
        pytest.param(
            set_field("deployment.external.0.overflow_wait_s", 5),
            ("tiny.yaml: external.0.overflow_wait_s: 5: is for when: overflow",),
            id="a wait without overflow",
        ),
        pytest.param(
            without("deployment.external.0.tariff", "usd_per_mtok_cached"),
            ("tiny.yaml: external.0.tariff.usd_per_mtok_cached: missing; add it",),
            id="no price for cached tokens",
        ),
        pytest.param(
            without("deployment.external.0", "tariff"),
            ("tiny.yaml: external.0.tariff: missing; add it",),
            id="no tariff",
        ),
        pytest.param(
            set_field("deployment.external.0.tariff.usd_per_mtok_out", -1),
            ("tiny.yaml: external.0.tariff.usd_per_mtok_out: -1",),
            id="a negative price",
        ),
        pytest.param(
            set_field("deployment.external.0.tarif", {}),
            ("tiny.yaml: external.0.tarif: unknown key; did you mean 'tariff'?",),
            id="unknown key",
        ),
        pytest.param(
            set_field("deployment.aliases", ["gpt 4o"]),
            ("tiny.yaml: aliases.0: 'gpt 4o'",),
            id="an alias with a space",
        ),
        pytest.param(
            set_field("deployment.aliases", ["other", "tiny"]),
            ("tiny.yaml: aliases.1: 'tiny': is also the name of a model in", "rename one"),
            id="its own name as an alias",
        ),
        pytest.param(
            set_field("deployment.aliases", ["a", "b", "a"]),
            ("tiny.yaml: aliases.2: 'a': is also the alias of a model in", "tiny.yaml"),
            id="an alias twice",
        ),
    ],
)
def test_a_mistake_is_named(
    folder: Folder, spoil: Callable[[Folder], None], words: tuple[str, ...]
) -> None:
    spoil(folder)
    message = folder.refusal()
    assert all(word in message for word in words), message
    assert len(message.splitlines()) == 1


def test_a_provider_s_model_is_named_once(folder: Folder) -> None:
    folder.deployment["external"] *= 2
    assert "external.1.pool: 'api': is named twice for the model org/tiny" in folder.refusal()


@pytest.mark.parametrize(
    ("name", "aliases", "words"),
    [
        ("gpt-4o", [], "tiny.yaml: aliases.0: 'gpt-4o': is also the name of a model in"),
        ("other", ["tiny"], "other.yaml: aliases.0: 'tiny': is also the name of a model in"),
        ("other", ["gpt-4o"], "other.yaml: aliases.0: 'gpt-4o': is also the alias of a model in"),
    ],
    ids=["a name is an alias elsewhere", "an alias is a name elsewhere", "an alias twice"],
)
def test_every_name_of_every_model_means_one_model(
    folder: Folder, name: str, aliases: list[str], words: str
) -> None:
    files = folder.write()
    other = folder.path / "other.yaml"
    other.write_text(yaml.safe_dump({**folder.deployment, "name": name, "aliases": aliases}))
    with pytest.raises(ManifestError) as caught:
        load_system([*files, other])
    assert words in str(caught.value)


def test_a_name_wins_over_an_alias_in_whatever_order_the_files_come(folder: Folder) -> None:
    platform, tiny = folder.write()
    other = folder.path / "other.yaml"
    other.write_text(yaml.safe_dump({**folder.deployment, "name": "gpt-4o", "aliases": []}))
    for files in ([platform, tiny, other], [platform, other, tiny]):
        with pytest.raises(ManifestError) as caught:
            load_system(files)
        assert "tiny.yaml: aliases.0: 'gpt-4o': is also the name of a model" in str(caught.value)
