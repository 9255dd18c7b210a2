"""What every test may import: the folders beside this file, as ``from formats import reference``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
