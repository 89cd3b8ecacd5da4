import sys
from pathlib import Path

# `test_weights` holds a helper of the tests in this folder.
sys.path.insert(0, str(Path(__file__).parent))
