"""Where train.py and configs/ lie: in the checkout, or in the copy of both that an installed wheel carries.

Imports nothing of ours.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CARRIED = _PACKAGE / "carried"  # setup.py fills it in a wheel; a checkout has none, nor an editable install of it

INSTALLED = _CARRIED.is_dir()
ROOT = _CARRIED if INSTALLED else _PACKAGE.parent
TRAIN = ROOT / "train.py"
REVISION = ROOT / "REVISION"  # beside a copy of the code, which no repository knows: what it is a copy of, in one line
