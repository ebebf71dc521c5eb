"""`python -m lattica_cli` is `lattica`."""

import sys

from lattica_cli.main import main

sys.exit(main())
