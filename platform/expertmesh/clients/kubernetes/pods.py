"""Where a pod runs: Ray knows a node by its pod's address, the cloud by the machine below."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PlacedPod:
    name: str
    node: str
    """Empty until it is scheduled."""
    addresses: tuple[str, ...]


def placed_pod(body: Mapping[str, Any]) -> PlacedPod:
    """Raises LookupError or TypeError for what is no pod."""
    status = body.get("status") or {}
    listed = [entry.get("ip", "") for entry in status.get("podIPs") or []]
    addresses = dict.fromkeys([status.get("podIP") or "", *listed])
    return PlacedPod(
        name=str(body["metadata"]["name"]),
        node=str((body.get("spec") or {}).get("nodeName") or ""),
        addresses=tuple(address for address in addresses if address),
    )
