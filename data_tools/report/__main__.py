"""python -m data_tools.report SHARDS --source FOLDER"""

import sys

from data_tools.report import main

sys.exit(main())
