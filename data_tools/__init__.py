"""Data tools: they turn pictures into shards. They may use tokun; tokun never imports them."""

import sys

from tokun._former_names import FormerNames, former_names

_ROOMS = {
    "captioning": ("from_table", "journal", "registers"),
    "images": ("duplicates", "medium", "pictures"),
    "pipeline": ("chunks", "disk", "stores", "verdicts"),
    "text": ("things", "yes_or_no"),
}
_RENAMED = {
    "pipeline": {"advice": "next_steps", "settle": "selection", "stores": "storage_backends"},
    "images": {"pictures": "image_ops", "sketches": "line_art_duplicates"},
    "text": {"things": "main_noun"},
    "readers": {"survey": "folder_scan", "tables": "caption_tables"},
    "captioning": {"journal": "journals"},
}  # fmt: skip
_MOVED = {
    "data_tools.engine": "tokun.utils.task_engine",
    "data_tools.pipeline.engine": "tokun.utils.task_engine",
    "data_tools.tables": "data_tools.readers.table_files",
}
FORMER = former_names("data_tools", _ROOMS, _RENAMED) | _MOVED
"""Former module names, which keep working: old name -> new name."""

sys.meta_path.insert(0, FormerNames(FORMER))
