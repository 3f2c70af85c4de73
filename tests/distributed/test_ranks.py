"""Many ranks without many machines: what an update exchanges grows with their number only where it must."""

import pytest

from tools.ranks import EXCHANGES, by_size

FEW, MANY = 8, 64


@pytest.mark.parametrize("shard", [False, True])
def test_what_grows_with_the_number_of_ranks(shard):
    results = by_size(shard, (FEW, MANY))
    for phase, few in results[FEW].items():
        many = results[MANY][phase]
        assert many["calls"] == few["calls"], phase
        for collective in EXCHANGES:  # each rank says as much as before
            said = few["bytes"].get(collective, 0) / FEW
            assert many["bytes"].get(collective, 0) / MANY <= 1.1 * said, phase
            assert said < 512, f"{phase}: a rank says more than a few numbers"
        if not shard:
            assert many["bytes"].get("allreduce") == few["bytes"].get("allreduce"), phase
