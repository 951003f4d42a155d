"""`fpo-train doctor --kernels`: every kernel against its reference on the device at hand, as a table."""

from __future__ import annotations

import time

import torch

import fpo_kernels as fk

COLUMNS = f"{'operation':<15}{'implementation':<16}{'configuration':<42}{'dtype':<10}{'error/budget':>12}  verdict"


def kernels_command() -> bool:
    """Print the table as it comes to be; whether no configuration disagreed."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"kernels on {device}, torch {torch.__version__}: largest error over what rounding allows")
    print(COLUMNS)
    began, verdicts = time.monotonic(), []
    for row in fk.verify_kernels():
        ratio = "" if row.ratio is None else f"{row.ratio:.2g}"
        name = f"{row.operation:<15}{row.implementation:<16}{row.configuration:<42}{row.dtype:<10}"
        print(f"{name}{ratio:>12}  {row.verdict}", flush=True)
        verdicts.append(row)
    ran = [row for row in verdicts if row.wrong or row.ratio is not None]
    wrong = [row for row in verdicts if row.wrong]
    print(f"{len(ran) - len(wrong)} of {len(ran)} agree, {len(wrong)} wrong, in {time.monotonic() - began:.0f} s")
    return not wrong
