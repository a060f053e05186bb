"""A Lease of coordination.k8s.io/v1, written only against the version that was read."""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from expertmesh.core.domain.lease import LeaseRecord
from expertmesh.errors import UpstreamUnavailable

URL_ANNOTATION = "expertmesh.io/url"


class LeaseAnswer(Protocol):
    @property
    def status(self) -> int: ...
    @property
    def body(self) -> dict[str, Any]: ...


class LeaseApi(Protocol):
    async def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> LeaseAnswer: ...


class KubernetesLease:
    """Raises UpstreamUnavailable when the outcome is not known."""

    def __init__(
        self,
        api: LeaseApi,
        namespace: str,
        name: str,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`now_s`: Unix time, written for people to read."""
        self._api = api
        self._name = name
        self._folder = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._namespace = namespace
        self._now_s = now_s
        self._object: dict[str, Any] = {}
        """As last seen: what others have written into it stays."""

    async def read(self) -> LeaseRecord:
        answer = await self._api.call("GET", f"{self._folder}/{self._name}")
        if answer.status == 404:
            self._object = {}
            return LeaseRecord(holder=None)
        return self._taken(answer)

    async def write(self, wanted: LeaseRecord) -> LeaseRecord | None:
        """None when another process has written since `wanted.version`."""
        body = self._body(wanted)
        if wanted.version:
            answer = await self._api.call("PUT", f"{self._folder}/{self._name}", body=body)
        else:
            answer = await self._api.call("POST", self._folder, body=body)
        # 404: it was deleted, or its namespace is; the next look tells.
        if answer.status in (404, 409):
            return None
        return self._taken(answer)

    def _taken(self, answer: LeaseAnswer) -> LeaseRecord:
        if not 200 <= answer.status < 300:
            said = answer.body.get("message", "")
            raise UpstreamUnavailable(f"Lease {self._name}: {answer.status}: {said}")
        try:
            record = _record(answer.body)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UpstreamUnavailable(
                f"Lease {self._name}: cannot be read: {type(error).__name__}: {error}"
            ) from error
        self._object = answer.body
        return record

    def _body(self, wanted: LeaseRecord) -> dict[str, Any]:
        known = self._object.get("metadata") or {}
        before = self._object.get("spec") or {}
        if known.get("resourceVersion") != wanted.version:
            known, before = {}, {}
        annotations = {**(known.get("annotations") or {}), URL_ANNOTATION: wanted.url}
        metadata = {**known, "name": self._name, "namespace": self._namespace}
        metadata["annotations"] = annotations
        metadata.pop("managedFields", None)
        if wanted.version:
            metadata["resourceVersion"] = wanted.version
        now = datetime.fromtimestamp(self._now_s(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {
            **before,
            "holderIdentity": wanted.holder or "",
            # Whole seconds and at least one.
            "leaseDurationSeconds": max(1, round(wanted.duration_s)),
            "leaseTransitions": wanted.transitions,
            "renewTime": now,
        }
        if before.get("holderIdentity") != wanted.holder or "acquireTime" not in spec:
            spec["acquireTime"] = now
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": spec,
        }


def _record(body: dict[str, Any]) -> LeaseRecord:
    spec = body.get("spec") or {}
    metadata = body["metadata"]
    holder = spec.get("holderIdentity") or None
    return LeaseRecord(
        holder=holder,
        url=str((metadata.get("annotations") or {}).get(URL_ANNOTATION, "")),
        duration_s=float(spec.get("leaseDurationSeconds") or 0) if holder else 0.0,
        transitions=int(spec.get("leaseTransitions") or 0),
        version=str(metadata["resourceVersion"]),
    )
