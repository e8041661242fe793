"""What the documents claim by running code holds."""

import pathlib
import re
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).parent.parent


def test_identities_of_the_operator() -> None:
    check = subprocess.run([sys.executable, ROOT / "docs" / "math_check.py"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
    assert check.stdout.count("all gradients agree") == 16


def test_table_of_compatibility() -> None:
    """Each row names a test that there is, or says that nothing was tried."""
    table = (ROOT / "docs" / "compatibility.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| library")]
    assert len(rows) > 25
    for row in rows:
        named = re.search(r"`(test_\w+)` \|$", row)
        assert f"def {named[1]}(" in tests if named else "not tried" in row, row


def test_gradients_of_maps() -> None:
    """The code in docs/analysis.md, with a smaller model."""
    text = (ROOT / "docs" / "analysis.md").read_text()
    section = text[text.index("## Gradients of maps") :]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    exec(code[1].replace('"deepvit_16b"', '"deepvit_16b", depth=2, embed_dim=48, num_heads=4'), names)
    patches = names["patches"]
    assert isinstance(patches, torch.Tensor) and patches.shape == (14, 14) and patches.min() >= 0 < patches.max()
