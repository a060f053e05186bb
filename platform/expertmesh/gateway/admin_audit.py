"""One line for each change through the admin API: who changed what."""

import logging
from datetime import UTC, datetime
from typing import Any

import msgspec
from fastapi import Request

from expertmesh.core.domain.tenant import Caller

audit_log = logging.getLogger("expertmesh.gateway.audit")
"""One JSON object per change; never a secret or its hash."""


def audit(request: Request, action: str, target: str, **details: Any) -> None:
    state = request.scope["state"]
    caller: Caller = state["caller"]
    line = {
        "at": datetime.now(UTC),
        "request_id": state.get("request_id", ""),
        "by_key": caller.key_id,
        "by_tenant": caller.tenant,
        "action": action,
        "target": target,
        **details,
    }
    audit_log.info("%s", msgspec.json.encode(line).decode())
