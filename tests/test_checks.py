"""The table of what is checked."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from checks import all_checks  # noqa: E402


def test_every_check_says_what_was_given_and_what_happens():
    checks = all_checks()
    assert {check.area for check in checks} >= {"Prompts", "Untrusted text"}
    assert all(check.given and check.then and check.test.startswith("test_") for check in checks)
    assert len({(check.area, check.given) for check in checks}) == len(checks)  # no line stands twice
