"""What is measured rather than asserted: `python -m tests.bench [NAME ...]`, from the repository's root."""

import sys
from pathlib import Path

# The tests' helpers are imported as the tests import them.
sys.path.insert(0, str(Path(__file__).parents[1]))
