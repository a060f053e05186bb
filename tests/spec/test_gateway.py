"""The gateway's part of the platform file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.spec.test_load import PLATFORM, Folder, set_field

from expertmesh.core.domain.gateway import (
    AdmissionBounds,
    GatewayConfig,
    LimitSettings,
    LimitStore,
    WithoutStore,
)
from expertmesh.errors import ManifestError
from expertmesh.spec.load import load_platform, load_system


def config_of(tmp_path: Path, gateway: dict[str, Any] | None = None) -> GatewayConfig:
    file = tmp_path / "platform.yaml"
    file.write_text(yaml.safe_dump({**PLATFORM, **({"gateway": gateway} if gateway else {})}))
    return load_platform(file).gateway.to_core()


def test_the_defaults(tmp_path: Path) -> None:
    assert config_of(tmp_path) == GatewayConfig("127.0.0.1", 8080)


def test_everything_that_can_be_said(tmp_path: Path) -> None:
    gateway = {
        "host": "0.0.0.0",
        "port": 80,
        "workers": 4,
        "limits": {
            "store": "redis",
            "redis_url_variable": "LIMITS_REDIS_URL",
            "on_unavailable": "open",
        },
        "admission": {"queued_requests": 50, "wait_s": 20},
        "external": {"concurrent_requests": 7},
        "cors_origins": ["https://chat.example.com", "http://127.0.0.1:3000"],
    }
    assert config_of(tmp_path, gateway) == GatewayConfig(
        host="0.0.0.0",
        port=80,
        workers=4,
        limits=LimitSettings(LimitStore.REDIS, "LIMITS_REDIS_URL", WithoutStore.OPEN),
        admission=AdmissionBounds(queued_requests=50, wait_s=20.0),
        cors_origins=("https://chat.example.com", "http://127.0.0.1:3000"),
        external_requests=7,
    )


def gateway(**values: Any) -> Callable[[Folder], None]:
    return set_field("platform.gateway", {"port": 8080, **values})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(gateway(workers=0), ("gateway.workers: 0", "greater"), id="no worker"),
        pytest.param(gateway(workers=65), ("gateway.workers: 65", "64"), id="too many workers"),
        pytest.param(
            gateway(limits={"store": "disk"}),
            ("gateway.limits.store: 'disk'", "'memory' or 'redis'"),
            id="unknown store",
        ),
        pytest.param(
            gateway(limits={"store": "redis"}),
            ("gateway.limits.redis_url_variable: None: missing with store: redis",),
            id="Redis without its URL",
        ),
        pytest.param(
            gateway(limits={"redis_url_variable": "REDIS_URL"}),
            ("gateway.limits.redis_url_variable: 'REDIS_URL': is for store: redis",),
            id="a URL without Redis",
        ),
        pytest.param(
            gateway(limits={"store": "redis", "redis_url_variable": "redis://:hidden@db:6379"}),
            ("gateway.limits.redis_url_variable: '…': is no name of an environment variable",),
            id="the URL itself",
        ),
        pytest.param(
            gateway(limits={"on_unavailable": "maybe"}),
            ("gateway.limits.on_unavailable: 'maybe'", "'open' or 'closed'"),
            id="unknown choice",
        ),
        pytest.param(
            gateway(admission={"queued_requests": 0}),
            ("gateway.admission.queued_requests: 0",),
            id="no queue",
        ),
        pytest.param(gateway(admission={"wait_s": 0}), ("gateway.admission.wait_s: 0",), id="age"),
        pytest.param(
            gateway(external={"concurrent_requests": 0}),
            ("gateway.external.concurrent_requests: 0",),
            id="no external request",
        ),
        pytest.param(
            gateway(cors_origins=["https://chat.example.com/"]),
            (
                "gateway.cors_origins.0: 'https://chat.example.com/': is no origin",
                "scheme and host",
            ),
            id="an origin with a path",
        ),
        pytest.param(
            gateway(cors_origins=["chat.example.com"]),
            ("gateway.cors_origins.0: 'chat.example.com': is no origin",),
            id="an origin without a scheme",
        ),
        pytest.param(
            gateway(limit={"store": "memory"}),
            ("gateway.limit: unknown key; did you mean 'limits'",),
            id="unknown key",
        ),
    ],
)
def test_a_mistake_is_named(
    tmp_path: Path, spoil: Callable[[Folder], None], words: tuple[str, ...]
) -> None:
    folder = Folder(tmp_path)
    spoil(folder)
    message = folder.refusal()
    assert "platform.yaml: " in message
    assert all(word in message for word in words), message
    assert "hidden" not in message
    assert len(message.splitlines()) == 1


def test_the_platform_file_may_hold_other_manifests(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    platform, model = folder.write()
    both = tmp_path / "both.yaml"
    both.write_text(f"{platform.read_text()}---\n{model.read_text()}")
    assert load_platform(both).name == "local"
    assert load_system([both]).platform_file == both
    assert load_system([model, platform]).platform_file == platform
    with pytest.raises(ManifestError, match=r"tiny\.yaml: kind: expected exactly one Platform"):
        load_platform(model)
