"""`python -m lattica_daemon` is `latticad`."""

import sys

from lattica_daemon.main import main

sys.exit(main())
