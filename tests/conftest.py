"""Set before torch is imported: idle threads sleep, so that a busy machine does not slow small tests tenfold."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
