"""Data tools: they turn pictures into shards. They may use tokun; tokun never imports them."""

import sys

from tokun._former_names import FormerNames

_ROOMS = {
    "captioning": ("from_table", "journal", "registers"),
    "images": ("duplicates", "medium", "pictures"),
    "pipeline": ("chunks", "disk", "engine", "stores"),
    "text": ("things", "yes_or_no"),
}
FORMER = {f"data_tools.{name}": f"data_tools.{room}.{name}" for room, names in _ROOMS.items() for name in names}
"""Former module names, which keep working: old name -> new name."""

sys.meta_path.insert(0, FormerNames(FORMER))
