"""Data tools: they turn pictures into shards. They may use tokun; tokun never imports them."""
