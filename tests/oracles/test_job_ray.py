"""A job on a Ray cluster of three nodes, one of which is killed: the output is that of one machine.

Each node has a network namespace of its own, on a bridge in a further one, so that the cluster sees three machines.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shardq
from shardq import Limits

pytestmark = [pytest.mark.oracle, pytest.mark.slow, pytest.mark.timeout(240)]
pytest.importorskip("ray", reason="Ray is not installed: pip install 'shardq[ray]'")

HEAD = "10.77.31.1:6399"
NODES = 3
FILES = 24
LIMIT_S = 60.0
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Cluster:
    """Namespaces, and a Ray node in each."""

    def __init__(self, folder: Path) -> None:
        self._prefix, self._folder = f"shardq{os.getpid()}", folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def name(self, node: int) -> str:
        return f"{self._prefix}-{node}"

    def build(self) -> None:
        """Namespace 0 has the bridge, 1 to NODES a node each."""
        ip("netns", "add", self.name(0))
        ip("-n", self.name(0), "link", "add", "bridge", "type", "bridge")
        ip("-n", self.name(0), "link", "set", "bridge", "up")
        for node in range(1, NODES + 1):
            ip("netns", "add", self.name(node))
            ip("-n", self.name(node), "link", "set", "lo", "up")
            port = f"port{node}"
            ip("-n", self.name(node), "link", "add", "eth0", "type", "veth", "peer", port, "netns", self.name(0))
            ip("-n", self.name(0), "link", "set", port, "master", "bridge", "up")
            ip("-n", self.name(node), "addr", "add", f"10.77.31.{node}/24", "dev", "eth0")
            ip("-n", self.name(node), "link", "set", "eth0", "up")

    def start(self, node: int) -> None:
        address = f"10.77.31.{node}"
        place = ["--head", "--port", "6399", "--include-dashboard=false"] if node == 1 else ["--address", HEAD]
        words = [*place, "--num-cpus", "1", "--node-ip-address", address, "--disable-usage-stats", "--block"]
        words += ["--object-store-memory", "80000000"]
        words += ["--temp-dir", str(self._folder)] if node == 1 else []
        self._processes.append(self.run(node, [sys.executable, "-m", "ray.scripts.scripts", "start", *words]))

    def run(self, node: int, words: list[str], **settings: Any) -> "subprocess.Popen[bytes]":
        command = ["ip", "netns", "exec", self.name(node), *words]
        log = (self._folder.parent / f"node{node}.log").open("ab")
        environment = {**os.environ, **ENVIRONMENT}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True, **settings)

    def wait_for_nodes(self, count: int) -> None:
        words = [sys.executable, "-c", f"import ray; ray.init(address={HEAD!r}); print(len(ray.nodes()))"]
        deadline_s = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline_s:
            command = ["ip", "netns", "exec", self.name(1), *words]
            environment = {**os.environ, **ENVIRONMENT}
            found = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
            if found.stdout.strip().endswith(str(count)):
                return
            time.sleep(0.5)
        logs = "".join(p.read_text()[-2000:] for p in self._folder.parent.glob("node*.log"))
        pytest.fail(f"node {count} of the cluster does not come up: {found.stdout}{found.stderr}{logs}")

    def kill(self, node: int) -> int:
        """kill -9 for all processes of a node; how many there were."""
        pids = ip("netns", "pids", self.name(node)).split()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        return len(pids)

    def remove(self) -> None:
        for node in range(NODES + 1):
            with contextlib.suppress(subprocess.CalledProcessError):
                while self.kill(node):
                    time.sleep(0.1)
                ip("netns", "delete", self.name(node))
        for process in self._processes:
            process.wait()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and ip (iproute2)")
    folder = Path("/tmp") / f"ray{os.getpid()}"  # its sockets allow no long path
    made = Cluster(folder / "ray")
    folder.mkdir()
    try:
        try:
            made.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for node in range(1, NODES + 1):
            made.start(node)
            made.wait_for_nodes(node)
        yield made
    finally:
        made.remove()
        shutil.rmtree(folder, ignore_errors=True)


def read(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_node_that_dies(cluster: Cluster, tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "pipeline" / "conftest.py"
    spec = importlib.util.spec_from_file_location("pipeline_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    checkpoints = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = checkpoints
    spec.loader.exec_module(checkpoints)
    source = checkpoints.write_checkpoint(tmp_path / "source" / "model", hidden=512, layers=FILES)
    shardq.quantize(source, output_dir=tmp_path / "alone", limits=Limits(parallel=1))
    job = tmp_path / "job"
    words = ["worker", "--job", str(job), str(source), "--executor", "ray", "--ray-address", HEAD, "--parallel", "1"]
    run = cluster.run(1, [sys.executable, "-m", "shardq.cli", *words])
    deadline_s = time.monotonic() + LIMIT_S
    while len(made := list(job.glob("done/*.json"))) < FILES // 4:
        assert time.monotonic() < deadline_s
        assert run.poll() is None
        time.sleep(0.02)
    assert cluster.kill(3) > 1
    assert len(made) < FILES
    assert run.wait(LIMIT_S) == 0
    assert read(job / "output") == read(tmp_path / "alone")
