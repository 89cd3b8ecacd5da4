import sys
from pathlib import Path

# `offline_wandb` is a helper of the tests in this folder.
sys.path.insert(0, str(Path(__file__).parent))
