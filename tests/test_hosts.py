"""Two processes of two devices each, as two hosts would be, on loopback (see hosts.py)."""

import re
import socket
import subprocess
import sys

import numpy as np
import pytest

LOST = re.compile(r"[Tt]ask 1 heartbeat timeout|[Cc]onnection (reset|closed)")


def run(directory, count, *, die_at=None):
    """Exit codes and outputs of all hosts, none of which may hang."""
    directory.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    hosts = []
    for i in range(count):
        command = [sys.executable, "-m", "tests.hosts", str(i), str(count), address, str(directory)]
        if die_at is not None and i == count - 1:
            command += ["--die-at", str(die_at)]
        hosts.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        outputs = [host.communicate(timeout=240)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    return [host.returncode for host in hosts], outputs


@pytest.mark.slow  # five processes; js.batches(shard=) is in test_batch.py, js.global_batch in test_devices.py
def test_two_hosts_and_a_lost_one(tmp_path):
    codes, outputs = run(tmp_path / "one", 1)
    assert codes == [0], outputs
    codes, outputs = run(tmp_path / "two", 2)
    assert codes == [0, 0] and not any(map(LOST.search, outputs)), outputs
    one, two = (np.load(tmp_path / name / "result.npz") for name in ("one", "two"))
    assert len(two["losses"]) == 12 and two["losses"][-1] < 0.8 * two["losses"][0]
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6)

    codes, outputs = run(tmp_path / "lost", 2, die_at=6)
    assert codes[1] == 17 and codes[0] not in (0, 17), outputs
    assert LOST.search(outputs[0]), outputs[0]  # the other says why it stops
    codes, outputs = run(tmp_path / "lost", 2)
    assert codes == [0, 0] and "going on from step 4" in outputs[0], outputs
    resumed = np.load(tmp_path / "lost" / "result.npz")
    for name in two:
        np.testing.assert_array_equal(resumed[name], two[name])
