from collections.abc import AsyncIterator

import pytest
from tests.gateway.stand import Stand, standing


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    async with standing() as started:
        yield started
