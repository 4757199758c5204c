"""Logging: where records go, one file for several processes, and no secret in it."""

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardq.errors import BadOption, NotWritable
from shardq.logs import LogConfig, configure_logging

LINES = 200
SAY = f"""
import logging, pickle, sys
pickle.loads(bytes.fromhex(sys.argv[1])).apply()
for i in range({LINES}):
    logging.getLogger("shardq.worker").info("worker %s line %d", sys.argv[2], i)
"""


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    logger = logging.getLogger("shardq")
    handlers, level = list(logger.handlers), logger.level
    yield
    for handler in [h for h in logger.handlers if h not in handlers]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level)


def test_without_a_file_everything_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", None)
    logging.getLogger("shardq.plan").info("planned")
    logging.getLogger("shardq.plan").debug("too fine")
    logging.getLogger("elsewhere").info("not ours")
    assert capfd.readouterr().err == "INFO shardq.plan: planned\n"


def test_with_a_file_stderr_gets_warnings_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("debug", tmp_path / "run.log")
    logging.getLogger("shardq.plan").debug("fine")
    logging.getLogger("shardq.plan").warning("odd")
    assert capfd.readouterr().err == "WARNING shardq.plan: odd\n"
    first, second = (tmp_path / "run.log").read_text().splitlines()
    assert first.endswith("shardq.plan: fine")
    assert "WARNING MainProcess[" in second


def test_second_call_replaces_the_first(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", None)
    configure_logging("error", None)
    logging.getLogger("shardq").warning("quiet")
    logging.getLogger("shardq").error("once")
    assert capfd.readouterr().err == "ERROR shardq: once\n"


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijKLMNOPQRST",
        "Authorization: Bearer s3cr3t.value",
        "https://cdn/x?X-Amz-Signature=deadbeef&Expires=3",
        "https://cdn/x?Expires=3&Signature=abc~def",
        "X-Amz-Credential=AKIA/2026/us-east-1",
    ],
)
def test_secrets_are_not_written(secret: str, capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", None)
    try:
        int(secret)
    except ValueError:
        logging.getLogger("shardq").exception("failed with %s", secret)
    text = capfd.readouterr().err
    assert text.count("<secret>") == 2
    assert "ValueError: invalid literal" in text
    for part in ("KLMNOP", "s3cr3t", "deadbeef", "abc~def", "AKIA"):
        assert part not in text


def test_workers_share_one_file(tmp_path: Path) -> None:
    config = pickle.dumps(LogConfig("info", tmp_path / "run.log")).hex()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    workers = [subprocess.Popen([sys.executable, "-P", "-c", SAY, config, str(n)], env=environment) for n in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    lines = (tmp_path / "run.log").read_text().splitlines()
    said = sorted(line.partition("shardq.worker: ")[2] for line in lines)
    assert said == sorted(f"worker {n} line {i}" for n in range(3) for i in range(LINES))


def test_unknown_level_is_refused() -> None:
    with pytest.raises(BadOption, match=r"'loud'.*debug, info"):
        configure_logging("loud", None)


def test_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotWritable, match="nowhere"):
        configure_logging("info", tmp_path / "nowhere" / "run.log")


def test_names_that_begin_like_a_token_are_kept(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", None)
    logging.getLogger("shardq").info("in hf_hub_download")
    assert capfd.readouterr().err == "INFO shardq: in hf_hub_download\n"
