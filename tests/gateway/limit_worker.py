"""A worker process of the tests: many calls at the limit server; prints how many were granted."""

import asyncio
import sys
import time
from pathlib import Path

from tests.gateway.limiting import account, running

from expertmesh.core.admission.reservation import Estimate, Refused, Reserved
from expertmesh.gateway.limit_client import SharedLimiter


async def main(path: str, name: str, calls: int) -> None:
    limiter = SharedLimiter(Path(path), name, "closed", timeout_s=10.0)
    acme = account(usd_per_day=1.0)
    async with running(limiter):
        if not await limiter.wait_connected(10):
            sys.exit("no connection")
        futures = [
            limiter.reserve(f"{name}-{number}", (acme,), Estimate(0, 10**10), time.time())
            for number in range(calls)
        ]
        granted = 0
        for answer in futures:
            outcome = answer if isinstance(answer, Reserved | Refused) else await answer
            granted += isinstance(outcome, Reserved)
        print(granted)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
