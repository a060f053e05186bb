"""The other end of ReportProcess: a question on standard input, a UsageReport on standard output.

The question does not come as arguments, which all users of the machine can read: the address of
the store may hold a password.
"""

import asyncio
import os
import sys
from dataclasses import dataclass, field

import msgspec

from expertmesh.core.metering.report import By, UsageReport
from expertmesh.errors import ExpertMeshError
from expertmesh.store.database import open_database
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import usage_report

REFUSED = 3
"""Exit status when the store cannot be used; standard error says why."""
_NICENESS = 10


@dataclass(frozen=True, slots=True)
class Question:
    store_url: str = field(repr=False)
    by: By
    since_s: float | None
    until_s: float | None


async def _answer(question: Question) -> UsageReport:
    database = await open_database(question.store_url, create=False)
    try:
        return await usage_report(Ledger(database), question.by, question.since_s, question.until_s)
    finally:
        await database.close()


def main() -> None:
    os.nice(_NICENESS)
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    try:
        report = asyncio.run(_answer(question))
    except ExpertMeshError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    sys.stdout.buffer.write(msgspec.json.encode(report))


if __name__ == "__main__":
    main()
