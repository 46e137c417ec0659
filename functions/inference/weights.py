"""A Whisper model's weights into the image, and none that were not expected.

python weights.py fetch NAME DIRECTORY    one of models.toml, to DIRECTORY/NAME
python weights.py check DIRECTORY SHA256  a model that is there
"""

from __future__ import annotations

import hashlib
import sys
import tomllib
from pathlib import Path

MODELS = Path(__file__).parent / "models.toml"
FILES = ["config.json", "preprocessor_config.json", "model.bin", "tokenizer.json", "vocabulary.*"]


def fetch(name: str, directory: Path) -> None:
    models = tomllib.loads(MODELS.read_text(encoding="utf-8"))
    if name not in models:
        sys.exit(f"weights.py: models.toml has {', '.join(models)}, and not '{name}'.")
    from huggingface_hub import snapshot_download

    model = models[name]
    snapshot_download(model["repository"], revision=model["revision"], allow_patterns=FILES, local_dir=directory / name)
    check(directory / name, model["sha256"])


def check(directory: Path, sha256: str) -> None:
    with (directory / "model.bin").open("rb") as weights:
        found = hashlib.file_digest(weights, "sha256").hexdigest()
    if found != sha256:
        sys.exit(f"weights.py: {directory / 'model.bin'} has the SHA-256 {found}, and not '{sha256}'.")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("fetch", "check"):
        sys.exit(__doc__)
    if sys.argv[1] == "fetch":
        fetch(sys.argv[2], Path(sys.argv[3]))
    else:
        check(Path(sys.argv[2]), sys.argv[3])
