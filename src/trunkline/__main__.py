"""`python -m trunkline` is the `trunkline` command."""

import sys

from trunkline.training.cli import main

sys.exit(main())
