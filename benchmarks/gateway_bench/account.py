"""The tenant and key of the load: all limits are set, so all policies look, and none is reached."""

import time

from expertmesh.core.domain.tenant import Limits, Tenant
from expertmesh.store.database import open_database
from expertmesh.store.keys import KeyBook
from expertmesh.store.tenants import TenantBook

LIMITS = Limits(
    requests_per_min=100_000_000,
    tokens_per_min=1_000_000_000,
    concurrent_requests=100_000,
    usd_per_day=100_000.0,
    usd_per_month=1_000_000.0,
)
_TENANT = "bench"


async def new_key(store_url: str) -> str:
    """Its secret. The store is created."""
    database = await open_database(store_url)
    try:
        now_s = time.time()
        await TenantBook(database).put(Tenant(_TENANT, limits=LIMITS), now_s)
        key = await KeyBook(database).create(_TENANT, "bench", now_s, limits=LIMITS)
        return key.secret
    finally:
        await database.close()
