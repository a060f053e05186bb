"""Requests to the Kubernetes API: sign-in and TLS by kubernetes_asyncio, objects as plain JSON.

Its generated classes and its watch are not used: they check every field of every node, and go on
from a version that the server has called gone.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import yaml
from kubernetes_asyncio import client, config
from kubernetes_asyncio.config.incluster_config import InClusterConfigLoader

from expertmesh.errors import SetupError, UpstreamUnavailable

_TIMEOUT_S = 5.0
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TOKEN_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/token"
_CERTIFICATE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
_VALUES = frozenset({404, 409, 410, 422})
"""Statuses that a caller expects as an outcome."""
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: dict[str, Any]

    @property
    def is_done(self) -> bool:
        return 200 <= self.status < 300


class KubernetesApi:
    """Raises UpstreamUnavailable without an answer, and for 401, 403, 429 and 5xx."""

    def __init__(self, configuration: client.Configuration, namespace: str) -> None:
        self._client = client.ApiClient(configuration)
        self.namespace = namespace

    async def close(self) -> None:
        await self._client.close()

    async def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = _JSON,
        timeout_s: float = _TIMEOUT_S,
    ) -> Answer:
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._send(method, path, query, body, content_type)
                async with response:
                    text = await response.read()
        except (aiohttp.ClientError, OSError, ssl.SSLError, TimeoutError) as error:
            raise _silent(method, path, error) from error
        if response.status not in _VALUES:
            _check(method, path, response, text)
        return Answer(response.status, _decoded(method, path, text))

    async def lines(
        self, path: str, query: Mapping[str, str], silence_s: float
    ) -> AsyncIterator[bytes]:
        """The answer line by line, as it comes; raises when none comes for `silence_s`."""
        limits = aiohttp.ClientTimeout(sock_connect=_TIMEOUT_S, sock_read=silence_s)
        try:
            response = await self._send("GET", path, query, None, _JSON, limits)
            async with response:
                if response.status != HTTPStatus.OK:
                    text = await response.read()
                    if response.status == HTTPStatus.GONE:
                        yield _gone(text)
                        return
                    _check("GET", path, response, text)
                async for line in response.content:
                    if line.strip():
                        yield line
        except (aiohttp.ClientError, OSError, ssl.SSLError, TimeoutError, ValueError) as error:
            raise _silent("GET", path, error) from error

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
        content_type: str,
        limits: aiohttp.ClientTimeout | None = None,
    ) -> aiohttp.ClientResponse:
        response: aiohttp.ClientResponse = await self._client.call_api(
            path,
            method,
            query_params=list((query or {}).items()),
            header_params={"Content-Type": content_type, "Accept": _JSON},
            body=dict(body) if body is not None else None,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=limits,
        )
        return response


async def open_kubernetes(kubeconfig: Path | None = None) -> KubernetesApi | None:
    """As the service account of this pod, or as `kubeconfig` says; None when this is no pod and no
    file is named. Raises SetupError when the file, or what the pod was given, is broken."""
    configuration = client.Configuration()
    if kubeconfig is not None:
        try:
            await config.load_kube_config(
                str(kubeconfig), client_configuration=configuration, persist_config=False
            )
            namespace = _namespace_of(kubeconfig)
        except (config.ConfigException, OSError, yaml.YAMLError) as error:
            raise SetupError(f"kubeconfig: {kubeconfig}: {error}") from None
        return KubernetesApi(configuration, namespace)
    return _in_pod(configuration)


def _in_pod(configuration: client.Configuration) -> KubernetesApi | None:
    if not Path(_TOKEN_FILE).exists():
        return None
    try:
        InClusterConfigLoader(_TOKEN_FILE, _CERTIFICATE_FILE).load_and_set(configuration)
        namespace = _NAMESPACE_FILE.read_text().strip()
    except (config.ConfigException, OSError) as error:
        raise SetupError(
            f"the service account of this pod: {error}; set automountServiceAccountToken: true"
        ) from None
    return KubernetesApi(configuration, namespace)


def _namespace_of(kubeconfig: Path) -> str:
    content = yaml.safe_load(kubeconfig.read_text()) or {}
    chosen = content.get("current-context")
    for context in content.get("contexts") or []:
        if context.get("name") == chosen:
            return str(context.get("context", {}).get("namespace") or "default")
    return "default"


def _check(method: str, path: str, response: aiohttp.ClientResponse, text: bytes) -> None:
    status = response.status
    if 200 <= status < 300:
        return
    said = _message(text) or response.reason or ""
    shown = f"Kubernetes: {method} {path}: {status}: {said[:300]}"
    if status == HTTPStatus.UNAUTHORIZED:
        raise UpstreamUnavailable(f"{shown}; is the service account's token valid?")
    if status == HTTPStatus.FORBIDDEN:
        raise UpstreamUnavailable(f"{shown}; give the service account a role with this verb")
    raise UpstreamUnavailable(shown)


def _silent(method: str, path: str, error: BaseException) -> UpstreamUnavailable:
    said = str(error) or type(error).__name__
    return UpstreamUnavailable(f"Kubernetes: {method} {path}: no answer: {said}")


def _message(text: bytes) -> str | None:
    try:
        return str(msgspec.json.decode(text)["message"])
    except (msgspec.DecodeError, LookupError, TypeError):
        return text[:300].decode(errors="replace").strip()


def _decoded(method: str, path: str, text: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise UpstreamUnavailable(f"Kubernetes: {method} {path}: sent no JSON: {error}") from error
    if not isinstance(body, dict):
        raise UpstreamUnavailable(f"Kubernetes: {method} {path}: sent no object")
    return body


def _gone(text: bytes) -> bytes:
    """As the server says it within a watch that has begun."""
    status = {"kind": "Status", "code": 410, "message": _message(text) or "gone"}
    return msgspec.json.encode({"type": "ERROR", "object": status})
