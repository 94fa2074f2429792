"""tokun report SHARDS --source FOLDER"""

import sys

from data_tools.report import main

sys.exit(main())
