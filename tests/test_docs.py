"""What the documents claim by running code holds."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_identities_of_the_operator() -> None:
    check = subprocess.run([sys.executable, ROOT / "docs" / "math_check.py"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
    assert check.stdout.count("all gradients agree") == 16
