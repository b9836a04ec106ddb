"""In CI a skipped test fails the session unless its reason is in ALLOWED_SKIPS. A pytest plugin."""

import os
import re

import pytest

# A pattern in the reason of a skip -> why CI accepts that skip. With the environment variable CI, any other skip fails
# the session.
ALLOWED_SKIPS = {
    r"needs a GPU|there is no GPU": "CI machines have no GPU; `make gpu` runs on machines that have one",
    r"there is a GPU|with a GPU|this device has fp16": "the test is about devices without that hardware",
    r"needs root|no right to mount|cannot be mounted|namespaces cannot|cannot be made here": "containers forbid it",
    r"no control group blkio of version 1": "control groups of version 2 cannot limit a whole disk in this way",
    r"(?i)imagenet.sample": "ImageNet's photographs may not be published with this repository",
    r"Chromium is not installed": "a browser is not among the packages that setup.sh installs",
}


def unexpected_skips(config) -> list[str]:
    """A line for each skipped test or module whose reason is not in ALLOWED_SKIPS; none unless CI is set."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")  # None in xdist's workers: their controller has it
    if not os.environ.get("CI") or terminal is None:
        return []
    skips = {report.nodeid: report.longrepr[2] for report in terminal.stats.get("skipped", [])}
    return [f"{id}: {why}" for id, why in skips.items() if not any(re.search(known, why) for known in ALLOWED_SKIPS)]


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.OK and unexpected_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    for line in unexpected_skips(config):
        terminalreporter.write_line(f"SKIP NOT ALLOWED IN CI (ALLOWED_SKIPS in tests/skips.py): {line}", red=True)
